import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydetr import config
from raydetr.errors import UserError
from raydetr.launch import train as training
from raydetr.launch.train import resume_config, scaling_config, train
from raydetr.training.fit import fit
from raydetr.weights.checkpoint import read_checkpoint
from tests import helpers

TINY = helpers.TINY | {
    "model.dropout": 0.1,
    "optim.epochs": 2,
    "optim.batch_size": 1,
    "data.train_sizes": [64, 80],
    "data.val_size": 64,
    "run.workers": 2,
    "run.pictures": 1,
    "run.name": "run",
}


EPOCHS = 30  # of the run that is stopped on its way


def settings(folder, storage, **changes):
    return helpers.tiny_config(TINY, folder, storage, **changes)


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


def log_of(run):
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("module", "late"),
    [("raydetr.launch.train", "torchvision"), ("raydetr.launch.mailbox", "torch"), ("raydetr.training.fit", "scipy.stats")],
)
def test_what_takes_long_to_import_is_not_where_everyone_waits(module, late):
    code = f"import sys, {module}; sys.exit({late!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def photographs(module_coco_folder):
    return module_coco_folder(train=6, val=2)


ALONE = """
import sys
import psutil, ray
from raydetr import config
from raydetr.launch.train import train

metrics = train(config.load_config(config.read_yaml(sys.argv[1])))
print(metrics["epoch"], ray.is_initialized(), psutil.Process().children())
"""


def test_one_worker_without_a_cluster_is_the_process_itself(coco_folder, tmp_path):
    config.write_yaml(settings(coco_folder(), tmp_path / "runs", run__workers=1), tmp_path / "settings.yaml")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    few_files = ["bash", "-c", 'ulimit -n 64; exec "$0" "$@"']
    command = [*few_files, sys.executable, "-c", ALONE, tmp_path / "settings.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "2 False []"
    assert re.fullmatch(r"(data: \d warnings; .*\n)?", done.stderr)
    assert [line["epoch"] for line in log_of(tmp_path / "runs" / "run")] == [0, 1]


@pytest.mark.parametrize("in_cluster", [False, True])
def test_automatic_workers_are_counted_where_they_will_run(coco_folder, tmp_path, monkeypatch, in_cluster):
    """On this machine before Ray starts on it, or in the cluster once it is joined."""
    sessions, runs = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(training, "nodes_resources", lambda: [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 4}] if in_cluster else [])
    monkeypatch.setattr(training, "ray_session", lambda workers: sessions.append(workers) or contextlib.nullcontext())
    monkeypatch.setattr(training, "_run", lambda config, least, _: runs.append((config.run.workers, least)) or {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if in_cluster:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    train(settings(coco_folder(), tmp_path, run__workers="auto"))
    assert (sessions, runs) == ([1], [(7, 7)]) if in_cluster else ([2], [(2, 2)])


def test_what_ends_the_one_worker_is_said_in_one_line_with_how_to_go_on(coco_folder, tmp_path, monkeypatch):
    def fail(_config):
        raise RuntimeError("CUDA error\nthe card fell off the bus")

    monkeypatch.setattr("raydetr.training.fit.fit", fail)
    with pytest.raises(UserError, match=rf"training failed: the card fell off the bus; .* --resume {tmp_path}/run$"):
        training._run_here(settings(coco_folder(), tmp_path, run__workers=1))


def test_what_only_the_user_can_mend_is_said_in_one_line_and_not_tried_again(cluster, coco_folder, tmp_path):
    folder = coco_folder(train=4, val=2)
    picture = folder / "train2017" / "train_002.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])  # the quick check reads headers only
    with pytest.raises(UserError, match=r"train_002\.jpg") as caught:
        train(settings(folder, tmp_path / "runs", run__workers=1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "run" / "last.pth").exists()


def test_more_workers_than_cpus_are_refused_with_the_numbers(cluster, coco_folder, tmp_path):
    with pytest.raises(UserError, match="3 asked for, 2 CPUs there"):
        scaling_config(settings(coco_folder(), tmp_path, run__workers=3))
    with pytest.raises(UserError, match="Ray sees no GPU"):
        scaling_config(settings(coco_folder(folder="other"), tmp_path, speed__device="cuda"))


def test_workers_share_the_cpus(cluster, coco_folder, tmp_path):
    alone = scaling_config(settings(coco_folder(), tmp_path, run__workers=1))
    assert (alone.num_workers, alone.resources_per_worker) == (1, {"CPU": 2})


@pytest.mark.parametrize(
    ("machines", "workers", "number", "each"),
    [
        ([{"CPU": 8}], "1:4", (1, 4), {"CPU": 2}),
        ([{"CPU": 2}], "1:4", (1, 4), {"CPU": 1}),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], "2:4", (2, 4), {"CPU": 4, "GPU": 1}),
        ([{"CPU": 2, "GPU": 4}], "1:4", (1, 4), {"CPU": 1, "GPU": 1}),
        ([{"CPU": 8}], "4:4", 4, {"CPU": 2}),
    ],
)
def test_of_some_to_more_workers_each_has_its_share_of_what_is_there(coco_folder, tmp_path, monkeypatch, machines, workers, number, each):
    monkeypatch.setattr(training, "nodes_resources", lambda: machines)
    scaling = scaling_config(settings(coco_folder(), tmp_path, run__workers=workers))
    assert (scaling.num_workers, scaling.resources_per_worker) == (number, each)


def test_fewer_places_than_the_fewest_workers_are_refused(coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "nodes_resources", lambda: [{"CPU": 2}])
    with pytest.raises(UserError, match="3 asked for, 2 CPUs there"):
        scaling_config(settings(coco_folder(), tmp_path, run__workers="3:8"))


def test_a_run_is_not_overwritten(coco_folder, tmp_path):
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("optim: {lr: 0.1}\n")
    with pytest.raises(UserError, match="--resume"):
        train(settings(coco_folder(), tmp_path / "runs"))


def test_data_that_would_fail_stop_the_run_before_it_starts(coco_folder, tmp_path):
    folder = coco_folder()
    (folder / "train2017" / "train_001.jpg").unlink()
    with pytest.raises(UserError, match=r"train_001\.jpg"):
        train(settings(folder, tmp_path / "runs"))


def test_resuming_keeps_the_settings(coco_folder, tmp_path):
    before = settings(coco_folder(), tmp_path / "runs", optim__lr=3e-4)
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    config.write_yaml(before, run / "config.yaml")
    moved = tmp_path / "moved"
    (tmp_path / "runs").rename(moved)
    after = resume_config(str(moved / "run"), {}, {"optim.epochs": "9", "optim.lr": 3e-4})
    assert (after.optim.lr, after.optim.epochs, after.run.storage) == (3e-4, 9, str(moved))
    with pytest.raises(UserError, match=r"optim\.lr is 0\.0003 .* and 0\.001 here"):
        resume_config(str(moved / "run"), {"optim.lr": 1e-3})


def start(folder, storage, *more, epochs, environment=None):
    """A run by the command, with a Ray of its own; ``more`` are flags."""
    values = config.flatten(config.to_dict(settings(folder, storage, optim__epochs=epochs)))
    flags = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value).strip("[]"))]
    command = [sys.executable, "-m", "raydetr.cli", "train", *([] if "--resume" in more else flags), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | (environment or {}), start_new_session=True, **pipes)


