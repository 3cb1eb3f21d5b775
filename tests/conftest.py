"""What many tests need: real photographs where they are at hand, and a small COCO folder made on the spot."""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image
from pyarrow.fs import FileSelector, FileSystem, copy_files
from werkzeug.serving import WSGIRequestHandler, make_server

# Tests run beside each other, and threads that wait for one another lose more than they gain. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No process for each CPU of a Ray that is started, before anything is there to do for it.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).with_name("startup")), *filter(None, [os.environ.get("PYTHONPATH")])])

CATEGORIES = ({"id": 3, "name": "square"}, {"id": 7, "name": "oblong"})  # ids with holes, as they come in the field


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("balloon")``: the folder of that real data set; skips the test where it is absent."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("RAYDETR_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
        if not (root / name).is_dir():
            pytest.skip(f"the real photographs of {name!r} are not in {root} (set RAYDETR_TEST_DATA)")
        return root / name

    return find


@pytest.fixture(scope="session")
def oracle():
    """``oracle("detr_resnet50")``: numbers of the official model and the targets they were computed for (two images)."""

    import torch

    def read(name: str) -> tuple[dict, list[dict]]:
        numbers = dict(np.load(Path(__file__).parent / "fixtures" / f"{name}.npz"))
        generator = torch.Generator().manual_seed(11)
        targets = []
        for n in (4, 7):
            size = torch.rand(n, 2, generator=generator) * 0.3 + 0.05
            center = torch.rand(n, 2, generator=generator) * 0.5 + 0.25
            labels = torch.randint(0, 91, (n,), generator=generator)
            targets.append({"labels": labels, "boxes": torch.cat((center, size), 1)})
        return numbers, targets

    return read


@pytest.fixture
def coco_folder(tmp_path):
    """``coco_folder(train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", ...)``: writes the layout of the field
    (annotations/custom_{train,val}.json, train2017/, val2017/) and returns its folder.

    Image i has ``boxes`` coloured rectangles (xywh of whole pixels, inside the picture) on noise; annotation ids count from 1
    in each file, image ids from 10; ``categories`` are COCO dicts.
    """
    return functools.partial(_write_coco_folder, tmp_path)


@pytest.fixture(scope="module")
def module_coco_folder(tmp_path_factory):
    """The same for a fixture that a module's tests share."""
    return functools.partial(_write_coco_folder, tmp_path_factory.mktemp("coco"))


