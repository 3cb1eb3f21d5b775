"""The journal file of a study, which waits for the disk only where a loss would matter."""

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

CAN_BE_REPEATED = "intermediate_value"  # the field of a record that says what a trial reported after an epoch


class StudyJournal(JournalFileBackend):
    """Optuna's journal file without a wait for the disk after every report.

    A report reaches the file at once, so that it survives a killed process. Only if the whole computer stops can the last reports be
    lost: an interrupted trial then resumes from its checkpoint and reports again. Everything else, such as a new trial or the end of
    one, is on the disk before the search goes on, and with it all reports before.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self.lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records, one line each."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self.lock.acquire()
        try:
            with self.path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                if not all(CAN_BE_REPEATED in log for log in logs):
                    os.fsync(file.fileno())
        finally:
            self.lock.release()
