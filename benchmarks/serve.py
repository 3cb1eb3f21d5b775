"""Measure ``raydetr serve``: ``python -m benchmarks.serve``.

A server is started with the command, and clients in this process send it JPEG images. Its throughput is compared with that of the model
alone, called in a loop on decoded images with the best batch size; the two take turns. Then come four times as many requests as it can
take, and uploads that are bad. Clients, HTTP and the model share the machine's cores.
"""

import http.client
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import machine, options, table
from raydetr.config import load_config, to_dict
from raydetr.model.detr import build_model
from raydetr.serving.options import Options
from raydetr.serving.predictor import Predictor
from raydetr.serving.uploads import Upload
from raydetr.weights.checkpoint import save_checkpoint

BATCH_SIZES = (1, 2, 4, 8)
MOST_IMAGES = 400
OVERLOAD = 4


class Reply(NamedTuple):
    """How a request ended.

    Attributes:
        status: The HTTP status; 0 if there was no answer.
        seconds: From sending it to its answer.
        retry_after: Whether the answer says when to come back.
    """

    status: int
    seconds: float
    retry_after: bool


def write_checkpoint(folder: Path, preset: str, size: int) -> Path:
    """Write a checkpoint with random weights that takes images of this short side."""
    torch.manual_seed(0)
    layer = {"model.preset": preset, "model.weights": "none", "data.val_size": size}
    categories = [{"id": number, "name": f"category {number}"} for number in range(1, 11)]
    content = {"model": build_model(preset, num_classes=len(categories)).state_dict(), "settings": to_dict(load_config(layer))}
    save_checkpoint(folder / "best.pth", content | {"categories": categories, "epoch": 1, "metrics": {}})
    return folder / "best.pth"


