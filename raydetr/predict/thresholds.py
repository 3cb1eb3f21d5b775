"""Choose score thresholds for a checkpoint on labeled images, and store them in it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydetr.errors import UserError
from raydetr.evaluate.coco import category_names, run_coco_eval, summarize
from raydetr.evaluate.intervals import with_intervals
from raydetr.evaluate.thresholds import Goal, Threshold, choose_thresholds, thresholds_table
from raydetr.predict.score import detect
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint


def store_thresholds(checkpoint: str | Path, goal: Goal, *layers: Mapping[str, Any], split: str = "val") -> tuple[dict[str, Any], str]:
    """Evaluate a checkpoint, choose a score threshold for each of its categories, and store them in its file.

    The file gets the entry ``thresholds``: for each category in label order a dict with ``score``, ``interval`` and ``goal``, or None.
    ``raydetr.load(...).thresholds`` has the scores; ``predict`` and the exports use them.

    Args:
        checkpoint: A checkpoint file of raydetr. It is replaced atomically.
        goal: What the thresholds are chosen for.
        *layers: Settings, later ones winning; they name the data set.
        split: The images to choose on: ``"val"``, ``"train"`` or ``"test"``.

    Returns:
        The metrics of :func:`raydetr.predict.score.score_checkpoint`, with the thresholds by category name under ``thresholds``; and a
        table of the thresholds as text.

    Raises:
        UserError: The file is no checkpoint of raydetr on this computer, changes meanwhile, or there is nothing to choose on.
    """
    path = Path(checkpoint).expanduser()
    if "://" in str(checkpoint) or not path.is_file():
        raise UserError(
            f"evaluate --thresholds: {checkpoint}: no file on this computer, where thresholds could be stored; copy it here first"
        )
    if not {"settings", "categories"} <= read_checkpoint(path).keys():
        raise UserError(f"evaluate --thresholds: {path}: thresholds are stored in checkpoints of raydetr only; train from this one first")
    before = path.stat()
    detected = detect(path, *layers, split=split)
    evaluation = run_coco_eval(detected.coco, detected.results)
    chosen = choose_thresholds(evaluation, goal)
    if not chosen:
        raise UserError(f"evaluate --thresholds: nothing to choose on: no category has an object and a detection in the {split} images")
    content = read_checkpoint(path)
    content["thresholds"] = [None if each is None else _entry(chosen.get(each), goal) for each in detected.category_ids]
    after = path.stat()
    if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
        raise UserError(f"evaluate --thresholds: {path} was replaced meanwhile; repeat the command when the training has ended")
    save_checkpoint(path, content)
    categories = detected.coco["categories"]
    names = category_names(categories)
    metrics = with_intervals(summarize(evaluation, categories), evaluation, categories)
    numbers = {names[each]: {**dataclasses.asdict(found), "f1": found.f1, "goal": str(goal)} for each, found in chosen.items()}
    table = thresholds_table(names.items(), chosen, goal)
    text = f"{table}\nstored in {path}; raydetr predict and raydetr export use them"
    return {**metrics, "unknown_categories": detected.unknown, "notes": detected.notes, "thresholds": numbers}, text


def _entry(chosen: Threshold | None, goal: Goal) -> dict[str, Any] | None:
    if chosen is None:
        return None
    return {"score": chosen.score, "interval": None if chosen.interval is None else list(chosen.interval), "goal": str(goal)}
