import sys

import pytest
import torch

from benchmarks import masks
from benchmarks.masks import BOXES, LEAN, OFFICIAL, make_batch, rows_of, step
from benchmarks.measure import peak_memory


def test_masks_of_the_batch_fill_their_boxes():
    _, (target,) = make_batch(1, 64, 96, torch.device("cpu"))
    area = target["boxes"][:, 2:].prod(1) * 64 * 96
    assert target["masks"].flatten(1).sum(1).tolist() == pytest.approx(area.tolist(), rel=0.4)


def test_extra_memory_is_beside_the_step_without_masks():
    memory = {BOXES: 100.0, LEAN: 110.0, OFFICIAL: 140.0}
    rows = rows_of({who: [0.5, 0.6] for who in memory}, memory)
    assert [row[-2:] for row in rows] == [["0 MiB", ""], ["10 MiB", 1.0], ["40 MiB", 4.0]]


class Here:
    """A contender in this process."""

    def __init__(self, _module, _serve, who, _quick):
        self.call = step(who, (1, 64, 96), torch.device("cpu"), torch.float32, "detr_tiny")

    def __call__(self):
        self.call()

    def close(self):
        return peak_memory()


def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.masks", "--quick"])
    monkeypatch.setattr(masks, "Child", Here)
    masks.main()
    shown = capsys.readouterr().out
    for what in (BOXES, LEAN, OFFICIAL, "extra memory", "3 times"):
        assert what in shown
