import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from raydetr.data.loader import build_loader, collate, draw_weights
from raydetr.data.transforms import train_transforms
from raydetr.errors import UserError
from tests.data.coco_files import dataset, one_line, rewrite, same, settings


def test_collate_pads_to_the_largest():
    small_one, wide = torch.rand(3, 4, 5), torch.rand(3, 2, 7)
    targets = [{"labels": torch.tensor([1])}, {"labels": torch.tensor([2])}]
    images, mask, collated = collate([(small_one, targets[0]), (wide, targets[1])])
    assert images.shape == (2, 3, 4, 7)
    assert mask.shape == (2, 4, 7)
    assert mask.dtype == torch.bool
    assert collated == targets
    assert torch.equal(images[0, :, :, :5], small_one)
    assert torch.equal(images[1, :, :2], wide)
    assert not images[mask[:, None].expand_as(images)].any()
    assert mask.sum() == 4 * 2 + 2 * 7
    assert mask[0, :, 5:].all()
    assert mask[1, 2:].all()


def test_collate_has_no_mask_where_nothing_is_padded():
    images, mask, _ = collate([(torch.rand(3, 4, 5), {}), (torch.rand(3, 4, 5), {})])
    assert mask is None
    assert images.shape == (2, 3, 4, 5)
    assert collate([(torch.rand(3, 9, 5), {})])[1] is None


@pytest.mark.parametrize("pad_to", [1, 4, 64])
def test_the_sides_of_a_batch_are_rounded_up(pad_to):
    """Nothing but the size of the batch changes: pixels, targets, and what the mask says of them."""
    images = [torch.rand(3, 4, 5), torch.rand(3, 2, 7)]
    expected, expected_mask, _ = collate([(image, {}) for image in images])
    padded, mask, _ = collate([(image, {}) for image in images], pad_to)
    assert padded.shape[2:] == {1: (4, 7), 4: (4, 8), 64: (64, 64)}[pad_to]
    assert torch.equal(padded[:, :, :4, :7], expected)
    assert torch.equal(mask[:, :4, :7], expected_mask)
    assert mask[:, 4:].all()
    assert mask[:, :, 7:].all()
    assert not padded[mask[:, None].expand_as(padded)].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_loading_process_makes_its_batches_where_it_hands_them_over(dtype):
    batch = [((200 * torch.rand(3, height, 5)).to(dtype), {"labels": torch.tensor([1])}) for height in (4, 6)]
    plain, shared = collate(batch, 4), collate(batch, 4, share=True)
    for name, one, other in zip(("images", "mask"), plain, shared, strict=False):
        assert (one.is_shared(), other.is_shared()) == (False, True), name
        assert other.dtype == one.dtype
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("num_workers", "fits", "share"), [(0, True, False), (1, True, True), (1, False, None)])
def test_batches_are_shared_by_loading_processes_where_there_is_room(coco_folder, monkeypatch, num_workers, fits, share):
    monkeypatch.setattr("raydetr.data.loader.fits_shared_memory", lambda needed: fits)
    loader = build_loader(dataset(coco_folder(train=2), "train"), 2, num_workers=num_workers)
    assert loader.collate_fn.keywords.get("share") is share


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_rounds_sides_up(coco_folder, num_workers):
    train = dataset(coco_folder(train=2, size=(96, 64)), "train")
    ((images, mask, _),) = build_loader(train, 2, shuffle=True, num_workers=num_workers, pad_to=128)
    assert (images.shape[2] % 128, images.shape[3] % 128) == (0, 0)
    assert mask is not None


def ids_of(loader) -> list[list[int]]:
    return [[target["image_id"].item() for target in targets] for _, _, targets in loader]


def test_training_batches_are_shuffled_anew_every_epoch(coco_folder):
    train = dataset(coco_folder(train=10), "train")
    loader = build_loader(train, 2, shuffle=True, seed=3)
    first = ids_of(loader)
    assert [len(batch) for batch in first] == [2] * 5 == [2] * len(loader)
    assert sorted(itertools.chain(*first)) == list(range(10, 20))
    assert ids_of(loader) == first
    train.set_epoch(1)
    assert ids_of(loader) != first
    train.set_epoch(0)
    assert ids_of(loader) == first == ids_of(build_loader(train, 2, shuffle=True, seed=3))
    assert ids_of(build_loader(train, 2, shuffle=True, seed=4)) != first


