import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

import raydetr
from raydetr import config
from raydetr.data.formats.convert import convert
from raydetr.demo import balloons
from raydetr.errors import UserError
from raydetr.launch import scheduling
from raydetr.launch import trial as launched
from raydetr.launch import tune as launcher
from raydetr.launch.command import seconds
from raydetr.launch.scheduling import StudyScheduler, trial_folder
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Demands
from raydetr.launch.train import TWICE
from raydetr.launch.trial import EARLIER
from raydetr.launch.tune import default_sampler, default_scheduler, resume, share_images, summary, tune
from raydetr.search.record import epochs_of, turns_of
from raydetr.search.space import read_space
from raydetr.search.study import TAKEN_OVER, Search, open_search
from raydetr.training.fit import fit
from raydetr.training.metrics import REPORTED
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from tests import helpers

TINY = helpers.TINY | {
    "optim.epochs": 2,
    "optim.batch_size": 2,
    "optim.schedule": "constant",
    "data.crop": 0.0,
    "run.name": "search",
}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"uniform": [0.05, 0.5]}}


def settings(folder, storage, **changes):
    return helpers.tiny_config(TINY, folder, storage, **changes)


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=True, resources={DRIVER: 4}, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@contextlib.contextmanager
def spoiled():
    """Within it photographs are spoiled as soon as a search has decoded them."""

    def share_and_spoil(config):
        shared = share_images(config)
        for picture in Path(config.data.path).glob("*2017/*.jpg"):
            picture.write_bytes(b"nothing that could be decoded")
        return shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "share_images", share_and_spoil)
        yield


@pytest.fixture(scope="module")
def searched(cluster, module_coco_folder, tmp_path_factory):
    """A search of three trials from Python: its folder, and what it returned."""
    storage, data = tmp_path_factory.mktemp("searched"), module_coco_folder()
    helpers.break_test_set(data)
    with spoiled():
        options = {"trials": 3, "scheduler": "none", "sampler": "random", "seed": 3, "demands": Demands(concurrent=1)}
        returned = raydetr.tune(settings(data, storage), SPACE, **options)
    return storage / "search", returned


@pytest.mark.slow
def test_a_search_trains_every_trial_with_its_own_settings(searched):
    search = open_search(searched[0])
    trials = search.frozen()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    folders = [trial_folder(search, number) for number in range(3)]
    rates = [log_of(folder)[0]["train_lr"] for folder in folders]  # what the optimizer really had
    assert rates == pytest.approx([search.config(number).optim.lr for number in range(3)])
    assert len(set(rates)) == 3
    assert rates[0] == config.load_config(TINY).optim.lr
    for trial, folder in zip(trials, folders, strict=True):
        scores = [line["test_coco_eval_bbox"][0] for line in log_of(folder)]
        assert trial.value == pytest.approx(max(scores))
        assert "optimizer" not in read_checkpoint(folder / "last.pth")
        assert sorted(path.name for path in (folder / "tb").iterdir())
    best = config.load_config(config.read_yaml(search.folder / "best.yaml"))
    assert best.optim.lr == search.config(search.best().number).optim.lr
    assert read_checkpoint(search.folder / "best.pth")["settings"]["optim"]["lr"] == best.optim.lr
    assert "best settings: raydetr train --config" in summary(search)
    columns = (search.folder / "trials.csv").read_text().splitlines()[0].split(",")
    trial = ["trial", "state", "AP", "epochs", "seconds", "started", "ended", *search.space.names]
    assert columns[: len(trial)] == trial
    assert columns[-3:] == ["node", "name", "reason"]
    assert columns[len(trial) : -3] == [name for name in REPORTED if name in columns and name not in trial]  # nothing of Ray's own
    assert {"AP50", "train_loss", "val_loss_giou", "best_epoch"} <= set(columns)


@pytest.mark.slow
def test_a_search_never_reads_the_test_set(searched):
    search = open_search(searched[0])
    assert (Path(search.base_config.data.path) / "annotations" / "custom_test.json").read_text() == "broken"
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * 3


@pytest.mark.slow
def test_trials_share_the_pictures_that_were_decoded_once(searched):
    folder, _ = searched
    assert [trial.state.name for trial in open_search(folder).frozen()] == ["COMPLETE"] * 3
    data = config.load_config(config.read_yaml(folder / "config.yaml")).data
    assert {picture.read_bytes() for picture in Path(data.path).glob("*2017/*.jpg")} == {b"nothing that could be decoded"}


