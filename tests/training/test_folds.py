import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import raydetr
from raydetr.config import load_config, read_yaml
from raydetr.errors import UserError
from raydetr.launch.train import check_data
from raydetr.predict.score import score_checkpoint
from raydetr.training.folds import fold_configs, fold_interval, mean_line, mean_metrics
from raydetr.weights.checkpoint import read_checkpoint
from tests.training.runs import folder_of, interrupted, log_of, run, same, settings

FOLDS = {"data.folds": 2, "optim.epochs": 2, "model.dropout": 0.1}


@pytest.fixture(scope="module")
def finished(module_coco_folder):
    config = settings(module_coco_folder(train=8, val=2), "folds", **FOLDS)
    return config, *run(config)


def fold_of(config, number):
    return folder_of(config) / f"fold-{number}"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_each_fold_is_a_run_of_its_own(finished):
    config, metrics, watcher = finished
    assert {path.name for path in folder_of(config).iterdir()} == {"config.yaml", "log.txt", "tb", "fold-1", "fold-2"}
    held_out = [set(read_checkpoint(fold_of(config, fold) / "last.pth")["data"]["val"]["image_ids"].tolist()) for fold in (1, 2)]
    assert not held_out[0] & held_out[1]
    assert held_out[0] | held_out[1] == set(range(10, 18))
    own = load_config(read_yaml(fold_of(config, 2) / "config.yaml"))
    assert (own.data.folds, own.data.fold, own.run.name) == (2, 2, "fold-2")
    assert load_config(read_yaml(folder_of(config) / "config.yaml")).data.fold is None
    assert next(event["text"] for event in watcher.of_kind("message") if event["text"].startswith("fold ")) == "fold 1 of 2"
    assert metrics["epoch"] == 2


def test_the_means_and_the_interval_over_folds(finished):
    config, metrics, watcher = finished
    folds = [lines_of(fold_of(config, fold)) for fold in (1, 2)]
    mean = lines_of(folder_of(config))
    assert [line["epoch"] for line in mean] == [0, 1]
    aps = [max(0.0, lines[-1]["test_coco_eval_bbox"][0]) for lines in folds]
    assert metrics["AP"] == pytest.approx(np.mean(aps))
    assert mean[-1]["test_coco_eval_bbox"][0] == pytest.approx(np.mean(aps))
    assert (metrics["AP_low"], metrics["AP_high"]) == pytest.approx(fold_interval(aps))
    assert (mean[-1]["test_AP_low"], mean[-1]["test_AP_high"]) == pytest.approx(fold_interval(aps))
    assert mean[-1]["train_loss"] == pytest.approx(np.mean([lines[-1]["train_loss"] for lines in folds]))
    last = watcher.of_kind("message")[-1]["text"]
    assert last.startswith(f"AP {metrics['AP']:.3f} (95 % interval over 2 folds: ")


def test_tensorboard_has_the_mean_at_the_epochs_of_the_folds(finished):
    config, metrics, _ = finished

    def scalars(folder, tag):
        events = EventAccumulator(str(folder / "tb"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    mean, folds = scalars(folder_of(config), "val/AP"), [scalars(fold_of(config, fold), "val/AP") for fold in (1, 2)]
    assert [step for step, _ in mean] == [step for step, _ in folds[0]] == [4, 8]
    assert mean[-1][1] == pytest.approx(metrics["AP"])
    for tag in ("val/AP_low", "val/AP_high", "val/loss", "val/loss_giou", "train_epoch/loss", "train_epoch/class_error", "epoch"):
        assert len(scalars(folder_of(config), tag)) == 2, tag
    loss = scalars(folder_of(config), "val/loss_giou")[-1][1]
    assert loss == pytest.approx(np.mean([scalars(fold_of(config, fold), "val/loss_giou")[-1][1] for fold in (1, 2)]), rel=1e-5)


def test_an_interrupted_run_resumes_in_its_fold_and_ends_in_the_same_bits(finished):
    whole, metrics, _ = finished
    config = settings(whole.data.path, "stopped", **FOLDS)
    seen = []
    interrupted(config, lambda event: event["kind"] == "report" and seen.append(event) is None and len(seen) == 3)
    assert not (folder_of(config) / "log.txt").exists()
    first = (fold_of(config, 1) / "last.pth").stat().st_mtime_ns
    again, _ = run(config)
    same(metrics, again)
    assert (fold_of(config, 1) / "last.pth").stat().st_mtime_ns == first, "a finished fold does not run again"
    for fold in (1, 2):
        same(*(read_checkpoint(fold_of(each, fold) / "last.pth")["model"] for each in (whole, config)))
    assert log_of(whole) == log_of(config)


def test_a_model_of_a_fold_is_evaluated_on_its_fold(finished):
    config, *_ = finished
    layers = {"data.path": config.data.path, "data.num_workers": 0}
    scored = score_checkpoint(fold_of(config, 1) / "best.pth", layers)
    assert scored["AP"] == pytest.approx(read_checkpoint(fold_of(config, 1) / "best.pth")["metrics"]["AP"])
    assert "fold 1 of 2" in scored["notes"][-1]
    raydetr.load(fold_of(config, 1) / "best.pth")


def test_more_folds_than_images_of_a_category_end_before_the_training(coco_folder):
    config = settings(coco_folder(train=3), "few", data__folds=5)
    with pytest.raises(UserError, match=r"data\.folds: 5 folds are more than the \d images? of category") as error:
        check_data(config)
    assert "\n" not in str(error.value)
    check_data(settings(Path(config.data.path), "enough", data__folds=2))


def test_means_leave_out_what_is_undefined():
    assert fold_interval([0.5]) is None
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert fold_interval([0.4, 0.5, 0.6]) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-5)
    assert fold_interval([0.4, 0.6]) == (0, 1)
    means = mean_metrics([{"AP": 0.4, "AP75": None, "epoch": 2, "seconds": 1.0}, {"AP": 0.6, "AP75": 0.2, "epoch": 3, "seconds": 2.0}])
    assert (means["AP"], means["AP75"], means["epoch"], means["seconds"]) == (pytest.approx(0.5), 0.2, 3, 3.0)
    lines = [{"epoch": 0, "n_parameters": 9, "x": value, "test_coco_eval_bbox": [ap, -1]} for value, ap in ((1.0, 0.2), (3.0, -1))]
    assert mean_line(lines) == {"epoch": 0, "n_parameters": 9, "x": 2.0, "test_coco_eval_bbox": [0.2, -1.0]}


def test_the_settings_of_the_folds():
    config = load_config({"data.folds": 3, "run.name": "a", "optim.lr": 1e-3})
    assert [(each.data.fold, each.run.name, each.run.storage) for each in fold_configs(config, "b/a")] == [
        (fold, f"fold-{fold}", "b/a") for fold in (1, 2, 3)
    ]


def test_the_weights_of_folds_differ(finished):
    config, *_ = finished
    states = [read_checkpoint(fold_of(config, fold) / "last.pth")["model"]["class_embed.weight"] for fold in (1, 2)]
    assert not torch.equal(*states)
