import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from raydetr.config import load_config
from raydetr.data.formats.convert import convert
from raydetr.data.images import read_image
from raydetr.data.loader import build_loader
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import coco_metrics
from tests.data.coco_files import dataset, one_line, rewrite, same, settings


@pytest.fixture
def known(coco_folder):
    """One picture, 100 x 50, with boxes of two categories, a crowd, and one that reaches out of it; and one without any."""
    root = coco_folder(val=2, size=(100, 50), boxes=0)

    def change(coco):
        boxes = [([10, 5, 20, 10], 7, 0, 33), ([0, 0, 100, 50], 7, 1, 5000), ([90, 40, 20, 20], 3, 0, None), ([50, 25, 50, 25], 3, 0, None)]
        coco["annotations"] = [
            {"id": 0, "image_id": 11, "category_id": category, "bbox": bbox, "iscrowd": crowd, **({"area": area} if area else {})}
            for bbox, category, crowd, area in boxes
        ]

    rewrite(root, change)
    return root


def test_targets(known):
    val = dataset(known)
    assert val.categories == [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]
    assert val.image_ids == [10, 11]
    assert len(val) == 2
    image, target = dataset(known, transforms=val_transforms(settings(val_size=144, max_size=256)))[1]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.shape == (3, 128, 256)  # 144 would make the long side exceed 256
    torch.testing.assert_close(
        target["boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.95, 0.9, 0.1, 0.2], [0.75, 0.75, 0.5, 0.5]]), rtol=0, atol=1e-6
    )
    expected = {
        "labels": [1, 0, 0],
        "area": [33, 400, 1250],
        "iscrowd": [0, 0, 0],
        "image_id": [11],
        "orig_size": [50, 100],
        "size": [128, 256],
    }
    assert {name: target[name].tolist() for name in expected} == expected
    kinds = {"boxes": torch.float32, "area": torch.float32} | dict.fromkeys(
        ("labels", "iscrowd", "image_id", "orig_size", "size"), torch.int64
    )
    assert {name: target[name].dtype for name in target} == kinds


def test_crowds_are_for_evaluation_only(known):
    val = dataset(known)
    assert [box["iscrowd"] for box in val.coco["annotations"]] == [0, 1, 0, 0]
    assert [box["id"] for box in val.coco["annotations"]] == [1, 2, 3, 4]
    assert len(val[1][1]["labels"]) == 3


def test_a_picture_without_boxes(known):
    _, target = dataset(known)[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)
    train = dataset(known, transforms=train_transforms(settings(known)))
    for epoch in range(10):
        assert train[epoch, 0][1]["boxes"].shape == (0, 4)


def test_boxes_belong_to_their_picture_in_whatever_order_they_stand(coco_folder):
    root = coco_folder(val=5, boxes=2)
    expected = [target["boxes"] for _, target in dataset(root)]

    def change(coco):
        coco["images"].reverse()
        coco["annotations"] = coco["annotations"][::2] + coco["annotations"][1::2]

    rewrite(root, change)
    val = dataset(root)
    assert val.image_ids == [10, 11, 12, 13, 14]
    for (_, target), boxes in zip(val, expected, strict=True):
        assert torch.equal(target["boxes"], boxes)


def test_boxes_that_a_crop_empties_go_with_all_that_is_theirs(coco_folder):
    root = coco_folder(train=1, boxes=6, size=(300, 200))
    data = load_config({"model.preset": "detr_tiny", "data.crop": 1.0, "data.crop_min": 60, "data.crop_max": 90}).data
    train = dataset(root, "train", train_transforms(data))
    numbers = set()
    for epoch in range(30):
        _, target = train[epoch, 0]
        numbers.add(len(target["boxes"]))
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"]) == len(target["iscrowd"])
        assert (target["boxes"][:, 2:] > 0).all()
        corners = target["boxes"][:, :2] - target["boxes"][:, 2:] / 2, target["boxes"][:, :2] + target["boxes"][:, 2:] / 2
        assert corners[0].numel() == 0 or (corners[0].min() > -1e-6 and corners[1].max() < 1 + 1e-6)
    assert len(numbers) > 2


def test_labels_stay_with_their_boxes_through_crops(coco_folder):
    """Things of category 3 are red and those of 7 blue: the colour at a box's middle must be its label's."""
    root = coco_folder(train=1, boxes=0, size=(200, 100))
    pixels = np.full((100, 200, 3), 90, np.uint8)
    things = [(10, 40, 3), (150, 10, 7), (60, 50, 3), (110, 60, 7)]
    for x, y, category in things:
        pixels[y : y + 30, x : x + 30] = (255, 0, 0) if category == 3 else (0, 0, 255)
    Image.fromarray(pixels).save(root / "train2017" / "train_000.jpg", quality=100, subsampling=0)
    boxes = [{"image_id": 10, "category_id": category, "bbox": [x, y, 30, 30]} for x, y, category in things]
    rewrite(root, lambda coco: coco.update(annotations=boxes), "train")
    data = load_config({"model.preset": "detr_tiny", "data.crop": 1.0, "data.crop_resize": [100], "data.crop_min": 60}).data
    train, seen = dataset(root, "train", train_transforms(data)), set()
    for epoch in range(40):
        image, target = train[epoch, 0]
        for (cx, cy, width, height), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            if min(width * image.shape[2], height * image.shape[1]) < 4:
                continue
            red, _, blue = image[:, int(cy * image.shape[1]), int(cx * image.shape[2])].tolist()
            assert (red > blue) == (label == 0)
        seen.add(tuple(target["labels"].tolist()))
    assert {(1, 1), (0, 0, 1)} <= seen  # some boxes went, from the front and from the back


def test_perfect_predictions_score_one(known):
    """Also where the file counts annotations from 0 and holds boxes that nothing could find."""
    rewrite(known, lambda coco: coco["annotations"].append(coco["annotations"][0] | {"bbox": [10, 10, -5, 0]}))
    rewrite(known, lambda coco: coco["annotations"].append(coco["annotations"][0] | {"bbox": [200, 10, 5, 5], "area": 25}))
    coco = dataset(known).coco
    found = [box for box in coco["annotations"] if not box["iscrowd"]]
    results = [{"image_id": box["image_id"], "category_id": box["category_id"], "bbox": box["bbox"], "score": 0.9} for box in found]
    assert coco_metrics(coco, results)["AP"] == 1.0


def test_a_readers_pictures_are_used(coco_folder):
    asked = []

    def reader(path, size):
        asked.append((path.name, size))
        return read_image(path, size) // 2

    root = coco_folder()
    dark, _ = dataset(root, images=reader)[1]
    bright, _ = dataset(root)[1]
    assert asked == [("val_001.jpg", (96, 64))]
    assert dark.mean() < bright.mean()


TRAINED = [{"id": 3, "name": "square"}, {"id": 4, "name": "round"}, {"id": 7, "name": "oblong"}]


def test_labels_follow_the_trained_order(known):
    val = dataset(known, categories=TRAINED)
    assert val.categories == val.coco["categories"] == TRAINED
    assert val[1][1]["labels"].tolist() == [2, 0, 0]
    assert val.warnings == []


def test_categories_with_other_ids_are_found_by_name(known):
    trained = [{"id": 1, "name": "Oblong "}, {"id": 2, "name": "square"}]
    val = dataset(known, categories=trained)
    assert val[1][1]["labels"].tolist() == [0, 1, 1]
    assert [box["category_id"] for box in val.coco["annotations"]] == [1, 1, 2, 2]
    assert len(val.warnings) == 1
    assert "2 categories have other ids than in training" in val.warnings[0]


def test_swapped_ids_are_not_mistaken(known):
    """The file's id 3 is the training's id 7 and the other way round: names decide."""
    val = dataset(known, categories=[{"id": 3, "name": "oblong"}, {"id": 7, "name": "square"}])
    assert val[1][1]["labels"].tolist() == [0, 1, 1]


def test_twins_keep_their_labels_whatever_their_ids_and_order(coco_folder):
    root = coco_folder(categories=({"id": 1, "name": "Box"}, {"id": 2, "name": "box"}))
    before = dataset(root)._labels.tolist()
    assert len(set(before)) == 2

    def swap(coco):
        coco["categories"] = [{"id": 1, "name": "box"}, {"id": 2, "name": "Box"}]
        for each in coco["annotations"]:
            each["category_id"] = 3 - each["category_id"]

    rewrite(root, swap)
    assert dataset(root, categories=[{"id": 1, "name": "Box"}, {"id": 2, "name": "box"}])._labels.tolist() == before


def test_a_category_that_resembles_two_trained_ones_is_refused(coco_folder):
    root = coco_folder(categories=({"id": 7, "name": "BOX"}, {"id": 8, "name": "other"}))
    trained = [{"id": 1, "name": "Box"}, {"id": 2, "name": "box"}, {"id": 3, "name": "other"}]
    with pytest.raises(UserError, match=r"category 'BOX' \(id 7, image id \d+\) cannot be told from 'Box', 'box'") as error:
        dataset(root, categories=trained)
    assert one_line(error)


def test_a_category_that_was_not_trained(known):
    with pytest.raises(UserError, match=r"category 'oblong' \(id 7, image id 11\) is not among .*\['square', 'round'\]") as error:
        dataset(known, categories=TRAINED[:2])
    assert one_line(error)
    rewrite(known, lambda coco: coco["categories"].append({"id": 99, "name": "never seen"}))
    assert len(dataset(known, categories=TRAINED).categories) == 3  # nothing is annotated with it


def test_names_that_repeat_are_told_apart_by_id(coco_folder):
    twins = ({"id": 0, "name": "thing"}, {"id": 1, "name": "thing"})
    root = coco_folder(val=8, categories=twins)
    expected = [target["labels"].tolist() for _, target in dataset(root)]
    assert {label for labels in expected for label in labels} == {0, 1}
    assert [target["labels"].tolist() for _, target in dataset(root, categories=list(twins))] == expected


def test_a_draw_follows_from_seed_epoch_and_index(coco_folder):
    root = coco_folder(train=3)
    train, again, other = dataset(root, "train"), dataset(root, "train"), dataset(root, "train", seed=1)
    first = [train[index] for index in range(3)]
    assert all(same(first[index], again[index]) for index in (2, 0, 1))
    assert not all(same(first[index], other[index]) for index in range(3))
    again.set_epoch(1)
    second = [again[index] for index in range(3)]
    assert not all(same(a, b) for a, b in zip(first, second, strict=True))
    assert all(same(train[1, index], second[index]) for index in range(3))
    again.set_epoch(0)
    assert all(same(first[index], again[index]) for index in range(3))


def test_the_process_s_own_draws_are_left_alone(coco_folder):
    train = dataset(coco_folder(train=4), "train")
    loader = build_loader(train, 2, shuffle=True)
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_data_set_can_be_sent_to_another_process(coco_folder):
    train = dataset(coco_folder(), "train")
    assert same(pickle.loads(pickle.dumps(train))[2], train[2])


def test_the_balloons(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "coco", category="balloon")
    val, train = dataset(tmp_path / "coco"), dataset(tmp_path / "coco", "train")
    assert (len(train), len(val)) == (61, 13)
    assert val.warnings == []
    assert val.categories == train.categories
    assert [category["name"] for category in val.categories] == ["balloon"]
    image, target = val[0]
    assert torch.isfinite(image).all()
    assert len(target["boxes"]) > 0
    for index in range(0, 61, 12):
        image, target = train[index]
        assert target["size"].tolist() == list(image.shape[1:])
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= 1).all()


