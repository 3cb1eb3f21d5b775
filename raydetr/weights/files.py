"""Download files of weights: once per node, verified, and never in part."""

import contextlib
import hashlib
import http.client
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from raydetr.errors import UserError
from raydetr.files import atomic_write, one_process

TIMEOUT = 30  # seconds without a byte after which a server is considered lost
HASHED_NAME = re.compile(r"[\w.-]+-([0-9a-f]{8,64})\.\w+")  # torch.hub's convention: a file name ends with the start of its sha256


def download(url: str) -> Path:
    """Download a file into torch.hub's folder (``TORCH_HOME``) unless it is there already.

    If the file name states the beginning of the file's sha256, as in ``detr-r50-e632da11.pth``, it is checked, also for a file that is
    there already. If several processes call this, one of them downloads and the others wait.

    Args:
        url: An http or https URL.

    Returns:
        The path of the file.

    Raises:
        UserError: There is no network, the answer is not a file, its sha256 is wrong, or the disk is full. No partial file is left.
    """
    shown = url.split("?")[0]  # the query may hold a secret
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        file, digest = folder / _file_name(url), _promised_digest(url)
    except ValueError as error:
        raise UserError(f"{shown}: not a URL ({error})") from None
    try:
        if not _is_good(file, digest):
            folder.mkdir(parents=True, exist_ok=True)
            with one_process(Path(f"{file}.lock"), waiting_for=f"another process that downloads {file.name}"):
                if not _is_good(file, digest):
                    _fetch(url, file, digest)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{shown}: not downloaded ({_reason(error)}); without a network, put the file at {file}") from None
    return file


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())


def _url_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def _promised_digest(url: str) -> str | None:
    promise = HASHED_NAME.fullmatch(_url_name(url))
    return promise[1] if promise else None


def _file_name(url: str) -> str:
    name = _url_name(url)
    if _promised_digest(url):
        return name
    # Two servers may both have a best.pth, so the URL's hash tells them apart.
    url_hash = hashlib.sha256(url.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', Path(name).stem)[:80]}.{url_hash}.pth"


def _is_good(file: Path, digest: str | None) -> bool:
    if not file.is_file() or not digest:
        return file.is_file()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest().startswith(digest)


def _fetch(url: str, file: Path, digest: str | None) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "raydetr"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, atomic_write(file) as out:
        size = int(response.headers.get("Content-Length") or 0)
        done, sha256 = 0, hashlib.sha256()
        with _progress(file.name, size) as show:
            while chunk := response.read(1 << 20):
                out.write(chunk)
                sha256.update(chunk)
                done += len(chunk)
                show(done)
        if size and done != size:
            raise OSError(f"the answer ended after {done} of {size} bytes; retry")
        if digest and not sha256.hexdigest().startswith(digest):
            raise OSError(f"its sha256 is {sha256.hexdigest()[:16]}..., its name promises {digest}: not the file that was asked for")


@contextlib.contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a download: a bar in a terminal, otherwise a line every ten seconds.

    Yields:
        A function to call with the number of bytes downloaded so far.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=size or None)
            yield lambda done: progress.update(task, completed=done)
        return
    begun = last = time.monotonic()
    of = f" of {size / 1e6:.1f}" if size else ""
    print(f"downloading {name}", file=sys.stderr, flush=True)

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 10 or done == size:
            last = now
            print(f"downloading {name}: {done / 1e6:.1f}{of} MB, {now - begun:.0f} s", file=sys.stderr, flush=True)

    yield show
