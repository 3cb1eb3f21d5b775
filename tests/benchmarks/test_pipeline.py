import sys

import pytest
import torch
from PIL import Image

from benchmarks import pipeline
from raydetr.config import Data


@pytest.fixture
def photographs(tmp_path):
    for number in range(2):
        Image.effect_noise((700, 500), 60).convert("RGB").save(tmp_path / f"{number}.jpg")
    return tmp_path


def test_the_official_way_gives_a_picture_of_the_right_size(photographs):
    sizes = {tuple(pipeline.official_transform(photographs / "0.jpg", Data(train_sizes=[480, 512])).shape[1:]) for _ in range(8)}
    assert {min(size) for size in sizes} <= {480, 512}
    mean = pipeline.official_transform(photographs / "0.jpg", Data(crop=0.0)).mean()
    assert torch.isfinite(mean)


def test_the_command_prints_its_table(photographs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.pipeline", "--quick", str(photographs)])
    pipeline.main()
    assert "times the peer" in capsys.readouterr().out
