"""Which checkpoint a run resumes from, and what is said if it is lost, damaged, or of other data."""

import json
import os
import shutil

import pytest
import torch

from raydetr.errors import UserError
from raydetr.training.resume import restart_from_best
from raydetr.weights.checkpoint import read_checkpoint
from tests.training.runs import STATEFUL, folder_of, interrupted, last_of, log_of, run, same, settings


@pytest.fixture(scope="module")
def original(module_coco_folder):
    """The settings of a run that was stopped after the second of its three epochs, and its best epoch."""
    config = settings(module_coco_folder(train=4, val=2), "original", **STATEFUL)
    interrupted(config, lambda event: event["kind"] == "report" and event["metrics"]["epoch"] == 2)
    return config, read_checkpoint(folder_of(config) / "best.pth")["epoch"]


@pytest.fixture
def stopped(original, tmp_path):
    """The same in a folder of the test's own."""
    config, best_epoch = original
    shutil.copytree(folder_of(config), tmp_path / "runs" / "run")
    return settings(config.data.path, "run", **STATEFUL, run__storage=str(tmp_path / "runs")), best_epoch


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_without_its_last_checkpoint_does_not_start_again_over_its_epochs(stopped):
    config, best_epoch = stopped
    (folder_of(config) / "last.pth").unlink()
    before = content_of(folder_of(config))
    with pytest.raises(UserError) as raised:
        run(config)
    assert str(raised.value) == (
        f"{folder_of(config)}/last.pth is missing, and 2 epochs of this run are finished: starting again would overwrite them; "
        f"best.pth goes as far as epoch {best_epoch}: resume from there with raydetr train --resume {folder_of(config)}/best.pth"
    )
    assert content_of(folder_of(config)) == before


def test_without_any_checkpoint_the_log_still_tells_how_far_the_run_was(stopped):
    config, _ = stopped
    for name in ("last.pth", "best.pth"):
        (folder_of(config) / name).unlink()
    with pytest.raises(UserError, match=r"2 epochs of this run are finished: .*; bring it back, or choose another run\.name"):
        run(config)


def test_without_a_log_the_best_checkpoint_does(stopped):
    config, _ = stopped
    content = read_checkpoint(folder_of(config) / "best.pth")
    torch.save(content | {"epoch": 2}, folder_of(config) / "best.pth")
    for name in ("last.pth", "log.txt"):
        (folder_of(config) / name).unlink()
    with pytest.raises(UserError, match="and 2 epochs of this run are finished"):
        run(config)


def test_a_first_epoch_that_was_killed_while_it_was_saved_starts_again(stopped):
    config, _ = stopped
    shutil.rmtree(folder_of(config))
    short = settings(config.data.path, "run", **STATEFUL, run__storage=config.run.storage, optim__epochs=1)
    run(short)
    (folder_of(config) / "last.pth").unlink()
    metrics, _ = run(short)
    assert metrics["epoch"] == 1


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_a_truncated_last_checkpoint_says_how_far_the_best_one_goes(stopped, length):
    config, best_epoch = stopped
    os.truncate(folder_of(config) / "last.pth", length)
    with pytest.raises(UserError, match=rf"last\.pth: .*; best\.pth goes as far as epoch {best_epoch}: resume from there with") as raised:
        run(config)
    assert "\n" not in str(raised.value)


def test_a_run_resumes_from_its_best_checkpoint(stopped):
    config, best_epoch = stopped
    best = read_checkpoint(folder_of(config) / "best.pth")
    (folder_of(config) / "last.pth").unlink()
    restart_from_best(str(folder_of(config)))
    restarted = last_of(config)
    same(restarted["model"], best["model"])
    assert restarted["progress"]["best_AP"] == best["metrics"]["AP"]
    metrics, watcher = run(config)
    assert watcher.of_kind("start")[0]["done"] == best_epoch
    assert metrics["epoch"] == 3
    assert [line["epoch"] for line in log_of(config)] == [0, 1, 2]
    assert last_of(config)["step"] == 3  # a step of two batches an epoch, counted on from the best one's
    assert len(last_of(config)["optimizer"]["state"]) > 0


def test_a_best_checkpoint_of_an_earlier_version_resumes_as_well(stopped):
    config, best_epoch = stopped
    content = read_checkpoint(folder_of(config) / "best.pth")
    torch.save({name: value for name, value in content.items() if name not in ("step", "data")}, folder_of(config) / "best.pth")
    restart_from_best(str(folder_of(config)))
    metrics, watcher = run(config)
    assert watcher.of_kind("start")[0]["done"] == best_epoch
    assert (metrics["epoch"], last_of(config)["step"]) == (3, 3)


def test_no_best_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(UserError, match=r"best\.pth: no such file"):
        restart_from_best(str(tmp_path))


def test_data_that_moved_is_the_same_data(stopped, tmp_path):
    config, _ = stopped
    moved = shutil.copytree(config.data.path, tmp_path / "moved")
    metrics, _ = run(settings(moved, "run", **STATEFUL, run__storage=config.run.storage))
    assert metrics["epoch"] == 3


def move_a_box(coco):
    coco["annotations"][0]["bbox"] = [1, 1, 9, 9]


def drop_a_box(coco):
    coco["annotations"].pop()


def drop_an_image(coco):
    image = coco["images"].pop()
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != image["id"]]


@pytest.mark.parametrize(
    ("split", "change", "difference"),
    [
        ("train", move_a_box, "boxes of image 10 changed"),
        ("val", drop_a_box, r"boxes of image 11 changed \(3 before, 2 now\)"),
        ("train", drop_an_image, "image 13 removed"),
    ],
)
def test_other_data_is_refused_with_the_difference(stopped, tmp_path, split, change, difference):
    config, _ = stopped
    edited = shutil.copytree(config.data.path, tmp_path / "edited")
    file = edited / "annotations" / f"custom_{split}.json"
    coco = json.loads(file.read_text())
    change(coco)
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=f"the {split} set is not the one that .*runs/run was trained on: {difference}; undo that, or"):
        run(settings(edited, "run", **STATEFUL, run__storage=config.run.storage))