def test_what_does_not_fill_a_training_batch_is_left_out(coco_folder):
    train = dataset(coco_folder(train=5), "train")
    assert [len(batch) for batch in ids_of(build_loader(train, 2, shuffle=True))] == [2, 2]


def test_fewer_images_than_a_batch_are_one_batch(coco_folder):
    train = dataset(coco_folder(train=3), "train")
    loader = build_loader(train, 8, shuffle=True)
    assert len(loader) == 1
    assert sorted(ids_of(loader)[0]) == [10, 11, 12]


@pytest.mark.parametrize(("images", "workers", "batch"), [(7, 2, 2), (8, 3, 2), (2, 3, 1), (3, 2, 4), (1, 4, 2)])
def test_every_training_worker_has_as_many_batches(coco_folder, images, workers, batch):
    train = dataset(coco_folder(train=images), "train")
    per_worker = [ids_of(build_loader(train, batch, rank, workers, shuffle=True)) for rank in range(workers)]
    shapes = {tuple(map(len, batches)) for batches in per_worker}
    assert len(shapes) == 1
    assert next(iter(shapes))  # at least one batch
    if images == 8:
        assert {image_id for batches in per_worker for each in batches for image_id in each} <= set(range(10, 18))


@pytest.fixture
def of_many_sizes(coco_folder):
    root = coco_folder(train=21)
    several = settings(root, train_sizes="32 48 64 80 96", crop=0.5, crop_resize="60 90", crop_min=30, crop_max=60)
    return dataset(root, "train", train_transforms(several))


def test_the_size_is_known_before_the_picture_is_read(of_many_sizes):
    sizes = {(epoch, index): of_many_sizes.size_of(epoch, index) for epoch in (0, 3) for index in range(21)}
    assert len(set(sizes.values())) > 10
    state = torch.get_rng_state()
    assert {each: tuple(of_many_sizes[each][0].shape[1:]) for each in sizes} == sizes
    assert torch.equal(torch.get_rng_state(), state)


def drawn(train, epoch, **options):
    """The epoch's batches of (epoch, index)."""
    train.set_epoch(epoch)
    return list(build_loader(train, 2, shuffle=True, **options).batch_sampler)


@pytest.mark.parametrize("window", [3, 64])
def test_batches_of_like_sizes_have_the_images_that_were_drawn(of_many_sizes, monkeypatch, window):
    monkeypatch.setattr("raydetr.data.loader.LikeSizes.window", window)
    for rank, epoch in itertools.product((0, 1), (0, 1)):
        share = {"rank": rank, "world_size": 2, "seed": 3}
        batches = drawn(of_many_sizes, epoch, group_sizes=True, **share)
        assert [len(batch) for batch in batches] == [2] * 5
        assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*drawn(of_many_sizes, epoch, **share)))
        assert batches == drawn(of_many_sizes, epoch, group_sizes=True, **share)
        assert batches != drawn(of_many_sizes, epoch, group_sizes=True, **share | {"seed": 4})


def test_batches_of_like_sizes_are_filled_up_less(of_many_sizes):
    def filled_up(group_sizes):
        sizes = [
            [of_many_sizes.size_of(*image) for image in batch]
            for epoch in range(4)
            for batch in drawn(of_many_sizes, epoch, group_sizes=group_sizes)
        ]
        return (
            sum(len(each) * max(height for height, _ in each) * max(width for _, width in each) for each in sizes)
            / sum(height * width for each in sizes for height, width in each)
            - 1
        )

    assert filled_up(True) < 0.6 * filled_up(False)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_evaluation_counts_every_image_once(coco_folder, workers):
    val = dataset(coco_folder(val=5))
    per_worker = [ids_of(build_loader(val, 2, rank, workers)) for rank in range(workers)]
    assert sorted(itertools.chain(*itertools.chain(*per_worker))) == [10, 11, 12, 13, 14]
    assert max(map(len, per_worker)) - min(map(len, per_worker)) <= 1
    assert per_worker == [ids_of(build_loader(val, 2, rank, workers)) for rank in range(workers)]


def test_evaluation_pads_nothing(coco_folder):
    """Photographs of different sizes never come together, so that what is predicted does not depend on the batch."""
    root = coco_folder(val=4)
    path = root / "val2017" / "val_001.jpg"
    Image.open(path).resize((60, 80)).save(path)
    rewrite(root, lambda coco: coco["images"][1].update(width=60, height=80))
    loader = build_loader(dataset(root), 3)
    assert ids_of(loader) == [[10, 12, 13], [11]]
    assert [mask for _, mask, _ in loader] == [None, None]


