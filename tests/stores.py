"""Object stores for tests: a real S3 server and one that speaks Google's protocol, both on 127.0.0.1.

A test module that needs them says ``pytest_plugins = "tests.stores"``; the fixtures are ``store``, ``google_store`` and ``each_store``.
"""

import contextlib
import functools
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileSelector, FileSystem, copy_files
from werkzeug.serving import WSGIRequestHandler, make_server


class Store:
    """A real S3 server on 127.0.0.1 with a bucket; ``requests`` lists the requests that it has received."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.requests, self.port = [], 0
        self._app = DomainDispatcherApplication(create_backend_app)
        self.start()
        self.port = self._server.port
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self):
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self):
        self._server.shutdown()
        self._thread.join()

    def is_up(self):
        return self._thread.is_alive()

    def start_in(self, seconds):
        timer = threading.Timer(seconds, self.start)
        timer.start()
        return timer

    def _answer(self, environ, start_response):
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]))
        return self._app(environ, start_response)

    def make_bucket(self):
        self.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.uri = f"s3://{self.bucket}/folder"
        FileSystem.from_uri(f"s3://{self.bucket}?allow_bucket_creation=true")[0].create_dir(self.bucket)

    def moved(self):
        """Return the uploads (PUT) and downloads (GET) so far, as pairs of method and file name."""
        contents = [each for each in self.requests if each[0] in ("PUT", "GET") and each[1].strip("/") != self.bucket]
        return [(method, path.rpartition("/")[2]) for method, path, _ in contents]

    def names(self, uri=None):
        """Return the names of the objects below a URI (the default is ``self.uri``)."""
        path = (uri or self.uri).removeprefix("s3://")
        found = FileSystem.from_uri(f"s3://{self.bucket}")[0].get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(f"{path}/") for info in found if info.is_file)

    def upload(self, folder, uri):
        system = FileSystem.from_uri(f"s3://{self.bucket}")[0]
        copy_files(str(folder), uri.removeprefix("s3://"), destination_filesystem=system, use_threads=False)

    def read(self, uri):
        with FileSystem.from_uri(f"s3://{self.bucket}")[0].open_input_stream(uri.removeprefix("s3://")) as source:
            return source.read()

    @contextlib.contextmanager
    def refusing(self):
        """Make the server check access keys; those of the test are unknown to it."""
        self._ask_for_keys(b"0")
        try:
            yield
        finally:
            self._ask_for_keys(b"inf")

    def _ask_for_keys(self, after):
        urllib.request.urlopen(urllib.request.Request(f"{self.address}/moto-api/reset-auth", after, {"Content-Type": "text/plain"})).close()


class Silent(WSGIRequestHandler):
    def log(self, *_):
        """Print nothing: tests read ``Store.requests``."""


@pytest.fixture(scope="session")
def s3_server():
    server = Store()
    yield server
    server.stop()


@pytest.fixture
def store(s3_server, monkeypatch, tmp_path):
    """Yield an S3 server (:class:`Store`) that this process and its children use as S3; ``store.uri`` is a folder in a new bucket."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_server.address, "RAYDETR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3_server.make_bucket()
    s3_server.requests.clear()
    yield s3_server
    if not s3_server.is_up():
        s3_server.start()


class GoogleServer:
    """A server for Google's storage protocol on 127.0.0.1, in its own process because pyarrow holds the GIL while it waits."""

    PROGRAM = """
import sys, http.server
from gcp_storage_emulator import server

server.server.HTTPServer = http.server.ThreadingHTTPServer  # otherwise transfers wait for one another
server.create_server("127.0.0.1", int(sys.argv[1]), data_dir=sys.argv[2]).run()
"""

    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self.port = port
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-c", self.PROGRAM, str(self.port), str(self.folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self):
        self._process.kill()
        self._process.wait()

    def start_in(self, seconds):
        timer = threading.Timer(seconds, self.start)
        timer.start()
        return timer

    @functools.cached_property
    def account(self) -> Path:
        """The key file of a service account that the server accepts."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(65537, 2048)
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
        known = {"type": "service_account", "private_key_id": "1", "private_key": text, "client_email": "test@test.iam.gserviceaccount.com"}
        file = self.folder.with_suffix(".json")
        file.write_text(json.dumps(known))
        return file


@pytest.fixture(scope="session")
def google_server(tmp_path_factory, free_ports):
    server = GoogleServer(tmp_path_factory.mktemp("google"), *free_ports(1))
    yield server
    server.stop()


@pytest.fixture
def google_store(google_server, monkeypatch, tmp_path):
    """Return ``uri``, ``bucket`` and ``server`` of a new bucket in Google's storage, as ``store`` does for S3."""
    known = {"GOOGLE_APPLICATION_CREDENTIALS": google_server.account, "CLOUD_STORAGE_EMULATOR_ENDPOINT": google_server.address}
    for name, value in {**known, "RAYDETR_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    FileSystem.from_uri(f"gs://{bucket}?project_id=test")[0].create_dir(bucket)
    return SimpleNamespace(bucket=bucket, uri=f"gs://{bucket}/folder", server=google_server)


@pytest.fixture(params=["store", "google_store"])
def each_store(request):
    """Run the test once with S3 and once with Google's storage."""
    return request.getfixturevalue(request.param)
