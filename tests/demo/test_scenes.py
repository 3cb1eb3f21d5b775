"""What the generated images are made of: things that lie where they are said to lie."""

import numpy as np
import pytest

from raydetr.demo.scenes import SUPERSAMPLE, Part, Scene, background, ellipse, fractal_noise, place, rectangle, smooth, stroke
from raydetr.demo.things import KINDS


def _scene(seed: int = 0) -> Scene:
    return Scene(np.random.default_rng(seed), 80, 60)


def test_placed_parts_are_stretched_turned_and_moved():
    (part,) = place([Part(rectangle(-1, -1, 1, 1), (0, 0, 0))], 10, 20, 5, stretch=2.0)
    assert part.points.min(0).tolist() == [0, 15]
    assert part.points.max(0).tolist() == [20, 25]
    (turned,) = place([Part(rectangle(-2, -1, 2, 1), (0, 0, 0))], 0, 0, 1, angle=np.pi / 2)
    np.testing.assert_allclose(turned.points.max(0), [1, 2], atol=1e-12)


def test_shapes_have_their_extents():
    np.testing.assert_allclose(np.abs(ellipse(0, 0, 3, 2)).max(0), [3, 2], atol=0.02)
    line = stroke(np.array([(0.0, 0.0), (4.0, 0.0), (8.0, 0.0)]), 2.0)
    assert line.min(0).tolist() == [0, -1]
    assert line.max(0).tolist() == [8, 1]
    curve = smooth(rectangle(-1, -1, 1, 1))  # touches the middles of the sides and cuts the corners
    np.testing.assert_allclose(np.abs(curve).max(0), [1, 1])
    np.testing.assert_allclose(np.linalg.norm(curve, axis=1).max(), np.hypot(0.75, 0.75))


def test_what_is_drawn_last_is_seen():
    scene = _scene()
    before = np.asarray(scene.image).copy()
    scene.add([Part(rectangle(10, 10, 40, 40), (250, 0, 0))], 1)
    scene.add([Part(rectangle(30, 10, 60, 40), (0, 250, 0)), Part(rectangle(0, 50, 80, 55), (0, 0, 250), solid=False)], 2)
    at = scene.numbers[20 * SUPERSAMPLE, 20 * SUPERSAMPLE :: 15 * SUPERSAMPLE]  # at x = 20, 35, 50, 65
    assert at.tolist() == [1, 2, 2, 0]
    pixels = np.asarray(scene.image)
    assert pixels[20 * SUPERSAMPLE, 20 * SUPERSAMPLE].tolist() == [250, 0, 0]
    assert pixels[20 * SUPERSAMPLE, 35 * SUPERSAMPLE].tolist() == [0, 250, 0]
    assert pixels[52 * SUPERSAMPLE, 35 * SUPERSAMPLE].tolist() == [0, 0, 250]  # drawn, and yet no part of the thing
    assert scene.numbers[52 * SUPERSAMPLE].max() == 0
    assert (pixels[45 * SUPERSAMPLE] == before[45 * SUPERSAMPLE]).all()


def test_parts_that_leave_the_picture_are_cut():
    scene = _scene()
    for shade in ("flat", "linear", "round", "shiny"):
        scene.add(place([Part(ellipse(0, 0, 1, 1), (200, 100, 50), shade)], 0, 0, 20), 1)
        scene.add(place([Part(ellipse(0, 0, 1, 1), (200, 100, 50), shade)], 500, 500, 20), 2)
    assert set(np.unique(scene.numbers)) == {0, 1}
    assert scene.finish().shape == (60, 80, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_thing_fills_a_good_part_of_its_unit_and_can_be_told_from_the_background(kind):
    for seed in range(3):
        scene = _scene(seed)
        before = np.asarray(scene.image).astype(int)
        parts = place(KINDS[kind](scene.rng), 40, 30, 15)
        scene.add(parts, 1)
        rows, columns = np.nonzero(scene.numbers)
        assert 0.08 * 4 < len(rows) / (15 * SUPERSAMPLE) ** 2 < 4.5
        assert abs(columns.mean() / SUPERSAMPLE - 40) < 8
        assert abs(rows.mean() / SUPERSAMPLE - 30) < 8
        changed = np.abs(np.asarray(scene.image).astype(int) - before).sum(-1)[rows, columns] > 6
        assert changed.mean() > 0.8


def test_noise_and_backgrounds_have_their_shape_and_range():
    noise = fractal_noise(np.random.default_rng(0), (40, 70), 5)
    assert noise.shape == (40, 70)
    assert (noise.min(), noise.max()) == (0, 1)
    images = [background(np.random.default_rng(seed), 64, 48) for seed in range(40)]
    assert all(image.shape == (48, 64, 3) and image.dtype == np.uint8 for image in images)
    assert np.mean([image.std() > 3 for image in images]) > 0.9  # next to none is plain


def test_there_is_no_balloon_among_the_things():
    assert not any("balloon" in kind for kind in KINDS)
