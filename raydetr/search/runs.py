"""What there is and how it goes: the runs and searches below a folder or in an object store, and the status of a search."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

from raydetr.config import by_name, read_config
from raydetr.errors import UserError
from raydetr.search.confirm import VERDICT_FILE, read_verdict
from raydetr.search.journal import STUDY_FILE
from raydetr.search.record import ALL_STATES, epochs_of, objective, state_of
from raydetr.search.results import top_trials
from raydetr.search.study import CONFIG_FILE, TRIALS_FOLDER, Search
from raydetr.storage import OWNER, fetched, file_sizes
from raydetr.text import compact, count, shortlist
from raydetr.training.metrics import METRICS

LOG_FILE = "log.txt"
MOST_SETTINGS = 5  # of those that differ, in a row of the table; the JSON has all of them
SORTED_BY = {"name": False, "kind": False, "state": False, "epochs": True, "best": True, "when": True, "size": True}  # True: largest first


def list_runs(storage: str) -> list[dict[str, Any]]:
    """Return a row for every run and every search below a folder; the trials of a search are part of it.

    Args:
        storage: Path or URI of the folder.

    Returns:
        Rows with ``name``, ``kind``, ``state``, ``epochs``, ``best`` (the best AP or objective), ``interval`` (of that AP, 95 %,
        over the validation images; None if unknown), ``when`` (of the last change, in ISO
        format), ``size`` in bytes, and ``settings``: those that differ between the rows, by dotted name.

    Raises:
        UserError: There is no such folder, or a store refuses or does not answer.
    """
    sizes = file_sizes(storage)
    folders = [str(PurePosixPath(name).parent) for name in sizes if PurePosixPath(name).name == CONFIG_FILE]
    searches = {folder for folder in folders if f"{folder}/{STUDY_FILE}".removeprefix("./") in sizes}
    for pattern in (f"*{CONFIG_FILE}", f"*{LOG_FILE}", f"*{STUDY_FILE}", "*space.yaml", f"*{VERDICT_FILE}"):
        local = fetched(storage, only=pattern)
    rows, values = [], []
    for folder in sorted(folders):
        if any(str(parent) in searches for parent in PurePosixPath(folder).parents if str(parent) != folder):
            continue  # a trial, or the confirmation of a search
        prefix = "" if folder == "." else f"{folder}/"
        row = {"name": folder if prefix else local.resolve().name, "size": sum(sizes[name] for name in sizes if name.startswith(prefix))}
        try:
            settings = by_name(read_config(local / folder / CONFIG_FILE))
            found = _search_row(local / folder) if folder in searches else _run_row(local / folder, settings, f"{prefix}{OWNER}" in sizes)
        except UserError as error:
            settings, found = {}, {"kind": "?", "state": str(error), "epochs": None, "best": None, "interval": None, "when": None}
        rows.append({**row, **found})
        values.append(settings)
    for row, differing in zip(rows, _differing(values), strict=True):
        row["settings"] = differing
    return rows


def _run_row(folder: Path, settings: Mapping[str, Any], owned: bool) -> dict[str, Any]:
    log = folder / LOG_FILE
    lines = _lines_of(log)
    best, interval = _best_of(lines)
    state = "unfinished" if owned else "finished" if lines else "empty"
    changed = log if lines else folder / CONFIG_FILE
    return {
        "kind": "run",
        "state": f"{state}, {len(lines)} of {settings['optim.epochs']} epochs" if owned else state,
        "epochs": len(lines),
        "best": best,
        "interval": interval,
        "when": _time_of(changed),
    }


def _lines_of(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.is_file() else []


def _best_of(lines: Sequence[str]) -> tuple[float | None, list[float] | None]:
    """Return the highest AP in the lines of a log.txt, and its interval; None where the log has none."""
    scores = []
    for line in lines:
        try:
            entry = json.loads(line)
            interval = [entry["test_AP_low"], entry["test_AP_high"]] if "test_AP_low" in entry else None
            ap = entry["test_coco_eval_bbox"][list(METRICS).index("AP")]
            scores += [(ap, interval)] if ap >= 0 else []  # -1: there is no object to find
        except (ValueError, LookupError, TypeError, AttributeError):  # the last line of a run that is being written, or a damaged one
            continue
    return max(scores, key=lambda score: score[0], default=(None, None))


def _search_row(folder: Path) -> dict[str, Any]:
    search = Search(folder)
    trials, best = search.frozen(), search.best()
    ended = sum(trial.state.is_finished() for trial in trials)
    state = "finished" if ended >= search.trials else f"unfinished, {ended} of {search.trials} trials"
    return {
        "kind": "search",
        "state": f"{state}, confirmed" if read_verdict(folder) else state,
        "epochs": sum(epochs_of(trial) for trial in trials),
        "best": objective(best),
        "interval": _interval_of(search, best) if best else None,
        "when": _time_of(folder / STUDY_FILE),
    }


def _interval_of(search: Search, best: FrozenTrial) -> list[float] | None:
    """Return the interval of the AP that is the objective of the best trial; None for another objective, or if it is unknown."""
    if search.metric != "AP":
        return None
    ap, interval = _best_of(_lines_of(search.folder / TRIALS_FOLDER / search.trial_name(best.number) / LOG_FILE))
    return interval if ap is not None and math.isclose(ap, objective(best) or 0.0, abs_tol=1e-9) else None


def search_status(path: str) -> str:
    """Return how a search goes, in a few lines: its trials by state, the running ones, and the best.

    Args:
        path: Path or URI of the search, which any process may be running.

    Raises:
        UserError: There is no search.
    """
    search = Search(fetched(path, recursive=False))
    trials, best = search.frozen(), search.best()
    numbers = Counter(map(state_of, trials))
    states = [f"{numbers[state]} {state}" for state in ALL_STATES if numbers[state]]
    lines = [f"{', '.join(states)}; {count(search.trials, 'trial')} requested; last change {_time_of(search.folder / STUDY_FILE)}"]
    lines.append(
        f"best {search.metric}: {objective(best) or 0.0:.4f} in trial {best.number}"
        if best
        else f"no trial has a value of {search.metric} yet"
    )
    for trial in trials:
        if state_of(trial) == "running":
            value = max(trial.intermediate_values.values(), default=None)
            so_far = "" if value is None else f", best {search.metric} {value:.4f}"
            lines.append(f"running: {search.trial_name(trial.number)}, {count(epochs_of(trial), 'epoch')}{so_far}")
    return "\n".join([*lines, top_trials(search)] if best else lines)


def _time_of(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")


def _differing(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each run those settings that are not the same in all runs; where a run is stored does not count."""
    known = [each for each in values if each]
    names = [
        name for name in (known[0] if known else ()) if not name.startswith("run.") and any(each[name] != known[0][name] for each in known)
    ]
    return [{name: each[name] for name in names if name in each} for each in values]


def sort_runs(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Sort the rows of :func:`list_runs`.

    Args:
        rows: The rows.
        key: A column of ``SORTED_BY``.

    Returns:
        The sorted rows; those without a value in the column come last.
    """
    with_value = [row for row in rows if row[key] is not None]
    return sorted(with_value, key=lambda row: row[key], reverse=SORTED_BY[key]) + [row for row in rows if row[key] is None]


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of :func:`list_runs` as a plain text table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "state", "epochs", "best", "when", "MB", "settings that differ"):
        table.add_column(heading, justify="right" if heading in ("epochs", "best", "MB") else "left", no_wrap=True)
    for row in rows:
        best = "-" if row["best"] is None else f"{row['best']:.4f}"
        best += f" ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})" if row["interval"] else ""
        settings = shortlist((f"{name}={compact(value)}" for name, value in row["settings"].items()), MOST_SETTINGS)
        cells = (row["name"], row["kind"], row["state"], "-" if row["epochs"] is None else str(row["epochs"]), best, row["when"] or "-")
        table.add_row(*cells, f"{row['size'] / 1e6:.1f}", settings)
    console = Console(width=2000, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
