"""What workers divide their losses by, agreed on by two processes."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raydetr.loss.criterion import build_criterion


def targets(*boxes_of_images):
    return [{"boxes": torch.full((boxes, 4), 0.25), "labels": torch.zeros(boxes, dtype=torch.int64)} for boxes in boxes_of_images]


def work(out):
    """Worker 0 has the first image of each step, worker 1 the second."""
    steps = {"none": (0, 0), "few": (1, 0), "many": (5, 2)}
    criterion = build_criterion(2, aux_loss=False)
    found = {name: float(criterion.normalizers([targets(boxes[dist.get_rank()])], 9).num_boxes) for name, boxes in steps.items()}
    outputs = {"pred_logits": torch.zeros(1, 9, 3), "pred_boxes": torch.full((1, 9, 4), 0.5)}
    losses = criterion(outputs, targets(0))
    torch.save({**found, "losses": {name: float(value) for name, value in losses.items()}}, Path(out) / f"{dist.get_rank()}.pth")


@pytest.mark.slow
def test_workers_share_the_mean_number_of_boxes_and_at_least_one(run_workers, tmp_path):
    for ended in run_workers(__file__, "work", 2, tmp_path):
        assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert first == second
    assert {name: first[name] for name in ("none", "few", "many")} == {"none": 1.0, "few": 1.0, "many": 3.5}
    assert first["losses"]["loss_bbox"] == first["losses"]["loss_giou"] == 0.0  # 0 / 1 where no worker has a box


if __name__ == "__main__":
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
