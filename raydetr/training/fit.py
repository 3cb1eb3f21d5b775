"""One training run: epochs of training and evaluation, each saved and reported.

A plain process, a ``torchrun`` or Ray Train worker and a trial of a search all call :func:`fit`. The run folder
``<run.storage>/<run.name>/`` gets ``config.yaml``, ``log.txt``, ``tb/`` (TensorBoard), ``best.pth`` (the evaluated weights of the epoch
with the highest AP) and ``last.pth`` (everything needed to resume). A run that finds its own ``last.pth`` resumes from it: on a CPU
the result is the same, bit for bit, as without the interruption. With ``data.folds`` each fold is such a run, see
:mod:`raydetr.training.folds`. If the run folder is in an object store, :func:`fit` writes a working
copy on this node, which is fetched before the first epoch and pushed after every epoch.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydetr.config import Config
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, precision_recall, run_coco_eval, summarize
from raydetr.evaluate.diagnosis import diagnose
from raydetr.evaluate.intervals import mask_interval_metrics, with_intervals
from raydetr.memory import kept_memory
from raydetr.storage import fetch, join, working_folder
from raydetr.text import count
from raydetr.training.console import Display, warn
from raydetr.training.engine import Detections, choose_device, evaluate, gathered, train_one_epoch
from raydetr.training.failures import BestEffort, failures_explained
from raydetr.training.folds import finish_folds, fold_configs, folds_sentence, mean_metrics, start_folds
from raydetr.training.latency import seconds_per_image
from raydetr.training.metrics import LAST_EPOCH, LATENCY, MASK_METRICS, losses_in
from raydetr.training.random_state import get_random_state
from raydetr.training.recorder import EpochResults, NoRecorder, Recorder, open_recorder
from raydetr.training.reporter import LocalReporter, Reporter
from raydetr.training.resume import BEST, LAST, find_checkpoint
from raydetr.training.run import Progress, Run, build_run
from raydetr.training.tracking import read_history


def fit(config: Config, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train a run to its end. Every worker of the run calls this function.

    A run that is finished already reports its last metrics once more and returns at once.

    Args:
        config: The settings; ``run.name`` must be set.
        reporter: Tells this worker its rank, and receives the results. Default: :class:`LocalReporter`. If the run has several workers, the
            caller has initialized ``torch.distributed``.

    Returns:
        The metrics of the last epoch: ``epoch`` (from 1), the twelve COCO numbers (None if the validation set has no object), the 95 %
        interval of AP as ``AP_low`` and ``AP_high``, with ``model.masks`` the twelve numbers of masks as ``segm_AP`` and so on, losses as
        ``train_loss`` (weighted), ``val_loss_ce`` (not weighted) and so on, ``best_AP``, ``best_epoch``, ``images_per_second`` and
        ``seconds``; in a search with this objective also ``latency``, the seconds of one image. With ``optim.freeze_detr``, where the AP
        of boxes stands still, the best epoch is that of the highest AP of masks, and ``best_AP`` is this AP.
        With ``data.folds``, all numbers are means over the folds, and the interval is that of AP over the folds.

    Raises:
        UserError: Something that the user can correct: settings, data, checkpoints, a full disk, too little GPU memory.
    """
    if reporter is None:
        with Display() as display:
            return fit(config, LocalReporter(display=display))
    if config.run.name is None:
        raise UserError("run.name is not set: it names the run's folder in run.storage")
    if config.data.folds and config.data.fold is None:
        return _fit_folds(config, reporter)
    root = join(config.run.storage, config.run.name)
    device = choose_device(config.speed, reporter.local_rank)
    with failures_explained(working_folder(root)), kept_memory(device.type):
        # In a function of its own, so that nothing refers to the network any more when memory is given back.
        return _fit(config, reporter, root, device)


