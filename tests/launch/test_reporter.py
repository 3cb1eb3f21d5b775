import os
from types import SimpleNamespace

import pytest
import ray
from ray.air._internal.device_manager.nvidia_gpu import CUDATorchDeviceManager

from raydetr.launch import reporter
from raydetr.launch.reporter import TrainReporter
from raydetr.launch.train import torch_config
from raydetr.storage import PATIENCE_S


@pytest.mark.parametrize("local_rank", [0, 2, 10, 11])
def test_the_device_of_a_worker_is_the_one_that_ray_made_current(monkeypatch, local_rank):
    # On a node of 12 GPUs: Ray gives each worker one id, and all of them as CUDA_VISIBLE_DEVICES, sorted as text.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(sorted(map(str, range(12)))))
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [str(local_rank)])
    (device,) = CUDATorchDeviceManager().get_devices()
    context = SimpleNamespace(get_world_rank=lambda: local_rank, get_world_size=lambda: 12, get_local_rank=lambda: local_rank)
    monkeypatch.setattr(reporter.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(reporter.ray.train.torch, "get_device", lambda: device)
    monkeypatch.setattr(reporter, "assigned_cores", lambda: 1)
    monkeypatch.setattr(reporter.torch.cuda, "is_available", lambda: True)
    given = TrainReporter(mailbox=None).local_rank
    assert os.environ["CUDA_VISIBLE_DEVICES"].split(",")[given] == str(local_rank)
    monkeypatch.setattr(reporter.torch.cuda, "is_available", lambda: False)
    assert TrainReporter(mailbox=None).local_rank == local_rank


def test_workers_wait_longer_than_rank_0_evaluates_and_saves():
    """A store that does not answer is retried for ``PATIENCE_S``, twice in an epoch; COCO's validation set is evaluated in seconds."""
    assert torch_config().timeout_s > 2 * PATIENCE_S + 600
