"""What clusters do to runs and searches: machines and processes come and go, hang, and fill their disks.

Several nodes of one cluster on this machine, with its disk as what they share.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import ray
import ray.tune

from raydetr import config
from raydetr.errors import UserError
from raydetr.launch import train as training
from raydetr.launch import tune as launcher
from raydetr.launch.scheduling import trial_folder
from raydetr.launch.slots import Demands
from raydetr.launch.trial import unpacked, with_node
from raydetr.launch.tune import resume, tune
from raydetr.search.results import trials_frame
from raydetr.search.study import Search
from raydetr.training.fit import fit
from raydetr.weights.checkpoint import read_checkpoint
from tests import helpers

TINY = helpers.TINY | {
    "optim.epochs": 4,
    "optim.batch_size": 1,
    "optim.schedule": "cosine",
    "run.max_failures": 0,
}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
TRIALS = 3
DRIVERS = []  # processes started by a test


@pytest.fixture(scope="module")
def cluster(ray_cluster):
    """A head without places; tests add their machines, which are gone afterwards."""
    with ray_cluster(0) as cluster:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture
def add_machine(cluster):
    yield cluster.add_node
    while DRIVERS:
        with contextlib.suppress(ProcessLookupError):  # one that a test has seen the end of
            os.killpg(DRIVERS.pop().pid, signal.SIGKILL)
    for machine in list(cluster.worker_nodes):
        cluster.remove_node(machine, allow_graceful=False)


@pytest.fixture(scope="module")
def photographs(module_coco_folder):
    return module_coco_folder(train=24, val=4)


def settings(photographs, storage, **changes):
    return helpers.tiny_config(TINY, photographs, storage, **{"run__name": "search", **changes})


def start(cluster, *flags):
    """A search on the cluster, by a driver of its own."""
    command = [sys.executable, "-c", "import sys; from raydetr.cli import main; sys.exit(main(sys.argv[1:]))", "tune", *flags]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    DRIVERS.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
    return DRIVERS[-1]


def start_search(cluster, known, folder):
    folder.mkdir(exist_ok=True)
    config.write_yaml(known, folder / "run.yaml")
    (folder / "space.yaml").write_text(json.dumps(SPACE))
    files = ("--config", str(folder / "run.yaml"), "--space", str(folder / "space.yaml"))
    return start(cluster, *files, "--trials", str(TRIALS), "--scheduler", "none", "--sampler", "random")


def log_of(folder):
    file = folder / "log.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logs_of(search):
    return [log_of(trial_folder(search, number)) for number in range(TRIALS)]


def check_went_as(undisturbed, search):
    """All trials are complete, and went as if nothing had happened: every epoch once, with the very same numbers."""
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * TRIALS
    assert logs_of(search) == undisturbed


@pytest.fixture(scope="module")
def undisturbed(cluster, photographs, tmp_path_factory):
    """Every trial's log where nothing happens."""
    machine = cluster.add_node(num_cpus=1)
    logs = logs_of(tune(settings(photographs, tmp_path_factory.mktemp("runs")), SPACE, trials=TRIALS, scheduler="none", sampler="random"))
    cluster.remove_node(machine)
    assert [[line["epoch"] for line in log] for log in logs] == [[0, 1, 2, 3]] * TRIALS
    assert len({log[-1]["test_loss"] for log in logs}) == TRIALS
    return logs


def wait_for(condition, process=None, seconds=400):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.3)  # to look at all processes takes long
    return found


