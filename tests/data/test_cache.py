import pickle

import pytest
import torch

from raydetr.config import load_config
from raydetr.data import cache
from raydetr.data.cache import DecodedImages, cache_limit
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.images import read_image
from raydetr.data.loader import build_loader
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError

PICTURE = 3 * 96 * 64  # bytes of one of the small set's


@pytest.fixture
def dataset(coco_folder):
    data = load_config({"data.path": str(coco_folder(train=4, val=2)), "data.val_size": 64}).data
    return CocoImages(find_split(data, "train"), val_transforms(data))


def test_a_picture_is_decoded_once_and_is_the_same(dataset):
    images = DecodedImages(dataset.files, 10 * PICTURE)
    for path, size in dataset.files:
        true = read_image(path, size)
        assert torch.equal(images(path, size), true)
        path.unlink()
        again = images(path, size)
        assert torch.equal(again, true)
        assert again.stride() == true.stride()


def test_what_the_limit_leaves_out_is_decoded_every_time(dataset):
    images = DecodedImages(dataset.files, 3 * PICTURE - 1)
    first = [images(*file) for file in dataset.files]
    for path, _ in dataset.files[:2]:
        path.unlink()
    assert all(torch.equal(images(*file), before) for file, before in zip(dataset.files, first, strict=True))
    dataset.files[2][0].unlink()
    with pytest.raises(UserError, match="train_002"):
        images(*dataset.files[2])


def test_loading_processes_fill_and_read_the_same_memory(dataset):
    dataset.images = DecodedImages(dataset.files, 10 * PICTURE)
    before = [batch[0] for batch in build_loader(dataset, 2, num_workers=2)]
    assert dataset.images.filled.all()
    for path, _ in dataset.files:
        path.unlink()
    after = [batch[0] for batch in build_loader(dataset, 2, num_workers=1)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_filled_cache_travels_and_a_half_filled_one_does_not(dataset):
    images = DecodedImages(dataset.files, 10 * PICTURE)
    true = images(*dataset.files[0])
    half = pickle.loads(pickle.dumps(images))
    assert not half.slots
    assert torch.equal(half(*dataset.files[0]), true)
    images.fill()
    whole = pickle.loads(pickle.dumps(images))
    dataset.files[0][0].unlink()
    assert torch.equal(whole(*dataset.files[0]), true)


def test_filling_names_a_broken_picture(dataset):
    path, _ = dataset.files[1]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"train_001\.jpg: broken"):
        DecodedImages(dataset.files, 10 * PICTURE).fill()


def test_nothing_is_kept_without_memory_for_it(dataset):
    images = DecodedImages(dataset.files, cache_limit(load_config({"data.cache_gb": 0}).data))
    images.fill()
    assert not images.slots
    assert torch.equal(images(*dataset.files[0]), read_image(*dataset.files[0]))


def test_the_limit_is_a_quarter_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CGROUP_LIMIT", tmp_path / "memory.max")
    data = load_config().data
    of_machine = cache_limit(data)
    assert of_machine > 1e8
    (tmp_path / "memory.max").write_text("max\n")
    assert cache_limit(data) == of_machine
    (tmp_path / "memory.max").write_text("400000000\n")
    assert cache_limit(data) == 1e8
    assert cache_limit(load_config({"data.cache_gb": 0.5}).data) == 5e8
