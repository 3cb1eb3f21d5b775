import sys

import pytest
import torch

from benchmarks import step
from benchmarks.measure import Child, peak_memory
from benchmarks.step import make_batch, our_step, peer_model
from raydetr.model.detr import build_model


def test_the_peer_is_the_same_network_and_trains_the_same():
    ours, peer = build_model("detr_resnet50", 91), peer_model()
    for trained in (True, False):
        numbers = [sum(each.numel() for each in model.parameters() if each.requires_grad == trained) for model in (ours, peer)]
        assert numbers[0] == numbers[1] > 0
    assert peer.config.auxiliary_loss


def test_both_steps_train():
    images, targets = make_batch(1, 64, 96, torch.device("cpu"))
    assert images.shape == (1, 3, 64, 96)
    ours = our_step(images, targets, torch.float32)
    ours()
    assert ours().losses.isfinite().all()
    for name in (step.PEER, step.SAME_DROPOUT):
        step.STEPS[name](images, targets, torch.float32)()


@pytest.mark.slow
def test_a_contender_lives_in_a_process_of_its_own():
    child = Child("benchmarks.step", "--serve", "step", step.OURS, "--quick")
    assert child() == child() == "done"
    assert child.close() > 300  # MiB: torch alone is as much


class Here:
    """A contender in this process."""

    def __init__(self, _module, _serve, what, who, _quick):
        self.call = step.contender(what, who, (1, 64, 96), torch.device("cpu"), torch.float32)

    def __call__(self):
        self.call()

    def close(self):
        return peak_memory()


def test_the_command_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.step", "--quick"])
    monkeypatch.setattr(step, "Child", Here)
    step.main()
    shown = capsys.readouterr().out
    for what in ("training step", "inference", "peak memory", "1.70", "1.30", "0.80"):
        assert what in shown
