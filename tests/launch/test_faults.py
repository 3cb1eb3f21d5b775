"""What clusters do to runs and searches: machines and processes come and go, hang, and fill their disks.

Several nodes of one cluster on this machine, with its disk as what they share.
"""

import contextlib
import json
import os
import signal
import threading
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from raydetr import config
from raydetr.launch.tune import trial_folder, tune
from raydetr.search import open_search

# One Ray at a time: two would share the cores, and the helpers of one could take the other for their own.
pytestmark = pytest.mark.xdist_group("ray")

TINY = {
    "model.preset": "detr_tiny",
    "model.weights": "none",
    "optim.epochs": 4,
    "optim.batch_size": 1,
    "optim.schedule": "cosine",
    "data.train_sizes": [48],
    "data.val_size": 48,
    "data.num_workers": 0,
    "run.pictures": 0,
    "run.max_failures": 0,
}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
TRIALS = 4
HOW = {"trials": TRIALS, "scheduler": "none", "sampler": "random", "seed": 5}


@pytest.fixture(scope="module")
def cluster():
    """A head without places; tests add their machines, which are gone afterwards."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "resources": {"trial_driver": 4}})
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_machine(cluster):
    yield cluster.add_node
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def photographs(module_coco_folder):
    return module_coco_folder(train=24, val=4)


def settings(photographs, storage, name, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load_config(TINY, {"data.path": str(photographs), "run.storage": str(storage), "run.name": name}, dotted)


def log_of(folder):
    file = folder / "log.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logs_of(search):
    return [log_of(trial_folder(search, number)) for number in range(TRIALS)]


@pytest.fixture(scope="module")
def undisturbed(cluster, photographs, tmp_path_factory):
    """Every trial's log where nothing happens."""
    machine = cluster.add_node(num_cpus=2)
    logs = logs_of(tune(settings(photographs, tmp_path_factory.mktemp("runs"), "undisturbed", run__max_failures=3), SPACE, **HOW))
    cluster.remove_node(machine)
    assert [[line["epoch"] for line in log] for log in logs] == [[0, 1, 2, 3]] * TRIALS
    assert len({log[-1]["test_loss"] for log in logs}) == TRIALS
    return logs


@contextlib.contextmanager
def meanwhile(disturb):
    """For the length of a ``with`` ``disturb`` runs beside it; what it raises comes out at the end."""
    raised = []

    def run():
        try:
            disturb()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    for error in raised:
        raise error


def wait_for(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)
    return found


def raylet(machine):
    return psutil.Process(machine.all_processes["raylet"][0].process.pid)


def processes_of(machine, title):
    """The machine's Ray processes with that title."""
    found = []
    for process in raylet(machine).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(title) or title in " ".join(process.cmdline()):
                found.append(process)
    return found


def trials_on(machine, search):
    """The numbers of the trials that run on a machine, in the middle of an epoch that is not their first; a trial's process is in its folder."""
    numbers = set()
    for process in processes_of(machine, "ray::ImplicitFunc"):
        with contextlib.suppress(psutil.Error):
            number = search.number(os.path.basename(process.cwd()))
            if number is not None and 1 <= len(log_of(trial_folder(search, number))) <= 3:
                numbers.add(number)
    return numbers


@pytest.mark.slow
def test_trials_follow_machines_that_come_and_outlive_those_that_go(undisturbed, add_machine, cluster, photographs, tmp_path):
    first = add_machine(num_cpus=1)
    lost = set()

    def disturb():
        wait_for(lambda: (tmp_path / "search" / "trials").exists(), "the first trial")
        search = open_search(tmp_path / "search")
        second = add_machine(num_cpus=2)
        lost.update(wait_for(lambda: len(numbers := trials_on(second, search)) == 2 and numbers, "two trials on the second machine"))
        cluster.remove_node(second, allow_graceful=False)

    with meanwhile(disturb):
        search = tune(settings(photographs, tmp_path, "search"), SPACE, **HOW)
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * TRIALS
    assert {search.frozen()[number].user_attrs["metrics"]["node"] for number in lost} == {first.node_id}  # they went on there
    assert logs_of(search) == undisturbed
