"""What rank 0 writes, and what happens where it cannot: checkpoints end a run, what only shows or logs does not."""

import errno
import io
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydetr.errors import DiskFull, UserError
from raydetr.training import recorder
from raydetr.training.console import Display
from raydetr.training.fit import fit
from raydetr.training.recorder import NoRecorder, Recorder
from raydetr.training.reporter import LocalReporter
from raydetr.training.tracking import Pictures, Tracker
from raydetr.weights.checkpoint import read_checkpoint
from tests.training.runs import Watcher, folder_of, interrupted, last_of, log_of, run, settings


def warnings_of(watcher):
    return [event["text"] for event in watcher.of_kind("message") if event["text"].startswith("warning: ")]


def steps_of(config, tag):
    accumulator = EventAccumulator(str(folder_of(config) / "tb"))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


def test_the_other_ranks_have_the_same_recorder_that_does_nothing():
    assert {name for name in vars(Recorder) if not name.startswith("_")} == {name for name in vars(NoRecorder) if not name.startswith("_")}


def test_a_drawer_that_fails_ends_no_training(coco_folder, monkeypatch):
    def draw(*_):
        raise ValueError("y1 must be greater than or equal to y0")

    monkeypatch.setattr(Pictures, "draw", draw)
    config = settings(coco_folder(), "run", run__pictures=2)
    metrics, watcher = run(config)
    assert metrics["epoch"] == 3
    assert warnings_of(watcher) == [
        "warning: pictures for TensorBoard: y1 must be greater than or equal to y0; left out, the training continues"
    ]
    assert steps_of(config, "epoch") == [4, 8, 12]


@pytest.mark.parametrize("method", ["log_step", "log_epoch", "log_pictures", "flush", "finish", "close"])
def test_events_that_cannot_be_written_end_no_training(coco_folder, monkeypatch, method):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tracker, method, fail)
    config = settings(coco_folder(), "run", run__pictures=1, optim__epochs=2)
    metrics, watcher = run(config)
    assert (metrics["epoch"], last_of(config)["epoch"]) == (2, 2)
    assert warnings_of(watcher) == ["warning: TensorBoard events: [Errno 28] No space left on device; left out, the training continues"]


def test_events_continue_in_the_epoch_after_a_failure(coco_folder, monkeypatch):
    log_step, failed = Tracker.log_step, []

    def fail_once(tracker, seen, numbers):
        if numbers["step"] == 3:
            tracker._events._writer.write(b"")  # a file that ends with something else than an event
            failed.append(True)
            raise OSError(errno.EIO, "Input/output error")
        log_step(tracker, seen, numbers)

    monkeypatch.setattr(Tracker, "log_step", fail_once)
    config = settings(coco_folder(), "run")
    run(config)
    assert failed == [True]
    assert steps_of(config, "train/loss") == [2, 4, 10, 12]
    assert steps_of(config, "epoch") == [4, 12]


def test_a_log_that_cannot_be_written_ends_no_training_and_is_completed_later(coco_folder):
    config = settings(coco_folder(), "run")

    class Obstacle(Watcher):
        def show(self, event):
            super().show(event)
            log = folder_of(config) / "log.txt"
            if event["kind"] == "start":
                log.mkdir()
            if event["kind"] == "epoch" and event["epoch"] == 2:
                log.rmdir()

    watcher = Obstacle()
    fit(config, watcher)
    (warning,) = warnings_of(watcher)
    assert warning.startswith("warning: log.txt: ")
    assert [line["epoch"] for line in log_of(config)] == [0, 1, 2]


