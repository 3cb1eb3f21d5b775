"""Trackers beside TensorBoard, each with its real package, offline; without the package the test is skipped."""

import importlib.util
import json
import sys

import pytest
from PIL import Image

from raydetr.errors import UserError
from raydetr.training import recorder
from raydetr.training.fit import fit
from raydetr.training.trackers import _tag
from tests.training.runs import Watcher, folder_of, interrupted, run, settings
from tests.training.test_recorder import warnings_of

EPOCHS = {"optim__epochs": 2, "run__pictures": 1}
TAGS = {"epoch", "val/AP", "val/AP50", "val/AP/square", "train_epoch/loss", "val/loss_ce", "lr/transformer", "speed/images_per_second"}


class Recording:
    """A tracker that remembers what it gets, and fails where ``failing`` says so."""

    run_id = "1"

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def __getattr__(self, method):
        def call(*arguments):
            if method in self.failing:
                raise ConnectionError("the tracker does not answer")
            self.calls.append((method, *arguments))

        return call


@pytest.fixture
def recording(monkeypatch):
    def install(*failing):
        tracker = Recording(failing)
        monkeypatch.setattr(recorder, "open_tracker", lambda *_: tracker)
        return tracker

    return install


def test_a_run_gives_its_tracker_numbers_images_and_files(coco_folder, recording):
    tracker = recording()
    config = settings(coco_folder(), "run", run__tracker="wandb", **EPOCHS)
    run(config)
    assert [call[0] for call in tracker.calls] == ["log", "log_pictures", "log", "log_pictures", "log_files", "close"]
    steps = [call[1] for call in tracker.calls if call[0] == "log"]
    assert steps == [4, 8]  # images seen
    numbers = tracker.calls[2][2]
    assert numbers.keys() >= TAGS
    assert numbers["epoch"] == 2
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    ((name, picture),) = tracker.calls[3][2].items()
    assert name == "val_000.jpg"
    assert isinstance(picture, Image.Image)
    assert [file.name for file in tracker.calls[4][1]] == ["config.yaml", "log.txt", "best.pth"]
    assert all(file.exists() for file in tracker.calls[4][1])
    assert tracker.calls[5] == ("close", False)


@pytest.mark.parametrize("method", ["log", "log_pictures", "log_files", "close"])
def test_a_tracker_that_fails_ends_no_training(coco_folder, recording, method):
    recording(method)
    metrics, watcher = run(settings(coco_folder(), "run", run__tracker="mlflow", **EPOCHS))
    assert metrics["epoch"] == 2
    assert warnings_of(watcher) == ["warning: run.tracker mlflow: the tracker does not answer; left out, the training continues"]


def test_an_interrupted_run_is_marked_as_failed(coco_folder, recording):
    tracker = recording()
    config = settings(coco_folder(), "run", run__tracker="mlflow", **EPOCHS)
    interrupted(config, lambda event: event["kind"] == "report")
    assert tracker.calls[-1] == ("close", True)


def test_a_trial_that_a_search_stops_or_pauses_is_not_marked_as_failed(coco_folder, recording):
    tracker = recording()
    config = settings(coco_folder(), "run", run__tracker="mlflow", **EPOCHS)
    with pytest.raises(SystemExit):
        fit(config, Watcher(lambda event: event["kind"] == "report" and sys.exit(0)))  # as Ray Tune's report does
    assert tracker.calls[-1] == ("close", False)


@pytest.mark.parametrize("kind", ["mlflow", "wandb", "trackio"])
def test_a_missing_package_is_named_before_the_first_step(coco_folder, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=rf"^run.tracker {kind} needs the package {kind}: pip install 'raydetr\[{kind}\]'$"):
        run(settings(coco_folder(), "run", run__tracker=kind, **EPOCHS))


def test_no_tracker_is_loaded_unless_it_is_asked_for(coco_folder, monkeypatch):
    for kind in ("mlflow", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, kind, None)
    config = settings(coco_folder(), "run", **EPOCHS)
    assert run(config)[0]["epoch"] == 2
    assert not (folder_of(config) / "tracker.json").exists()


def test_a_tag_has_only_characters_that_all_trackers_take():
    assert _tag("val/AP/Straße: 'x' (3)") == "val/AP/Stra_e_ _x_ _3_"


def package(kind):
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"the package {kind} is not installed")
    return importlib.import_module(kind)


def tracked_and_resumed(folder, kind):
    """A run that is stopped after its first epoch and resumed; returns the ids of its entries."""
    config = settings(folder, "run", run__tracker=kind, **EPOCHS)
    interrupted(config, lambda event: event["kind"] == "report")
    ids = [json.loads((folder_of(config) / "tracker.json").read_text())[kind]]
    _, watcher = run(config)
    assert not warnings_of(watcher)
    return config, [*ids, json.loads((folder_of(config) / "tracker.json").read_text())[kind]]


@pytest.mark.slow
def test_mlflow_keeps_a_resumed_run_as_one(coco_folder, monkeypatch):
    mlflow = package("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, ids = tracked_and_resumed(coco_folder(), "mlflow")
    assert ids[0] == ids[1]
    client = mlflow.MlflowClient(f"sqlite:///{folder_of(config).parent.absolute() / 'mlflow.db'}")
    found = client.get_run(ids[0])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["optim.epochs"] == "2"
    assert found.data.metrics.keys() >= TAGS
    assert [each.step for each in client.get_metric_history(ids[0], "val/AP")] == [4, 8]
    names = {each.path for path in ("", "pictures") for each in client.list_artifacts(ids[0], path)}
    assert names >= {"best.pth", "log.txt", "config.yaml", "pictures/00000004-val_000.jpg.png"}


def wandb_records(file):
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, after a head of seven bytes."""
    data, position, part = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block that no head fits into
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield part
            part = b""


@pytest.mark.slow
def test_wandb_keeps_an_offline_run(coco_folder, monkeypatch):
    wandb = package("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config, ids = tracked_and_resumed(coco_folder(), "wandb")
    wandb.teardown()  # its own process writes the files
    assert ids[0] == ids[1]
    rows, keys = [], set()
    for file in sorted(folder_of(config).glob(f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb")):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            keys |= row.keys()
            rows += [json.loads(row["step"])] if "val/AP" in row else []
            if record.run.run_id:
                assert {item.key for item in record.run.config.update} >= {"optim.lr", "run.tracker"} or record.run.resumed
    assert rows == [4, 8]
    assert keys >= TAGS
    assert any(key.startswith("pictures/val_000.jpg") for key in keys)


@pytest.mark.slow
def test_wandb_without_a_login_is_one_line(coco_folder, tmp_path, monkeypatch):
    package("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^run.tracker wandb: .*; log in with `wandb login`, or set WANDB_MODE=offline") as error:
        run(settings(coco_folder(), "run", run__tracker="wandb", **EPOCHS))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_trackio_keeps_a_run_on_this_computer(coco_folder, tmp_path, monkeypatch):
    package("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    _, ids = tracked_and_resumed(coco_folder(), "trackio")
    assert ids[0] == ids[1]
    assert SQLiteStorage.get_runs("raydetr") == ids[:1]
    assert SQLiteStorage.get_run_config("raydetr", ids[0])["optim.epochs"] == 2
    logs = SQLiteStorage.get_logs("raydetr", ids[0])
    assert [(row["step"], row["epoch"]) for row in logs if "val/AP" in row] == [(4, 1), (8, 2)]
    assert set().union(*logs) >= TAGS | {"pictures/val_000.jpg"}
    (artifact,) = SQLiteStorage.get_artifacts("raydetr")
    assert artifact["name"] == ids[0]
