import sys

import numpy as np
import pytest

from benchmarks import tiles


def test_the_images_repeat_and_their_things_are_small():
    (first, things), (second, same) = (tiles.draw(np.random.default_rng((0, 1)), tiles.SMALL) for _ in range(2))
    assert (first == second).all()
    assert things == same
    assert first.shape == (480, 640, 3)
    assert things
    for (x, y, width, height), label in things:
        assert 0 <= x < x + width <= 640
        assert 0 <= y < y + height <= 480
        assert max(width, height) < 120
        assert 0 <= label < len(tiles.NAMES)


@pytest.mark.slow
def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.tiles", "--quick"])
    tiles.main()
    shown = capsys.readouterr().out
    assert "| the image alone" in shown
    assert "| --tiles 4x4" in shown
