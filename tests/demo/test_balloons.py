"""The generated balloon images: repeatable, labeled where the balloons are, never trivial."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raydetr.demo.balloons import LEAST_VISIBLE, draw, edge, generate, outline, simplified
from raydetr.demo.scenes import SUPERSAMPLE
from raydetr.errors import UserError


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _regions(folder: Path) -> dict[str, list[np.ndarray]]:
    """Outlines [corners, 2] by file name."""
    entries = json.loads((folder / "via_region_data.json").read_text())
    shapes = {entry["filename"]: [region["shape_attributes"] for region in entry["regions"].values()] for entry in entries.values()}
    return {name: [np.stack([each["all_points_x"], each["all_points_y"]], axis=1) for each in of_file] for name, of_file in shapes.items()}


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("balloons")
    generate(folder, train=6, val=3, seed=5)
    return folder


def test_counts_and_layout_are_those_of_a_via_folder(generated):
    for split, count in (("train", 6), ("val", 3)):
        entries = json.loads((generated / split / "via_region_data.json").read_text())
        assert len(entries) == count == len(list((generated / split).glob("*.jpg")))
        for key, entry in entries.items():
            path = generated / split / entry["filename"]
            assert entry["size"] == path.stat().st_size
            assert key == f"{entry['filename']}{entry['size']}"
            assert entry["regions"]
            assert all(region["region_attributes"] == {"name": "balloon"} for region in entry["regions"].values())


def test_a_seed_gives_the_same_bytes_and_more_pictures_begin_with_the_fewer(generated, tmp_path):
    generate(tmp_path / "again", train=6, val=3, seed=5)
    assert _files(tmp_path / "again") == _files(generated)
    generate(tmp_path / "fewer", train=2, val=1, seed=5)
    fewer, all_of_them = _files(tmp_path / "fewer"), _files(generated)
    assert sorted(name for name in fewer if name.endswith(".jpg")) == [
        "train/balloons_train_0000.jpg",
        "train/balloons_train_0001.jpg",
        "val/balloons_val_0000.jpg",
    ]
    assert all(fewer[name] == all_of_them[name] for name in fewer if name.endswith(".jpg"))


def test_seeds_and_splits_give_different_pictures(generated, tmp_path):
    generate(tmp_path, train=6, val=3, seed=6)
    images = [data for folder in (generated, tmp_path) for name, data in _files(folder).items() if name.endswith(".jpg")]
    assert len(set(images)) == 18


def test_outlines_lie_inside_the_picture_on_its_edges(generated):
    """Along an outline the image changes much more than elsewhere: that is seen without knowing how it was drawn."""
    along, elsewhere = [], []
    for name, outlines in _regions(generated / "train").items():
        image = Image.open(generated / "train" / name)
        pixels = np.asarray(image.convert("L")).astype(float)
        steepness = np.hypot(*np.gradient(pixels))
        lines = Image.new("L", image.size)
        for points in outlines:
            assert points.min() >= 0
            assert (points <= image.size).all()
            assert len(points) >= 6
            ImageDraw.Draw(lines).line([*map(tuple, points), tuple(points[0])], fill=1, width=2)
        inner = np.zeros(pixels.shape, dtype=bool)
        inner[3:-3, 3:-3] = True  # where the image cuts a balloon there is no edge to see
        on_line = np.asarray(lines).astype(bool)
        along.append(steepness[on_line & inner].mean())
        elsewhere.append(np.median(steepness[~on_line & inner]))
    assert np.mean(along) > 3 * np.mean(elsewhere)


def test_outlines_enclose_what_is_seen_of_each_balloon():
    for number in range(6):
        image, seen = draw(np.random.default_rng((1, 2, number)))
        for mask in seen:
            assert mask.shape == (image.shape[0] * SUPERSAMPLE, image.shape[1] * SUPERSAMPLE)
            enclosed = Image.new("L", mask.shape[::-1])
            ImageDraw.Draw(enclosed).polygon([tuple(point) for point in outline(mask) * SUPERSAMPLE], fill=1)
            enclosed = np.asarray(enclosed).astype(bool)
            assert (enclosed & mask).sum() > 0.9 * (enclosed | mask).sum()


def test_every_balloon_is_seen_in_part_and_none_twice():
    masks = [mask for number in range(12) for mask in draw(np.random.default_rng((9, 0, number)))[1]]
    assert all(mask.sum() > 100 for mask in masks)
    for number in range(12):
        _, seen = draw(np.random.default_rng((9, 0, number)))
        assert seen
        assert np.sum(seen, axis=0).max() == 1
    assert 0 < LEAST_VISIBLE < 1


@pytest.mark.parametrize(
    ("rows", "corners"),
    [
        (["....", ".##.", ".##.", "...."], {(1, 1), (3, 1), (3, 3), (1, 3)}),
        (["#.", "##"], {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (0, 2)}),
        (["#####", "#####", "#...#", "....."], {(0, 0), (5, 0), (5, 3), (4, 3), (4, 2), (1, 2), (1, 3), (0, 3)}),
        (["#..##", "...##"], {(3, 0), (5, 0), (5, 2), (3, 2)}),
    ],
)
def test_the_edge_of_a_mask_is_that_of_its_largest_piece(rows, corners):
    found = edge(np.array([[pixel == "#" for pixel in row] for row in rows]))
    assert {tuple(point) for point in found.tolist()} == corners
    assert len(found) == len(corners)


def test_the_edge_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        edge(np.zeros((3, 3), dtype=bool))


def test_a_simplified_outline_keeps_within_its_tolerance():
    turn = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = 50 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    few = simplified(circle, 0.5)
    assert 8 < len(few) < 60
    middles = (few + np.roll(few, -1, axis=0)) / 2
    assert np.abs(np.linalg.norm(middles, axis=1) - 50).max() < 0.51
    square = np.array([(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1)])
    assert {tuple(point) for point in simplified(square, 0.1).tolist()} == {(0, 0), (2, 0), (2, 2), (0, 2)}


def test_impossible_requests_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="-1 images"):
        generate(tmp_path, train=-1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        generate(tmp_path / "file", train=1, val=0)
