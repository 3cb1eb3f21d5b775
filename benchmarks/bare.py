"""Whole runs on a machine that has PyTorch and little else: what stands in for raydetr's other dependencies."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from raydetr.evaluate.matches import AnnotatedBoxes, DetectedBoxes

EVALUATORS = ("hotcoco", "pycocotools")  # AP needs one of them


def is_there(name: str) -> bool:
    """Return whether a package can be imported."""
    return sys.modules.get(name, ...) is not None and importlib.util.find_spec(name) is not None


class SilentReporter:
    """The reporter of a run in this process that shows nothing: the terminal's needs rich."""

    rank, world_size, local_rank, cores = 0, 1, 0, 2
    searched = images = None
    objectives = ()

    def checkpoint(self) -> None:
        """Return None: the run resumes from its own last.pth."""

    def show(self, event: dict[str, Any]) -> None:
        """Ignore the event."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Ignore the metrics."""


@contextlib.contextmanager
def runs_work() -> Iterator[None]:
    """Make runs work within the ``with`` block without TensorBoard (no events) and without hotcoco (pycocotools computes AP)."""
    from raydetr.evaluate import coco, matches
    from raydetr.training.recorder import Recorder

    with contextlib.ExitStack() as patches:
        if not is_there("tensorboard"):
            patches.enter_context(mock.patch.object(Recorder, "_open_tracker", return_value=None))
        if not is_there("hotcoco"):
            for module in (coco, matches):
                patches.enter_context(mock.patch.object(module, "coco_eval", pycocotools_eval))
        yield


def pycocotools_eval(objects: AnnotatedBoxes, detections: DetectedBoxes, images: int, categories: int) -> Any:
    """Return what :func:`raydetr.evaluate.matches.coco_eval` returns, computed by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def data_set(boxes: AnnotatedBoxes | DetectedBoxes, **columns: np.ndarray) -> COCO:
        columns |= {"id": np.arange(len(boxes.image)) + 1, "image_id": boxes.image + 1, "category_id": boxes.category + 1}
        columns |= {"bbox": boxes.xywh, "area": boxes.area}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        made: Any = COCO()
        made.dataset = {
            "images": [{"id": number} for number in range(1, images + 1)],
            "categories": [{"id": number} for number in range(1, categories + 1)],
            "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(None):
        found = data_set(detections, score=detections.score, iscrowd=np.zeros(len(detections.image), np.int64))
        evaluation = COCOeval(data_set(objects, iscrowd=objects.crowd.astype(np.int64)), found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    pairs = [each and {**each, "dtMatched": each["dtMatches"] > 0} for each in evaluation.evalImgs]
    return SimpleNamespace(eval=evaluation.eval, eval_imgs=pairs, accumulate=lambda: None)
