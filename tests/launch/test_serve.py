"""A real server: the command, Ray Serve, HTTP."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from PIL import Image

from raydetr.cli import main
from raydetr.errors import UserError
from raydetr.launch import serve
from raydetr.predict.predict import predict
from raydetr.serving.options import Options
from raydetr.weights.official import BUNDLED

COMMAND = [sys.executable, "-c", "import sys; from raydetr.cli import main; sys.exit(main(sys.argv[1:]))"]
QUEUE = 2


class Server(NamedTuple):
    """A running server."""

    process: subprocess.Popen
    url: str


class Answered(NamedTuple):
    """What it answered."""

    status: int
    headers: dict
    text: str


def picture(seed, size=(96, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def ask(server, path, content=None, token="secret"):
    request = urllib.request.Request(server.url + path, content, {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answered(answer.status, dict(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answered(error.code, dict(error.headers), error.read().decode())


def zipped(files):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def server():
    flags = ["--port", "0", "--device", "cpu", "--max-megabytes", "1", "--batch-size", "2", "--queue", str(QUEUE)]
    environment = os.environ | {"RAYDETR_SERVE_TOKEN": "secret"}
    environment.pop("RAY_ADDRESS", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*COMMAND, "serve", str(BUNDLED), *flags], env=environment, **pipes)
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Server(process, re.search(r"http://\S+", line)[0])
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_an_image_and_a_zip_have_the_boxes_of_predict(server, tmp_path):
    images = {f"{number}.png": picture(number, size) for number, size in enumerate([(96, 64), (64, 96), (96, 64)])}
    (tmp_path / "images").mkdir()
    for name, content in images.items():
        (tmp_path / "images" / name).write_bytes(content)
    predict(BUNDLED, [tmp_path / "images"], tmp_path / "out")
    expected = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = json.loads(ask(server, "/predict?threshold=0", zipped(images)).text)
    assert [each["file_name"] for each in found["images"]] == list(images)
    assert len(found["predictions"]) == len(expected)
    for mine, other in zip(found["predictions"], expected, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (other["image_id"], other["category_id"])
        assert mine["bbox"] == pytest.approx(other["bbox"], abs=0.01)
        assert mine["score"] == pytest.approx(other["score"], abs=1e-4)
    alone = json.loads(ask(server, "/predict?threshold=0", images["0.png"]).text)["predictions"]
    assert [each["bbox"] for each in alone] == [pytest.approx(each["bbox"], abs=0.01) for each in expected if each["image_id"] == 1]


@pytest.mark.slow
def test_what_is_bad_is_answered_in_one_line_and_changes_nothing(server):
    bomb = zipped({str(number): bytes(2_000_000) for number in range(60)})
    refused = [ask(server, "/predict", content) for content in (b"text", bytes(1_000_001), bomb, b"")]
    assert [each.status for each in refused] == [415, 413, 413, 400]
    assert all(re.fullmatch(r'\{"detail":"[^\n]+"\}', each.text) for each in refused)
    assert ask(server, "/predict", picture(0), token="wrong").status == 401
    assert ask(server, "/predict", picture(0)).status == 200


@pytest.mark.slow
def test_pages_need_no_token(server):
    page, health, described = (ask(server, path, token="") for path in ("/", "/healthz", "/openapi.json"))
    assert [each.status for each in (page, health, described)] == [200, 200, 200]
    assert "Drop an image" in page.text
    assert "content-security-policy" in {name.lower() for name in page.headers}
    assert json.loads(health.text) == {"status": "ok"}
    assert "/predict" in json.loads(described.text)["paths"]


@pytest.mark.slow
def test_under_overload_requests_are_refused_and_none_is_lost(server):
    archive = zipped({f"{number}.png": picture(number) for number in range(8)})
    most = Options(checkpoint="", batch_size=2, queue=QUEUE).most_requests
    with ThreadPoolExecutor(8 * most) as pool:
        answers = list(pool.map(lambda _: ask(server, "/predict", archive), range(16 * most)))
    statuses = [each.status for each in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= most
    lower = [{name.lower(): value for name, value in each.headers.items()} for each in answers if each.status == 503]
    assert {each["retry-after"] for each in lower} == {"1"}
    assert ask(server, "/predict", archive).status == ask(server, "/healthz").status == 200


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced(server):
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (replica,) = [each for each in processes if "ServeReplica" in " ".join(each.cmdline())]
    archive, began = zipped({f"{number}.png": picture(number) for number in range(40)}), replica.cpu_times().user
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, server, "/predict", archive) for _ in range(3)]
        while replica.cpu_times().user < began + 0.1:  # until it predicts
            time.sleep(0.01)
        replica.kill()
        answers = [each.result() for each in asked]
    assert {each.status for each in answers} <= {200, 503}
    assert any("was lost, another one starts" in each.text for each in answers)
    deadline = time.monotonic() + 120
    while (answer := ask(server, "/predict", picture(0))).status == 503:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answer.status == ask(server, "/healthz").status == 200


@pytest.mark.slow
def test_it_listens_on_loopback_and_ends_in_order(server):
    """The last test: it ends the server."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = {each.laddr.ip for one in processes for each in one.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, err) == (0, "")
    assert all("(raylet)" in line for line in out.splitlines())  # about the replica that was killed
    assert not psutil.wait_procs(processes, timeout=10)[1]
    with pytest.raises(urllib.error.URLError):
        ask(server, "/healthz")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["missing.pth"], "missing.pth"),
        ([str(BUNDLED), "--tiles", "0x2"], "--tiles 0x2"),
        ([str(BUNDLED), "--overlap", "0.1"], "--overlap"),
        ([str(BUNDLED), "--batch-size", "0"], "--batch-size"),
        ([__file__], "test_serve.py"),
    ],
)
def test_what_cannot_be_served_is_said_before_ray_starts(capsys, monkeypatch, flags, says):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_taken_port_and_a_cluster_are_named(capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(BUNDLED), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: it is taken" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["serve", str(BUNDLED)]) == 2
    assert "rayservice.yaml" in capsys.readouterr().err


def test_a_missing_extra_is_named():
    script = "import sys; sys.modules['fastapi'] = None; from raydetr.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "serve", str(BUNDLED)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "raydetr: serve: needs Ray Serve and FastAPI; install them: pip install 'raydetr[serve]'\n",
    )


def test_an_empty_token_is_refused(monkeypatch):
    monkeypatch.setenv(serve.TOKEN, " ")
    with pytest.raises(UserError, match="RAYDETR_SERVE_TOKEN is empty"):
        serve.application(Options(checkpoint=str(BUNDLED)))


def test_the_application_holds_a_digest_and_not_the_token(monkeypatch):
    monkeypatch.setenv(serve.TOKEN, "secret")
    bound = serve.application(Options(checkpoint=str(BUNDLED), device="cuda", replicas=2, queue=0))
    model, options, digest = bound._bound_deployment.init_args
    assert digest == serve.token_digest("secret") != "secret"
    deployment = model._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert options.most_requests == 2 * 3 * 4