def _fit_folds(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Train a run for each fold, in the folder ``fold-N`` of the run's own; return the means of their metrics."""
    root, show = join(config.run.storage, str(config.run.name)), BestEffort(_warning_shower(reporter))
    if reporter.rank == 0:
        start_folds(config, root)
    metrics = []
    for own in fold_configs(config, root):
        with show("the terminal"):
            reporter.show({"kind": "message", "text": f"fold {own.data.fold} of {config.data.folds}"})
        metrics.append(fit(own, reporter))
    if reporter.rank == 0:
        finish_folds(config, root)
    means = mean_metrics(metrics)
    with show("the terminal"):
        reporter.show({"kind": "message", "text": folds_sentence(means, config, root)})
    return means


def _fit(config: Config, reporter: Reporter, root: str, device: torch.device) -> dict[str, Any]:
    folder = fetch(root)
    start = find_checkpoint(root, folder, reporter)
    run = build_run(config, reporter, root, device, start, BestEffort(_warning_shower(reporter)))
    if run.finished:
        run.show({"kind": "message", "text": _how_to_lengthen(run)})
        _report(run, start)
    else:
        _train(run)
    return run.metrics


def _train(run: Run) -> None:
    run.load_ahead()
    with open_recorder(run) as recorder:
        epochs, done = run.config.optim.epochs, run.progress.epoch
        run.show({"kind": "start", "epochs": epochs, "steps": run.steps_per_epoch, "done": done})
        while not run.finished:
            _train_epoch(run, recorder)
        recorder.finish()
    best = {"best_AP": run.progress.best_AP, "best_epoch": run.progress.best_epoch, "checkpoint": join(run.root, BEST)}
    run.show({"kind": "end", "epochs": run.progress.epoch, **best})
    if run.reporter.rank == 0:
        with run.best_effort("the diagnosis"):
            for words in diagnosis(run):
                run.show({"kind": "message", "text": words})


def diagnosis(run: Run) -> list[str]:
    """Return what the curves of a finished run show, in words.

    Args:
        run: The run.

    Returns:
        The sentences of :func:`raydetr.evaluate.diagnosis.diagnose`; empty if there is no problem.

    Raises:
        UserError: log.txt cannot be read, or a line of it is damaged.
    """
    objects = Counter((split, each["image_id"]) for split in (run.train_set, run.val_set) for each in split.coco["annotations"])
    return diagnose(
        read_history(run.folder / "log.txt"),
        num_queries=run.config.model.num_queries,
        most_objects=max(objects.values(), default=0),
        images=len(run.val_set),
        clip_max_norm=run.config.optim.clip_max_norm,
    )


def _train_epoch(run: Run, recorder: Recorder | NoRecorder) -> None:
    """Train, evaluate, record and report an epoch, in this order. If any of it fails, last.pth is that of a complete earlier epoch."""
    training, progress, started, epoch = run.training, run.progress, time.perf_counter(), run.progress.epoch + 1
    train = train_one_epoch(training, run.batches, epoch, _step_shower(run, recorder))
    run.show({"kind": "evaluate", "epoch": epoch})
    val, detections = evaluate(training.evaluated, training.criterion, run.val, training.device, training.dtype)
    scores, curve = gathered(_score(run, detections) if run.reporter.rank == 0 else None)[0]
    best = progress.update((scores["segm"] if run.config.optim.freeze_detr else scores)["AP"], val["loss"])
    if not run.finished:
        run.load_ahead()
    run.metrics = _metrics(progress, train, val, scores) | {"seconds": time.perf_counter() - started} | _latency(run)
    random_states = gathered(get_random_state(training.device))
    recorder.record_epoch(EpochResults(train, val, detections, scores, curve, best, random_states))
    _report(run, run.folder / LAST)
    run.show({"kind": "epoch", "epoch": epoch, "metrics": run.metrics, "seconds": time.perf_counter() - started, "best": best})


def _report(run: Run, checkpoint: Path | None) -> None:
    last = {LAST_EPOCH: True} if run.finished else {}
    run.reporter.report({**run.metrics, **last}, checkpoint if run.reporter.rank == 0 else None)


def _step_shower(run: Run, recorder: Recorder | NoRecorder) -> Callable[[dict[str, float]], None]:
    first, epoch = run.training.step, run.progress.epoch + 1

    def show(numbers: dict[str, float]) -> None:
        recorder.record_step(numbers)
        shown = {name: numbers[name] for name in ("loss", "images_per_second")}
        run.show({"kind": "step", "epoch": epoch, "step": numbers["step"] - first, **shown})

    return show


def _warning_shower(reporter: Reporter) -> Callable[[str], None]:
    def show(text: str) -> None:
        try:
            reporter.show({"kind": "message", "text": text})
        except Exception:  # it is the terminal that fails
            warn(text)

    return show


def _score(run: Run, detections: Detections) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    coco = run.val_set.coco
    results = detections.results(run.val_set.categories)
    evaluation = run_coco_eval(coco, results)
    scores = with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"], ["AP"])
    if run.config.model.masks:
        scores["segm"] = mask_interval_metrics(coco, results, ["AP"])
    return scores, precision_recall(evaluation)


def _metrics(progress: Progress, train: dict[str, float], val: dict[str, float], scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": progress.epoch,
        **{name: scores[name] for name in METRICS},
        **dict(zip(("AP_low", "AP_high"), scores["AP_interval"] or (None, None), strict=True)),
        **({name: scores["segm"][of_boxes] for name, of_boxes in MASK_METRICS.items()} if "segm" in scores else {}),
        **{f"train_{name}": train[name] for name in losses_in(train)},
        "train_grad_norm": train["grad_norm"] if math.isfinite(train["grad_norm"]) else None,  # NaN where every step of fp16 overflowed
        **{f"val_{name}": val[name] for name in losses_in(val)},
        "best_AP": progress.best_AP,
        "best_epoch": progress.best_epoch,
        "images_per_second": train["images_per_second"],
    }


def _latency(run: Run) -> dict[str, float]:
    """Return the latency of a finished run of a search of which it is an objective; rank 0 measures it."""
    if not run.finished or LATENCY not in run.reporter.objectives:
        return {}
    training = run.training
    measured = None
    if run.reporter.rank == 0:
        measured = seconds_per_image(training.evaluated, training.criterion, run.val_set, training.device, training.dtype)
    return {LATENCY: gathered(measured)[0]}


def _how_to_lengthen(run: Run) -> str:
    epochs, optim = run.progress.epoch, run.config.optim
    if epochs >= optim.epochs:
        return f"{run.root} is finished after {count(epochs, 'epoch')}; a larger --epochs trains on"
    return (
        f"{run.root} is finished: AP has not risen for {run.progress.stale} epochs (optim.patience {optim.patience}); "
        "a larger --optim.patience, or 0, trains on"
    )
