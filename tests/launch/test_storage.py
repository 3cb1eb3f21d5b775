"""Runs and searches that are kept in an object store, with a real S3 server."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import ray

from raydetr import config, storage
from raydetr.errors import UserError
from raydetr.launch import nodes
from raydetr.launch.nodes import check_nodes, probe_node
from raydetr.launch.scheduling import copy_weights
from raydetr.launch.slots import Demands
from raydetr.launch.train import ray_session, resume_config, train
from raydetr.launch.tune import pushing, refresh_working_copy, resume, summary, tune
from raydetr.predict.predict import predict
from raydetr.predict.score import score_checkpoint
from raydetr.report.report import report
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search, open_search
from raydetr.storage import become_owner, fetched
from raydetr.training.fit import LocalReporter, fit
from raydetr.weights.checkpoint import read_checkpoint
from tests import helpers

pytest_plugins = "tests.stores"

TINY = helpers.TINY | {
    "model.dropout": 0.1,
    "optim.epochs": 4,
    "optim.batch_size": 1,
    "optim.schedule": "constant",
    "data.crop": 0.0,
    "run.name": "one",
}


def settings(data, place, **changes):
    return helpers.tiny_config(TINY, data, place, **changes)


def start(*words):
    """The command in a process, of a machine that has no copies yet."""
    command = [sys.executable, "-m", "raydetr.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def flags_of(settings):
    values = config.flatten(config.to_dict(settings))
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value).strip("[]"))]


def wait_until(condition, process, patience_s=300):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_of(store, place):
    return [json.loads(line)["epoch"] for line in store.read(f"{place}/log.txt").splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_from_the_store_alone_and_ends_in_the_same_bits(store, coco_folder, tmp_path):
    folder, run = coco_folder(train=6, val=2), f"{store.uri}/one"
    photographs = f"{store.uri}/photographs"
    store.upload(folder, photographs)
    train(settings(folder, tmp_path, optim__epochs=4))
    train(settings(photographs, store.uri, optim__epochs=2))
    with pytest.raises(UserError, match=f"{run} holds a run already: resume it with --resume {run}"):
        train(settings(folder, store.uri))
    assert log_of(store, run) == [0, 1]
    before = store.names(run)

    shutil.rmtree(storage.cache_folder())
    outage = threading.Thread(target=stop_for, args=(store, 15, storage.working_folder(run) / "config.yaml"))
    outage.start()
    train(resume_config(run, {"optim.epochs": 4}), resume=True)
    outage.join()
    assert log_of(store, run) == [0, 1, 2, 3]
    names = store.names(run)
    assert {name for name in names if not name.startswith("tb/")} == {"best.pth", "config.yaml", "last.pth", "log.txt"}
    assert set(before) < set(names)  # the second process wrote events of its own
    mine, other = (read_checkpoint(file) for file in (fetched(f"{run}/last.pth"), tmp_path / "one" / "last.pth"))
    assert all(mine["model"][name].equal(other["model"][name]) for name in other["model"])
    assert not any(b"secret-of-the-test" in store.read(f"{run}/{name}") for name in names)
    assert score_checkpoint(f"{run}/best.pth", {"data.path": photographs})["AP"] == pytest.approx(mine["metrics"]["best_AP"])
    predict(f"{run}/best.pth", [folder / "val2017"], tmp_path / "seen")
    assert len(json.loads((tmp_path / "seen" / "images.json").read_text())["images"]) == 2

    train(resume_config(run, {"optim.epochs": 5, "run.workers": 2}), resume=True)
    assert log_of(store, run) == [0, 1, 2, 3, 4]
    assert len(read_checkpoint(fetched(f"{run}/last.pth"))["random"]) == 2


def stop_for(store, seconds, sign):
    """The store does not answer for that long, once the file ``sign`` is there."""
    deadline = time.monotonic() + 300
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    store.stop()
    time.sleep(seconds)
    store.start()


@pytest.mark.slow
def test_a_search_goes_on_from_the_store_alone(store, coco_folder, tmp_path, monkeypatch):
    folder, place, space = coco_folder(train=4, val=2), f"{store.uri}/one", tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1e-5, 1e-2]}\n")
    options = ("--space", space, "--trials", 3, "--scheduler", "none", "--concurrent", 1)
    stopped = start("tune", *options, *flags_of(settings(folder, store.uri, optim__epochs=3)))
    wait_until(lambda: any(name.endswith("last.pth") for name in store.names(place)), stopped)
    kill(stopped)
    monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path / "another machine"))
    begun = {name.split("/")[1] for name in store.names(place) if name.startswith("trials/")}
    said = summary(resume(place, demands=Demands(concurrent=1)))
    assert f"raydetr train --config {place}/best.yaml; its weights: {place}/best.pth" in said

    names = set(store.names(place))
    assert {"best.pth", "best.yaml", "config.yaml", "space.yaml", "study.journal", "trials.csv", "trials.parquet"} <= names
    search = Search(fetched(place))
    trials = {search.trial_name(number) for number in range(3)}
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE"] * 3
    assert begun <= trials  # what was begun went on, under its own name
    for name in trials:
        assert log_of(store, f"{place}/trials/{name}") == [0, 1, 2]
        assert "optimizer" not in read_checkpoint(search.folder / "trials" / name / "last.pth")
    best = read_checkpoint(fetched(f"{place}/best.pth"))
    assert best["settings"]["optim"]["lr"] == search.config(search.best().number).optim.lr
    assert not any("/ray/" in name or name.startswith("ray/") for name in names)
    monkeypatch.chdir(tmp_path)
    assert report([place]).name == "report.html"


def test_a_trial_goes_on_from_anothers_weights(each_store, coco_folder):
    folder, place = coco_folder(), each_store.uri
    one, other = (settings(folder, place, run__name=name, optim__epochs=epochs) for name, epochs in (("one", 1), ("other", 2)))
    fit(one)
    copy_weights(f"{place}/one", f"{place}/other")
    assert fit(other)["epoch"] == 2
    log = fetched(f"{place}/other/log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1]  # the first epoch is the other one's


def test_a_machine_that_was_given_up_for_lost_leaves_the_store_alone(store, coco_folder, tmp_path, monkeypatch):
    run = settings(coco_folder(), store.uri, optim__epochs=2)
    theirs = []

    class Lost(LocalReporter):
        def show(self, event):
            if event["kind"] == "evaluate" and event["epoch"] == 2:
                with monkeypatch.context() as another:
                    another.setenv("RAYDETR_CACHE", str(tmp_path / "another machine"))
                    theirs.append(fit(run))

    with pytest.raises(UserError, match=f"another process has taken over {store.uri}/one"):
        fit(run, Lost())
    assert theirs[0]["epoch"] == 2
    assert read_checkpoint(fetched(f"{store.uri}/one/last.pth"))["metrics"]["seconds"] == theirs[0]["seconds"]
    assert ".owner" not in store.names(f"{store.uri}/one")


def test_a_search_that_another_machine_goes_on_with_stops(store, coco_folder, tmp_path, monkeypatch):
    place, space = f"{store.uri}/one", read_space({"optim.lr": {"uniform": [1e-5, 1e-2]}})
    mine = create_search(place, space, settings(coco_folder(), store.uri), trials=2)
    with pushing(mine):
        pass
    mine.owner = become_owner(place)
    mine.push()
    monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path / "another machine"))
    refresh_working_copy(place)
    theirs = open_search(place)
    with pushing(theirs):
        theirs.ask()
        with pytest.raises(UserError, match=f"another process has taken over {place}; this one stops"):
            mine.push()
    assert len(Search(fetched(place)).frozen()) == 1
    assert ".owner" not in store.names(place)


@pytest.fixture
def two_machines(store, ray_cluster, monkeypatch):
    """Two nodes of a cluster that do not know the store's address; yields the id of the one that is not the head."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with ray_cluster(1, 1) as cluster:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_session(1):
            here = ray.get_runtime_context().get_node_id()
            yield next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != here)