@pytest.mark.slow
def test_a_search_from_python_gives_settings_a_frame_and_the_study(searched):
    _, (best, trials, study) = searched
    assert list(trials["trial"]) == [0, 1, 2]
    assert set(trials["optim.lr"]) == {trial.params["optim.lr"] for trial in study.trials}
    assert best.optim.lr in set(trials["optim.lr"])
    assert best.run.name is None


@pytest.mark.slow
def test_a_search_with_several_objectives_measures_them(cluster, coco_folder, tmp_path):
    space, demands = {"model.num_queries": {"choice": [5]}}, Demands(concurrent=1)
    known = settings(coco_folder(), tmp_path, optim__epochs=1)
    search = tune(known, space, trials=2, also=["latency", "AP50"], demands=demands)
    assert search.scheduler == "none"
    for trial in search.frozen():
        ap, latency, ap50 = trial.values
        (epoch,) = log_of(trial_folder(search, trial.number))
        assert [ap, ap50] == pytest.approx(epoch["test_coco_eval_bbox"][:2])
        assert latency == read_checkpoint(trial_folder(search, trial.number) / "last.pth")["metrics"]["latency"] > 0
    assert "latency" in summary(search)


@pytest.mark.slow
def test_a_trial_that_breaks_is_failed_and_the_search_goes_on(cluster, coco_folder, tmp_path):
    # The tiny backbone has no stage to dilate: every trial but the first, which has the defaults, fails.
    search = tune(
        settings(coco_folder(), tmp_path), {"model.dilation": {"choice": [True]}}, trials=2, scheduler="none", demands=Demands(concurrent=1)
    )
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE", "FAIL"]
    assert "model.dilation" in search.frozen()[1].user_attrs["reason"]
    assert search.best().number == 0


@pytest.mark.slow
def test_a_trial_whose_process_dies_again_and_again_is_failed(cluster, coco_folder, tmp_path, monkeypatch):
    begun = tmp_path / "begun"

    def run_trial(parameters, images):
        if launched.unpacked(parameters).config.run.name.startswith("001"):
            with begun.open("a") as file:
                file.write("x")
            os._exit(1)
        ray.tune.report({"epoch": 1, "AP": 0.5, "finished": True})

    monkeypatch.setattr(launcher, "run_trial", run_trial)
    known = settings(coco_folder(), tmp_path, run__max_failures=1)
    search = tune(known, SPACE, trials=3, scheduler="none", demands=Demands(concurrent=1))
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert search.frozen()[1].user_attrs["reason"] == "lost 2 times (run.max_failures), the last time: its process was killed"
    assert begun.read_text() == "xx"


@pytest.mark.slow
def test_a_fault_of_the_machine_ends_its_process_and_the_trial_is_retried(cluster, coco_folder, tmp_path, monkeypatch):
    processes = tmp_path / "processes"

    def kill_loader():
        while not (loaders := psutil.Process().children()):
            time.sleep(0.01)
        loaders[0].kill()

    def fit(original, config, reporter):
        """The first trial loses a loader process once, the second meets a CUDA error at each attempt, the third an error of the code."""
        import torch

        number = config.run.name[:3]
        with processes.open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        if number == "000":
            if processes.read_text().count("000 ") == 1:
                threading.Thread(target=kill_loader, daemon=True).start()
            return original(config, reporter)
        if number == "001":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if number == "002":
            raise RuntimeError("shapes do not fit")
        return {"epoch": 1, "AP": 0.5}

    def run_trial(parameters, images):
        with pytest.MonkeyPatch.context() as patch:
            import raydetr.training.fit as module

            patch.setattr(module, "fit", functools.partial(fit, module.fit))
            launched.run_trial(parameters, images)

    monkeypatch.setattr(launcher, "run_trial", run_trial)
    known = settings(coco_folder(), tmp_path, run__max_failures=2, data__num_workers=1)
    search = tune(known, SPACE, trials=4, scheduler="none", demands=Demands(concurrent=1))
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    cuda, code = (search.frozen()[number].user_attrs["reason"] for number in (1, 2))
    host = socket.gethostname()
    assert cuda.startswith(
        f"lost 3 times (run.max_failures), the last time: {host}: AcceleratorError: CUDA error: an illegal memory access"
    )
    assert code == f"lost 2 times ({TWICE}), the last time: {host}: RuntimeError: shapes do not fit"
    trials, pids = zip(*(line.split() for line in processes.read_text().splitlines()), strict=True)
    assert trials == ("000", "000", "001", "001", "001", "002", "002", "003")
    assert len(set(pids)) == 7
    assert pids[1] == pids[2]  # a process is reused unless it met a fault


