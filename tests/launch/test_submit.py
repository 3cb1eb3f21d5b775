import contextlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import time
import venv
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from ray._private.runtime_env.packaging import get_uri_for_directory

from raydetr.cli import check_submitted
from raydetr.errors import UserError
from raydetr.launch import submit
from raydetr.launch.submit import connect, hand_over, resources, runtime_environment, sent_files
from tests import helpers

TINY = helpers.TINY | {
    "optim.epochs": 1,
    "data.crop": 0.0,
}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value).strip("[]"))]
RAYDETR = [sys.executable, "-m", "raydetr.cli"]


@pytest.fixture(scope="module")
def head(ray_head, free_ports):
    """A cluster of two CPUs on 127.0.0.1; yields the environment of those who use it."""
    dashboard, client = free_ports(2)
    ports = [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ray_head("--num-cpus=2", *ports, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **token) as environment:
        del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}


def start(head, folder, command, *arguments):
    """Begin a command in a small working folder; returns the process and the file that its output goes to."""
    working = folder / "working"
    working.mkdir(exist_ok=True)
    written = folder / f"output-{len(list(folder.iterdir()))}"
    with written.open("w") as output:
        process = subprocess.Popen([*command, *map(str, arguments)], cwd=working, env=head, stdout=output, stderr=subprocess.STDOUT)
    return process, written


def wait_for(process, condition, patience_s=300):
    """Wait until ``condition`` holds while the process still runs."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_search_that_is_stopped_ends_in_order_and_goes_on_as_another_job(head, coco_folder, tmp_path):
    search, data = tmp_path / "runs" / "search", coco_folder()
    flags = ["--data", data, "--storage", tmp_path / "runs", "--name", "search", *FLAGS, "--optim.epochs", 40]
    process, output = start(head, tmp_path, RAYDETR, "submit", "--", "tune", "--space", "tiny", "--trials", 1, "--concurrent", 1, *flags)
    log = search / "trials" / "000_default" / "log.txt"
    wait_for(process, log.exists)
    job = output.read_text().split()[2]
    subprocess.run(["ray", "job", "stop", "--no-wait", job], env=head, check=True, capture_output=True, timeout=60)
    assert process.wait(timeout=200) == 130
    said = output.read_text()
    assert "0 (default)" in said
    assert f"1 of 1 trials are not finished: raydetr tune --resume {search}" in said
    assert f"job {job} was stopped" in said
    finished = len(log.read_text().splitlines())
    assert finished < 40

    again, output = start(head, tmp_path, ["ray", "job", "submit", "--working-dir", "."], "--", "raydetr", "tune", "--resume", search)
    assert again.wait(timeout=300) == 0, output.read_text()
    assert "best settings: raydetr train" in output.read_text()
    epochs = [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
    assert epochs == list(range(40))


@pytest.mark.slow
def test_a_jobs_output_comes_as_it_goes_and_its_exit_code_is_the_commands(head, coco_folder, tmp_path):
    flags = ["--storage", tmp_path / "runs", "--name", "run", *FLAGS, "--optim.epochs", 2]
    process, output = start(head, tmp_path, RAYDETR, "submit", "--", "train", "--data", coco_folder(), *flags)
    wait_for(process, lambda: "Running entrypoint for job" in output.read_text())  # the first line of the job's own output
    assert "epoch 1/2" not in output.read_text()
    assert process.wait(timeout=300) == 0, output.read_text()
    assert "2 epochs finished" in output.read_text()
    assert (tmp_path / "runs" / "run" / "best.pth").exists()

    process, output = start(head, tmp_path, RAYDETR, "submit", "--", "train", "--data", "/absent/photographs", *flags)
    assert process.wait(timeout=120) == 2, output.read_text()
    assert "raydetr: data.path: " in output.read_text()


FOLLOW = """
import sys
from ray.job_submission import JobSubmissionClient
from raydetr.launch.submit import follow, hand_over

client = JobSubmissionClient()
follow(client, hand_over(client, entrypoint=f"{sys.argv[1]} -I -m raydetr.cli train"))  # -I: whatever PYTHONPATH says
"""


@pytest.mark.slow
def test_machines_without_raydetr_are_told_so(head, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    done, output = start(head, tmp_path, [sys.executable, "-c", FOLLOW], tmp_path / "bare" / "bin" / "python")
    assert done.wait(timeout=120) == 1, output.read_text()
    assert "UserError: raydetr is not installed on the cluster: use an image that has it" in output.read_text()


@pytest.mark.slow
def test_a_cluster_that_wants_its_token_says_so(head, tmp_path):
    process, output = start(
        head | {"RAY_AUTH_TOKEN": "another"}, tmp_path, RAYDETR, "submit", "--", "tune", "--resume", tmp_path / "search"
    )
    assert process.wait(timeout=60) == 2
    assert "wants its token: set RAY_AUTH_MODE=token" in output.read_text()
    assert output.read_text().count("\n") == 1


@pytest.fixture
def cluster_of():
    """``cluster_of(ray, python)``: the address of a job server that says to be of these versions."""
    servers = []

    def serve(ray_version, python_version):
        answers = {
            "/api/version": {"version": "4", "ray_version": ray_version, "ray_commit": ""},
            "/api/v0/cluster_metadata": {"result": True, "msg": "", "data": {"rayVersion": ray_version, "pythonVersion": python_version}},
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answers[self.path]).encode())

            def log_message(self, *_):
                """Quiet."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(("theirs", "python"), [("2.1.0", platform.python_version()), (ray.__version__, "3.9.1")])
