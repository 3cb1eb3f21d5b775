"""A cluster without machines but its head, whose autoscaler brings up to two with a CPU each: processes of this machine."""

import json
import os
import time

import pytest
import ray
import ray.tune

from raydetr import config
from raydetr.errors import UserError
from raydetr.launch import tune as launcher
from raydetr.launch.slots import Demands
from raydetr.launch.train import train
from raydetr.launch.trial import with_node
from raydetr.launch.tune import tune
from raydetr.search.results import trials_frame

SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
MACHINES = {
    "cluster_name": "test",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "auth": {"ssh_user": "nobody"},
    **{
        f"{which}_commands": [] for which in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    },
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "docker": {},
}


@pytest.fixture
def cluster(ray_head, free_ports, tmp_path):
    """This process's cluster."""
    port, file = free_ports(1)[0], tmp_path / "autoscaler.json"
    address = f"{ray.util.get_node_ip_address()}:{port}"
    file.write_text(json.dumps({**MACHINES, "provider": {**MACHINES["provider"], "gcs_address": address}}))
    flags = ("--num-cpus=0", "--include-dashboard=false", f"--autoscaling-config={file}")
    # Another Ray may have been in this process, whose token is kept.
    known = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(*flags, port=port, **known):
        ray.init(address=address, logging_level="error", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.slow
def test_machines_come_for_what_waits_and_what_they_cannot_hold_is_refused_in_time(cluster, coco_folder, tmp_path, monkeypatch):
    known = {"data.path": str(coco_folder()), "run.storage": str(tmp_path), "model.preset": "detr_tiny", "model.weights": "none"}

    def settings(minutes, **changes):
        return config.load_config(known, {"run.name": "run", "run.wait_for_machines_min": minutes}, changes)

    def run_trial(parameters, images):  # where it runs, and no training
        while sum(node["Alive"] for node in ray.nodes()) < 3:  # until the other's machine has come
            time.sleep(0.5)
        ray.tune.report({**with_node({"epoch": 1, "AP": 0.5}), "finished": True})

    monkeypatch.setattr(launcher, "run_trial", run_trial)
    with pytest.raises(UserError, match=r"the cluster has 0 CPUs; .*run\.wait_for_machines_min"):
        tune(settings(0), SPACE)
    with pytest.raises(UserError, match=r"say --speed\.device cuda or cpu"):
        tune(settings(5), SPACE)
    options = {"trials": 2, "scheduler": "none", "demands": Demands(concurrent=2)}
    trials = trials_frame(tune(settings(5, **{"speed.device": "cpu"}), SPACE, **options))
    assert list(trials["state"]) == ["complete"] * 2
    assert trials["node"].nunique() == 2
    with pytest.raises(UserError, match=r"no machines with 3 x 1 CPU came in 0\.1 minutes"):
        train(settings(0.1, **{"speed.device": "cpu", "run.workers": 3, "run.name": "another"}))
