"""What Ray tells workers about GPUs, on a node that claims to have twelve: real workers and real ids, and nothing computed on a GPU."""

import os

import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from raydetr import config as settings
from raydetr.launch.reporter import TrainReporter
from raydetr.launch.train import WORKERS_TIMEOUT_S, scaling_config, torch_config
from raydetr.training.engine import gathered

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0)
class Neighbor:
    """Occupies GPUs."""

    def ids(self):
        return [int(each) for each in ray.get_gpu_ids()]


@pytest.fixture(scope="module")
def two_gpus():
    """A node of 12 GPUs whose numbers 2, 10 and 11 are free."""
    ray.init(address="local", num_cpus=4, num_gpus=12, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        neighbors = []
        for number in (2, 1, 7):  # one after the other: Ray gives the lowest numbers first
            neighbors.append(Neighbor.options(num_gpus=number).remote())
            ray.get(neighbors[-1].ids.remote())
        assert ray.get(neighbors[1].ids.remote()) == [2]
        ray.kill(neighbors[1])
        yield
    finally:
        ray.shutdown()


def worker(_config):
    torch.cuda.is_available = lambda: True  # Ray's choice of the device and raydetr's need nothing else of CUDA
    context, reporter = ray.train.get_context(), TrainReporter(mailbox=None)
    group = dist.distributed_c10d._get_default_group()
    mine = {
        "ids": [int(each) for each in ray.get_gpu_ids()],
        "visible": os.environ["CUDA_VISIBLE_DEVICES"].split(","),
        "ray_local_rank": context.get_local_rank(),
        "device": ray.train.torch.get_device().index,
        "local_rank": reporter.local_rank,
        "cores": reporter.cores,
        "timeout_s": group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
    }
    return gathered(mine)


def test_every_worker_takes_the_gpu_that_ray_gave_it(two_gpus):
    config = settings.load_config({"run.workers": 2})
    scaling, gloo = scaling_config(config), torch_config()
    assert scaling.resources_per_worker == {"CPU": 2, "GPU": 1}
    gloo.backend = "gloo"  # NCCL needs a GPU
    workers = TorchTrainer(worker, scaling_config=scaling, torch_config=gloo).fit().return_value
    assert sorted(each["ids"] for each in workers) == [[2], [10]]
    for each in workers:
        assert each["visible"] == ["10", "2"], "Ray lets the workers of a node see all GPUs of the run, sorted as text"
        assert each["visible"][each["local_rank"]] == str(each["ids"][0])
        assert each["local_rank"] == each["device"]
        assert each["cores"] == 2
        assert each["timeout_s"] == WORKERS_TIMEOUT_S
    # By their numbers the workers have the other order, which would put both on a neighbor's GPU.
    assert [each["ray_local_rank"] for each in workers] != [each["local_rank"] for each in workers]
