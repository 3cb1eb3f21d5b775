"""Batches that do not fit into shared memory, and those that never arrive."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from raydetr.config import load_config
from raydetr.data import loader, shared_memory
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader, largest_batch, largest_side
from raydetr.data.shared_memory import as_arrays, as_tensors, fits_shared_memory, free_shared_memory
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import UserError


@pytest.fixture
def dataset(coco_folder):
    def make(split="train", size=(96, 64), normalized=True, **settings):
        data = load_config({"data.path": str(coco_folder(train=6, val=4, size=size, folder=f"data_{split}")), **settings}).data
        transforms = (train_transforms if split == "train" else val_transforms)(data, normalized)
        return CocoImages(find_split(data, split), transforms)

    return make


def as_if_free(monkeypatch, number):
    for module in (shared_memory, loader):
        monkeypatch.setattr(module, "free_shared_memory", lambda: number)


def test_what_is_free_is_read_from_the_file_system():
    if not shared_memory.SHARED_MEMORY.is_dir():
        pytest.skip("this system has no /dev/shm")
    assert 0 <= free_shared_memory() <= shutil.disk_usage("/dev/shm").total


def test_half_of_what_is_free_may_be_used_and_where_nothing_limits_it_all_fits(monkeypatch, tmp_path):
    as_if_free(monkeypatch, 1000)
    assert fits_shared_memory(500)
    assert not fits_shared_memory(501)
    monkeypatch.undo()
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "absent")
    assert fits_shared_memory(10**18)


def test_a_batch_survives_the_way_as_arrays():
    batch = (torch.rand(2, 3, 4, 5), None, [{"boxes": torch.rand(3, 4), "labels": torch.arange(3)}, {"boxes": torch.rand(0, 4)}])
    arrays = as_arrays(batch)
    assert isinstance(arrays[0], np.ndarray)
    assert isinstance(arrays[2][0]["labels"], np.ndarray)
    images, mask, targets = as_tensors(arrays)
    assert torch.equal(images, batch[0])
    assert mask is None
    assert all(torch.equal(each[name], target[name]) for each, target in zip(targets, batch[2], strict=True) for name in target)
    assert targets[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("crop", [0.0, 1.0])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (300, 40)])
def test_no_batch_is_larger_than_the_bound(dataset, size, crop):
    settings = {"data.train_sizes": [48, 64], "data.max_size": 150, "data.crop": crop, "data.crop_resize": [60], "data.crop_min": 20}
    for split in ("train", "val"):
        data = dataset(split, size, **settings, **{"data.crop_max": 50, "data.val_size": 64})
        for epoch in range(4):
            data.set_epoch(epoch)
            for pad_to in (1, 64):
                for images, mask, _ in build_loader(data, 2, shuffle=split == "train", pad_to=pad_to):
                    assert images.nbytes + (0 if mask is None else mask.nbytes) <= largest_batch(data, 2, pad_to)


def test_batches_for_a_gpu_are_bytes(dataset):
    settings = {"data.train_sizes": [64], "data.crop": 0.0, "data.flip": 0.0}
    data = dataset(normalized=False, **settings)
    (images, *_), *_ = build_loader(data, 2)
    assert images.dtype == torch.uint8
    assert largest_batch(data, 2) == 2 * largest_side(data) ** 2 * (3 + 1)  # and the padding mask
    data.transforms = train_transforms(load_config(settings).data)
    assert largest_batch(data, 2) == 2 * largest_side(data) ** 2 * (12 + 1)


SETTINGS = {"data.train_sizes": [64], "data.val_size": 64, "data.crop": 0.0}


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_that_do_not_fit_are_the_same_and_use_no_shared_memory(dataset, monkeypatch, shuffle):
    data = dataset(**SETTINGS)
    expected = list(build_loader(data, 2, shuffle=shuffle))
    as_if_free(monkeypatch, 10_000)

    def refuse(*_):
        raise AssertionError("a tensor went through shared memory")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    loader = build_loader(data, 2, shuffle=shuffle, num_workers=2)
    for (images, mask, targets), (others, other_mask, other_targets) in zip(loader, expected, strict=True):
        assert torch.equal(images, others)
        assert (mask is None and other_mask is None) or torch.equal(mask, other_mask)
        assert [each["boxes"].tolist() for each in targets] == [each["boxes"].tolist() for each in other_targets]
    (warning,) = data.warnings
    assert "/dev/shm has 0 MB free" in warning
    assert "--shm-size" in warning
    assert "data.num_workers 0" in warning


def test_nothing_is_said_where_batches_fit_or_nothing_is_shared(dataset, monkeypatch):
    data = dataset(**SETTINGS)
    build_loader(data, 2, num_workers=2)
    assert not data.warnings
    as_if_free(monkeypatch, 10_000)
    build_loader(data, 2)
    assert not data.warnings


def test_workers_of_one_node_share_its_memory(dataset, monkeypatch):
    data = dataset(**SETTINGS)
    as_if_free(monkeypatch, 2 * 2 * loader.PREFETCH * largest_batch(data, 2))  # what one worker's two processes may use
    build_loader(data, 2, num_workers=2)
    assert not data.warnings
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    build_loader(data, 2, num_workers=2)
    assert data.warnings


def test_a_batch_that_does_not_come_is_an_error_that_says_what_to_do(dataset):
    data = dataset(**SETTINGS)
    data.images = lambda path, size: time.sleep(600)
    with pytest.raises(UserError, match=r"no batch came .* within 1 s") as error:
        list(build_loader(data, 2, num_workers=1, timeout_s=1))
    assert "data.num_workers 0" in str(error.value)
    assert "data.batch_timeout_s" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_error_of_a_loading_process_stays_as_it_is(dataset):
    data = dataset(**SETTINGS)
    data.images = lambda path, size: os._exit(3)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(build_loader(data, 2, num_workers=1, timeout_s=60))


ONE_EPOCH = """
import sys
from raydetr.config import load_config
from raydetr.data.coco import find_split
from raydetr.data.coco import CocoImages
from raydetr.data.loader import build_loader
from raydetr.data.transforms import train_transforms
settings = {"data.train_sizes": [800], "data.crop": 0.0}
data = load_config({"data.path": sys.argv[1], **settings}).data
train = CocoImages(find_split(data, "train"), train_transforms(data))
loader = build_loader(train, 4, shuffle=True, num_workers=2, timeout_s=120)
print(sum(len(targets) for _, _, targets in loader), *train.warnings)
"""


@pytest.mark.slow
def test_an_epoch_goes_through_64_mb_of_shared_memory(coco_folder):
    """As in a container of Docker or Kubernetes: batches of 40 MB are lost there without an error."""
    mount = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" "$@"']
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm is not permitted here")
    root = coco_folder(train=8, val=1, size=(400, 300))
    done = subprocess.run([*mount, sys.executable, "-c", ONE_EPOCH, root], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 /dev/shm has ")
