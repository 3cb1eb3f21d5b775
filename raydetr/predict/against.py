"""Two models, or results files, on the same labeled images: what each scores, and what their difference is worth."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, Evaluation, run_coco_eval, run_mask_eval, summarize
from raydetr.evaluate.intervals import compare, mask_interval_metrics, verdict, with_intervals
from raydetr.predict.score import Detected, detections_of, metrics_table
from raydetr.text import fold_name, shortlist


def score_against(mine: str | Path, other: str | Path, *layers: Mapping[str, Any], split: str = "val") -> dict[str, Any]:
    """Evaluate ``mine`` and compare it with ``other``, image by image.

    Args:
        mine: A checkpoint, or a COCO results file (``.json``).
        other: Another.
        *layers: Settings, later ones winning; they name the data set.
        split: Which of its images.

    Returns:
        The numbers and intervals of ``mine``, with the result of :func:`raydetr.evaluate.intervals.compare` under ``against`` and the
        ``verdict`` in words. If both have masks, and the data set has some, the same of masks is under ``segm``.

    Raises:
        UserError: If the two were trained on different categories, or one of them cannot be read.
    """
    detected, others = (detections_of(source, *layers, split=split, masks=True) for source in (mine, other))
    names, other_names = _folded(detected), _folded(others)
    if names is not None and other_names is not None and names != other_names:
        raise UserError(
            f"--against: {other} detects {shortlist(sorted(other_names), 5)}, {mine} {shortlist(sorted(names), 5)}: "
            "only the same categories can be compared"
        )
    notes = [*detected.notes, *(note for note in others.notes if note not in detected.notes)]
    segm: dict[str, Any] = {}
    if detected.dataset.has_masks and others.dataset.has_masks:
        segm = {"segm": _compared(run_mask_eval, detected, others, str(other), "mask AP")}
    elif detected.dataset.has_masks:
        segm = {"segm": mask_interval_metrics(detected.coco, detected.results)}
        notes.append(f"{other} has no masks: only boxes are compared")
    return {
        **_compared(run_coco_eval, detected, others, str(other), "AP"),
        **segm,
        "unknown_categories": detected.unknown,
        "notes": notes,
    }


def _compared(
    evaluate: Callable[[dict, list[dict]], Evaluation], detected: Detected, others: Detected, other: str, measure: str
) -> dict[str, Any]:
    coco, categories = detected.coco, detected.coco["categories"]
    evaluation, other_evaluation = (evaluate(coco, each.results) for each in (detected, others))
    difference = compare(evaluation, other_evaluation, categories)
    return {
        **with_intervals(summarize(evaluation, categories), evaluation, categories),
        "against": {"other": other, **difference},
        "verdict": verdict(difference, len(coco["images"]), measure),
    }


def _folded(detected: Detected) -> set[str] | None:
    return None if detected.names is None else set(map(fold_name, detected.names))


def against_table(metrics: Mapping[str, Any]) -> str:
    """Return the numbers of :func:`score_against` as text: the table of the one, the differences, and the verdict."""
    parts = [("", metrics)]
    if "against" in metrics.get("segm", {}):
        parts = [(" of boxes", metrics), (" of masks", metrics["segm"])]
    return "\n\n".join([metrics_table(metrics), *(_difference_table(part, of) for of, part in parts)])


def _difference_table(metrics: Mapping[str, Any], of: str) -> str:
    difference = metrics["against"]
    lines = [f"difference{of} to {difference['other']}, with its 95 % interval over the same images"]
    lines += [f"{name:<10} {_signed(difference, name)}" for name in METRICS]
    width = max(map(len, difference["per_category"]), default=0)
    lines += ["", *(f"{name:<{width}}  AP {_signed(numbers, 'AP')}" for name, numbers in difference["per_category"].items())]
    return "\n".join([*lines, "", metrics["verdict"]])


def _signed(numbers: Mapping[str, Any], name: str) -> str:
    value, interval = numbers[name], numbers[f"{name}_interval"]
    if value is None:
        return "-"
    return f"{value:+.3f}" + ("" if interval is None else f"  ({interval[0]:+.3f} to {interval[1]:+.3f})")
