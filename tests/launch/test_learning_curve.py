import json

import pytest

from raydetr.cli import main
from raydetr.errors import UserError
from raydetr.launch import learning_curve as module
from raydetr.launch.learning_curve import learning_curve, part_config
from raydetr.launch.signals import Interrupted
from raydetr.weights.checkpoint import read_checkpoint
from tests.helpers import TINY, tiny_config

CURVE = TINY | {"optim.epochs": 1, "run.name": "curve", "run.seed": 5, "speed.device": "cpu"}


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return module_coco_folder(train=8, val=3)


def test_smaller_parts_train_for_more_epochs(data, tmp_path):
    own = part_config(tiny_config(CURVE, data, tmp_path, optim__epochs=10), 0.25, 7)
    assert (own.data.fraction, own.optim.epochs, own.run.seed, own.run.name) == (0.25, 40, 7, "0.25-seed-7")
    assert own.run.storage == f"{tmp_path}/curve"


@pytest.mark.slow
def test_a_curve_is_trained_resumed_and_said(data, tmp_path, monkeypatch, capsys):
    train, trained = module.train, []

    def stopping(config, resume):
        if len(trained) == 2:
            trained.append("stopped")
            raise Interrupted("another message", 15)
        trained.append(config.run.name)
        return train(config, resume=resume)

    monkeypatch.setattr(module, "train", stopping)
    flags = [f"--{name}={value if not isinstance(value, list) else value[0]}" for name, value in CURVE.items()]
    command = ["learning-curve", "--data", str(data), "--storage", str(tmp_path), *flags, "--fractions", ".25", ".5", "1", "--seeds", "2"]
    assert main(command) == 128 + 15
    assert capsys.readouterr().err.splitlines()[-1].endswith("finished trainings are kept: give the same command again to resume")
    assert main(command) == 0
    assert trained == ["0.25-seed-5", "0.5-seed-5", "stopped", "1-seed-5", "0.25-seed-6", "0.5-seed-6", "1-seed-6"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("Twice the 8 training images would bring ")
    assert shown[-1] == f"numbers: {tmp_path}/curve/learning_curve.json"
    content = json.loads((tmp_path / "curve" / "learning_curve.json").read_text())
    assert len(content["result"]["trainings"]) == 6
    for seed in (5, 6):
        parts = [
            set(read_checkpoint(tmp_path / "curve" / f"{fraction}-seed-{seed}" / "best.pth")["data"]["train"]["image_ids"].tolist())
            for fraction in ("0.25", "0.5", "1")
        ]
        assert [len(part) for part in parts] == [2, 4, 8]
        assert parts[0] < parts[1] < parts[2]
    assert main([*command, "--optim.lr", "0.1"]) == 2
    assert "holds a learning curve with optim.lr 0.0005, not 0.1; choose another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fractions", "half", "1"], "--fractions: 'half,1' are not numbers such as .25 .5 1"),
        (["--fractions", ".5", "1"], "at least 3 different fractions"),
        (["--fractions", ".01", ".5", "1"], "the same number of images, or none, of 8 training images"),
        (["--seeds", "1"], "--seeds 1: at least 2"),
        (["--data.folds", "2"], "data.folds: a learning curve trains on parts"),
        (["--data.fraction", "0.5"], "data.fraction: a learning curve sets it itself"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, more, message):
    assert main(["learning-curve", "--data", str(data), "--storage", str(tmp_path), *more]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1]
    assert len([line for line in shown if line.startswith("raydetr: ")]) == 1


def test_the_folder_of_a_run_is_left_alone(data, tmp_path):
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="curve holds a run already; choose another --name"):
        learning_curve(tiny_config(CURVE, data, tmp_path), (0.25, 0.5, 1.0), 2)


def test_a_damaged_file_is_named(data, tmp_path):
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve" / "learning_curve.json").write_text("{}")
    with pytest.raises(UserError, match=r"learning_curve\.json: is damaged"):
        learning_curve(tiny_config(CURVE, data, tmp_path), (0.25, 0.5, 1.0), 2)
