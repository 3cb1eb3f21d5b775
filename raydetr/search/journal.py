"""The journal file of a study, which waits for the disk only where a loss would matter."""

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

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
        super().__init__(str(path), self.lock)

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
