"""What only rank 0 of a run does: write the run folder, and push it to its object store."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from raydetr.config import by_name, to_dict, write_yaml
from raydetr.errors import UserError, is_disk_full
from raydetr.evaluate.coco import run_coco_eval
from raydetr.evaluate.errors import error_numbers, errors_markdown
from raydetr.files import delete_partial_files
from raydetr.storage import OWNER, become_owner, check_owner, push, remove_tokens, stamp
from raydetr.training.engine import Detections
from raydetr.training.metrics import LATENCY
from raydetr.training.resume import BEST, LAST
from raydetr.training.run import Run
from raydetr.training.trackers import ExternalTracker, open_tracker
from raydetr.training.tracking import STEP_TAGS, Log, Pictures, Tracker, epoch_scalars, log_line, objective_tag
from raydetr.weights.checkpoint import save_checkpoint

PICTURE_SETS = 10  # in about so many epochs of a run validation images are drawn, besides the first and the last


@dataclasses.dataclass
class EpochResults:
    """The results of an epoch."""

    train: dict[str, float]  # means over the epoch, of train_one_epoch
    val: dict[str, float]  # losses, of evaluate
    detections: Detections
    scores: dict[str, Any]  # of evaluate.coco.summarize
    curve: dict[str, np.ndarray]  # of evaluate.coco.precision_recall
    best: bool  # whether this epoch is the best so far
    random_states: list[dict[str, Any]]  # of every worker


class Recorder:
    """Writes the run folder: config.yaml, log.txt, tb/, best.pth and last.pth. It is a context manager, which closes TensorBoard's file.

    A checkpoint that cannot be written ends the run. If pictures, TensorBoard events or log.txt cannot be written, the user is warned. The
    same holds for a tracker of ``run.tracker`` that fails once the run has begun.

    Args:
        run: The run, before its first step.

    Raises:
        UserError: The folder cannot be written, or a file in it is damaged, or the tracker of ``run.tracker`` cannot be opened.
    """

    def __init__(self, run: Run):
        self._run = run
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_yaml(run.config, run.folder / "config.yaml")
            self._log = Log(run.folder / "log.txt", run.progress.epoch)
            self._tracker: Tracker | None = self._open_tracker()
        except OSError as error:
            if is_disk_full(error):
                raise
            # The partial file of an atomic write would mean nothing to the user.
            where = run.folder if str(error.filename).endswith(".partial") else error.filename or run.folder
            raise UserError(f"run.storage: cannot write to {where}: {error.strerror}") from None
        if self._log.was_cut:
            run.show({"kind": "message", "text": f"{run.folder / 'log.txt'}: the last line was cut short and is removed"})
        self._last = stamp(run.root, LAST)  # last.pth as this process found or left it
        self._owner = become_owner(run.root)
        self._pictures = Pictures(run.val_set, run.config.run.pictures)
        self._external: ExternalTracker | None = None
        if run.config.run.tracker != "none":
            settings, name = by_name(run.config), str(run.config.run.name)
            self._external = open_tracker(run.config.run.tracker, name, run.folder, settings)
        self._epoch_began = run.training.step  # the optimizer step before the first one of the epoch
        self._kept: tuple[int, bool, Detections] | None = None  # an epoch, whether it is the best so far, and its detections

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._track(Tracker.close)
        failed = kind is not None and not issubclass(kind, SystemExit)  # SystemExit: the search stops or pauses the trial
        self._track_outside(lambda external: external.close(failed))

    def record_step(self, numbers: dict[str, float]) -> None:
        """Write the numbers of a step to TensorBoard.

        Args:
            numbers: What :func:`raydetr.training.engine.train_one_epoch` calls ``show`` with.
        """
        seen = self._seen((numbers["step"] - self._epoch_began) / self._run.steps_per_epoch)
        self._track(lambda tracker: tracker.log_step(seen, numbers))

    def _seen(self, part: float = 0.0) -> int:
        """Return how many training images the run has seen after its finished epochs and a part of the next one.

        After the same epoch it is the same for every batch size and number of workers, also where these pad or drop an image.
        """
        return math.floor(len(self._run.train_set) * (self._run.progress.epoch + part) + 0.5)

    def record_epoch(self, results: EpochResults) -> None:
        """Write the results of an epoch (``last.pth`` after all other files), and push them to the object store.

        Args:
            results: The results.

        Raises:
            UserError: A checkpoint cannot be written, the object store cannot be reached, or another process has taken over the run.
        """
        check_owner(self._run.root, self._owner, is_unchanged=lambda: stamp(self._run.root, LAST) == self._last)
        self._write_logs(results)
        self._draw(results)
        self._track(Tracker.flush)
        self._epoch_began = self._run.training.step
        if results.best or not (self._kept and self._kept[1]):
            self._kept = self._run.progress.epoch, results.best, results.detections
        self._save(results)
        push(self._run.root)
        self._last = stamp(self._run.root, LAST)
        if not self._tracker:
            with self._run.best_effort("TensorBoard events"):
                self._tracker = self._open_tracker()

    def finish(self) -> None:
        """Write the errors of the best epoch, mark the run as finished, delete leftovers of killed processes, and push it a last time.

        Raises:
            UserError: The object store cannot be reached.
        """
        with self._run.best_effort("the errors for TensorBoard"):
            self._write_errors()
        self._track(Tracker.finish)
        files = [self._run.folder / name for name in ("config.yaml", "log.txt", BEST)]
        self._track_outside(lambda external: external.log_files([file for file in files if file.exists()]))
        with self._run.best_effort("the tidying of the run folder"):
            delete_partial_files(self._run.folder)
        push(self._run.root)
        remove_tokens(self._run.root, OWNER)

    def _open_tracker(self) -> Tracker:
        run = self._run
        return Tracker(run.folder / "tb", run.config, self._seen(), run.reporter.searched, run.reporter.objectives)

    def _track(self, write: Callable[[Tracker], None]) -> None:
        if not self._tracker:
            return
        tracker, self._tracker = self._tracker, None
        with self._run.best_effort("TensorBoard events"):
            write(tracker)
            self._tracker = tracker  # not after a failure: the file may end with half an event, and the next epoch starts another

    def _track_outside(self, write: Callable[[ExternalTracker], None]) -> None:
        if self._external:
            with self._run.best_effort(f"run.tracker {self._run.config.run.tracker}"):
                write(self._external)

    def _write_logs(self, results: EpochResults) -> None:
        training, epoch = self._run.training, self._run.progress.epoch
        train, val, scores = results.train, results.val, results.scores
        best, seen = self._run.progress.best_AP, self._seen()
        self._track(lambda tracker: tracker.log_epoch(seen, epoch, train, val, scores, results.curve, best))
        numbers = {tag: train[name] for name, tag in STEP_TAGS.items() if tag.startswith(("lr/", "speed/")) and name in train}
        if LATENCY in self._run.metrics:
            latency = {objective_tag(LATENCY): self._run.metrics[LATENCY]}
            self._track(lambda tracker: tracker.log_scalars(seen, latency))
            numbers |= latency
        numbers |= {tag: value for tag, value in epoch_scalars(epoch, train, val, scores, best).items() if value is not None}
        self._track_outside(lambda external: external.log(seen, numbers))
        trained = sum(parameter.numel() for parameter in training.detr.parameters() if parameter.requires_grad)
        with self._run.best_effort("log.txt"):
            self._log.append(log_line(epoch - 1, train, val, scores, training.criterion.weight_dict, trained))

    def _draw(self, results: EpochResults) -> None:
        epoch, epochs = self._run.progress.epoch, self._run.config.optim.epochs
        sets = 1 if self._run.reporter.searched else PICTURE_SETS  # trials are short, and many
        if epoch % math.ceil(epochs / sets) == 0 or epoch in (1, epochs):
            with self._run.best_effort("pictures for TensorBoard"):
                pictures = self._pictures.draw(results.detections)
                self._track(lambda tracker: tracker.log_pictures(self._seen(), pictures))
                if pictures:
                    self._track_outside(lambda external: external.log_pictures(self._seen(), pictures))

    def _write_errors(self) -> None:
        """Write why objects are missed: as text, and for a run that is no trial the images with the most errors.

        They are those of the best epoch, or of the last one if this process resumed the run after its best epoch.
        """
        if not self._kept or not self._tracker:
            return
        epoch, best, detections = self._kept
        dataset, seen = self._run.val_set, self._seen()
        evaluation = run_coco_eval(dataset.coco, detections.results(dataset.categories))
        numbers = {"split": "val", "images": len(dataset), **error_numbers(evaluation, dataset.coco)}
        names = {image["id"]: image["file_name"] for image in dataset.coco["images"]}
        text = f"Epoch {epoch}, the {'best' if best else 'last'} one. {errors_markdown(numbers, names)}"
        self._track(lambda tracker: tracker.log_text(seen, "errors", text))
        worst = [each["image_id"] for each in numbers["worst_images"][: self._pictures.number]]
        if worst and self._run.reporter.searched is None:
            with self._run.best_effort("pictures for TensorBoard"):
                pictures = self._pictures.draw(detections, worst)
                self._track(lambda tracker: tracker.log_pictures(seen, pictures, "errors"))

    def _save(self, results: EpochResults) -> None:
        run, training, average = self._run, self._run.training, self._run.training.average
        about = {
            "model": training.evaluated.state_dict(),
            "settings": to_dict(run.config),
            "categories": run.train_set.categories,
            "data": run.data,
            "epoch": run.progress.epoch,
            "step": training.step,
            "metrics": run.metrics,
        }
        if results.best:
            save_checkpoint(run.folder / BEST, about)
        state = {
            "optimizer": training.optimizer.state_dict(),
            "lr_scheduler": training.scheduler.state_dict(),
            "scaler": training.scaler.state_dict(),
            # With a moving average, "model" is the average. The same tensors under a second name take no space in the file.
            "ema": average.module.state_dict() if average else None,
            "ema_updates": average.updates if average else 0,
            "trained": training.detr.state_dict() if average else None,
            "random": results.random_states,
            "progress": dataclasses.asdict(run.progress),
        }
        if training.detr.query_groups > 1:
            state["groups"] = training.detr.group_embed.weight
        save_checkpoint(run.folder / LAST, about | state)


class NoRecorder:
    """The recorder of every rank but 0, which does nothing."""

    def __enter__(self) -> "NoRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def record_step(self, numbers: dict[str, float]) -> None:
        """Ignore the numbers of a step."""

    def record_epoch(self, results: EpochResults) -> None:
        """Ignore the results of an epoch."""

    def finish(self) -> None:
        """Do nothing."""


def open_recorder(run: Run) -> Recorder | NoRecorder:
    """Return the recorder of this worker, which writes on rank 0 only.

    Args:
        run: The run, before its first step.

    Raises:
        UserError: The run folder cannot be written, or a file in it is damaged.
    """
    return Recorder(run) if run.reporter.rank == 0 else NoRecorder()