def test_boxes_of_real_photographs_survive_the_way_there_and_back(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "coco", category="balloon")
    val = dataset(tmp_path / "coco")
    by_image = {image_id: [] for image_id in val.image_ids}
    for box in val.coco["annotations"]:
        by_image[box["image_id"]].append(box["bbox"])
    for _, target in val:
        height, width = target["orig_size"].tolist()
        cx, cy, w, h = (target["boxes"].double() * torch.tensor([width, height, width, height])).unbind(1)
        xywh = torch.stack([cx - w / 2, cy - h / 2, w, h], 1).numpy()
        stated = np.array(by_image[target["image_id"].item()])
        x1y1 = np.maximum(stated[:, :2], 0)
        x2y2 = np.minimum(stated[:, :2] + stated[:, 2:], [width, height])
        assert np.abs(xywh - np.hstack([x1y1, x2y2 - x1y1])).max() < 1e-3


def test_transforms_get_what_torchvision_knows(known):
    """Any v2 transform can take the place of ours."""
    got = []
    val = dataset(known, transforms=lambda image, boxes: (got.append((image, boxes)), (image.float(), boxes))[1])
    val[1]
    image, boxes = got[0]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8
    assert boxes.canvas_size == (50, 100)
    assert boxes[1].tolist() == [90, 40, 100, 50]  # clipped to the picture
