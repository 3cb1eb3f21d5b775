"""optim.batch_total: a run is the same run on any number of workers."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader
from raydetr.data.transforms import train_transforms
from raydetr.errors import UserError
from raydetr.training.fit import fit
from raydetr.training.run import step_messages
from raydetr.training.schedule import lr_factor, scaled_rates
from tests.training.runs import TINY, Watcher, interrupted, last_of, log_of, run, settings

# Sizes differ from image to image, so that batches are padded, and some boxes are cropped away.
SHARED = {
    "optim.batch_total": 4,
    "optim.epochs": 2,
    "model.dropout": 0.0,
    "optim.ema_decay": 0.9,
    "data.crop": 0.9,
    "optim.scale_lr": "sqrt",
}


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return module_coco_folder(train=9, val=3)


def train_set(folder):
    changed = load_config(TINY | {"data.path": str(folder), "data.crop": 0.9})
    return CocoImages(find_split(changed.data, "train"), train_transforms(changed.data))


def test_workers_share_the_images_of_a_step(data):
    images = train_set(data)

    def steps(workers, batch_size, group_sizes=False):
        share = {"shuffle": True, "seed": 3, "batch_total": 4, "group_sizes": group_sizes}
        batches = [list(build_loader(images, batch_size, rank, workers, **share).batch_sampler) for rank in range(workers)]
        each = 4 // workers
        per_step = -(-each // batch_size)
        assert {len(mine) for mine in batches} == {2 * per_step}, "nine images make two steps of four"
        for mine in batches:
            assert all(0 < len(batch) <= batch_size for batch in mine)
        chain = itertools.chain.from_iterable
        joined = [list(chain(chain(mine[row * per_step :][:per_step]) for mine in batches)) for row in range(2)]
        for step in joined:
            assert {size for _, _, size in step} == {
                tuple(max(sides) for sides in zip(*(images.size_of(epoch, index) for epoch, index, _ in step), strict=True))
            }
        return joined

    for group_sizes in (False, True):
        alone = steps(1, 4, group_sizes)
        assert alone == steps(1, 3, group_sizes) == steps(2, 2, group_sizes) == steps(2, 9, group_sizes) == steps(4, 1, group_sizes)
    images.set_epoch(1)
    assert steps(2, 2) != alone


def test_batches_of_a_step_are_padded_alike(data):
    images = train_set(data)
    first, second, *_ = build_loader(images, 2, shuffle=True, batch_total=4)
    assert first[0].shape == second[0].shape
    plain = [batch[0].shape for batch in build_loader(images, 2, shuffle=True)]
    assert len(set(plain)) > 1


def test_a_training_set_smaller_than_a_step_is_refused(data):
    with pytest.raises(UserError, match=r"optim\.batch_total: 12 images are more than the training set has \(9\)"):
        build_loader(train_set(data), 2, shuffle=True, batch_total=12)


@pytest.mark.parametrize(
    ("total", "workers", "message"),
    [
        (16, 3, "16 images cannot be divided among 3 workers; the nearest that can: 15 or 18"),
        (2, 4, "2 images cannot be divided among 4 workers; the nearest that can: 4"),
        (16, "1:4", r"16 images cannot be divided among 3 workers \(run.workers 1:4\); the nearest that can: 12 or 24"),
    ],
)
def test_what_cannot_be_divided_is_refused(total, workers, message):
    with pytest.raises(UserError, match=rf"optim\.batch_total: {message}$"):
        load_config({"optim.batch_total": total, "run.workers": workers})


def test_the_workers_that_there_are_count(data):
    watcher = Watcher()
    watcher.world_size = 3  # as where torchrun started more than the settings say
    with pytest.raises(UserError, match=r"optim\.batch_total: 4 images cannot be divided among 3 workers; the nearest that can: 3 or 6"):
        fit(settings(data, "three", **SHARED), watcher)


def test_accumulate_follows_from_the_total():
    with pytest.raises(UserError, match=r"optim\.accumulate: follows from optim\.batch_total"):
        load_config({"optim.batch_total": 16, "optim.accumulate": 2})
    with pytest.raises(UserError, match=r"optim\.batch_size auto:8: give a number with optim\.batch_total"):
        load_config({"optim.batch_total": 8, "optim.batch_size": "auto:8"})
    assert load_config({"optim.batch_total": 12, "run.workers": "1:4"}).optim.batch_total == 12


@pytest.mark.parametrize(("how", "factor"), [("none", 1.0), ("linear", 0.25), ("sqrt", 0.5)])
def test_learning_rates_follow_the_batch(how, factor):
    optim = load_config({"optim.scale_lr": how, "optim.lr": 1e-3, "optim.lr_backbone": 1e-4, "optim.batch_total": 4}).optim
    scaled = scaled_rates(optim, 4)
    assert (scaled.lr, scaled.lr_backbone) == pytest.approx((factor * 1e-3, factor * 1e-4))
    assert lr_factor(scaled, 0, 10) == 1.0
    lines = step_messages(optim, 2)
    assert lines[0] == "optim.batch_total: each step takes 4 images, 2 in 1 batch on each of 2 workers"
    assert (
        lines[1:]
        == {
            "none": [],
            "linear": ["optim.scale_lr linear: steps of 4 images instead of 16, so learning rates of 0.00025 and 2.5e-05 (backbone)"],
            "sqrt": ["optim.scale_lr sqrt: steps of 4 images instead of 16, so learning rates of 0.0005 and 5e-05 (backbone)"],
        }[how]
    )


def test_the_batch_of_plain_settings_counts_workers_and_accumulation():
    optim = load_config({"optim.scale_lr": "linear", "optim.accumulate": 2}).optim
    assert step_messages(optim, 8) == [
        "optim.scale_lr linear: steps of 32 images instead of 16, so learning rates of 0.0002 and 2e-05 (backbone)"
    ]


# --- one, two and four workers ---


def work_together(path):
    workers = dist.get_world_size()
    watcher = Watcher()
    fit(settings(path, f"{workers} workers", **SHARED), watcher)
    if dist.get_rank() == 0:
        (Path(path).parent / f"{workers}.json").write_text(json.dumps([event["loss"] for event in watcher.of_kind("step")]))
    if workers == 2:
        interrupted(settings(path, "changing", **SHARED), lambda event: event["kind"] == "step" and event["epoch"] == 2)


@pytest.mark.slow
def test_a_run_is_the_same_on_one_two_and_four_workers_and_where_they_change(data, run_workers):
    config = settings(data, "1 worker", **SHARED)
    _, watcher = run(config)
    losses = {1: [event["loss"] for event in watcher.of_kind("step")]}
    assert len(losses[1]) == 4
    group = last_of(config)["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == config.optim.lr / 2
    for workers in (2, 4):
        ended = run_workers(__file__, "work_together", workers, data, timeout=400)
        assert [process.returncode for process in ended] == [0] * workers, [process.stderr for process in ended]
        losses[workers] = json.loads((Path(data).parent / f"{workers}.json").read_text())
        assert losses[workers] == pytest.approx(losses[1], rel=1e-5)
    changing = settings(data, "changing", **SHARED)
    assert last_of(changing)["epoch"] == 1
    assert len(last_of(changing)["random"]) == 2
    _, watcher = run(changing)
    assert [event["loss"] for event in watcher.of_kind("step")] == pytest.approx(losses[1][2:], rel=1e-5)
    expected = log_of(config)
    for name in ("2 workers", "4 workers", "changing"):
        lines = log_of(settings(data, name, **SHARED))
        assert len(lines) == 2
        for line, alone in zip(lines, expected, strict=True):
            for key in (key for key in alone if key.endswith(("_unscaled", "_loss")) and alone[key]):
                assert line[key] == pytest.approx(alone[key], rel=1e-5), (name, key)
            assert line["test_coco_eval_bbox"] == pytest.approx(alone["test_coco_eval_bbox"], abs=1e-4)
    weights = [last_of(settings(data, name, **SHARED))["model"] for name in ("1 worker", "4 workers")]
    for name, values in weights[0].items():
        assert torch.allclose(values, weights[1][name], atol=1e-4), name


if __name__ == "__main__":
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
