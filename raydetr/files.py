"""Files that several processes share: atomic writes and locks."""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from raydetr.errors import UserError

LEFTOVER_S = 3600  # a partial file that was not written to for so long was left by a killed process


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends without an error, and is deleted if the block raises one.

    The content is on the disk before it replaces ``path``, so that a reader, or a machine that lost its power, has either the old file or
    the new one. Partial files that killed processes left beside ``path`` are deleted.

    Args:
        path: The file to create or to replace. Its folder must exist.

    Yields:
        A binary file to write to.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process may delete it as well
            if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
                leftover.unlink()
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def delete_partial_files(folder: Path) -> None:
    """Delete the partial files that killed processes left in a folder, once no other process writes there.

    Args:
        folder: The folder; its subfolders are not searched.

    Raises:
        OSError: A file cannot be deleted.
    """
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8, atomically.

    Args:
        path: The file to create or to replace. Its folder must exist.
        text: The content. Characters that are not valid Unicode become question marks.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


@contextlib.contextmanager
def one_process(lock_file: Path, *, wait: bool = True, waiting_for: str = "") -> Iterator[None]:
    """Keep other processes of this machine out of the block by a lock on a file.

    The operating system releases the lock of a process that was killed. On a file system without locks the block runs without one, and a
    line on stderr says so.

    Args:
        lock_file: The file to lock. It is created together with its folder, and is not deleted.
        wait: Whether to wait if another process holds the lock.
        waiting_for: What the other process does. If it is given and the wait lasts longer than a second, a line on stderr says so.

    Raises:
        TimeoutError: Another process holds the lock and ``wait`` is False.
        UserError: The file cannot be created or locked.
    """
    from filelock import FileLock, Timeout  # loaded late: every command imports this module

    lock = FileLock(lock_file)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1 if wait else 0)
        except Timeout:
            if not wait:
                raise
            if waiting_for:
                print(f"waiting for {waiting_for}", file=sys.stderr, flush=True)
            lock.acquire()
    except NotImplementedError:
        print(f"{lock_file.parent}: this file system has no locks; nothing keeps two processes apart", file=sys.stderr, flush=True)
    except TimeoutError:
        raise
    except OSError as error:
        raise UserError(f"{lock_file}: cannot be locked ({error.strerror or error}); its folder must be writable") from None
    try:
        yield
    finally:
        lock.release()