@pytest.mark.slow
def test_every_machine_writes_and_reads_before_anything_starts(two_machines, store, coco_folder):
    asked, original = [], nodes.check_answers
    nodes.check_answers = lambda seen, *more: (asked.extend(seen), original(seen, *more))
    try:
        check_nodes(settings(coco_folder(), store.uri))
    finally:
        nodes.check_answers = original
    assert [answer["token"] for _, answer in asked] == [True, True]
    assert len({answer["wrote"] for _, answer in asked}) == 2
    assert store.names() == []
    with pytest.raises(UserError, match=rf"{store.uri}/absent is not on \S+ \([\d.]+\), \S+ \([\d.]+\); the photographs"):
        check_nodes(settings(f"{store.uri}/absent", store.uri))

    def cut_off(paths, place, token):
        import os

        import ray

        if ray.get_runtime_context().get_node_id() == two_machines:
            os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
        return answer(paths, place, token)

    answer = probe_node
    with pytest.raises(UserError, match=rf"\S+ \([\d.]+\): {store.uri}.*: the store does not answer"):
        check_nodes(settings(coco_folder(folder="other"), store.uri), cut_off)


def test_a_store_that_refuses_ends_a_run_before_it_starts(store, coco_folder):
    folder = coco_folder()
    with pytest.raises(UserError, match="there is no bucket no-such-bucket; create it"):
        train(settings(folder, "s3://no-such-bucket/runs"))
    with store.refusing(), pytest.raises(UserError, match=f"refuses access to bucket {store.bucket}"):
        train(settings(folder, store.uri))


@pytest.mark.slow
def test_the_full_disk_of_one_machine_is_named_and_the_search_goes_on_when_there_is_room(
    store, ray_cluster, coco_folder, small_disk, monkeypatch
):
    known, search = settings(coco_folder(), store.uri, optim__epochs=10), f"{store.uri}/one"

    def fill():
        while not list(small_disk.glob("**/last.pth")):
            time.sleep(0.1)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**20))

    with ray_cluster(1) as cluster:
        cluster.add_node(num_cpus=1, env_vars={"RAYDETR_CACHE": str(small_disk)})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        threading.Thread(target=fill, daemon=True).start()
        with pytest.raises(UserError, match=f"{socket.gethostname()}: the disk of {small_disk}/.* raydetr tune --resume {search}"):
            tune(known, {"optim.lr": {"loguniform": [1e-5, 1e-2]}}, trials=2, scheduler="none")
        (small_disk / "filler").unlink()
        assert [trial.state.name for trial in resume(search).frozen()] == ["COMPLETE"] * 2
    for name in ("000_default", "001"):
        (log,) = [each for each in store.names(search) if each.startswith(f"trials/{name}") and each.endswith("/log.txt")]
        assert log_of(store, f"{search}/{log.removesuffix('/log.txt')}") == list(range(10))
