"""Masks of objects: what is read, and that they stay with their boxes through every transform."""

import json

import numpy as np
import pycocotools.mask as reference
import pytest
import torch
from PIL import Image

from raydetr.config import load_config
from raydetr.data.cache import DecodedImages
from raydetr.data.coco import CocoImages, find_split, load_coco
from raydetr.data.loader import build_loader, collate
from raydetr.data.masks import box_mask, decode_masks, encode_masks, mask_area, mask_box, read_segmentation
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import UserError

SIZE = (30, 40)  # height, width
SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]


def random_polygons(seed):
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(1, 60, 2))
    polygons = [
        (random.normal(0.5, 0.5, (random.integers(3, 8), 2)) * [width, height]).ravel().tolist() for _ in range(random.integers(1, 3))
    ]
    return polygons, (height, width)


def uncompressed(rle):
    """The run lengths of a mask, by columns, the first of them zeros."""
    pixels = reference.decode(rle).flatten(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *changes, len(pixels)]).tolist()
    return {"size": list(rle["size"]), "counts": [0, *runs] if pixels[0] else runs}


@pytest.mark.parametrize("seed", range(30))
def test_polygons_and_rles_are_read_as_pycocotools_reads_them(seed):
    """Random polygons cross themselves and reach out of the image."""
    polygons, size = random_polygons(seed)
    expected = reference.merge(reference.frPyObjects(polygons, *size))
    mask = read_segmentation(polygons, size)
    if not reference.area(expected):
        assert mask is None
        return
    assert mask == expected | {"counts": expected["counts"].decode()}
    json.dumps(mask)
    assert read_segmentation(mask, size) == read_segmentation(uncompressed(mask), size) == mask
    pixels = decode_masks([mask], size)
    assert (pixels[0] == reference.decode(mask)).all()
    assert encode_masks(pixels) == [mask]
    assert mask_area(mask) == reference.area(mask)
    assert mask_box(mask) == reference.toBbox(mask).tolist()


@pytest.mark.parametrize(
    "nothing", [None, [], {}, [[]], [[1, 2, 3, 4]], [[100, 100, 120, 100, 120, 120]], [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]]
)
def test_a_segmentation_without_a_pixel_is_no_mask(nothing):
    """Also a polygon of two points, one outside the image, and one smaller than a pixel."""
    assert read_segmentation(nothing, SIZE) is None


def test_a_mask_of_one_pixel_is_a_mask():
    pixel = np.zeros((1, *SIZE), bool)
    pixel[0, 7, 9] = True
    (rle,) = encode_masks(pixel)
    assert read_segmentation(rle, SIZE) == rle
    assert mask_area(rle) == 1
    assert mask_box(rle) == [9, 7, 1, 1]
    assert mask_area(read_segmentation([[9, 7, 10, 7, 10, 8, 9, 8]], SIZE)) == 1


def test_what_a_self_crossing_polygon_encloses_twice_is_not_in_its_mask():
    bow = read_segmentation([[0, 0, 20, 20, 20, 0, 0, 20]], SIZE)
    pixels = decode_masks([bow], SIZE)[0]
    assert pixels[10, 2]
    assert pixels[10, 18]
    assert not pixels[2, 10]


def test_the_mask_of_a_box_fills_it():
    assert mask_box(box_mask([4, 5, 6, 7], SIZE)) == [4, 5, 6, 7]
    assert mask_area(box_mask([4, 5, 6, 7], SIZE)) == 42


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon has 7 coordinates; x and y come in pairs"),
        ([[1, 2, float("nan"), 4, 5, 6]], "is not a list of numbers"),
        ([1, 2, 3, 4, 5, 6], "polygon 1 is not a list of numbers"),
        (["text"], "is not a list of numbers"),
        ("text", "neither polygons .* nor an RLE"),
        ({"size": [40, 30], "counts": [1200]}, "an RLE of 30 x 40 pixels in an image of 40 x 30"),
        ({"size": [30, 40], "counts": [7]}, "do not add up to 40 x 30 pixels"),
        ({"size": [30, 40], "counts": [1300, -100]}, "do not add up"),
        ({"size": [30, 40], "counts": [600, "x"]}, "do not add up"),
        ({"size": [30, 40], "counts": "a\x7fb"}, "do not add up"),
        ({"size": [30, 40], "counts": "o" * 40}, "do not add up"),
        ({"size": [30, 40], "counts": ""}, "do not add up"),
        ({"size": [30], "counts": []}, "is not an RLE with size"),
        ({"counts": "abc"}, "is not an RLE with size"),
        ({"size": [30, 40]}, "is not an RLE with size"),
    ],
)
def test_a_bad_segmentation_is_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        read_segmentation(bad, SIZE)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


