"""Describe in words what the curves of a run show. Each rule recognizes one problem and says what to do about it.

The rules read the metrics that a run reports after each epoch (:func:`raydetr.training.fit.fit`): ``AP``, ``AP50``, ``AP75``, ``AP_low``,
``AP_high``, ``train_loss``, ``train_grad_norm``, ``val_loss``, ``val_class_error``, ``val_cardinality_error`` and so on. A rule that finds
no problem returns None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

History = Sequence[Mapping[str, Any]]  # the metrics of each epoch, the first one first


def diagnose(history: History, *, num_queries: int = 100, most_objects: int = 0, images: int = 0, clip_max_norm: float = 0.0) -> list[str]:
    """Return what the curves of a run show: a sentence or more for each rule that applies.

    Args:
        history: The metrics of each epoch, the first epoch first.
        num_queries: ``model.num_queries``.
        most_objects: The largest number of objects in an image; 0 if unknown.
        images: The number of validation images; 0 if unknown.
        clip_max_norm: ``optim.clip_max_norm``; 0 if gradients are not clipped.

    Returns:
        The sentences, the gravest problem first; empty if there is no problem.
    """
    if not history:
        return []
    untrained = weights_not_loaded(history)
    found = [
        untrained,
        too_few_queries(num_queries, most_objects),
        rate_too_high(history, clip_max_norm),
        None if untrained else rate_too_low(history),
        overfitting(history),
        loose_boxes(history),
        invented_or_missed(history),
        too_few_images(history, images),
    ]
    return [words for words in found if words]


def weights_not_loaded(history: History) -> str | None:
    """Report that AP is still 0 and nearly every object has the wrong class after several epochs.

    Args:
        history: The metrics of each epoch.

    Returns:
        What to check, or None.
    """
    last = history[-1]
    if len(history) < 3 or (last["AP"] or 0) > 0.001 or last["val_class_error"] < 95:
        return None
    return (
        f"After {len(history)} epochs AP is 0 and {last['val_class_error']:.0f} % of the objects have the wrong class: the network has not "
        "learned to classify. Were weights loaded (model.weights), and are the categories those of the annotations?"
    )


def too_few_queries(num_queries: int, most_objects: int) -> str | None:
    """Report that an image has more objects than the network has object queries, and so more than it can detect.

    Args:
        num_queries: ``model.num_queries``.
        most_objects: The largest number of objects in an image; 0 if unknown.

    Returns:
        What to change, or None.
    """
    if most_objects <= num_queries:
        return None
    return f"An image has {most_objects} objects, but the network detects at most {num_queries}: raise model.num_queries."


def rate_too_high(history: History, clip_max_norm: float) -> str | None:
    """Report a learning rate that is too high: the training loss rises from its lowest value and stays up, or is not finite.

    Args:
        history: The metrics of each epoch.
        clip_max_norm: ``optim.clip_max_norm``; 0 if gradients are not clipped.

    Returns:
        What to change, or None.
    """
    losses = _values(history, "train_loss")
    if not np.isfinite(losses).all():
        return "The training loss is no longer a number: lower optim.lr and optim.lr_backbone."
    if len(losses) < 4 or losses[-3:].min() < 1.3 * losses.min():
        return None
    norms = _values(history, "train_grad_norm")
    always = clip_max_norm and (norms > clip_max_norm).all()
    clipped = " and the gradient is clipped in every epoch" if always else ""
    return (
        f"The training loss rose from {losses.min():.2f} to {losses[-1]:.2f}{clipped}: the learning rate is too high; lower optim.lr and "
        "optim.lr_backbone."
    )


def rate_too_low(history: History) -> str | None:
    """Report a training loss that has hardly changed since the first epoch.

    Args:
        history: The metrics of each epoch.

    Returns:
        What to change, or None.
    """
    losses = _values(history, "train_loss")
    if len(losses) < 5 or not np.isfinite(losses).all() or abs(losses[-1] - losses[0]) > 0.05 * losses[0]:
        return None
    return f"The training loss is flat ({losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} epochs): raise optim.lr, or train longer."


def overfitting(history: History) -> str | None:
    """Report overfitting: the validation loss rises after its lowest value while the training loss keeps falling, and AP does not rise.

    Args:
        history: The metrics of each epoch.

    Returns:
        Since when, and what to change, or None.
    """
    train, val = _values(history, "train_loss"), _values(history, "val_loss")
    if len(val) < 5 or not np.isfinite([*train, *val]).all():
        return None
    lowest = int(val.argmin())
    ap = _values(history, "AP")
    later = len(val) - 1 - lowest
    still_better = np.fmax.reduce(ap[lowest:]) > ap[lowest] + 0.01
    if later < 3 or val[-1] < 1.1 * val[lowest] or train[-1] > 0.98 * train[lowest] or still_better:
        return None
    return (
        f"Overfitting from epoch {lowest + 1}: since then the validation loss has risen from {val[lowest]:.2f} to {val[-1]:.2f} while the "
        "training loss fell. Train for fewer epochs (optim.epochs, optim.patience), average the weights (optim.ema_decay) or freeze the "
        "backbone (optim.freeze_backbone)."
    )


def loose_boxes(history: History) -> str | None:
    """Report that objects are found, but their boxes are not tight: AP75 is at most half of AP50 in the best epoch.

    Args:
        history: The metrics of each epoch.

    Returns:
        What to change, or None.
    """
    best = max(history, key=lambda each: each["AP"] or 0)
    if not best["AP50"] or best["AP50"] < 0.3 or best["AP75"] is None or best["AP75"] > 0.5 * best["AP50"]:
        return None
    return (
        f"Objects are found, but the boxes are loose (AP50 {100 * best['AP50']:.0f}, AP75 {100 * best['AP75']:.0f}): train longer at the "
        "low rate, raise loss.giou_loss_coef or loss.bbox_loss_coef, or use larger images (data.val_size)."
    )


def invented_or_missed(history: History) -> str | None:
    """Report that the number of detected objects is far from the number of annotated ones.

    Args:
        history: The metrics of each epoch.

    Returns:
        What to change, or None.
    """
    last = history[-1]
    wrong, recall = last.get("val_cardinality_error"), last.get("AR100")
    if wrong is None or recall is None or wrong < 5 or len(history) < 3:
        return None
    words = f"The number of objects detected in an image is wrong by {wrong:.0f} on average"
    if recall >= 0.5:
        return f"{words}, though most objects are found: objects are invented; raise loss.eos_coef."
    return f"{words}, and objects are missed: lower loss.eos_coef, or train longer."


def too_few_images(history: History, images: int) -> str | None:
    """Report too few validation images: the 95 % interval of AP is wide.

    Args:
        history: The metrics of each epoch.
        images: The number of validation images; 0 if unknown.

    Returns:
        The interval in words, or None.
    """
    low, high = history[-1].get("AP_low"), history[-1].get("AP_high")
    if low is None or high is None or high - low < 0.15:
        return None
    number = f"{images} validation images" if images else "The validation images"
    return (
        f"{number} are too few to tell settings apart: AP is only known to lie between {100 * low:.0f} and {100 * high:.0f} "
        "(95 % interval)."
    )


def _values(history: History, name: str) -> np.ndarray:
    return np.array([np.nan if each.get(name) is None else each[name] for each in history], float)
