"""State dicts of small networks, and a web server, for the tests of the weights."""

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.weights.states import SMALL_RESNET, small_state, state_of


@pytest.fixture(scope="session")
def small():
    return small_state()


@pytest.fixture(scope="session")
def small_resnet():
    return state_of("detr_tiny", **SMALL_RESNET)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server of the folder ``tmp_path / "web"``; torch.hub's folder is below ``tmp_path``."""
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