def test_loading_processes_change_nothing_and_hear_of_the_epoch(coco_folder):
    root = coco_folder(train=6)
    alone, helped = dataset(root, "train"), dataset(root, "train")
    loaders = build_loader(alone, 2, shuffle=True), build_loader(helped, 2, shuffle=True, num_workers=2)
    epochs = []
    state = torch.get_rng_state()
    for epoch in (0, 1, 5):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        for (images, mask, targets), (images2, mask2, targets2) in zip(*batches, strict=True):
            assert torch.equal(images, images2)
            assert (mask is None and mask2 is None) or torch.equal(mask, mask2)
            assert all(same((images, a), (images2, b)) for a, b in zip(targets, targets2, strict=True))
        epochs.append(torch.cat([images.flatten() for images, _, _ in batches[1]]))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(each[:5000].tolist()) for each in epochs}) == 3


def test_an_epoch_that_was_broken_off_does_not_reach_into_the_next(coco_folder):
    train = dataset(coco_folder(train=8), "train")
    loader = build_loader(train, 2, shuffle=True, num_workers=1)
    next(iter(loader))
    train.set_epoch(1)
    got = list(loader)
    expected = list(build_loader(train, 2, shuffle=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, expected, strict=True))


class InWorker:
    """A reader that tells whether it runs in a loading process."""

    def __call__(self, path, size):
        return torch.full((3, size[1], size[0]), 255 if get_worker_info() else 0, dtype=torch.uint8)


def test_pictures_are_read_in_loading_processes(coco_folder):
    val = dataset(coco_folder(), images=InWorker())
    assert next(iter(build_loader(val, 1, num_workers=1)))[0].min() > 0
    assert next(iter(build_loader(val, 1)))[0].max() < 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_picture_is_named_in_one_line(coco_folder, num_workers):
    root = coco_folder(val=3)
    path = root / "val2017" / "val_001.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError) as error:
        list(build_loader(dataset(root), 1, num_workers=num_workers))
    assert one_line(error).startswith(f"{path}: broken or truncated image")


KILLED = """
import multiprocessing, threading, time, torch
from raydetr.data.loader import Loader

class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return index

def load():  # as in a trial of a search, which does not run in its process's main thread
    try:
        for _ in Loader(Stuck(), batch_size=1, num_workers=1, timeout=600):
            for process in multiprocessing.active_children():
                process.kill()
    except RuntimeError as error:
        print(error)

thread = threading.Thread(target=load)
thread.start()
thread.join()
"""


def test_a_killed_loading_process_is_noticed_in_any_thread():
    # In a process of its own: where the main thread has loaded before, torch tells that one instead.
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120, check=True)
    assert "exited unexpectedly" in done.stdout


def test_images_of_rare_categories_are_drawn_more_often(coco_folder):
    counts = np.array([[2, 0]] * 9 + [[1, 1]])
    weights = draw_weights(counts, 0.4)
    assert weights.tolist() == [1.0] * 9 + [2.0]
    assert draw_weights(counts, 0.05).tolist() == [1.0] * 10
    assert draw_weights(np.zeros((3, 2), int), 0.5).tolist() == [1.0] * 3
    train = dataset(coco_folder(train=10), "train")
    drawn_per_epoch = []
    for epoch in range(20):
        train.set_epoch(epoch)
        batches = [list(build_loader(train, 2, rank, 2, shuffle=True, weights=weights).batch_sampler) for rank in (0, 1)]
        ids = [index for worker in batches for batch in worker for _, index in batch]
        assert len(ids) == 8, "as many as without, two workers with two whole batches each"
        draws = [image for worker in batches for batch in worker for image in batch]
        assert len(set(draws)) == len(draws), "an image that is drawn twice in an epoch is transformed in two ways"
        drawn_per_epoch.append(ids)
    assert 1.4 < np.mean([ids.count(9) for ids in drawn_per_epoch]) < 2.2, "2 of 11 shares of ten images, of which eight are used"
    assert len({tuple(ids) for ids in drawn_per_epoch}) == 20
    assert any(len(set(ids)) < len(ids) for ids in drawn_per_epoch)
    one = build_loader(train, 2, shuffle=True, weights=np.ones(10)).batch_sampler
    assert sorted(index for batch in one for _, index in batch) == list(range(10))
