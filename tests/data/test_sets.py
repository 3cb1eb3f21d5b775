import json

import numpy as np
import pytest
import torch

from raydetr.config import load_config
from raydetr.data.fingerprint import data_fingerprint
from raydetr.data.sets import check_folds, describe_sets, load_sets, nested_order
from raydetr.errors import UserError
from tests.helpers import TINY


@pytest.fixture(scope="module")
def folder(module_coco_folder):
    """Ten training images of one or two categories, two of them the same photograph; three validation images."""
    root = module_coco_folder(train=10, val=3)
    (root / "train2017" / "train_007.jpg").write_bytes((root / "train2017" / "train_002.jpg").read_bytes())
    return root


def sets(folder, seed=0, **changes):
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return load_sets(load_config(TINY | {"data.path": str(folder)}, dotted).data, seed)


def names(images):
    return [image["file_name"] for image in images.coco["images"]]


def test_the_sets_of_the_files(folder):
    train, val = sets(folder)
    assert (len(train), len(val)) == (10, 3)
    assert train.images is val.images
    assert describe_sets(load_config({}).data) is None


def test_folds_hold_out_each_image_once_and_keep_look_alikes_together(folder):
    held_out = []
    for fold in (1, 2, 3):
        train, val = sets(folder, data__folds=3, data__fold=fold)
        assert sorted(names(train) + names(val)) == [f"train_{number:03d}.jpg" for number in range(10)]
        assert (names(train), names(val)) == tuple(map(names, sets(folder, seed=9, data__folds=3, data__fold=fold))), "whatever the seed"
        assert ("train_002.jpg" in names(val)) == ("train_007.jpg" in names(val))
        boxes = {each["image_id"] for each in val.coco["annotations"]}
        assert boxes <= set(val.image_ids)
        image, target = val[0]
        assert int(target["image_id"]) == val.image_ids[0]
        assert image.dtype == torch.float32
        held_out += names(val)
        data_fingerprint(train.coco)
    assert sorted(held_out) == [f"train_{number:03d}.jpg" for number in range(10)]


def test_a_fold_is_transformed_as_in_evaluation(folder):
    train, val = sets(folder, data__folds=2, data__fold=1, data__flip=1.0)
    plain = sets(folder)[0]
    row = plain.image_ids.index(val.image_ids[0])
    assert val.transforms is not train.transforms
    assert torch.equal(val[0][1]["labels"], plain[row][1]["labels"])


def test_folds_need_no_validation_set(module_coco_folder):
    root = module_coco_folder(train=4, val=1, folder="only train")
    (root / "annotations" / "custom_val.json").unlink()
    for file in (root / "val2017").iterdir():
        file.unlink()
    (root / "val2017").rmdir()
    train, val = sets(root, data__folds=2, data__fold=2)
    assert (len(train), len(val)) == (2, 2)
    with pytest.raises(UserError, match="no val annotations"):
        sets(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.fold": 1}, r"data\.fold: 1 is not one of the folds; data\.folds is not set"),
        ({"data.folds": 3, "data.fold": 4}, r"data\.fold: 4 is not one of the folds; data\.folds is 3"),
        ({"data.folds": 3, "data.reshuffle": True}, r"data\.reshuffle: the folds of data\.folds take the place"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        load_config(changes)


def test_more_folds_than_images_of_a_category():
    coco = {
        "images": [{"id": number} for number in range(6)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "never"}],
        "annotations": [{"image_id": number, "category_id": 1 + (number < 2), "iscrowd": 0} for number in range(6)],
    }
    check_folds(coco, 2)
    with pytest.raises(UserError, match=r"^data\.folds: 3 folds are more than the 2 images of category 'dog'; use 2 folds at most$"):
        check_folds(coco, 3)
    coco["annotations"].pop(0)
    with pytest.raises(UserError, match="more than the 1 image of category 'dog'; label more images"):
        check_folds(coco, 2)


def test_reshuffling_divides_all_images_anew(folder):
    drawn = [sets(folder, data__reshuffle=True, data__reshuffle_seed=seed) for seed in (0, 1, 1)]
    for train, val in drawn:
        assert (len(train), len(val)) == (10, 3)
        assert len({*train.image_ids, *val.image_ids}) == 13
        assert sorted(names(train) + names(val)) == sorted(names(sets(folder)[0]) + names(sets(folder)[1]))
        paths = {path.name: path for path, _ in train.files + val.files}
        assert all(path.is_file() for path in paths.values())
        assert {each["image_id"] for each in val.coco["annotations"]} <= set(val.image_ids)
        assert ("train_002.jpg" in names(val)) == ("train_007.jpg" in names(val))
        for images in (train, val):
            assert len(images[len(images) - 1][1]["boxes"]) == 3
    assert names(drawn[0][1]) != names(drawn[1][1])
    assert names(drawn[1][1]) == names(drawn[2][1])


def test_joined_sets_keep_each_image_with_its_boxes(folder):
    train, val = sets(folder)
    both = train.joined(val)
    for row in range(3):
        assert torch.equal(both[10 + row][1]["orig_size"], val[row][1]["orig_size"])
        mine = [each["bbox"] for each in both.coco["annotations"] if each["image_id"] == both.image_ids[10 + row]]
        assert mine == [each["bbox"] for each in val.coco["annotations"] if each["image_id"] == val.image_ids[row]]
    assert [each["id"] for each in both.coco["annotations"]] == list(range(1, 40))


def test_a_fraction_is_nested_and_follows_the_seed(folder):
    parts = [set(names(sets(folder, data__fraction=fraction)[0])) for fraction in (0.2, 0.5, 1.0)]
    assert [len(part) for part in parts] == [2, 5, 10]
    assert parts[0] < parts[1] < parts[2]
    assert {frozenset(names(sets(folder, seed=seed, data__fraction=0.2)[0])) for seed in range(6)} != {frozenset(parts[0])}
    assert len(sets(folder, data__fraction=0.01)[0]) == 1


def test_every_beginning_of_the_order_has_its_share_of_each_category():
    random = np.random.default_rng(0)
    counts = np.stack([random.poisson(3, 200), (random.random(200) < 0.1).astype(int), np.zeros(200, int)], axis=1)
    order = nested_order(counts, 1)
    assert sorted(order) == list(range(200))
    for share in (0.25, 0.5, 0.75):
        part = counts[order[: round(200 * share)]].sum(0) / np.maximum(counts.sum(0), 1)
        assert part[:2] == pytest.approx([share, share], abs=0.06)
    assert not np.array_equal(order, nested_order(counts, 2))


def test_what_a_run_scores_on_is_said():
    assert describe_sets(load_config({"data.folds": 3, "data.fold": 2}).data) == "fold 2 of 3 of the training set is held out and scored"
    assert "divided anew (data.reshuffle_seed 4)" in describe_sets(load_config({"data.reshuffle": True, "data.reshuffle_seed": 4}).data)


def test_the_annotations_of_a_part_are_json(folder):
    json.dumps(sets(folder, data__folds=2, data__fold=1)[1].coco)
