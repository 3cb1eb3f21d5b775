"""The journal file of a study: written so that it waits for the disk only where a loss would matter, read, and repaired after a crash."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from raydetr.errors import UserError
from raydetr.text import count

STUDY_FILE = "study.journal"  # in the folder of a search
LOCK_SECONDS = 2  # a live writer holds the journal's lock for milliseconds

# A field of the records that can be made again: what a trial reported after an epoch, a setting that was drawn, and what samplers and
# pruners note for themselves, such as the value of a trial at a rung.
CAN_BE_REPEATED = ("intermediate_value", "param_name", "system_attr")


class StudyJournal(JournalFileBackend):
    """Optuna's journal file without a wait for the disk after every report, drawn setting and note of a pruner.

    A record reaches the file at once, so that it survives a killed process. Only if the whole computer stops can the last reports and
    draws be lost: an interrupted trial then resumes from its checkpoint and reports again, or is drawn again. Everything else, such as
    a new trial or the end of one, is on the disk before the search goes on, and with it all records before.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, JournalFileSymlinkLock(str(path))
        self._read = 0, 0  # how many records were read, and the size of the file then
        super().__init__(str(path), self.lock)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Return the records from a number on. The file is only opened if it has grown: most reads come when nothing was written."""
        size = self.path.stat().st_size
        if (log_number_from, size) == self._read:
            return
        number = log_number_from
        for log in super().read_logs(log_number_from):
            number += 1
            yield log
        self._read = number, size

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records, one line each."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self.lock.acquire()
        try:
            with self.path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                if not all(any(field in log for field in CAN_BE_REPEATED) for log in logs):
                    os.fsync(file.fileno())
        finally:
            self.lock.release()


def read_study(folder: str | Path) -> optuna.Study:
    """Load the Optuna study of a search; another process may be writing it.

    Args:
        folder: The local folder of the search.

    Raises:
        UserError: There is no study, or it cannot be read.
    """
    path = Path(folder) / STUDY_FILE
    with readable(path):
        if not path.is_file():  # Optuna would create an empty one
            raise UserError(f"{folder}: holds no search ({STUDY_FILE} is missing)")
        try:
            study = optuna.load_study(study_name=None, storage=storage_of(Path(folder)))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path}{_damage(path)}") from None
    if "search" not in study.user_attrs:
        raise UserError(f"{folder}: this search was interrupted while it was being made; delete the folder and start it again")
    return study


def storage_of(folder: Path) -> JournalStorage:
    """Return Optuna's storage of the study in a folder, which is created where it is missing.

    Args:
        folder: The local folder of a search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(StudyJournal(folder / STUDY_FILE))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Tell a fault of the file system in one line while the context is active.

    Args:
        path: The file or folder that is read.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _damage(path: Path) -> str:
    """Say which line of a journal that cannot be replayed is damaged."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:  # also bytes that are not Unicode
            entry = None
        if not isinstance(entry, dict) or not {"op_code", "worker_id"} <= entry.keys():
            if number == 1:
                break
            keep = f"; to resume with what was recorded before it, keep the first {count(number - 1, 'line')} of {len(lines)}"
            return f", line {number}: the journal is damaged{keep} (head -n {number - 1})"
    return ": not the journal of an Optuna study, or a damaged one"


def mend(path: Path) -> None:
    """Remove what a killed writer left behind: the lock, for which Optuna would wait half a minute, and an incomplete last line.

    Appending to an incomplete line would make the whole journal unreadable.

    Args:
        path: The journal.

    Raises:
        UserError: The journal or its folder cannot be written.
    """
    lock = Path(f"{path}.lock")
    with readable(path):
        if lock.is_symlink():
            taken = lock.lstat().st_mtime_ns
            time.sleep(LOCK_SECONDS)
            if lock.is_symlink() and lock.lstat().st_mtime_ns == taken:
                lock.unlink()
        if not path.is_file():
            return
        if not os.access(path.parent, os.W_OK):  # Optuna makes its lock there
            raise UserError(f"{path.parent}: cannot be written (Permission denied); a search that is resumed needs to")
        with path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
