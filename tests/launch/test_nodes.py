import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raydetr import __version__, config
from raydetr.errors import UserError
from raydetr.launch import nodes
from raydetr.launch.nodes import check_listening, check_nodes, is_node_failure, lost_another_node, lost_nodes, probe_node
from raydetr.launch.train import train


@pytest.fixture(scope="module")
def two_machines(ray_cluster):
    """Two nodes of one cluster; yields the id of the one that is not the head. Both see this machine's disk."""
    with ray_cluster(1, 1) as cluster:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        here = ray.get_runtime_context().get_node_id()
        yield next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != here)
        ray.shutdown()


def settings(folder, storage):
    return config.load_config({"data.path": str(folder), "run.storage": str(storage), "run.name": "run", "model.preset": "detr_tiny"})


def changed_on(node, change):
    """What :func:`probe_node` answers, but on ``node`` with ``change``, as if its disk were another."""
    answer = probe_node

    def probe(paths, storage, token):
        import ray

        found = answer(paths, storage, token)
        return found | change if ray.get_runtime_context().get_node_id() == node else found

    return probe


def test_machines_that_share_all_pass_and_nothing_stays_behind(two_machines, coco_folder, tmp_path):
    asked = []
    original = nodes.check_answers
    nodes.check_answers = lambda seen, *more: (asked.extend(seen), original(seen, *more))
    try:
        check_nodes(settings(coco_folder(), tmp_path / "runs"))
    finally:
        nodes.check_answers = original
    assert len(asked) == 2
    assert [answer["version"] for _, answer in asked] == [__version__] * 2
    assert len({answer["wrote"] for _, answer in asked}) == 2  # each wrote its own
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": None}, r"no raydetr on the cluster's machines: .*\(.*\); take an image"),
        ({"version": "9.9"}, rf"raydetr is {re.escape(__version__)} here and 9\.9 on "),
        ({"lacking": ["/shared/photographs"]}, r"/shared/photographs is not on \S+ \([\d.]+\); the photographs"),
        ({"token": False}, r"run\.storage: .* is another folder on \S+ \([\d.]+\) than here; .*NFS"),
        ({"wrote": "elsewhere"}, r"run\.storage: .* is another folder"),
        ({"refusal": "s3://bucket/runs: the store refuses"}, r"\S+ \([\d.]+\): s3://bucket/runs: the store refuses"),
    ],
)
def test_a_machine_that_lacks_something_is_named(two_machines, coco_folder, tmp_path, change, says):
    with pytest.raises(UserError, match=says) as caught:
        check_nodes(settings(coco_folder(), tmp_path / "runs"), changed_on(two_machines, change))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_asks_the_machines_before_it_starts(two_machines, coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "probe_node", changed_on(two_machines, {"lacking": ["/shared/photographs"]}))
    with pytest.raises(UserError, match="is not on"):
        train(settings(coco_folder(), tmp_path / "runs"))


def test_what_a_machine_has_is_seen_there(tmp_path):
    (tmp_path / ".probe-abc").write_text("abc")
    found = probe_node([str(tmp_path), str(tmp_path / "absent")], str(tmp_path), "abc")
    assert (found["version"], found["lacking"], found["token"]) == (__version__, [str(tmp_path / "absent")], True)
    assert (tmp_path / found["wrote"]).read_text() == "abc"
    assert not probe_node([], str(tmp_path / "another disk"), "abc")["token"]
    assert not (tmp_path / "another disk").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1", "ray://127.0.0.1:1", "garbage", "host:port"])
def test_an_address_where_nothing_listens_is_said_at_once(address):
    with pytest.raises(UserError, match="--address X: no"):
        check_listening("--address X", address)


def test_an_address_where_something_listens_passes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        check_listening("--address X", f"127.0.0.1:{server.getsockname()[1]}")
    check_listening("RAY_ADDRESS", "auto")


@pytest.mark.parametrize("other", [{"ray_version": "2.1.0"}, {"python_version": "3.9.1"}])
def test_a_cluster_of_other_versions_is_refused_with_both(two_machines, other):
    known = ray._private.worker.global_worker.gcs_client
    key, namespace = b"CLUSTER_METADATA", b"cluster"  # what every driver compares itself with
    before = known.internal_kv_get(key, namespace)
    known.internal_kv_put(key, json.dumps(json.loads(before) | other).encode(), True, namespace)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from raydetr.launch.train import ray_session\nwith ray_session(1): pass"],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        known.internal_kv_put(key, before, True, namespace)
    said = done.stderr.strip().splitlines()[-1]
    theirs = {"ray_version": ray.__version__, "python_version": platform.python_version()} | other
    assert "UserError: RAY_ADDRESS" in said
    assert f"Ray: {theirs['ray_version']} Python: {theirs['python_version']} " in said
    assert f"Ray: {ray.__version__} Python: {platform.python_version()};" in said


def test_the_loss_of_a_machine_is_told_from_that_of_a_process(two_machines):
    unreachable, dead = ray.exceptions.ActorUnavailableError("cannot be reached", None), ray.exceptions.ActorDiedError()
    for error, of_machine in ((unreachable, True), (dead, False), (RuntimeError("Connection reset by peer"), False)):
        assert is_node_failure(error) == of_machine
        assert is_node_failure(WorkerHealthCheckFailedError("A worker health check failed.", failure=error)) == of_machine


def test_a_machine_that_went_is_lost_once(monkeypatch):
    def machines(*alive):
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": str(number), "Alive": there} for number, there in enumerate(alive)])

    monkeypatch.setattr(nodes, "LOSS_TIMEOUT_S", 0.1)
    machines(True, True)
    before = lost_nodes()
    assert not lost_another_node(before)
    machines(True, False)
    assert lost_another_node(before)
    assert not lost_another_node(lost_nodes())
