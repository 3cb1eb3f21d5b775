import os
import socket
import subprocess
import sys
import time

import pytest

from raydetr.cli import check_submitted
from raydetr.config import load_config, write_yaml
from raydetr.errors import UserError
from raydetr.launch.submit import resources, runtime_environment

pytestmark = pytest.mark.xdist_group("ray")

TINY = {
    "model.preset": "detr_tiny",
    "model.weights": "none",
    "optim.epochs": 1,
    "data.train_sizes": [48],
    "data.crop": 0.0,
    "data.val_size": 48,
    "data.num_workers": 0,
    "run.pictures": 0,
}


def test_what_goes_along_with_a_job(tmp_path):
    environment = runtime_environment(tmp_path, ["/big/"])
    assert environment["working_dir"] == str(tmp_path)
    assert {"/data/", "/runs/", "/.venv/", "/.git/", "/big/"} <= set(environment["excludes"])
    assert "pip" not in environment
    (tmp_path / "constraints.txt").write_text("optuna==5.0\n")
    assert any("constraints.txt" in line for line in runtime_environment(tmp_path)["pip"])


def test_resources_as_rays_own_commands_take_them():
    assert resources('{"trial_driver": 1}') == {"trial_driver": 1.0}
    assert resources(None) is None
    for text in ("trial_driver", "[1]", '{"a": "b"}'):
        with pytest.raises(UserError, match="--entrypoint-resources"):
            resources(text)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "best.pth"], "is no job for a cluster"),
        (["train", "--data", "photographs", "--storage", "/runs"], "--data photographs: .* absolute path"),
        (["train", "--data", "/photographs"], "--storage"),
        (["tune", "--resume", "runs/search"], "--resume runs/search: .* absolute path"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_here(command, message):
    with pytest.raises(UserError, match=message):
        check_submitted(command)


def free_ports(count):
    taken = [socket.socket() for _ in range(count)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@pytest.fixture
def head(tmp_path):
    """A Ray cluster of one machine; gives the address of its job server."""
    port, dashboard = free_ports(2)
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    command = [ray, "start", "--head", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    started = subprocess.Popen([*command, "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.3)
    yield f"http://127.0.0.1:{dashboard}"
    started.terminate()
    started.wait(timeout=60)


def submit(address, *command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    arguments = [sys.executable, "-m", "raydetr.cli", "submit", "--address", address, *command]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_job_is_followed_and_its_exit_code_is_the_commands(head, coco_folder, tmp_path):
    write_yaml(load_config(TINY), tmp_path / "run.yaml")
    (tmp_path / "folder").mkdir()
    train = ["--", "train", "--config", str(tmp_path / "run.yaml"), "--data", str(coco_folder()), "--storage", str(tmp_path / "runs")]
    done = submit(head, "--working-dir", str(tmp_path / "folder"), *train, "--name", "one")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ray job stop" in done.stderr
    assert "AP" in done.stdout
    assert (tmp_path / "runs" / "one" / "best.pth").exists()
    again = submit(head, "--working-dir", str(tmp_path / "folder"), *train, "--name", "one")
    assert again.returncode == 2
    assert "holds a run already" in again.stdout