class Broken(io.StringIO):
    """A terminal whose every write fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, _):
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "[Errno 32] Broken pipe"),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (UnicodeEncodeError("ascii", "\u2501", 0, 1, "ordinal not in range(128)"), "'ascii' codec"),
    ],
    ids=["pipe", "connection", "encoding"],
)
@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
def test_a_terminal_that_fails_ends_no_training(coco_folder, capfd, terminal, error, reason):
    with Display(Console(file=Broken(error), force_terminal=terminal)) as display:
        metrics = fit(settings(coco_folder(train=2), "run", optim__epochs=1), LocalReporter(display=display))
    assert metrics["epoch"] == 1
    assert capfd.readouterr().err.count(f"warning: the terminal: {reason}") == 1


def test_a_reporter_that_cannot_show_ends_no_training(coco_folder, capsys):
    class Mute(LocalReporter):
        def show(self, event):
            raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    assert fit(settings(coco_folder(), "run", optim__epochs=1), Mute())["epoch"] == 1
    assert capsys.readouterr().err.count("warning: the terminal: ") == 1


def test_a_full_disk_under_a_checkpoint_ends_the_run_in_order(coco_folder, monkeypatch):
    config = settings(coco_folder(), "run", optim__epochs=1)
    run(config)
    before = (folder_of(config) / "last.pth").read_bytes()

    def full(*_):
        raise DiskFull("last.pth: not saved (No space left on device)")

    monkeypatch.setattr(recorder, "save_checkpoint", full)
    with pytest.raises(DiskFull, match=r"the disk of .*runs/run is full; finished epochs are kept: make room and resume"):
        run(settings(config.data.path, "run", optim__epochs=2))
    assert (folder_of(config) / "last.pth").read_bytes() == before


def test_the_best_checkpoint_stays_when_ap_falls(coco_folder, monkeypatch):
    scores = iter([0.2, 0.4, 0.3, 0.1])
    summarize = fit.__globals__["summarize"]
    monkeypatch.setitem(fit.__globals__, "summarize", lambda *given: summarize(*given) | {"AP": next(scores)})
    config = settings(coco_folder(), "run", optim__epochs=4)
    metrics, watcher = run(config)
    best = read_checkpoint(folder_of(config) / "best.pth")
    assert (best["epoch"], best["metrics"]["AP"]) == (2, 0.4)
    assert (metrics["best_epoch"], metrics["best_AP"], metrics["epoch"], metrics["AP"]) == (2, 0.4, 4, 0.1)
    assert [event["best"] for event in watcher.of_kind("epoch")] == [True, True, False, False]


def test_the_validation_loss_decides_between_epochs_of_equal_ap(coco_folder, monkeypatch):
    losses, evaluate = iter([2.0, 1.0, 3.0, 1.0]), fit.__globals__["evaluate"]

    def scripted(*given):
        numbers, detections = evaluate(*given)
        return numbers | {"loss": next(losses)}, detections

    monkeypatch.setitem(fit.__globals__, "evaluate", scripted)
    monkeypatch.setitem(fit.__globals__, "summarize", lambda *given, real=fit.__globals__["summarize"]: real(*given) | {"AP": 0.5})
    metrics, watcher = run(settings(coco_folder(), "run", optim__epochs=4))
    assert [event["best"] for event in watcher.of_kind("epoch")] == [True, True, False, False]
    assert metrics["best_epoch"] == 2


@pytest.mark.parametrize(("searched", "drawn"), [(None, [1, 2, 3, 4]), ({"optim.lr": (1e-5, 1e-3)}, [1, 4])], ids=["a run", "a trial"])
def test_images_are_drawn_in_many_epochs_of_a_run_and_in_the_first_and_last_of_a_trial(coco_folder, monkeypatch, searched, drawn):
    watcher = Watcher()
    watcher.searched, epochs = searched, []

    def draw(self, detections, worst=None):
        epochs.extend([] if worst else [1 + len(watcher.of_kind("epoch"))])
        return {}

    monkeypatch.setattr(Pictures, "draw", draw)
    fit(settings(coco_folder(), "run", run__pictures=1, optim__epochs=4), watcher)
    assert epochs == drawn


# --- before the first step ---


def stopped_before_training(config, says):
    watcher = Watcher()
    with pytest.raises(UserError, match=says) as raised:
        fit(config, watcher)
    assert "\n" not in str(raised.value)
    assert not watcher.of_kind("step")


def test_a_log_that_is_damaged_is_named_before_the_first_step(coco_folder):
    config = settings(coco_folder(), "run")
    interrupted(config, lambda event: event["kind"] == "report" and event["metrics"]["epoch"] == 2)
    log = folder_of(config) / "log.txt"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(["garbage", *lines[1:]]) + "\n")
    stopped_before_training(config, r"log\.txt, line 1: not a line of a training log")
    log.unlink()
    log.mkdir()
    stopped_before_training(config, r"log\.txt: .*Is a directory")


def test_a_half_last_line_of_the_log_is_cut_and_said(coco_folder):
    config = settings(coco_folder(), "run")
    interrupted(config, lambda event: event["kind"] == "report" and event["metrics"]["epoch"] == 2)
    log = folder_of(config) / "log.txt"
    log.write_bytes(log.read_bytes()[:-200])
    metrics, watcher = run(config)
    assert metrics["epoch"] == 3
    assert f"{log}: the last line was cut short and is removed" in [event["text"] for event in watcher.of_kind("message")]
    assert [line["epoch"] for line in log_of(config)] == [0, 2]


def test_a_tensorboard_folder_that_cannot_be_written_is_named_before_the_first_step(coco_folder):
    config = settings(coco_folder(), "run")
    folder_of(config).mkdir(parents=True)
    (folder_of(config) / "tb").write_text("a file")
    stopped_before_training(config, r"run\.storage: cannot write to .*runs/run/tb: File exists")


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become a user without permission")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_run_folder_without_permission_is_one_line(coco_folder, mode):
    # In a folder that every user may enter, unlike pytest's own.
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        data = shutil.copytree(coco_folder(), Path(top) / "data")
        config = settings(data, "run", run__storage=str(Path(top) / "runs"))
        folder_of(config).mkdir(parents=True)
        folder_of(config).chmod(mode)
        os.seteuid(65534)
        try:
            stopped_before_training(config, f"{folder_of(config)}.*: Permission denied")
        finally:
            os.seteuid(0)
