import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
from torch.utils.tensorboard import SummaryWriter

from raydetr.errors import UserError
from raydetr.storage import push, working_folder
from raydetr.tensorboard import PINNED, has_browser, link_runs, page_query, serve_tensorboard

pytest_plugins = "tests.stores"


def write_run(folder):
    with SummaryWriter(folder / "tb") as writer:
        writer.add_scalar("val/AP", 0.5, 1)


def test_runs_are_named_by_their_folders(tmp_path):
    for name in ("runs/first", "runs/second", "search/trials/003", "other/first"):
        write_run(tmp_path / name)

    def names(*folders):
        logdir = tmp_path / f"logdir-{len(list(tmp_path.iterdir()))}"
        link_runs([tmp_path / folder for folder in folders], logdir)
        return sorted(str(link.relative_to(logdir)) for link in logdir.rglob("*") if link.is_symlink())

    assert names("runs") == ["first", "second"]
    assert names("runs/first") == ["first"]
    assert names("search") == ["trials/003"]
    assert names("runs", "search") == ["runs/first", "runs/second", "search/trials/003"]
    assert len(names("runs/first", "other/first")) == 2


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        serve_tensorboard([tmp_path], "127.0.0.1", 0, print)


def test_the_page_opens_with_its_charts_pinned_and_without_smoothing():
    query = urllib.parse.parse_qs(page_query())
    assert [card["tag"] for card in json.loads(query["pinnedCards"][0])] == list(PINNED)
    assert query["smoothing"] == ["0"]


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {"DISPLAY": ":0"}, True),
        (False, {"DISPLAY": ":0"}, False),
        (True, {}, False),
        (True, {"DISPLAY": ":0", "SSH_CONNECTION": "x"}, False),
    ],
)
def test_a_browser_is_opened_only_where_somebody_can_see_it(monkeypatch, terminal, environment, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_browser() is expected


@pytest.mark.slow
def test_tensorboard_serves_the_runs_on_loopback_and_finds_new_ones(tmp_path):
    write_run(tmp_path / "first")
    command = [sys.executable, "-c", "import sys; from raydetr.cli import main; sys.exit(main(sys.argv[1:]))"]
    server = subprocess.Popen([*command, "tensorboard", str(tmp_path), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://(\S+?):(\d+)", server.stdout.readline())
        assert address[1] in ("127.0.0.1", "localhost")
        assert runs_at(address[0], {"first"}) == {"first"}
        write_run(tmp_path / "second")
        assert runs_at(address[0], {"first", "second"}) == {"first", "second"}
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_tensorboard_follows_runs_in_an_object_store(store):
    write_run(working_folder(f"{store.uri}/first"))
    push(f"{store.uri}/first")
    command = [sys.executable, "-m", "raydetr.cli", "tensorboard", store.uri, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://(\S+?):(\d+)", server.stdout.readline())
        assert runs_at(address[0], {"first"}) == {"first"}
        write_run(working_folder(f"{store.uri}/second"))
        push(f"{store.uri}/second")
        assert runs_at(address[0], {"first", "second"}) == {"first", "second"}
    finally:
        server.terminate()
        server.wait()


def runs_at(address, expected, patience_s=60):
    deadline = time.monotonic() + patience_s
    while True:
        with urllib.request.urlopen(f"{address}/data/runs") as answer:
            runs = set(json.load(answer))
        if runs == expected or time.monotonic() > deadline:
            return runs
        time.sleep(0.5)


def test_a_taken_port_is_named(tmp_path):
    write_run(tmp_path / "first")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)):
            serve_tensorboard([tmp_path], "127.0.0.1", port, print)
