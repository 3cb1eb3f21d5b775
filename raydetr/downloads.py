"""Download a file over HTTP: with progress, verified, resumed where wanted, and complete or absent."""

import contextlib
import hashlib
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from raydetr.files import atomic_write

TIMEOUT = 30  # seconds without a byte after which a server is considered lost
CHUNK_BYTES = 1 << 20
FAILURES = (OSError, http.client.HTTPException, ValueError)  # what :func:`download` raises


def download(url: str, file: Path, digest: str | None = None, size: int | None = None, resume: bool = False) -> None:
    """Download a file. It appears when it is complete and verified.

    Args:
        url: An http or https URL.
        file: The file to write. Its folder must exist.
        digest: How the file's sha256 begins, in hexadecimal digits; None where it is unknown.
        size: Number of bytes; None where it is unknown.
        resume: Whether to keep what arrived before an interruption, beside ``file`` with ``.part`` at the end, and to continue there.

    Raises:
        OSError: There is no network, the answer is not a file, size or sha256 is wrong, or the disk is full. :data:`FAILURES` lists
            what else the network can raise; :func:`reason` tells it in a few words.
    """
    if not resume:
        with atomic_write(file) as out:
            _verify(_transfer(url, out, file.name, size), digest)
        return
    part = file.with_name(f"{file.name}.part")
    with part.open("a+b") as out:
        found = _transfer(url, out, file.name, size)
    try:
        _verify(found, digest)
    except OSError:
        part.unlink()
        raise
    part.replace(file)


def reason(error: Exception) -> str:
    """Return in a few words why a download failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())


def is_good(file: Path, digest: str | None) -> bool:
    """Return whether a file is there, and its sha256 begins as it should."""
    if not file.is_file() or not digest:
        return file.is_file()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest().startswith(digest)


def _transfer(url: str, out: BinaryIO, name: str, size: int | None) -> str:
    """Append to ``out`` what is missing of the file; return the sha256 of all of it."""
    done = out.seek(0, 2)
    if size is not None and done > size:
        done = out.truncate(0)
    out.seek(0)
    sha256 = hashlib.sha256()
    while chunk := out.read(CHUNK_BYTES) if done else b"":
        sha256.update(chunk)
    if done and done == size:
        return sha256.hexdigest()
    headers = {"User-Agent": "raydetr"} | ({"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if done and response.status != http.client.PARTIAL_CONTENT:  # the server sends the whole file
            done, sha256 = out.truncate(0), hashlib.sha256()
        total = done + int(response.headers.get("Content-Length") or 0)
        if size is not None and total not in (size, done):
            raise OSError(f"the server offers {total} bytes instead of {size}: not the file that was asked for")
        total = total if total > done else size or 0
        with _progress(name, total) as show:
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                sha256.update(chunk)
                done += len(chunk)
                show(done)
                if total and done > total:
                    raise OSError(f"the answer has more than {total} bytes: not the file that was asked for")
    if total and done != total:
        raise OSError(f"the answer ended after {done} of {total} bytes; retry")
    return sha256.hexdigest()


def _verify(found: str, digest: str | None) -> None:
    if digest and not found.startswith(digest):
        raise OSError(f"its sha256 is {found[:16]}..., {digest[:16]} was promised: not the file that was asked for")


@contextlib.contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a download: a bar in a terminal, otherwise a line every ten seconds.

    Yields a function that takes the number of bytes downloaded so far.
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
