"""Ray that does not start, is not there, or is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from raydetr.errors import UserError
from raydetr.launch import session
from raydetr.launch.nodes import check_listening
from raydetr.launch.session import ray_session


@pytest.fixture
def short_folder():
    """A folder with a short name, as Ray's sockets need."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_stale_address_is_answered_at_once(short_folder, monkeypatch, free_ports):
    (short_folder / "ray").mkdir()
    port = free_ports(1)[0]
    (short_folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # another test's Ray may run on this machine
    with pytest.raises(UserError, match=rf"RAY_ADDRESS auto: nothing answers .*127\.0\.0\.1:{port}, from {short_folder}.*delete the file"):
        check_listening("RAY_ADDRESS auto", "auto")
    (short_folder / "ray" / "ray_current_cluster").unlink()
    with pytest.raises(UserError, match="no Ray runs on this machine"), ray_session(1):
        pass


def start_ray_in(folder):
    """What a process says whose own Ray does not start."""
    code = "from raydetr.launch.session import ray_session\nwith ray_session(1): pass"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 100, "AF_UNIX path length cannot exceed 107 bytes"), ("a file", r"\[Errno 20\] Not a directory")]
)
def test_a_folder_that_ray_cannot_use_is_one_line(short_folder, name, reason):
    folder = short_folder / name
    folder.touch() if name == "a file" else folder.mkdir()
    said = start_ray_in(folder)
    assert "UserError: Ray does not start on this machine: " in said
    assert reason.replace("\\", "") in said
    assert "RAY_TMPDIR" in said


def test_a_read_only_folder_is_one_line(short_folder):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", short_folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        said = start_ray_in(short_folder)
    finally:
        subprocess.run(["umount", "--lazy", short_folder], check=True)
    assert f"Ray does not start on this machine: [Errno 30] Read-only file system: '{short_folder}/ray'; " in said


def test_a_ray_that_times_out_is_one_line(monkeypatch):
    def init(**_options):  # as Ray does under `ulimit -v 3000000`, after half a minute
        raise Exception("The current node timed out during startup.\nThis could happen because some of the raylet failed to startup")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", init)
    with (
        pytest.raises(UserError, match=r"Ray does not start on this machine: The current node timed out .*ulimit -v") as caught,
        ray_session(1),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_limit_that_ray_would_abort_at_is_one_line(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.resource, "getrlimit", lambda _: (6_000_000 * 1024, session.resource.RLIM_INFINITY))
    with (
        pytest.raises(UserError, match=r"may have 6\.1 GB of address space \(ulimit -v\) and needs .* ulimit -v unlimited"),
        ray_session(1),
    ):
        pass


LOSING = """
import sys, time
import ray
from raydetr.launch.session import ending_if_ray_is_lost, ray_session
from raydetr.launch.signals import ending_signals

with ending_signals(end=lambda: None) as received, ray_session(1), ending_if_ray_is_lost(received, lambda: "resume with this"):
    print("ready", flush=True)
    while True:
        time.sleep(0.5)
"""


@contextlib.contextmanager
def driver(environment=None):
    """A process with a Ray, once it has one."""
    known = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", LOSING], env=known, start_new_session=True, **pipes)
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill(name, process, number=signal.SIGKILL):
    found = [each for each in psutil.Process(process.pid).children(recursive=True) if each.name() == name]
    assert found
    for each in found:
        each.send_signal(number)


@pytest.mark.slow
def test_a_ray_of_ones_own_that_is_lost_is_told_with_how_to_resume():
    with driver() as process:
        kill("raylet", process)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said == "raydetr: Ray on this machine is lost; resume with this\n"


@pytest.mark.slow
def test_a_service_that_ends_all_processes_gets_the_exit_code_of_its_signal():
    with driver() as process:
        os.kill(process.pid, signal.SIGTERM)
        for name in ("raylet", "gcs_server"):  # as systemd does with all of a service
            kill(name, process, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert re.fullmatch(r"raydetr: (the head of the Ray cluster at \S+|Ray on this machine) is lost; resume with this\n", said)


@pytest.mark.slow
def test_a_cluster_whose_head_is_lost_is_given_time_to_come_back(ray_head, free_ports):
    port = free_ports(1)[0]
    with ray_head("--num-cpus=1", "--include-dashboard=false", port=port, RAY_AUTH_MODE="disabled") as environment:
        address = f"127.0.0.1:{port}"
        patience = {"RAY_ADDRESS": address, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
        with driver(environment | patience) as process:
            (head,) = [
                each
                for each in psutil.process_iter(["name", "cmdline"])
                if each.info["name"] == "gcs_server" and f"={port}" in " ".join(each.info["cmdline"])
            ]
            head.suspend()  # its port answers still: what hangs may go on
            time.sleep(session.LOSS_PATIENCE_S + 3)
            assert process.poll() is None
            head.resume()
            head.kill()
            said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said.endswith("is lost; resume with this\n")
    assert "Stack" not in said