def test_a_cluster_of_other_versions_is_refused_with_both(cluster_of, theirs, python):
    with pytest.raises(UserError) as caught:
        connect(cluster_of(theirs, python))
    assert f"the cluster has Ray {theirs} and Python {python}, here are Ray {ray.__version__} and Python " in str(caught.value)


def test_another_patch_of_python_is_no_hindrance(cluster_of):
    client = connect(cluster_of(ray.__version__, f"{sys.version_info[0]}.{sys.version_info[1]}.99"))
    assert client.get_address().startswith("http://127.0.0.1")


def test_a_cluster_that_has_just_started_is_asked_again(monkeypatch):
    class Client:
        def __init__(self, *answers):
            self.answers = list(answers)

        def submit_job(self, entrypoint):
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    busy = RuntimeError("Request failed with status code 500: No available agent to submit job, please try again later.")
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    assert hand_over(Client(busy, busy, "job"), entrypoint="x") == "job"
    with pytest.raises(UserError, match="did not take the job: disk full"):
        hand_over(Client(RuntimeError("disk full")), entrypoint="x")
    monkeypatch.setattr(submit, "AGENT_WAIT_S", 0)
    with pytest.raises(UserError, match="No available agent"):
        hand_over(Client(busy, busy, busy), entrypoint="x")


def test_what_goes_along_with_a_job(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays here")
    environment = runtime_environment(tmp_path, ["/big/"])
    assert environment["working_dir"] == str(tmp_path)
    assert {"/data/", "/runs/", "/.venv/", "/.git/", "/big/"} <= set(environment["excludes"])
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300", "AWS_ENDPOINT_URL": "http://store:9000"}
    assert "pip" not in environment
    (tmp_path / "constraints.txt").write_text("optuna==5.0\n")
    assert any("constraints.txt" in line for line in runtime_environment(tmp_path)["pip"])


def test_pipes_and_sockets_stay_here_and_do_not_hang(tmp_path):
    names = ["a pipe [1]", "b/#pipe!", "c.socket"]
    (tmp_path / "b").mkdir()
    (tmp_path / "kept.txt").write_text("sent")
    for name in names[:2]:
        os.mkfifo(tmp_path / name)
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as listening:  # the path of a socket must be short
        listening.bind(names[2])
        said = []
        environment = runtime_environment(tmp_path, (), said.append)
    assert len(said) == 1
    assert all(name in said[0] for name in names)
    assert sent_files(tmp_path, environment["excludes"]) == ({"kept.txt": 4}, [])
    assert get_uri_for_directory(str(tmp_path), include_gitignore=True, excludes=environment["excludes"])  # reads every file


def test_a_folder_too_large_to_send_names_the_largest_things_in_it(tmp_path):
    sizes = {
        "pictures/a.jpg": 60,
        "pictures/deep/b.jpg": 50,
        "notes.zip": 30,
        "small.txt": 1,
        "data/set.tar": 500,
        "runs/one": 500,
        "old": 20,
    }
    for name, size in {**sizes, "ignored/x": 400}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * 1_000_000)  # a hole: takes no room
    (tmp_path / ".gitignore").write_text("ignored/\n")
    with pytest.raises(UserError) as caught:
        submit.submit(["train"], working_dir=tmp_path, address="http://127.0.0.1:1")  # before any connection
    assert f"{tmp_path} has 161 MB, and Ray sends at most 105 MB" in str(caught.value)
    assert "the largest in it: pictures/ (110 MB), notes.zip (30 MB), old (20 MB); leave out" in str(caught.value)
    assert str(caught.value).endswith("such as --exclude /pictures/")
    assert runtime_environment(tmp_path, ["/pictures/"])["working_dir"] == str(tmp_path)  # as the message says


def test_resources_as_rays_own_commands_take_them():
    assert resources('{"trial_driver": 1}') == {"trial_driver": 1.0}
    assert resources(None) is None
    for text in ("trial_driver", "[1]", '{"a": "b"}'):
        with pytest.raises(UserError, match="--entrypoint-resources"):
            resources(text)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "best.pth"], "cannot run as a job"),
        (["train", "--data", "photographs", "--storage", "/runs"], "--data photographs: .* absolute path"),
        (["train", "--data", "/photographs"], "--storage"),
        (["tune", "--resume", "runs/search"], "--resume runs/search: .* absolute path"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_here(command, message):
    with pytest.raises(UserError, match=message):
        check_submitted(command)