def processes_of(machine, title):
    """Ray's processes with that title on a machine."""
    found = []
    for process in psutil.Process(machine.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def trials_on(machine, folder):
    """Numbers of the trials that run on a machine, those in the middle of an epoch that is not their first.

    Ray Tune gives a trial's process a working folder of the trial's id.
    """
    if not (folder / "trials").exists():
        return set()
    search, numbers = Search(folder), set()
    for process in processes_of(machine, "ray::ImplicitFunc"):
        with contextlib.suppress(psutil.Error):
            number = search.number(os.path.basename(process.cwd()))
            if number is not None and 1 <= len(log_of(trial_folder(search, number))) <= 3:
                numbers.add(number)
    return numbers


@pytest.mark.slow
def test_a_search_outlives_machines_that_come_go_and_hang_and_its_driver(undisturbed, add_machine, cluster, photographs, tmp_path):
    first = add_machine(num_cpus=1)
    driver = start_search(cluster, settings(photographs, tmp_path), tmp_path)
    wait_for(lambda: trials_on(first, tmp_path / "search"), driver)
    second = add_machine(num_cpus=2)
    lost = wait_for(lambda: trials_on(second, tmp_path / "search"), driver)  # one or two: how long each takes is the machine's affair
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: trials_on(first, tmp_path / "search"), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    driver = start(cluster, "--resume", str(tmp_path / "search"))  # the job that is submitted again
    wait_for(lambda: trials_on(first, tmp_path / "search"), driver)
    raylet = psutil.Process(first.all_processes["raylet"][0].process.pid)
    hanging = [*raylet.children(recursive=True), raylet]
    for process in hanging:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that was just ending
            process.suspend()
    time.sleep(5)
    for process in hanging:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    search = Search(tmp_path / "search")
    check_went_as(undisturbed, search)  # with run.max_failures 0: the machine's loss is not the trials'
    assert {search.frozen()[number].user_attrs["metrics"]["node"] for number in lost} == {first.node_id}  # they went on there


@pytest.mark.slow
def test_a_full_disk_stops_a_search_that_goes_on_when_there_is_room(undisturbed, add_machine, cluster, photographs, small_disk, tmp_path):
    machine = add_machine(num_cpus=1)
    driver = start_search(cluster, settings(photographs, small_disk), tmp_path)
    wait_for(lambda: trials_on(machine, small_disk / "search"), driver)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(2**20))
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 2, said
    assert f"make room, then raydetr tune --resume {small_disk / 'search'}" in said
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    check_went_as(undisturbed, resume(small_disk / "search"))


@pytest.mark.slow
def test_a_run_of_some_to_more_workers_follows_the_machines(add_machine, cluster, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RESIZE_INTERVAL_S", 1.0)
    changes = {"optim__epochs": 30, "optim__batch_total": 2, "optim__lr": 1e-5, "model__dropout": 0.0}
    ended, run = [], tmp_path / "run"
    elastic = settings(photographs, tmp_path, run__workers="1:2", run__name="run", **changes)  # with run.max_failures 0
    thread = threading.Thread(target=lambda: ended.append(training.train(elastic)), daemon=True)

    def workers():
        """How many trained the last epoch; None before the first."""
        assert thread.is_alive() or ended, "the run failed"
        with contextlib.suppress(UserError):
            return len(read_checkpoint(run / "last.pth")["random"])

    add_machine(num_cpus=1)
    thread.start()
    wait_for(lambda: workers() == 1)
    second = add_machine(num_cpus=1)
    wait_for(lambda: workers() == 2)
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: workers() == 1)
    thread.join(timeout=300)
    assert ended[0]["epoch"] == 30
    log = log_of(run)
    assert [line["epoch"] for line in log] == list(range(30))
    fit(settings(photographs, tmp_path, run__name="alone", **changes))
    for line, alone in zip(log, log_of(tmp_path / "alone"), strict=True):
        assert line["train_lr"] == pytest.approx(alone["train_lr"], rel=1e-12)
        # Sums of two workers are rounded otherwise; another image in a single step would change the loss by more.
        assert [line[name] for name in ("train_loss", "test_loss")] == pytest.approx([alone["train_loss"], alone["test_loss"]], rel=1e-4)


@pytest.mark.slow
def test_trials_that_share_cards_are_packed_or_spread(add_machine, photographs, tmp_path, monkeypatch):
    for _ in range(2):
        add_machine(num_cpus=4, num_gpus=2)

    def run_trial(parameters, images):  # where it runs, and no training
        begun = tmp_path / "begun" / placement
        begun.mkdir(parents=True, exist_ok=True)
        (begun / unpacked(parameters).config.run.name).touch()
        deadline = time.monotonic() + 120
        while len(list(begun.iterdir())) < number and time.monotonic() < deadline:
            time.sleep(0.2)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, ray.get_gpu_ids()))  # its own half of a card, and no other
        ray.tune.report({**with_node({"epoch": 1, "AP": 0.5}), "finished": True})

    monkeypatch.setattr(launcher, "run_trial", run_trial)
    for placement, number, machines in (("pack", 4, 1), ("spread", 2, 2)):
        demands = Demands(gpus=0.5, concurrent=number, placement=placement)
        known = settings(photographs, tmp_path, run__name=placement)
        trials = trials_frame(tune(known, SPACE, trials=number, scheduler="none", demands=demands))
        assert list(trials["state"]) == ["complete"] * number
        # Packed two to a card, a machine's second card serves where it has all four; spread one to a machine.
        assert trials.groupby(["node", "cards"]).size().to_list() == [number // 2] * 2
        assert trials["node"].nunique() == machines
