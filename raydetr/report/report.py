"""The report of a run or a search, or of several side by side: one HTML file that needs no network. The page itself is report.html."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydetr.errors import UserError
from raydetr.evaluate.errors import MEANINGS
from raydetr.evaluate.intervals import compare, verdict
from raydetr.files import atomic_write_text
from raydetr.pages import page_environment
from raydetr.report.charts import Chart
from raydetr.report.page import SERIES, card, cell, chart, interval_words, points, table
from raydetr.report.run import (
    BEST_FILE,
    RunErrors,
    RunRecord,
    ap_axis,
    epochs_axis,
    find_errors,
    read_run,
    run_part,
)
from raydetr.report.search import best_checkpoint, best_run, compared_searches, search_part, shown_trial
from raydetr.search.journal import STUDY_FILE
from raydetr.search.record import objective
from raydetr.search.study import Search
from raydetr.storage import exists, fetched, is_uri, join, split
from raydetr.text import count

MOST_SETTINGS = 20  # of those that differ, shown beside each other


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about: a run, or a search with the run of its best trial.

    Attributes:
        path: Path or URI, as the user gave it.
        search: The search; None for a run.
        run: The run; of a search that of its best trial, None if it cannot be read.
        errors: Its errors, why they are unknown, or None if nobody wants them.
    """

    path: str
    search: Search | None
    run: RunRecord | None
    errors: RunErrors | str | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return split(self.path)[1] if is_uri(self.path) else Path(self.path).resolve().name

    @property
    def best_ap(self) -> float | None:
        """The highest AP of its run, or the best objective of the search."""
        if self.search:
            best = self.search.best()
            return objective(best)
        return None if self.run is None or self.run.best is None else self.run.history[self.run.best]["AP"]

    @property
    def checkpoint(self) -> str:
        """Path or URI of its best weights."""
        return best_checkpoint(self.search, self.path) if self.search else join(self.path, BEST_FILE)

    def part(self) -> dict[str, Any]:
        """Return what the page shows of it."""
        if self.search:
            return search_part(self.search, self.path, self.errors, self.run)
        assert self.run is not None
        return run_part(self.run, self.errors)


def report(
    paths: Sequence[str | Path], out: str | Path | None = None, *, data: Mapping[str, Any] | None = None, errors: bool = True
) -> Path:
    """Write the report of a run or a search, or of several side by side.

    Args:
        paths: Paths or URIs of runs and searches, which may still be running.
        out: The file to write. By default it is ``report.html``, in the folder of a single local one, else in the current folder.
        data: Settings that say where the data set is now; by default it is where the run found it.
        errors: Whether to run the best weights on the validation images, and to show their errors.

    Returns:
        The path of the report.

    Raises:
        UserError: There is neither run nor search in a folder, the searches have different objectives, or the file cannot be written.
    """
    if not paths:
        raise UserError("report: name the folder of at least one run or search")
    subjects = [_subject(str(path), data or {}, errors) for path in paths]
    metrics = {each.search.metric if each.search else "AP": each.path for each in subjects}
    if len(metrics) > 1:
        raise UserError("report: " + ", ".join(f"{path} maximizes {metric}" for metric, path in metrics.items()) + "; not comparable")
    alone = len(subjects) == 1
    out = Path(out) if out else (Path(paths[0]).expanduser() if alone and not is_uri(paths[0]) else Path()) / "report.html"
    environment = page_environment("raydetr.report", "raydetr.predict")
    page = environment.get_template("report.html").render(
        title=f"{'Search' if subjects[0].search else 'Run'} {subjects[0].name}" if alone else f"{len(subjects)} runs and searches",
        comparison=None if alone else compared(subjects),
        parts=[each.part() for each in subjects],
    )
    try:
        atomic_write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot write the report ({error.strerror or error})") from None
    return out


def _subject(path: str, data: Mapping[str, Any], with_errors: bool) -> Subject:
    if not exists(path):
        raise UserError(f"{path}: there is no such run or search")
    search = Search(fetched(path, recursive=False)) if exists(join(path, STUDY_FILE)) else None
    run = best_run(search, path) if search else read_run(path)
    found = Subject(path, search, run, None)
    known = with_errors and found.best_ap is not None
    if not known:
        return found
    if not exists(found.checkpoint):
        return dataclasses.replace(found, errors=f"The errors are not shown: {found.checkpoint} is missing.")
    settings = search.base if search else run.settings if run else {}
    return dataclasses.replace(found, errors=find_errors(found.checkpoint, settings, data))


# ---------------------------------------------------------------------------------------------------------------- side by side


def labels(subjects: Sequence[Subject]) -> list[str]:
    """Return a name for each; their paths where two have the same name."""
    names = [each.name for each in subjects]
    return names if len(set(names)) == len(names) else [each.path for each in subjects]