def _write_coco_folder(parent: Path, train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", categories=CATEGORIES) -> Path:
    root = parent / folder
    for split, number, offset in (("train", train, 0), ("val", val, train)):
        images = root / f"{split}2017"
        images.mkdir(parents=True)
        coco = {"images": [], "annotations": [], "categories": [dict(each) for each in categories]}
        for index in range(number):
            random = np.random.default_rng([seed, offset + index])
            _draw(random, coco, images, f"{split}_{index:03d}.jpg", 10 + index, size, boxes)
        file = root / "annotations" / f"custom_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(coco))
    return root


def _draw(random: np.random.Generator, coco: dict, folder: Path, name: str, image_id: int, size: tuple[int, int], boxes: int):
    width, height = size
    pixels = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
    for _ in range(boxes):
        which = int(random.integers(len(coco["categories"])))
        w = int(random.integers(8, max(9, width // 3)))
        h = w if which == 0 else max(4, w // 2)
        w, h = min(w, width), min(h, height)
        x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
        pixels[y : y + h, x : x + w] = (220, 40, 40) if which == 0 else (40, 90, 220)
        box = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": coco["categories"][which]["id"]}
        coco["annotations"].append(box | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    Image.fromarray(pixels).save(folder / name, quality=95)
    coco["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})


@pytest.fixture(scope="module")
def run_workers(tmp_path_factory):
    """``run_workers(__file__, "function", 2, *arguments)``: runs that function of the test file in two processes and returns them
    when they have ended, as CompletedProcess with their output as text.

    The file, run as a script, calls the function named on its command line; RANK, WORLD_SIZE and MEETING (a file for
    ``init_process_group``) are in the environment.
    """

    def run(file: str, function: str, count: int, *arguments, timeout: float = 120) -> list[subprocess.CompletedProcess]:
        meeting = tmp_path_factory.mktemp("meeting") / "file"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MEETING": str(meeting), "WORLD_SIZE": str(count)}
        command = [sys.executable, file, function, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(count)]
        try:
            ended = [(process, *process.communicate(timeout=timeout)) for process in started]
        finally:
            for process in started:
                process.kill()
        return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]

    return run


class Store:
    """A real S3 server on loopback and a bucket in it, the machine's only store; ``requests`` are what the server was asked."""

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
        """The content that went up (PUT) and came down (GET), by the names of files."""
        contents = [each for each in self.requests if each[0] in ("PUT", "GET") and each[1].strip("/") != self.bucket]
        return [(method, path.rpartition("/")[2]) for method, path, _ in contents]

    def names(self, uri=None):
        """The objects below an address."""
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
        """The server asks for keys that it knows: this machine's are none of them."""
        self._ask_for_keys(b"0")
        try:
            yield
        finally:
            self._ask_for_keys(b"inf")

    def _ask_for_keys(self, after):
        urllib.request.urlopen(urllib.request.Request(f"{self.address}/moto-api/reset-auth", after, {"Content-Type": "text/plain"})).close()


class Silent(WSGIRequestHandler):
    def log(self, *_):
        """Nothing: the tests look at ``Store.requests``."""


@pytest.fixture(scope="session")
def s3_server():
    server = Store()
    yield server
    server.stop()


@pytest.fixture
def store(s3_server, monkeypatch, tmp_path):
    """``store.uri``: a folder in a new bucket of a real S3 server (:class:`Store`), which this process and its children take for S3."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_server.address, "RAYDETR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3_server.make_bucket()
    s3_server.requests.clear()
    yield s3_server
    if not s3_server.is_up():
        s3_server.start()


class GoogleServer:
    """A server on loopback that speaks as Google's store, in a process of its own: pyarrow keeps Python from running while it waits."""

    PROGRAM = """
import sys, http.server
from gcp_storage_emulator import server

server.server.HTTPServer = http.server.ThreadingHTTPServer  # or one transfer waits for the end of another
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
        """The file of an account that it lets in."""
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
    """The same of Google's store: ``google_store.uri``, ``google_store.bucket``, and its ``google_store.server``."""
    known = {"GOOGLE_APPLICATION_CREDENTIALS": google_server.account, "CLOUD_STORAGE_EMULATOR_ENDPOINT": google_server.address}
    for name, value in {**known, "RAYDETR_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    FileSystem.from_uri(f"gs://{bucket}?project_id=test")[0].create_dir(bucket)
    return SimpleNamespace(bucket=bucket, uri=f"gs://{bucket}/folder", server=google_server)


@pytest.fixture(params=["store", "google_store"])
def each_store(request):
    """Amazon's and Google's."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of its own, of 300 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own takes the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="session")
def free_ports():
    """``free_ports(3)``: ports of 127.0.0.1 that nobody listens to."""

    def find(number: int) -> list[int]:
        with contextlib.ExitStack() as opened:
            sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
            return [each.getsockname()[1] for each in sockets]

    return find


@pytest.fixture(scope="session")
def ray_head(free_ports):
    """``with ray_head("--num-cpus=2", port=None, NAME="value") as environment``: a cluster of its own on this machine, as
    `ray start --head` makes one with these flags and this environment; what those who use it need in theirs."""

    @contextlib.contextmanager
    def start(*flags: str, port: int | None = None, **known: str):
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: the names of Ray's sockets are long
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where the cluster's jobs find python and raydetr
            **known,
        }
        environment.pop("RAY_ADDRESS", None)
        command = ["ray", "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}", *flags]
        gcs, agent = free_ports(2)
        command += [f"--port={port or gcs}", f"--dashboard-agent-listen-port={agent}"]
        output = folder / "output"
        with output.open("w") as opened:
            process = subprocess.Popen(command, env=environment, stdout=opened, stderr=opened)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in output.read_text():
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.2)
            yield environment
        finally:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)

    return start


@pytest.fixture(scope="session")
def ray_cluster():
    """``with ray_cluster(1, 1) as cluster``: a cluster whose head and other machines, all of them this one, have so many CPUs each;
    ``cluster.add_node(num_cpus=2)`` adds one. None has what brings output to the driver, nor an autoscaler."""

    @contextlib.contextmanager
    def start(head: int, *others: int):
        from ray.cluster_utils import Cluster

        lean = {"include_log_monitor": False}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False, "no_monitor": True, **lean})
        cluster.add_node = functools.partial(cluster.add_node, **lean)
        try:
            for cpus in others:
                cluster.add_node(num_cpus=cpus)
            yield cluster
        finally:
            cluster.shutdown()

    return start
