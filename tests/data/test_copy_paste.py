"""Objects that are pasted into other images: pixels, masks and boxes agree, whatever is drawn."""

import json

import numpy as np
import pytest
import torch

from raydetr.config import load_config
from raydetr.data.copy_paste import VISIBLE, paste
from raydetr.data.loader import build_loader
from raydetr.data.scene import Scene
from raydetr.data.sets import load_sets
from raydetr.data.transforms import drawn_from
from raydetr.errors import UserError
from raydetr.launch.tune import tune
from tests.helpers import add_outlines
from tests.training.runs import run, settings

SEEDS = range(40)


def scene_of(seed: int, color: int, all_have_masks=True) -> Scene:
    """An image of one color with ellipses, each of its own color and label, of which later ones lie on earlier ones."""
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(40, 120, 2))
    rows, columns = np.mgrid[:height, :width]
    masks = []
    for _ in range(random.integers(1, 5)):
        middle, radius = random.uniform(0.2, 0.8, 2) * [height, width], random.uniform(0.08, 0.25, 2) * [height, width]
        shape = ((rows - middle[0]) / radius[0]) ** 2 + ((columns - middle[1]) / radius[1]) ** 2 <= 1
        masks = [each & ~shape for each in masks] + [shape]
    masks = torch.from_numpy(np.stack([each for each in masks if each.any()]))
    pixels = torch.full((3, height, width), color, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        pixels[:, mask] = color + 10 * (number + 1)
    has_mask = torch.ones(len(masks), dtype=torch.bool)
    if not all_have_masks:
        has_mask[0] = False
    xyxy = torch.stack([box_around(mask) for mask in masks])
    masks[~has_mask] = False
    return Scene(pixels, xyxy, torch.arange(len(masks)) + color, masks.sum((1, 2)).float(), masks, has_mask)


def box_around(mask):
    rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def pasted(seed, **kwargs) -> tuple[Scene, Scene, Scene]:
    scene, source = scene_of(seed, 10, **kwargs), scene_of(seed + 1000, 110)
    with drawn_from(seed):
        return scene, source, paste(scene, source)


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_masks_and_boxes_agree(seed):
    scene, source, new = pasted(seed)
    old, kept = scene.pixels.clone(), len(scene.labels)
    assert new.pixels.shape == scene.pixels.shape
    assert torch.equal(scene.pixels, old)
    assert len({len(each) for each in (new.xyxy, new.labels, new.area, new.masks, new.has_mask)}) == 1
    assert (new.masks.sum(0) <= 1).all()
    for number, mask in enumerate(new.masks):
        assert torch.equal(new.xyxy[number], box_around(mask))
        assert new.area[number] == pytest.approx(float(mask.sum()))
        # The colors of an object of its own image are those of its label.
        first = scene if number < kept else source
        color = int(first.pixels[0][first.masks[list(first.labels).index(new.labels[number])]][0])
        inside = new.pixels[0][mask]
        assert (inside == color).all() if number < kept else (inside >= 110).all()
    ground = ~new.masks.any(0)
    assert torch.equal(new.pixels[:, ground], scene.pixels[:, ground])
    assert torch.equal(new.labels[:kept], scene.labels)
    assert (new.masks[:kept].sum((1, 2)) >= VISIBLE * scene.masks.sum((1, 2))).all()
    assert set(new.labels[kept:].tolist()) <= set(source.labels.tolist())


def test_most_images_get_objects_and_some_hide_parts_of_others():
    results = [pasted(seed) for seed in SEEDS]
    added = [len(new.labels) - len(scene.labels) for scene, _, new in results]
    assert np.mean(np.array(added) > 0) > 0.8
    assert any((new.masks[: len(scene.labels)].sum() < scene.masks.sum()) for scene, _, new in results)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_nothing_is_pasted_on_the_box_of_an_object_without_a_mask(seed):
    scene, _, new = pasted(seed, all_have_masks=False)
    left, top, right, bottom = (int(side) for side in scene.xyxy[0])
    assert torch.equal(new.pixels[:, top:bottom, left:right], scene.pixels[:, top:bottom, left:right])
    assert torch.equal(new.xyxy[0], scene.xyxy[0])
    assert not new.has_mask[0]


def sets_of(folder, masks=False, **changes):
    base = {"model.preset": "detr_tiny", "data.path": str(folder), "data.train_sizes": [48, 64], "data.val_size": 48, "data.crop": 0.5}
    base |= {"data.crop_resize": [48], "data.crop_min": 24, "data.crop_max": 40}
    return load_sets(load_config(base, changes).data, 3, masks=masks)


def test_off_is_exactly_as_without_masks(coco_folder):
    plain, _ = sets_of(coco_folder())
    train, val = sets_of(add_outlines(coco_folder(folder="outlines")), **{"data.copy_paste": 1.0})
    train.copy_paste = 0.0
    for index in range(len(plain)):
        (image, target), (expected, wanted) = train[2, index], plain[2, index]
        assert torch.equal(image, expected)
        assert target.keys() == wanted.keys()
        assert all(torch.equal(target[name], wanted[name]) for name in target)
    assert val.copy_paste == 0
    assert "masks" not in val[0][1]


@pytest.mark.parametrize("masks", [False, True])
def test_training_images_get_objects_of_others_and_keep_their_size(coco_folder, masks):
    folder = add_outlines(coco_folder(boxes=2))
    train, _ = sets_of(folder, masks, **{"data.copy_paste": 1.0, "data.crop": 0.0})
    more = 0
    for epoch in range(4):
        for index in range(len(train)):
            image, target = train[epoch, index]
            assert train.size_of(epoch, index) == tuple(image.shape[1:])
            count = len(target["labels"])
            more += count - 2
            assert len(target["boxes"]) == len(target["area"]) == len(target["iscrowd"]) == count
            assert ("masks" in target) == masks
            assert (target["boxes"] > 0).all()
            if masks:
                assert target["masks"].shape == (count, *image.shape[1:])
                assert target["masks"].flatten(1).any(1).all()
    assert more > 8
    again, _ = sets_of(folder, masks, **{"data.copy_paste": 1.0, "data.crop": 0.0})
    assert torch.equal(again[3, 1][0], train[3, 1][0])
    assert any(not torch.equal(train[0, index][0], train[1, index][0]) for index in range(4))
    (_, _, targets), *_ = build_loader(train, 4, shuffle=True)
    assert len(targets) == 4


def test_parts_of_a_set_paste_of_their_own_images(coco_folder):
    folder = add_outlines(coco_folder(train=8))
    train, val = sets_of(folder, **{"data.copy_paste": 1.0, "data.folds": 4, "data.fold": 1})
    assert (train.copy_paste, val.copy_paste) == (1.0, 0.0)
    read = []
    train.images = lambda path, size, decode=train.images: read.append(path) or decode(path, size)
    for index in range(len(train)):
        train[0, index]
    assert set(read) == {path for path, _ in train.files}
    half, _ = sets_of(folder, **{"data.copy_paste": 1.0, "data.fraction": 0.5})
    assert half.copy_paste == 1.0
    both, own = sets_of(folder, **{"data.copy_paste": 1.0, "data.reshuffle": True})
    assert (both.copy_paste, own.copy_paste) == (1.0, 0.0)


def test_a_set_without_masks_is_refused_in_one_line(coco_folder):
    with pytest.raises(UserError, match=r"data\.copy_paste: .*custom_train\.json has no mask.* set data\.copy_paste 0") as caught:
        run(settings(coco_folder(), "none", data__copy_paste=0.5))
    assert "\n" not in str(caught.value)


def test_a_search_over_it_is_refused_before_its_first_trial(coco_folder, tmp_path):
    known = settings(coco_folder(), "search", run__storage=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.copy_paste: .*custom_train\.json has no mask"):
        tune(known, {"data.copy_paste": {"choice": [0, 0.5]}}, trials=2)
    assert not (tmp_path / "search").exists()


def test_one_image_with_masks_is_enough(coco_folder):
    folder = add_outlines(coco_folder())
    file = folder / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    for each in coco["annotations"]:
        if each["image_id"] != 10:
            del each["segmentation"]
    file.write_text(json.dumps(coco))
    train, _ = sets_of(folder, **{"data.copy_paste": 1.0, "data.crop": 0.0})
    assert len(train[0, 0][1]["labels"]) == 3  # there is no other image to cut objects out of
    metrics, _ = run(settings(folder, "one", data__copy_paste=1.0, optim__epochs=1))
    assert metrics["epoch"] == 1
