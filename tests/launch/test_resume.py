"""Resuming a run from outside: what may change, what is refused, and in which words."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from raydetr.cli import cli
from raydetr.data.coco import CocoImages
from raydetr.errors import UserError
from raydetr.launch.train import resume_config, train
from raydetr.weights.checkpoint import read_checkpoint
from tests.helpers import TINY, tiny_config

SMALL = TINY | {"model.dec_layers": 1, "model.enc_layers": 0, "run.name": "run", "optim.epochs": 2}


@pytest.fixture(scope="module")
def finished(module_coco_folder, tmp_path_factory):
    """The folders of a finished run of two epochs and of its data."""
    data, storage = module_coco_folder(train=2, val=1), tmp_path_factory.mktemp("runs")
    train(tiny_config(SMALL, data, storage))
    return storage / "run", data


@pytest.fixture
def own(finished, tmp_path):
    """The same run in a folder of the test's own."""
    return Path(shutil.copytree(finished[0], tmp_path / "runs" / "run")), finished[1]


def test_a_finished_run_says_so_and_how_to_lengthen_it(own, capfd):
    run, _ = own
    metrics = train(resume_config(str(run)), resume=True)
    assert metrics["epoch"] == 2
    assert f"{run} is finished after 2 epochs; a larger --epochs trains on" in capfd.readouterr().out
    assert train(resume_config(str(run), {"optim.epochs": 3}), resume=True)["epoch"] == 3
    assert sorted(path.name for path in run.iterdir()) == ["best.pth", "config.yaml", "last.pth", "log.txt", "tb"]


def test_a_run_is_resumed_from_its_best_checkpoint_where_that_is_named(own):
    run, _ = own
    epoch = read_checkpoint(run / "best.pth")["epoch"]
    (run / "last.pth").unlink()
    with pytest.raises(UserError, match=rf"raydetr train --resume {run}/best\.pth$|is missing") as raised:
        train(resume_config(str(run), {"optim.epochs": 3}), resume=True)
    assert f"best.pth goes as far as epoch {epoch}" in str(raised.value)
    result = CliRunner().invoke(cli, ["train", "--resume", f"{run}/best.pth", "--epochs", "3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read_checkpoint(run / "last.pth")["epoch"] == 3


def test_the_last_checkpoint_names_its_run_as_well(own):
    run, _ = own
    assert resume_config(f"{run}/last.pth").run.name == "run"


def test_data_may_have_moved_but_not_changed(own, tmp_path):
    run, data = own
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    longer = {"optim.epochs": 3, "data.path": str(moved)}
    assert train(resume_config(str(run), longer), resume=True)["epoch"] == 3
    file = moved / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["bbox"][2] += 0.5
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=rf"the train set is not the one that {run} was trained on: boxes of image 10 changed"):
        train(resume_config(str(run), longer | {"optim.epochs": 4}), resume=True)


def test_an_empty_settings_file_is_named(own):
    run, _ = own
    (run / "config.yaml").write_text("")
    with pytest.raises(
        UserError, match=rf"{run}/config\.yaml: is empty, and it should hold the settings of the run; restore the file or start"
    ):
        resume_config(str(run))


@pytest.mark.slow
def test_a_second_training_of_a_run_is_refused_until_the_first_has_ended(module_coco_folder, tmp_path):
    data = module_coco_folder(train=2, val=1, folder="other")
    flags = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in SMALL.items()]
    endless = [*flags, f"--data={data}", f"--run.storage={tmp_path}", "--epochs=100000"]
    first = subprocess.Popen([sys.executable, "-m", "raydetr.cli", "train", *endless], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "last.pth").exists():
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for second in ({"resume": True}, {}):
            config = resume_config(str(tmp_path / "run"))
            with pytest.raises(UserError, match=r"run: another raydetr is training this run; wait for its end or stop it first"):
                train(config, **second)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    done = read_checkpoint(tmp_path / "run" / "last.pth")["epoch"]
    assert train(resume_config(str(tmp_path / "run"), {"optim.epochs": done + 1}), resume=True)["epoch"] == done + 1


def test_a_loading_process_that_dies_is_one_line(module_coco_folder, tmp_path, monkeypatch):
    transformed = CocoImages._transformed

    def die(images, *given):
        if os.getpid() != mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return transformed(images, *given)

    mine = os.getpid()
    monkeypatch.setattr(CocoImages, "_transformed", die)
    data = module_coco_folder(train=2, val=1, folder="dying")
    with pytest.raises(UserError, match=r"training failed: DataLoader worker .*(killed|exited unexpectedly)") as raised:
        train(tiny_config(SMALL | {"data.num_workers": 1}, data, tmp_path))
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(f"finished epochs are kept: raydetr train --resume {tmp_path}/run")