# --------------------------------------------------------------------------------------------------------------- data sets


def write(folder, annotations, sizes=((96, 64), (64, 96))):
    """A data set whose train and val are the same images of these (width, height), with annotations ``(image, xywh, segmentation)``."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, (width, height) in enumerate(sizes):
        coco["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        for split in ("train", "val"):
            (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (90, 120, 30)).save(folder / f"{split}2017" / f"{number}.png")
    for number, (image, box, segmentation, *crowd) in enumerate(annotations, 1):
        entry = {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(bool(crowd))}
        coco["annotations"].append(entry | ({} if segmentation is None else {"segmentation": segmentation}))
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / "annotations" / f"custom_{split}.json").write_text(json.dumps(coco))
    return folder


def random_objects(seed, count=12):
    """Boxes, and boxes without their corners, of all sizes in both images."""
    random, objects = np.random.default_rng(seed), []
    for number in range(count):
        width, height = ((96, 64), (64, 96))[number % 2]
        w, h = random.uniform(6, width / 2), random.uniform(6, height / 2)
        x, y = random.uniform(0, width - w), random.uniform(0, height - h)
        cut = 0 if number % 3 == 0 else 0.3
        corners = [(cut, 0), (1 - cut, 0), (1, cut), (1, 1 - cut), (1 - cut, 1), (cut, 1), (0, 1 - cut), (0, cut)]
        objects.append((number % 2, [x, y, w, h], [[value for a, b in corners for value in (x + a * w, y + b * h)]]))
    return objects


def settings(folder, **changes):
    small = {"data.train_sizes": [40, 47], "data.crop_resize": [64], "data.crop_min": 48, "data.crop_max": 60, "data.val_size": 55}
    return load_config({"data.path": str(folder), **small, **{f"data.{name}": value for name, value in changes.items()}}).data


def extents(target):
    """The boxes of a target and those around its masks, xyxy in pixels, and whether each mask has a pixel."""
    height, width = target["size"].tolist()
    center, side = target["boxes"].split(2, 1)
    boxes = torch.cat([center - side / 2, center + side / 2], 1) * torch.tensor([width, height, width, height])
    around = [torch.zeros(4)] * len(boxes)
    for number, mask in enumerate(target["masks"]):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            around[number] = torch.tensor([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()
    return boxes, torch.stack(around) if around else boxes, target["masks"].flatten(1).any(1)


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_and_its_box_stay_together_through_resize_and_flip(tmp_path, seed):
    data = settings(write(tmp_path, random_objects(seed)), crop=0.0, flip=0.5)
    for split, transforms in (("train", train_transforms(data)), ("val", val_transforms(data))):  # both make images smaller
        dataset = CocoImages(find_split(data, split), transforms, masks=True)
        for epoch in range(8):
            for index in range(2):
                _, target = dataset[epoch, index]
                boxes, around, there = extents(target)
                assert len(there) == 6
                assert there.all()
                assert (boxes - around).abs().max() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_and_its_box_stay_together_through_a_crop(tmp_path, seed):
    """A mask is never outside of its box by more than a pixel, and one that fills its box still does."""
    objects = random_objects(seed)
    full = [[number % 3 == 0 for number, each in enumerate(objects) if each[0] == image] for image in (0, 1)]
    data = settings(write(tmp_path, objects), crop=1.0)
    dataset = CocoImages(find_split(data, "train"), train_transforms(data), masks=True)
    cut = 0
    for epoch in range(20):
        for index in range(2):
            image, target = dataset[epoch, index]
            assert target["masks"].shape[1:] == image.shape[1:]
            boxes, around, there = extents(target)
            cut += 6 - len(boxes)
            beyond = torch.cat([boxes[:, :2] - around[:, :2], around[:, 2:] - boxes[:, 2:]], 1)[there]
            assert not len(beyond) or beyond.max() <= 1
            if len(boxes) == 6:  # nothing was dropped: the order tells which they are
                filled = torch.tensor(full[index]) & there
                assert not filled.any() or (boxes - around)[filled].abs().max() <= 1
    assert cut  # the crops were not harmless


def test_masks_are_padded_with_their_images(tmp_path):
    data = settings(write(tmp_path, random_objects(0)))
    dataset = CocoImages(find_split(data, "val"), val_transforms(data), masks=True)
    samples = [dataset[0], dataset[1]]
    images, padding, targets = collate(samples, pad_to=32)
    for (_, before), target, padded in zip(samples, targets, padding, strict=True):
        assert target["masks"].shape[1:] == images.shape[2:]
        assert target["masks"].sum() == before["masks"].sum()
        assert not target["masks"][:, padded].any()


def test_crowds_are_left_out_and_boxes_without_a_mask_are_marked(tmp_path):
    whole = {"size": [64, 96], "counts": [0, 64 * 96]}
    objects = [(0, [10, 5, 10, 10], [SQUARE]), (0, [0, 0, 96, 64], whole, "crowd"), (0, [30, 30, 8, 8], None), (1, [0, 0, 9, 9], None)]
    data = settings(write(tmp_path, objects))
    dataset = CocoImages(find_split(data, "val"), val_transforms(data), masks=True)
    _, target = dataset[0]
    assert target["has_mask"].tolist() == [True, False]
    assert target["masks"].flatten(1).any(1).tolist() == [True, False]
    assert target["masks"].dtype == torch.bool
    assert dataset.has_masks
    assert any("2 annotations (first: annotation id 3) without a mask" in line for line in dataset.warnings)
    assert [each["segmentation"] is None for each in dataset.coco["annotations"]] == [False, False, True, True]


def test_nothing_is_read_or_kept_without_masks(tmp_path):
    folder = write(tmp_path, [(0, [1, 1, 5, 5], [[1, 2, 3]])])  # a polygon that cannot be read
    data = settings(folder)
    dataset = CocoImages(find_split(data, "val"), val_transforms(data))
    assert "segmentation" not in dataset.coco["annotations"][0]
    assert not {"masks", "has_mask"} & set(dataset[0][1])
    assert dataset.rles is None
    assert not dataset.has_masks
    assert len(DecodedImages(dataset.files, 10**6).pixels) == 2 * 3 * 64 * 96
    with pytest.raises(UserError, match=r"custom_val\.json: annotation id 1: segmentation: a polygon has 3 coordinates"):
        load_coco(find_split(data, "val").annotations, masks=True)


def test_masks_are_kept_packed_with_the_decoded_image(tmp_path):
    data = settings(write(tmp_path, random_objects(1)))
    dataset = CocoImages(find_split(data, "val"), val_transforms(data), masks=True)
    true = [target["masks"] for _, target in (dataset[0], dataset[1])]
    cache = DecodedImages(dataset.files, 10**6, rles=dataset.rles)
    assert len(cache.pixels) == 2 * (3 * 64 * 96 + 6 * 64 * 96 // 8)
    dataset.images, dataset.decode_masks = cache, cache.masks
    for _ in range(2):  # filled, and read
        assert all(torch.equal(dataset[index][1]["masks"], masks) for index, masks in enumerate(true))
    kept = cache.masks(*dataset.files[0], dataset.rles[0])
    cache.pixels[3 * 64 * 96] ^= 128  # the first pixel of the first mask
    assert cache.masks(*dataset.files[0], dataset.rles[0])[0, 0, 0] != kept[0, 0, 0]
    assert (cache.masks(*dataset.files[0], dataset.rles[0][:2]) == kept[:2]).all()  # other masks than those that are kept are decoded


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_masks_over(tmp_path, workers):
    data = settings(write(tmp_path, random_objects(2)))
    dataset = CocoImages(find_split(data, "val"), val_transforms(data), masks=True)
    batches = list(build_loader(dataset, 2, num_workers=workers))
    assert [tuple(target["masks"].shape[1:]) for _, _, targets in batches for target in targets] == [(55, 82), (82, 55)]