@pytest.mark.slow
def test_a_search_where_everything_fails_stops_after_a_few(cluster, coco_folder, tmp_path):
    folder = coco_folder()
    picture = folder / "train2017" / "train_002.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])  # the quick check reads headers only
    with pytest.raises(UserError, match=r"trials failed.*train_002\.jpg"):
        tune(settings(folder, tmp_path, data__cache_gb=0), SPACE, trials=30, scheduler="none", demands=Demands(concurrent=1))
    assert len(open_search(tmp_path / "search").frozen()) < 10


def test_a_broken_picture_stops_a_search_before_its_first_trial(cluster, coco_folder, tmp_path):
    folder = coco_folder()
    picture = folder / "val2017" / "val_001.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"val_001\.jpg: broken or truncated"):
        tune(settings(folder, tmp_path), SPACE, trials=30)
    assert not (tmp_path / "search").exists()


def test_a_machines_workers_read_the_same_memory(cluster, coco_folder, tmp_path):
    (shared,) = share_images(settings(coco_folder(), tmp_path))
    one, other = ray.get(shared), ray.get(shared)
    assert one.filled.all()
    assert len(one.filled) == 6
    assert np.shares_memory(one.pixels, other.pixels)


@pytest.mark.slow
def test_a_population_goes_on_from_its_best(cluster, tmp_path):
    balloons.generate(tmp_path / "photographs", train=8, val=4)
    convert(tmp_path / "photographs", tmp_path / "data")
    changed = {"model__weights": "bundled", "data__train_sizes": [96], "data__val_size": 96, "optim__epochs": 4, "optim__lr": 5e-4}
    known = settings(tmp_path / "data", tmp_path, **changed)
    search = tune(known, {"optim.lr": {"loguniform": [1e-9, 1e-3]}}, trials=4, scheduler="pbt", sampler="random", metric="AP50")
    trials = search.frozen()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    changes = {trial.number: trial.user_attrs[TAKEN_OVER] for trial in trials if TAKEN_OVER in trial.user_attrs}
    assert changes  # a rate of 1e-9 learns nothing: somebody has gone on from somebody else
    assert 0 not in changes
    for number, (change, *_) in changes.items():
        assert search.settings(number)["optim.lr"] == search.frozen()[number].user_attrs[TAKEN_OVER][-1]["settings"]["optim.lr"]
        rates = {line["epoch"] + 1: line["train_lr"] for line in log_of(trial_folder(search, number))}
        assert rates[change["after"]] == pytest.approx(trials[number].params["optim.lr"])
        assert rates[4] == pytest.approx(search.settings(number)["optim.lr"])  # what the optimizer really had


def test_a_population_of_several_workers_is_refused(coco_folder, tmp_path):
    with pytest.raises(UserError, match="--workers-per-trial"):
        tune(settings(coco_folder(), tmp_path), SPACE, trials=4, scheduler="pbt", demands=Demands(workers=2))


def test_a_search_has_one_driver(coco_folder, tmp_path):
    launcher.create_search(tmp_path / "search", read_space(SPACE), settings(coco_folder(), tmp_path), trials=2)
    with launcher.driving(tmp_path / "search"), pytest.raises(UserError, match="another raydetr is running this search"):
        resume(tmp_path / "search")
    with launcher.driving(tmp_path / "search"):
        pass  # it is free again


def test_an_existing_search_is_offered_to_go_on_with(cluster, coco_folder, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "study.journal").write_text("")
    with pytest.raises(UserError, match="--resume"):
        tune(settings(coco_folder(), tmp_path), SPACE, trials=2)


