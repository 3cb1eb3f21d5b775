import numpy as np
import pytest
from PIL import Image, ImageFilter

from raydetr.config import Data
from raydetr.data.coco import find_split, load_coco
from raydetr.data.splits import alike_groups, box_counts, stratified_parts
from raydetr.errors import UserError

SHARES = [0.7, 0.2, 0.1]


def boxes_of_parts(counts, parts, number):
    return np.array([counts[parts == part].sum(0) for part in range(number)])


def test_every_part_has_its_share_of_images_and_of_every_category():
    counts = np.random.default_rng(0).poisson([0.05, 0.3, 3, 0.1], (200, 4))
    parts = stratified_parts(counts, SHARES)
    assert np.bincount(parts).tolist() == [140, 40, 20]
    expected = counts.sum(0) * np.array(SHARES)[:, None]
    assert np.abs(boxes_of_parts(counts, parts, 3) - expected).max() <= 0.05 * counts.sum(0).max()
    # Rare categories within one box: by chance alone the test part had none of the rarest in a third of all draws.
    assert np.abs(boxes_of_parts(counts, parts, 3) - expected)[:, [0, 3]].max() <= 1.5


def test_crowded_images_are_spread():
    counts = np.ones((60, 1), dtype=int)
    counts[:12] = 50
    crowded = np.bincount(stratified_parts(counts, [1 / 3] * 3)[:12])
    assert crowded.tolist() == [4, 4, 4]


def test_folds_are_of_equal_size():
    parts = stratified_parts(np.random.default_rng(1).poisson(1, (23, 3)), [0.2] * 5)
    assert sorted(np.bincount(parts)) == [4, 4, 5, 5, 5]


def test_groups_stay_whole_and_sizes_hold():
    groups = np.random.default_rng(2).permutation(np.repeat(np.arange(40), 5))
    parts = stratified_parts(np.ones((200, 2), dtype=int), SHARES, groups)
    assert np.bincount(parts).tolist() == [140, 40, 20]
    assert all(len(set(parts[groups == group])) == 1 for group in range(40))


@pytest.mark.parametrize("large", [2, 90])
def test_no_part_is_empty_however_large_a_group_is(large):
    groups = [0] * large + [1, 2]
    counts = np.zeros((large + 2, 3), dtype=int)
    counts[-2, 1] = counts[-1, 2] = 1
    assert set(stratified_parts(counts, SHARES, groups)) == {0, 1, 2}


def test_images_without_boxes_are_dealt_out_as_well():
    assert np.bincount(stratified_parts(np.zeros((50, 3), dtype=int), SHARES)).tolist() == [35, 10, 5]


def test_a_seed_gives_the_same_parts_and_another_gives_others():
    counts = np.ones((50, 2), dtype=int)
    one, again, other = (stratified_parts(counts, SHARES, seed=seed) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_fewer_groups_than_parts_are_refused():
    with pytest.raises(UserError, match=r"^2 images cannot be divided into 3 parts$"):
        stratified_parts(np.ones((2, 1), dtype=int), SHARES)
    with pytest.raises(UserError, match=r"^9 images in 1 groups of look-alike images cannot be divided into 3 parts$"):
        stratified_parts(np.ones((9, 1), dtype=int), SHARES, [0] * 9)


def test_look_alikes_are_one_group_and_others_are_not(tmp_path):
    random = np.random.default_rng(0)
    scenes = [Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((128, 96)) for _ in range(3)]
    blank = Image.new("RGB", (128, 96), "gray")
    files = {
        "a.png": scenes[0],
        "b.png": scenes[1],
        "a_small.jpg": scenes[0].resize((64, 48)),
        "blank.png": blank,
        "a_soft.jpg": scenes[0].filter(ImageFilter.GaussianBlur(1)),
        "c.png": scenes[2],
        "blank_other.png": Image.new("RGB", (128, 96), "silver"),
        "blank_again.png": blank,  # the same bytes
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    seen = []
    groups = alike_groups([(tmp_path / name, None) for name in files], progress=lambda *each: seen.append(each))
    assert groups.tolist() == [0, 1, 0, 2, 0, 3, 4, 2]
    assert seen[-1] == (8, 8)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.png"):
        alike_groups([(tmp_path / "a.png", None)])


def test_box_counts_leave_out_crowds(coco_folder):
    coco, _ = load_coco(find_split(Data(path=str(coco_folder())), "train").annotations)
    assert box_counts(coco).sum() == 12
    coco["annotations"][0]["iscrowd"] = 1
    counts = box_counts(coco)
    assert counts.shape == (4, 2)
    assert counts.sum(1).tolist() == [2, 3, 3, 3]
