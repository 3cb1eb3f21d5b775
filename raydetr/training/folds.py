"""A run with ``data.folds``: a run for each fold in ``fold-N/`` of its folder, and beside them the means over the folds.

``log.txt`` and ``tb/`` of the run's own folder hold the mean of each epoch, and of AP its 95 % interval over the folds. Both are written
when the last fold has ended.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from raydetr.config import Config, with_settings, write_yaml
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS
from raydetr.evaluate.intervals import CONFIDENCE
from raydetr.files import atomic_write_text
from raydetr.storage import join, push, working_folder
from raydetr.text import count
from raydetr.training.metrics import LOSSES
from raydetr.training.resume import LAST
from raydetr.training.tracking import Tracker, read_log
from raydetr.weights.checkpoint import read_checkpoint

STATS = "test_coco_eval_bbox"  # in a line of log.txt: the twelve numbers, -1 where one is undefined


def fold_name(fold: int) -> str:
    """Return the name of a fold's run in the folder of the whole run; the first fold is 1."""
    return f"fold-{fold}"


def fold_configs(config: Config, root: str) -> Iterator[Config]:
    """Yield the settings of each fold's run.

    Args:
        config: The settings of the whole run.
        root: Its folder, a path or a URI.
    """
    for fold in range(1, (config.data.folds or 0) + 1):
        yield with_settings(config, {"data.fold": fold, "run.storage": root, "run.name": fold_name(fold)})


def start_folds(config: Config, root: str) -> None:
    """Write ``config.yaml`` of the whole run, from which it is resumed.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = working_folder(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise UserError(f"run.storage: cannot write to {folder}: {error.strerror}") from None
    push(root, recursive=False)


def finish_folds(config: Config, root: str) -> None:
    """Write the means over the folds to ``log.txt`` and ``tb/`` of the whole run.

    Args:
        config: The settings of the whole run.
        root: Its folder, a path or a URI; the runs of all folds in it have ended.
    """
    folder, folds = working_folder(root), config.data.folds or 0
    logs = [read_log(working_folder(join(root, fold_name(fold))) / "log.txt") for fold in range(1, folds + 1)]
    lines = [mean_line(same_epoch) for same_epoch in zip(*logs, strict=False)]  # a fold may have stopped earlier than others
    atomic_write_text(folder / "log.txt", "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))
    last = read_checkpoint(working_folder(join(root, fold_name(1))) / LAST)
    _write_events(config, folder, lines, images=len(last["data"]["train"]["image_ids"]))
    push(root)


def _write_events(config: Config, folder: Path, lines: Sequence[Mapping[str, Any]], images: int) -> None:
    shutil.rmtree(folder / "tb", ignore_errors=True)  # of a shorter run
    tracker = Tracker(folder / "tb", config)
    for line in lines:
        scalars = {f"val/{name}": None if value < 0 else value for name, value in zip(METRICS, line[STATS], strict=True)}
        scalars |= {f"val/{name}": line.get(f"test_{name}") for name in ("AP_low", "AP_high")}
        for name in LOSSES:
            key = name if f"train_{name}_unscaled" not in line else f"{name}_unscaled"
            scalars |= {f"{tag}/{name}": line.get(f"{split}_{key}") for tag, split in (("train_epoch", "train"), ("val", "test"))}
        tracker.log_scalars((line["epoch"] + 1) * images, {"epoch": line["epoch"] + 1, **scalars})
    tracker.finish()
    tracker.close()


def mean_line(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over the folds of an epoch's lines of log.txt, with the interval of AP over the folds.

    Args:
        lines: The line of each fold.
    """
    numbers = [name for name, value in lines[0].items() if isinstance(value, (int, float)) and all(name in line for line in lines)]
    means: dict[str, Any] = {name: float(np.mean([line[name] for line in lines])) for name in numbers}
    known = [[value for value in column if value >= 0] for column in zip(*(line[STATS] for line in lines), strict=True)]
    means |= {"epoch": lines[0]["epoch"], "n_parameters": lines[0]["n_parameters"]}
    means[STATS] = [float(np.mean(column)) if column else -1.0 for column in known]
    interval = fold_interval(known[0])
    for name in ("test_AP_low", "test_AP_high"):  # of each fold, they are intervals over its images
        means.pop(name, None)
    return means | (dict(zip(("test_AP_low", "test_AP_high"), interval, strict=True)) if interval else {})


def mean_metrics(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over the folds of the metrics that their runs end with; AP has its interval over the folds.

    A metric that is None in some folds is the mean over the others; ``seconds`` is that of the last epoch of all folds together.
    """
    known = {name: [each[name] for each in folds if each.get(name) is not None] for name in folds[0]}
    means: dict[str, Any] = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    means["AP_low"], means["AP_high"] = fold_interval(known["AP"]) or (None, None)
    return means | {"epoch": max(known["epoch"]), "seconds": sum(known["seconds"])}


def fold_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over the folds of a metric from 0 to 1, by Student's t; None for fewer than two folds.

    Models of different folds are trained on much the same images, so that the interval is a little too narrow (Bengio and Grandvalet,
    "No unbiased estimator of the variance of k-fold cross-validation", 2004).
    """
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def folds_sentence(means: Mapping[str, Any], config: Config, root: str) -> str:
    """Return what a run with folds found, and how to get a model of all images, in words."""
    where = f"their models are {join(root, 'fold-N', 'best.pth')}; without data.folds a run trains on all images"
    if means["AP"] is None:
        return f"no fold has an object that counts for AP; {where}"
    interval = f" (95 % interval over {count(config.data.folds or 0, 'fold')}: {means['AP_low']:.3f} to {means['AP_high']:.3f})"
    return f"AP {means['AP']:.3f}{interval if means['AP_low'] is not None else ''}; {where}"