def wait_for_epoch(run, epoch, process, patience_s=300):
    deadline = time.monotonic() + patience_s
    while not (run / "log.txt").exists() or len(log_of(run)) < epoch:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no epoch came"
        time.sleep(0.02)


def same_weights(first, second):
    mine, other = read_checkpoint(first)["model"], read_checkpoint(second)["model"]
    return all(torch.equal(mine[name], other[name]) for name in mine)


SECRETS = {"AWS_SECRET_ACCESS_KEY": "marker-of-a-secret-key", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "marker-of-a-secret-token"}


@pytest.fixture(scope="module")
def stopped(photographs, tmp_path_factory):
    """A run of two workers with secrets in its environment, ended by SIGTERM after its first epoch; resumed, its driver killed after the
    next: its folder, the two processes' exit codes and what they said, and the files of Ray's sessions."""
    storage = tmp_path_factory.mktemp("stopped")
    run, ended = storage / "run", []
    resume = ("--resume", str(run), "--debug")
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as session:
        for sign, more in ((signal.SIGTERM, ()), (signal.SIGKILL, resume)):
            process = start(photographs, storage, *more, epochs=EPOCHS, environment={**SECRETS, "RAY_TMPDIR": session})
            wait_for_epoch(run, len(log_of(run)) + 1 if ended else 1, process)
            os.killpg(process.pid, sign)  # to the group, as a terminal, a scheduler or a service does
            said, _ = process.communicate(timeout=120)
            ended.append((process.returncode, said))
        left = {str(path): path.read_bytes() for path in Path(session).rglob("*") if path.is_file()}
    return run, ended, left


@pytest.fixture(scope="module")
def resumed(cluster, stopped):
    """The same run at its end: its folder, what was said on the way, and its last metrics."""
    run, ended, _ = stopped
    metrics = train(resume_config(str(run)), resume=True)
    return run, "".join(said for _, said in ended), metrics