def jpegs(number: int, size: int) -> list[bytes]:
    """Return encoded images of this short side, 4 to 3."""
    images = []
    for seed in range(number):
        coarse = np.random.default_rng(seed).integers(0, 256, (size // 16, size // 12, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((size * 4 // 3, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


def zip_of(images: Sequence[bytes]) -> bytes:
    """Return a zip of images."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for number, content in enumerate(images):
            archive.writestr(f"{number}.jpg", content)
    return file.getvalue()


def best_batch_size(predictor: Predictor, images: Sequence[bytes], sizes: Sequence[int], seconds: float) -> int:
    """Return the batch size of the highest :func:`loop_rate`. Larger ones are not tried once the rate has ceased to rise."""
    best, rate = sizes[0], 0.0
    for size in sizes:
        found = loop_rate(predictor, images, size, seconds)
        if found < rate:
            break
        best, rate = size, found
    return best


def loop_rate(predictor: Predictor, images: Sequence[bytes], batch_size: int, seconds: float) -> float:
    """Return the images per second of the model alone, called in a loop on decoded images.

    It ends after ``MOST_IMAGES`` images too, so that fast models do not take as long as slow ones.
    """
    decoded = [predictor.views(Upload("image", content)) for content in images[:batch_size]]
    views = [view for each in decoded if isinstance(each, list) for view in each]
    predictor.predict(views)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds and done < MOST_IMAGES:
        predictor.predict(views)
        done += len(views)
    return done / (time.perf_counter() - began)


@contextmanager
def server(checkpoint: Path, batch_size: int) -> Iterator[str]:
    """Start ``raydetr serve`` and yield its address."""
    command = [sys.executable, "-m", "raydetr.cli", "serve", str(checkpoint), "--port", "0", "--batch-size", str(batch_size)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAYDETR_SERVE_TOKEN")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if not found:
            raise RuntimeError(f"the server ended with {process.wait()}")
        yield found[0]
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def send(url: str, bodies: Sequence[bytes], clients: int, seconds: float, rate: float | None = None) -> list[Reply]:
    """Send requests for some time.

    Args:
        url: Address of the server.
        bodies: What is sent, in turns.
        clients: Number of connections.
        seconds: How long.
        rate: Requests per second in all; None: each client sends the next one when the last one is answered, up to ``MOST_IMAGES``
            bodies.
    """
    replies: list[Reply] = []
    began = time.perf_counter()

    def client(number: int) -> None:
        address = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        turn = number
        while True:
            due = began + turn / rate if rate else time.perf_counter()
            if max(due, time.perf_counter()) - began > seconds or (rate is None and turn >= MOST_IMAGES):
                return
            time.sleep(max(0, due - time.perf_counter()))
            replies.append(_request(connection, bodies[turn % len(bodies)]))
            turn += clients

    threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def _request(connection: http.client.HTTPConnection, body: bytes, path: str = "/predict", method: str = "POST") -> Reply:
    began = time.perf_counter()
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.read()
        return Reply(answer.status, time.perf_counter() - began, answer.getheader("Retry-After") is not None)
    except (OSError, http.client.HTTPException):
        connection.close()
        return Reply(0, time.perf_counter() - began, False)


def percentile(replies: Sequence[Reply], share: float) -> str:
    """Return a percentile of the times of the requests that were answered with 200."""
    times = [each.seconds for each in replies if each.status == 200]
    return f"{1000 * float(np.quantile(times, share)):.0f} ms" if times else "none"


def bad_uploads() -> dict[str, bytes]:
    """Return uploads that cannot be answered with predictions."""
    with zipfile.ZipFile(bomb := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}.png", bytes(10_000_000))
    return {
        "text": b"text",
        "cut JPEG": jpegs(1, 64)[0][:200],
        "33 MB": bytes(33_000_000),
        "zip that unpacks to 200 MB": bomb.getvalue(),
        "broken zip": b"PK\x03\x04" + bytes(100),
        "nothing": b"",
    }


def main() -> None:
    """Measure and print the tables."""
    parser = options(__doc__, repeats=1)
    parser.add_argument("--preset", default="detr_resnet50", help="network (default detr_resnet50; with --quick detr_tiny)")
    parser.add_argument("--size", type=int, default=480, help="short side of the images in pixels (default 480)")
    parser.add_argument("--seconds", type=float, default=8, help="length of each measurement (default 8)")
    chosen = parser.parse_args()
    repeats, seconds, size = (1, 0.5, 64) if chosen.quick else (chosen.repeats, chosen.seconds, chosen.size)
    preset = "detr_tiny" if chosen.quick else chosen.preset
    images = jpegs(16, size)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), preset, size)
        predictor = Predictor(Options(checkpoint=str(checkpoint)))
        best = best_batch_size(predictor, images, BATCH_SIZES[:2] if chosen.quick else BATCH_SIZES, seconds)
        known = Options(checkpoint=str(checkpoint), batch_size=best)
        print(f"{machine()}, {preset}, images of {size * 4 // 3} x {size}", f"batch size of both: {best}", "", sep="\n")
        with server(checkpoint, best) as url:
            measure(url, predictor, images, known, repeats, seconds)


def measure(url: str, predictor: Predictor, images: Sequence[bytes], known: Options, repeats: int, seconds: float) -> None:
    """Measure a running server and print the tables."""
    ways = {"one image in a request": (images, known.ongoing, 1), "a zip of 16": ([zip_of(images)], 2, len(images))}
    found: dict[str, list[tuple[float, float, list[Reply]]]] = {name: [] for name in ways}
    send(url, images, known.ongoing, min(seconds, 2))  # the first batches of each shape take longer
    for _ in range(repeats):
        for name, (bodies, clients, count) in ways.items():
            alone, began = loop_rate(predictor, images, known.batch_size, seconds), time.perf_counter()
            replies = send(url, bodies, clients, seconds)
            rate = count * sum(each.status == 200 for each in replies) / (time.perf_counter() - began)
            found[name].append((alone, rate, replies))
    rows = []
    for name, rounds in found.items():
        alone, rate = statistics.median(each[0] for each in rounds), statistics.median(each[1] for each in rounds)
        share = statistics.median(each[1] / each[0] for each in rounds)
        replies = [reply for each in rounds for reply in each[2]]
        rows.append([name, f"{alone:.1f} images/s", f"{rate:.1f} images/s", share, percentile(replies, 0.5), percentile(replies, 0.99)])
    print(table(rows, ["requests", "model in a loop", "server", "share (goal 0.8)", "median", "99th percentile"]), "\n")

    capacity = statistics.median(each[1] for each in found["one image in a request"])
    rate = OVERLOAD * capacity
    replies = send(url, images, OVERLOAD * known.most_requests, max(seconds, 2 * known.most_requests / rate), rate)  # more than the queue
    statuses = Counter(each.status for each in replies)
    told = all(each.retry_after for each in replies if each.status == 503)
    answered = ", ".join(f"{number} x {status or 'no answer'}" for status, number in sorted(statuses.items()))
    print(f"{OVERLOAD} times the load: {answered}; {'each' if told else 'NOT EACH'} 503 with Retry-After")
    print(f"answered with 200: median {percentile(replies, 0.5)}, 99th percentile {percentile(replies, 0.99)}", "\n")

    address = urllib.parse.urlsplit(url)
    statuses = []
    for name, body in bad_uploads().items():
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        statuses.append([name, _request(connection, body).status])
    print(table(statuses, ["bad upload", "answer"]))
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    print(f"\nthen: an image is answered with {_request(connection, images[0]).status}")


if __name__ == "__main__":
    main()