def compared(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return what the page shows of several side by side."""
    by_label = dict(zip(labels(subjects), subjects, strict=True))
    searches = {label: each.search for label, each in by_label.items() if each.search}
    cards = [_runs_card(by_label), _curves_card(by_label)]
    if len(searches) > 1:
        cards += compared_searches(searches)
    cards += [each for each in (_errors_card(by_label), _differences_card(by_label)) if each]
    return {"lead": first_words(by_label), "cards": cards}


def first_words(by_label: Mapping[str, Subject]) -> str:
    """Return which of several reaches most, and whether that is more than chance, in a sentence or two."""
    ranked = sorted(
        ((label, each) for label, each in by_label.items() if each.best_ap is not None), key=lambda each: -(each[1].best_ap or 0.0)
    )
    if len(ranked) < 2:
        return "There is nothing to compare yet."
    (first, one), (second, other) = ranked[:2]
    lead = f"{first} reaches the highest AP, {points(one.best_ap)}; {second} reaches {points(other.best_ap)}."
    mine, theirs = one.errors, other.errors
    if not isinstance(mine, RunErrors) or not isinstance(theirs, RunErrors):
        return (
            f"{lead} Whether that is more than luck is not shown: raydetr evaluate {one.checkpoint} --against {other.checkpoint} says it."
        )
    try:
        found = verdict(compare(mine.evaluation, theirs.evaluation, mine.detected.coco["categories"]), len(mine.detected.coco["images"]))
    except UserError as error:
        return f"{lead} Whether that is more than luck cannot be said: {error}."
    found = found.replace("The checkpoint", first).replace("the other", second)
    caution = " Best weights were chosen on these images, and one seed of each says nothing about seeds."
    return f"{lead} Image by image: {found}{caution}"


def _runs_card(by_label: Mapping[str, Subject]) -> dict[str, Any]:
    highest = max((each.best_ap for each in by_label.values() if each.best_ap is not None), default=None)
    rows = []
    for label, each in by_label.items():
        kind = f"search, trial {shown_trial(each.search)}" if each.search else "run"
        last = each.run.history[each.run.best] if each.run and each.run.best is not None else None
        interval = interval_words(last["AP_low"], last["AP_high"]).strip(" ()").removeprefix("95 % interval ") if last else ""
        epochs = f"{len(each.run.history)} of {each.run.settings['optim.epochs']}" if each.run else "-"
        cells = [label, kind, points(each.best_ap), interval or "-", *(points(last[name]) if last else "-" for name in ("AP50", "AP75"))]
        rows.append(([*cells, epochs], "best" if each.best_ap is not None and each.best_ap == highest else ""))
    headings = ["", "what", "best AP", "95 % interval", "AP50", "AP75", "epochs"]
    return card("Side by side", "In points. Of a search: its best trial.", table=table(headings, rows, left=(1,)))


def _curves_card(by_label: Mapping[str, Subject]) -> dict[str, Any]:
    curves, legend = {}, []
    for index, (label, each) in enumerate(by_label.items()):
        css = f"s{index % SERIES}"
        legend.append((css, label))
        for name in ("AP", "train_loss", "val_loss"):
            history = each.run.history if each.run else ()
            factor = 100 if name == "AP" else 1
            steps = [(number, factor * row[name]) for number, row in enumerate(history, 1) if row[name] is not None]
            curves.setdefault(name, []).append((label, css, steps))
    epochs = max((len(each.run.history) for each in by_label.values() if each.run), default=1)
    headings = {"AP": "AP", "train_loss": "Training loss", "val_loss": "Validation loss"}
    charts = []
    for name, lines in curves.items():
        figure = Chart(headings[name], epochs_axis(epochs), ap_axis([y for *_, steps in lines for _, y in steps], ""))
        for label, css, steps in lines:
            figure.line(steps, css, label)
        charts.append(chart(headings[name], figure.svg()))
    explanation = "Weighted losses can be compared only where the weights of their terms are the same."
    return card("Curves", explanation, charts=charts, legend=legend)


def _errors_card(by_label: Mapping[str, Subject]) -> dict[str, Any] | None:
    known = {label: each.errors.numbers for label, each in by_label.items() if isinstance(each.errors, RunErrors)}
    if not known:
        return None
    rows = [
        ([kind, *(f"{points(numbers['lost_AP50'][kind]['AP'])} ({numbers['lost_AP50'][kind]['count']})" for numbers in known.values())], "")
        for kind in MEANINGS
    ]
    explanation = "By how much AP50 would rise without each kind of error, and how often it occurs."
    return card("Errors", explanation, table=table(["", *known], rows))


def _differences_card(by_label: Mapping[str, Subject]) -> dict[str, Any] | None:
    """Return the table of the settings that are not the same everywhere."""
    known = {label: each.run.settings for label, each in by_label.items() if each.run}
    first = next(iter(known.values()), {})
    names = [name for name in first if not name.startswith("run.") and any(each.get(name) != first[name] for each in known.values())]
    if len(known) < 2 or not names:
        return None
    rows = [([name, *(cell(each.get(name)) for each in known.values())], "") for name in names[:MOST_SETTINGS]]
    left_out = len(names) - len(rows)
    note = f"{count(left_out, 'more setting')} differ." if left_out else ""
    return card("Settings that differ", table=table(["setting", *known], rows, note=note))