def check_interrupted(code, said, run, sign):
    """The process was ended by a signal as it should: in order, with how to resume."""
    assert said.endswith(f"raydetr: interrupted; finished epochs are kept: raydetr train --resume {run}\n")
    assert "Traceback" not in said
    assert "Stack" not in said  # of Ray's C++
    assert code == 128 + sign


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_a_run_in_order(stopped):
    run, (first, _), _ = stopped
    check_interrupted(*first, run, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_without_ray_in_order(photographs, tmp_path, sign):
    process = start(photographs, tmp_path, "--run.workers=1", epochs=400)
    wait_for_epoch(tmp_path / "run", 1, process)
    os.killpg(process.pid, sign)
    said, _ = process.communicate(timeout=120)
    check_interrupted(process.returncode, said, tmp_path / "run", sign)


def newest_process(title):
    """The youngest process with that title of the Ray that was started here; those of earlier runs may still be ending."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append((process.create_time(), process))
    return max(found, key=lambda each: each[0])[1]


@pytest.mark.slow
def test_a_killed_mailbox_or_controller_is_replaced_and_at_last_the_run_says_how_to_resume(cluster, photographs, tmp_path):
    run, ended = tmp_path / "run", []

    def fail():
        with pytest.raises(UserError) as caught:
            train(settings(photographs, tmp_path, run__workers=1, run__max_failures=1, optim__epochs=10_000))
        ended.append(str(caught.value))

    thread = threading.Thread(target=fail)
    thread.start()
    running = SimpleNamespace(poll=lambda: None if thread.is_alive() else 1, stdout=io.StringIO("the run has ended"))
    wait_for_epoch(run, 1, running)
    for title in ("ray::Mailbox", "ray::TrainController"):
        newest_process(title).kill()
        wait_for_epoch(run, len(log_of(run)) + 2, running)  # one may have been on its way
    newest_process("ray::TrainController").kill()
    thread.join(timeout=120)
    assert ended[0].startswith("Ray Train's controller failed: ")
    assert ended[0].endswith(f"raydetr train --resume {run}")
    assert "\n" not in ended[0]


@pytest.mark.slow
def test_an_error_of_the_code_is_retried_once(cluster, photographs, tmp_path, monkeypatch):
    attempts, train_worker = tmp_path / "attempts", training.train_worker

    def fit(config, reporter):
        with attempts.open("a") as file:
            file.write("x")
        raise RuntimeError("shapes do not fit")

    def broken_worker(loop_config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("raydetr.training.fit.fit", fit)
            return train_worker(loop_config)

    monkeypatch.setattr(training, "train_worker", broken_worker)
    with pytest.raises(UserError) as caught:
        train(settings(photographs, tmp_path, run__workers=1, run__max_failures=9))
    assert str(caught.value).startswith(f"worker 0 failed: RuntimeError: shapes do not fit ({training.TWICE}); ")
    assert str(caught.value).endswith(f"raydetr train --resume {tmp_path}/run")
    assert attempts.read_text() == "xx"


@pytest.mark.slow
def test_two_workers_make_a_whole_run_folder(resumed):
    run, _, metrics = resumed
    assert metrics["epoch"] == EPOCHS
    assert [line["epoch"] for line in log_of(run)] == list(range(EPOCHS))
    assert {path.name for path in run.iterdir()} - {".lock"} == {"config.yaml", "log.txt", "tb", "best.pth", "last.pth"}  # no ray/, .owner
    assert config.load_config(config.read_yaml(run / "config.yaml")).run.workers == 2
    last = read_checkpoint(run / "last.pth")
    assert last["epoch"] == EPOCHS
    assert len(last["random"]) == 2


@pytest.mark.slow
def test_a_short_epoch_does_not_wait_for_ray_train(resumed):
    events = EventAccumulator(str(resumed[0] / "tb"))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("val/AP")]
    assert min(later - earlier for earlier, later in itertools.pairwise(times[-6:])) < 1.9  # Ray Train's own pace is 2 s


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_ends_in_the_weights_of_a_run_without_ray(resumed, photographs, tmp_path, run_workers):
    config.write_yaml(settings(photographs, tmp_path, optim__epochs=EPOCHS), tmp_path / "settings.yaml")
    ended = run_workers(__file__, "train_without_ray", 2, tmp_path / "settings.yaml")
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert same_weights(resumed[0] / "last.pth", tmp_path / "run" / "last.pth")


@pytest.mark.slow
def test_no_secret_is_left_in_a_run_or_in_rays_session(stopped, resumed):
    run, said, _ = resumed
    assert any(name.endswith("raylet.out") for name in stopped[2])
    left = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "log.txt", "best.pth"} <= {path.name for path in left}
    assert any("tfevents" in path.name for path in left)
    told = {"output": said.encode(), **stopped[2], **{str(path): path.read_bytes() for path in left}}
    assert [where for where, text in told.items() if b"marker-of-a-secret" in text] == []


LISTENING = """
import psutil, ray
from raydetr.launch.train import ray_session

with ray_session(1, drivers=True):
    ray.get(ray.remote(num_cpus=1)(lambda: None).remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in processes:
        for socket in process.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                print("LISTENS", process.name(), socket.laddr.ip)
"""


def test_ray_that_is_started_here_listens_to_this_machine_only():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", LISTENING], env=environment, capture_output=True, text=True, timeout=180, check=True)
    listening = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("LISTENS")]
    assert len(listening) >= 6, done.stdout  # the driver, gcs_server, raylet, dashboard, its agents, the task's worker
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}, done.stdout


def train_without_ray(file):
    """Two plain processes of one run, which nothing happens to."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    fit(config.load_config(config.read_yaml(file)))
    dist.destroy_process_group()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