def test_fewer_trials_than_have_begun_are_refused(coco_folder, tmp_path, monkeypatch):
    search = launcher.create_search(tmp_path / "search", read_space(SPACE), settings(coco_folder(), tmp_path), trials=8)
    for number in range(5):
        search.ask(str(number))
        search.tell(number, "complete", 0.5)
    with pytest.raises(UserError, match=r"--trials 3: 5 trials of .* have begun already; give 5 to finish these, or more"):
        resume(tmp_path / "search", trials=3)
    assert open_search(tmp_path / "search").trials == 8  # nothing has changed
    search.extend(3)  # as an earlier version let it
    assert "not finished" not in summary(search)


def test_a_file_that_cannot_be_written_is_named(coco_folder, tmp_path):
    launcher.create_search(tmp_path / "search", read_space(SPACE), settings(coco_folder(), tmp_path), trials=2)
    (tmp_path / "search" / "driver.lock").mkdir()  # no permission would do the same, but not to the root user
    with pytest.raises(UserError, match=rf"{tmp_path}/search/driver\.lock: cannot be locked \(Is a directory\)"):
        resume(tmp_path / "search")


def test_resuming_with_another_space_shows_the_difference(coco_folder, tmp_path):
    launcher.create_search(tmp_path / "search", read_space(SPACE), settings(coco_folder(), tmp_path), trials=2)
    changed = read_space({**SPACE, "loss.eos_coef": {"uniform": [0.05, 0.9]}})
    with pytest.raises(UserError, match=r"loss\.eos_coef"):
        resume(tmp_path / "search", changed)


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129600), ("7", 7), (None, None)])
def test_time_budgets_have_units(text, value):
    assert seconds(text) == value


@pytest.mark.slow
def test_paused_trials_train_on_as_if_they_had_not_been_paused(cluster, module_coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduling, "REPORT_S", 1000.0)  # so that the epochs between two decisions are reported together
    gathered, on_trial_result = [], StudyScheduler.on_trial_result

    def watch(scheduler, controller, trial, result):
        gathered.extend(each["epoch"] for each in result.get(EARLIER, ()))
        return on_trial_result(scheduler, controller, trial, result)

    monkeypatch.setattr(StudyScheduler, "on_trial_result", watch)
    data = module_coco_folder(folder="promoted")
    known = settings(data, tmp_path, optim__epochs=4, data__crop=0.5, run__seed=1)
    search = tune(known, SPACE, trials=5, sampler="random", scheduler="promote", demands=Demands(concurrent=1))
    trials = search.frozen()
    assert trials[0].state.name == "COMPLETE"
    epochs = [epochs_of(trial) for trial in trials[1:]]
    assert set(epochs) == {2, 4}, epochs
    for trial in trials:
        log = log_of(trial_folder(search, trial.number))
        assert [line["epoch"] for line in log] == list(range(epochs_of(trial)))
        assert sorted(trial.intermediate_values) == list(range(1, epochs_of(trial) + 1))
        assert trial.state.name == ("COMPLETE" if len(log) == 4 else "PRUNED")
        assert "optimizer" not in read_checkpoint(trial_folder(search, trial.number) / "last.pth")
    assert set(gathered) == {1, 3}  # before the decision after epoch 2, and between it and the last epoch
    promoted = next(trial for trial in trials[1:] if epochs_of(trial) == 4)
    assert len(turns_of(promoted)) == 2
    alone = search.config(promoted.number)
    alone.run.storage, alone.run.name = str(tmp_path), "alone"
    fit(alone)
    same = ("train_loss", "test_loss", "train_lr")
    logs = log_of(trial_folder(search, promoted.number)), log_of(tmp_path / "alone")
    assert [[line[name] for name in same] for line in logs[0]] == [[line[name] for name in same] for line in logs[1]]


