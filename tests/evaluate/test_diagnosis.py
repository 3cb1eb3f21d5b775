import numpy as np
import pytest

from raydetr.config import SETTINGS
from raydetr.evaluate.diagnosis import diagnose


def run(epochs=10, **curves):
    """The history of a good run of ten epochs, with the curves that are given instead: numbers, or values of each epoch."""
    steps = np.arange(epochs)
    good = {
        **{"AP": 0.5 * (1 - 0.7**steps), "AP50": 0.8 * (1 - 0.6**steps), "AP75": 0.6 * (1 - 0.7**steps), "AR100": 0.7},
        **{"train_loss": 2 + 8 * 0.6**steps, "val_loss": 3 + 7 * 0.7**steps, "val_class_error": 20.0, "val_cardinality_error": 1.0},
    }
    curves = {name: np.broadcast_to(values, epochs) for name, values in (good | curves).items()}
    return [{name: float(values[epoch]) for name, values in curves.items()} for epoch in range(epochs)]


def only(history, *words, **about):
    (found,) = diagnose(history, **about)
    for each in words:
        assert each in found
    return found


def test_a_good_run_is_not_talked_about():
    assert diagnose(run(), num_queries=100, most_objects=40, images=200) == []
    assert diagnose(run()[:1]) == []
    assert diagnose([]) == []


def test_weights_that_were_not_loaded():
    bad = {"AP": 0, "AP50": 0, "AP75": 0, "val_class_error": 100, "train_loss": 10, "AR100": 0}
    only(run(**bad), "After 10 epochs AP is 0 and 100 % of the objects", "model.weights")
    assert diagnose(run(**bad)[:2]) == []  # too early to tell


def test_more_objects_than_queries():
    only(run(), "An image has 120 objects", "at most 100", "model.num_queries", num_queries=100, most_objects=120)


def test_a_rate_that_is_too_high():
    loss = [10, 6, 4, 7, 9, 9, 9, 9, 9, 9]
    assert "clipped" not in only(run(train_loss=loss), "rose from 4.00 to 9.00", "optim.lr")
    only(run(train_loss=loss, train_grad_norm=5), "the gradient is clipped in every epoch", clip_max_norm=0.1)
    only(run(train_loss=[10, 5, 4, 4, 4, 4, 4, 4, 4, np.nan]), "no longer a number")


def test_a_rate_that_is_too_low():
    only(run(train_loss=np.linspace(10, 9.8, 10)), "flat (10.00 to 9.80 in 10 epochs)", "raise optim.lr")


def test_overfitting_says_since_when():
    ap = [0, 0.2, 0.3, 0.35, 0.35, 0.35, 0.34, 0.34, 0.33, 0.33]
    val = [9, 7, 6, 5, 5.1, 5.3, 5.6, 6, 6.5, 7]
    only(run(val_loss=val, AP=ap), "Overfitting from epoch 4", "5.00 to 7.00", "optim.ema_decay")
    assert diagnose(run(val_loss=val)) == []  # AP is still rising: the loss alone says nothing
    assert diagnose(run(val_loss=val, AP=ap, train_loss=[9, 8, 7, 6, 6, 6, 6, 6, 6, 6])) == []


def test_loose_boxes():
    only(run(AP50=0.7, AP75=0.2), "AP50 70, AP75 20", "loss.giou_loss_coef")


@pytest.mark.parametrize(("recall", "words"), [(0.8, "raise loss.eos_coef"), (0.2, "lower loss.eos_coef")])
def test_objects_invented_or_missed(recall, words):
    only(run(val_cardinality_error=20, AR100=recall), "wrong by 20", words)


def test_a_validation_set_that_is_too_small():
    history = run()
    history[-1] |= {"AP_low": 0.41, "AP_high": 0.63}
    only(history, "13 validation images are too few", "between 41 and 63", images=13)
    history[-1] |= {"AP_low": 0.48, "AP_high": 0.54}
    assert diagnose(history) == []


def test_every_setting_that_is_named_exists():
    import re
    from pathlib import Path

    from raydetr.evaluate import diagnosis

    text = Path(diagnosis.__file__).read_text()
    named = set(re.findall(r"\b(?:optim|model|loss|data)\.[a-z_]+\b", text))
    assert len(named) > 8
    assert named <= set(SETTINGS)


def test_undefined_ap_is_no_reason_to_fail():
    history = [each | {"AP": None, "AP50": None, "AP75": None, "AR100": None} for each in run(val_loss=[9, 7, 6, 5, 5, 5, 6, 6, 6.5, 7])]
    diagnose(history)
