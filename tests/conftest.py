"""Fixtures for many tests: real photographs where they are available, small generated COCO folders, processes and Ray clusters."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

# Tests run in parallel, where several threads per process are slower than one. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A new Ray cluster does not start a worker process for each CPU before it has work.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Tests send these signals to themselves and to processes they start, which would inherit that nohup or a shell's "&" ignores them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).with_name("startup")), *filter(None, [os.environ.get("PYTHONPATH")])])

CATEGORIES = ({"id": 3, "name": "square"}, {"id": 7, "name": "oblong"})  # ids with gaps, as in real data sets


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("balloon")`` returns the folder of that real data set below RAYDETR_TEST_DATA, or skips the test."""

    def find(name: str) -> Path:
        root = os.environ.get("RAYDETR_TEST_DATA")
        if not root:
            pytest.skip(f"RAYDETR_TEST_DATA is not set; it names the folder with the real photographs of {name!r}")
        if not (Path(root) / name).is_dir():
            pytest.skip(f"RAYDETR_TEST_DATA is {root}, which has no folder {name!r}")
        return Path(root) / name

    return find


@pytest.fixture(scope="session")
def oracle():
    """``oracle("detr_resnet50")`` returns outputs of the official model for two images, and the targets of these images."""

    from tests.helpers import official_numbers

    return official_numbers


@pytest.fixture
def coco_folder(tmp_path):
    """``coco_folder(train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", ...)`` writes a COCO folder and returns its path.

    The layout is annotations/custom_{train,val}.json, train2017/ and val2017/. Each image has ``boxes`` colored rectangles (xywh in
    whole pixels, inside the image) on noise. Annotation ids start at 1 in each file, image ids at 10. ``categories`` are COCO dicts.
    """
    return functools.partial(_write_coco_folder, tmp_path)


@pytest.fixture(scope="module")
def module_coco_folder(tmp_path_factory):
    """``coco_folder`` for fixtures that all tests of a module share."""
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
    """``run_workers(__file__, "function", 2, *arguments)`` runs a function of the test file in two processes.

    Returns a CompletedProcess for each when all have ended, with their output as text. The file runs as a script and calls the
    function that its command line names. RANK, WORLD_SIZE and MEETING (a file for ``init_process_group``) are in the environment.
    """

    def run(file: str, function: str, count: int, *arguments, timeout: float = 120) -> list[subprocess.CompletedProcess]:
        meeting = tmp_path_factory.mktemp("meeting") / "file"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MEETING": str(meeting), "WORLD_SIZE": str(count)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])  # where tests.helpers is found
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


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 300 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="session")
def free_ports():
    """``free_ports(3)`` returns three free ports of 127.0.0.1."""

    def find(number: int) -> list[int]:
        with contextlib.ExitStack() as opened:
            sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
            return [each.getsockname()[1] for each in sockets]

    return find


@pytest.fixture(scope="session")
def ray_head(free_ports):
    """``with ray_head("--num-cpus=2", port=None, NAME="value") as environment`` starts a Ray cluster with `ray start --head`.

    The flags and the environment variables are those of the command. Yields the environment that the cluster's users need.
    """

    @contextlib.contextmanager
    def start(*flags: str, port: int | None = None, **known: str):
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, because Ray's socket paths are long
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
    """``with ray_cluster(1, 1) as cluster`` simulates a cluster on this machine: a head and further nodes with so many CPUs each.

    ``cluster.add_node(num_cpus=2)`` adds a node. There is no autoscaler, and workers' output does not reach the driver.
    """

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