@pytest.mark.parametrize("text", ["soon", "-3m", "0", "5 weeks"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--time-budget"):
        seconds(text)


@pytest.mark.parametrize(
    ("concurrent", "scheduler", "also", "expected"),
    [
        (1, None, [], "gp"),
        (128, "evidence", [], "gp"),
        (512, "asha", [], "tpe"),
        (64, "pbt", [], "tpe"),
        (64, "none", ["latency"], "tpe"),
    ],
)
def test_a_search_is_drawn_by_the_model_of_all_trials_unless_too_many_run_at_a_time(concurrent, scheduler, also, expected):
    assert default_sampler(concurrent, scheduler, also) == expected


@pytest.mark.parametrize(
    ("sampler", "also", "expected"), [("tpe", [], "asha"), ("gp", [], "promote"), ("cmaes", [], "asha"), ("tpe", ["latency"], "none")]
)
def test_more_trials_pass_a_rung_beside_the_model_that_learns_from_them(sampler, also, expected):
    assert default_scheduler(sampler, also) == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--space", "loss", "--trials", "0"], "--trials 0"),
        (["--space", "loss", "--sampler", "tppe"], "tpe"),
        (["--space", "loss", "--scheduler", "ashha"], "asha"),
        (["--space", "loss", "--metric", "AP42"], "AP50"),
        (["--space", "masks", "--metric", "segm_AP"], "--metric segm_AP: without model.masks there is no AP of masks"),
        (["--space", "loss", "--also", "latancy"], "--also: 'latancy' is not one of latency, AP, "),
        (["--space", "loss", "--also", "segm_AP"], "--also segm_AP: without model.masks there is no AP of masks"),
        (["--space", "loss", "--metric", "latency"], "give --also latency"),
        (["--space", "loss", "--also", "AP"], "--also AP: is an objective of the search already"),
        (["--space", "loss", "--also", "latency", "--scheduler", "asha"], "several objectives need --scheduler none"),
        (["--space", "loss", "--also", "latency", "--sampler", "gp"], "--sampler gp knows one objective"),
        (["--space", "lss"], "loss"),
        ([], "--space"),
        (["--resume", "absent"], "a search keeps its settings"),
    ],
)
def test_bad_flags_are_one_line(coco_folder, tmp_path, capsys, flags, says):
    from raydetr.cli import main

    assert main(["tune", "--data", str(coco_folder()), "--storage", str(tmp_path / "runs"), "--preset", "detr_tiny", *flags]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_resuming_what_is_not_there_is_one_line(capsys):
    from raydetr.cli import main

    assert main(["tune", "--resume", "absent"]) == 2
    assert "holds no search" in capsys.readouterr().err


def start(*flags, address=None, environment=None):
    """A search by the command, on the cluster at an address or with a Ray of its own."""
    command = [sys.executable, "-m", "raydetr.cli", "tune", *flags]
    environment = os.environ | (environment or {}) | ({"RAY_ADDRESS": address} if address else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.3)  # to look at all processes takes long
    return found


def processes_of(title):
    """Processes with that title of the Ray that was started here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def ended_trials(folder):
    """When the trials of the search in a folder ended, those that have."""
    if not (folder / "trials").exists():
        return {}
    return {trial.number: trial.datetime_complete for trial in Search(folder).frozen() if trial.state.is_finished()}


def all_epochs(search, epochs=3):
    logs = [log_of(trial_folder(search, number)) for number in range(search.trials)]
    return all([line["epoch"] for line in log] == list(range(epochs)) for log in logs)


@pytest.mark.slow
def test_a_trial_whose_worker_is_killed_resumes_from_its_last_epoch(cluster, coco_folder, tmp_path):
    photographs, folder, epochs = coco_folder(), tmp_path / "search", 20
    config.write_yaml(settings(photographs, tmp_path, optim__epochs=epochs), tmp_path / "run.yaml")
    options = ("--space", "loss", "--also", "latency", "--trials", "1", "--workers-per-trial", "2")  # with it nothing stops early
    driver = start("--config", str(tmp_path / "run.yaml"), *options, address=ray.get_runtime_context().gcs_address)
    wait_for(lambda: driver.poll() is not None or list(folder.glob("trials/*")))
    for picture in photographs.glob("*2017/*.jpg"):
        picture.write_bytes(b"nothing that could be decoded")  # as it was when the search began
    log = next(folder.glob("trials/*")) / "log.txt"
    victim, _ = wait_for(lambda: len(workers := processes_of("ray::RayTrainWorker")) == 2 and workers)
    wait_for(lambda: driver.poll() is not None or (log.exists() and len(log_of(log.parent)) > 1))  # last.pth has the first
    assert len(log_of(log.parent)) < epochs
    victim.kill()
    assert driver.wait(timeout=400) == 0, driver.stdout.read()
    search = open_search(folder)
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"], [trial.user_attrs for trial in search.frozen()]
    assert search.frozen()[0].values[1] == read_checkpoint(log.parent / "last.pth")["metrics"]["latency"] > 0  # of the first worker
    assert all_epochs(search, epochs)
    assert len(list((log.parent / "tb").glob("*tfevents*"))) >= 2  # another process has trained the rest
    assert config.read_yaml(log.parent / "config.yaml")["run.workers"] == 2


SECRET = "marker-of-a-secret-key"


@pytest.mark.slow
def test_signals_end_a_search_in_order_and_leave_neither_secrets_nor_litter(cluster, coco_folder, tmp_path):
    config.write_yaml(settings(coco_folder(), tmp_path, optim__epochs=10), tmp_path / "run.yaml")
    folder = tmp_path / "search"
    first = ("--config", str(tmp_path / "run.yaml"), "--space", "loss", "--trials", "3", "--scheduler", "none")
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as session:
        for sign, flags in ((signal.SIGINT, first), (signal.SIGTERM, ("--resume", str(folder)))):
            before = ended_trials(folder)
            # With a Ray of its own; without an address in the environment, where other tests may have one.
            driver = start(*flags, "--concurrent", "1", environment={"AWS_SECRET_ACCESS_KEY": SECRET, "RAY_TMPDIR": session})
            wait_for(lambda before=before: len(ended_trials(folder)) > len(before))
            os.killpg(driver.pid, sign)  # to the group, as a terminal, a scheduler or a service does; another trial is under way
            said, _ = driver.communicate(timeout=120)
            assert driver.returncode == 128 + sign, said
            assert said.endswith(f"raydetr: interrupted; finished epochs are kept: raydetr tune --resume {folder}\n")
            assert "best settings: raydetr train --config" in said
            assert "Traceback" not in said
            assert "Stack" not in said  # of Ray's C++
        assert list(Path(session).rglob("raylet.out"))
        left = {str(path): path.read_bytes() for path in [*Path(session).rglob("*"), *folder.rglob("*")] if path.is_file()}
    assert [where for where, text in {**left, "output": said.encode()}.items() if SECRET.encode() in text] == []
    assert (folder / "best.yaml").exists()
    ended = ended_trials(folder)
    assert 2 <= len(ended) <= 3
    finished = trial_folder(open_search(folder), 0)
    unstripped = {**read_checkpoint(finished / "last.pth"), "optimizer": {"state": {}}}
    save_checkpoint(finished / "last.pth", unstripped)  # as a driver leaves it that is killed at the wrong moment
    (finished / ".owner").write_text("a token")
    (finished / ".last.pth.0.partial").touch()
    (finished / "ray").mkdir()
    search = resume(folder, demands=Demands(concurrent=1))
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * 3
    assert ended.items() <= ended_trials(folder).items()  # none ran twice
    assert all_epochs(search, 10)
    names = {path.name for path in folder.rglob("*")}
    assert names.isdisjoint({"ray", ".owner", ".last.pth.0.partial"})
    for number in range(3):
        assert "optimizer" not in read_checkpoint(trial_folder(search, number) / "last.pth")


@pytest.mark.slow
def test_trials_and_drivers_killed_at_any_moment_lose_nothing(cluster, coco_folder, tmp_path):
    address, folder, random = ray.get_runtime_context().gcs_address, tmp_path / "search", np.random.default_rng(0)
    config.write_yaml(settings(coco_folder(), tmp_path, optim__epochs=8), tmp_path / "run.yaml")
    options = ("--space", "loss", "--scheduler", "none", "--trials", "60")  # so that it has not ended before all of this
    driver, killed = start("--config", str(tmp_path / "run.yaml"), *options, address=address), set()

    def new_trials():
        assert driver.poll() is None, driver.stdout.read()
        return [each for each in processes_of("ray::ImplicitFunc") if each.pid not in killed]

    for victim in ("trial", "driver", "trial"):
        wait_for(new_trials)
        time.sleep(random.uniform(0, 9))  # a process of a trial starts for some seconds, then it trains
        trials = wait_for(new_trials)
        if victim == "trial":
            trials = [trials[int(random.integers(len(trials)))]]
            with contextlib.suppress(psutil.NoSuchProcess):
                trials[0].kill()
        else:  # the trials go with it
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            driver = start("--resume", str(folder), address=address)
        killed |= {each.pid for each in trials}
    time.sleep(random.uniform(0, 8))  # it is about to go on
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    begun = len(open_search(folder).frozen())
    search = resume(folder, trials=begun + 1)
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * (begun + 1), [trial.user_attrs for trial in search.frozen()]
    assert all_epochs(search, 8)
