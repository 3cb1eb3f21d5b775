import sys

import pytest
import torch

from benchmarks import roofline


def test_a_product_is_counted():
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    flop, by_operator, moved = roofline.count(lambda: (a @ b).t())
    assert flop == 2 * 10 * 20 * 30
    assert by_operator == {"mm": flop}
    assert moved == 4 * (10 * 20 + 20 * 30 + 10 * 30)


@pytest.mark.slow
def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.roofline", "--quick"])
    roofline.main()
    shown = capsys.readouterr().out
    for what in ("arithmetic of the step", "convolution_backward", "traffic of the step", "the step takes"):
        assert what in shown
