"""The part of a report about one training run, which may also be a trial: its curves, what they say, and its errors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raydetr.config import PATH_SETTINGS, SETTINGS, by_name, preset_settings, read_config
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, Evaluation, run_coco_eval
from raydetr.evaluate.diagnosis import diagnose
from raydetr.evaluate.errors import error_numbers, first_sentence
from raydetr.predict.errors import errors_content
from raydetr.predict.score import Detected, detections_of
from raydetr.report.charts import Axis, Chart, axis
from raydetr.report.page import card, cell, chart, interval_words, points, table
from raydetr.storage import fetched, join, split
from raydetr.text import count
from raydetr.training.tracking import read_history
from raydetr.weights.checkpoint import read_checkpoint

CONFIG_FILE, LOG_FILE, BEST_FILE = "config.yaml", "log.txt", "best.pth"
IMAGE_SIDE, MOST_IMAGES, MOST_SUSPECTS = 420, 8, 8  # of the errors: so that a report stays small enough to send
ALL_GOOD = "The curves show nothing to worry about."


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run left in its folder.

    Attributes:
        path: Path or URI of the run.
        settings: Every setting by dotted name.
        history: The metrics of each epoch.
        data: The fingerprints of its training and validation set; empty where it has no checkpoint yet.
    """

    path: str
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return split(self.path)[1]

    @property
    def best(self) -> int | None:
        """The position of the epoch with the highest AP; None if no epoch has one."""
        known = [position for position, each in enumerate(self.history) if each["AP"] is not None]
        return max(known, key=lambda position: (self.history[position]["AP"], -position), default=None)

    @property
    def images(self) -> int:
        """The number of validation images; 0 if unknown."""
        return len(self.data["val"]["image_ids"]) if "val" in self.data else 0

    @property
    def most_objects(self) -> int:
        """The largest number of objects in an image; 0 if unknown."""
        return max((int(each["boxes"].max()) for each in self.data.values() if len(each["boxes"])), default=0)


@dataclasses.dataclass(frozen=True)
class RunErrors:
    """The errors of a model.

    Attributes:
        headline: What costs most, in a sentence.
        numbers: Of :func:`raydetr.evaluate.errors.error_numbers`.
        detected: The data set and the detections.
        evaluation: The evaluation of the detections.
    """

    headline: str
    numbers: Mapping[str, Any]
    detected: Detected
    evaluation: Evaluation


def read_run(path: str) -> RunRecord:
    """Read a run.

    Args:
        path: Path or URI of the run, which may still be running.

    Raises:
        UserError: There is no run, or one of its files is damaged.
    """
    folder = fetched(path, only=LOG_FILE, recursive=False)
    log = read_history(folder / LOG_FILE)
    folder = fetched(path, only=CONFIG_FILE, recursive=False)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{path}: holds neither a run nor a search ({CONFIG_FILE} is missing)")
    settings = by_name(read_config(folder / CONFIG_FILE))
    checkpoint = fetched(path, only=BEST_FILE, recursive=False) / BEST_FILE
    data = read_checkpoint(checkpoint).get("data") or {} if checkpoint.is_file() else {}
    return RunRecord(str(path), settings, log, data)


def find_errors(checkpoint: str, settings: Mapping[str, Any], data: Mapping[str, Any]) -> RunErrors | str:
    """Find the errors of a checkpoint on its validation set.

    Args:
        checkpoint: Path or URI.
        settings: Those it was trained with, which say where the data set is.
        data: Settings that say where the data set is now; empty: where it was.

    Returns:
        The errors, or a sentence that says why they are unknown.
    """
    names = [name for name in PATH_SETTINGS if name.startswith("data.") and settings[name]]
    where = data or {name: settings[name] for name in names}
    try:
        detected = detections_of(fetched(checkpoint), where)
        evaluation = run_coco_eval(detected.coco, detected.results)
        numbers = error_numbers(evaluation, detected.coco)
    except (UserError, OSError) as error:
        return f"The errors are not shown: {error}. Name the data set with --data, if it is elsewhere now."
    numbers = {"split": "val", "images": len(detected.coco["images"]), **numbers}
    return RunErrors(first_sentence(numbers), numbers, detected, evaluation)


def shown_errors(errors: RunErrors | str, checkpoint: str) -> dict[str, Any]:
    """Return what the page shows of errors: ``headline`` and ``content``, which is None where they are unknown."""
    if isinstance(errors, str):
        return {"headline": errors, "notes": [], "content": None}
    files = f"raydetr errors {checkpoint} writes them to files for a labeling tool."
    content = errors_content(errors.numbers, errors.detected, files, MOST_IMAGES, MOST_SUSPECTS, IMAGE_SIDE)
    notes = [f"{note[0].upper()}{note[1:]}." for note in errors.detected.notes]
    return {"headline": errors.headline, "notes": notes, "content": content}


def run_part(run: RunRecord, errors: RunErrors | str | None) -> dict[str, Any]:
    """Return what the page shows of a run.

    Args:
        run: The run.
        errors: Its errors, why they are unknown, or None if nobody wants them.
    """
    return {
        "title": f"Run {run.name}",
        **dict(zip(("lead", "quiet"), run_sentences(run), strict=True)),
        "tiles": _tiles(run),
        "cards": [*run_cards(run), *([metrics_card(run)] if run.best is not None else []), settings_card(run)],
        "errors": None if errors is None else shown_errors(errors, join(run.path, BEST_FILE)),
    }


def run_sentences(run: RunRecord) -> tuple[str, list[str]]:
    """Return what a run reached, in a sentence, and what to think of it."""
    if not run.history:
        return "No epoch is finished yet.", []
    if run.best is None:
        return "AP is unknown: the validation set has no object to find.", []
    best = run.history[run.best]
    images = f" on {count(run.images, 'validation image')}" if run.images else " on the validation images"
    interval = interval_words(best["AP_low"], best["AP_high"])
    lead = f"AP {points(best['AP'])}{interval}{images}, in epoch {run.best + 1} of {len(run.history)}."
    return lead, [
        "That epoch was chosen by the same images, so expect a little less on other images. The interval says how far the choice of the "
        "images moves AP; another seed moves it as well."
    ]


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    best = None if run.best is None else run.history[run.best]
    return [
        ("best AP", points(best["AP"]) if best else "-"),
        ("its epoch", "-" if run.best is None else str(run.best + 1)),
        ("epochs trained", f"{len(run.history)} of {run.settings['optim.epochs']}"),
        ("validation images", str(run.images or "-")),
        ("network", str(run.settings["model.preset"])),
    ]


def diagnosis(run: RunRecord) -> list[str]:
    """Return what the curves of a run say, a sentence each."""
    return diagnose(
        run.history,
        num_queries=run.settings["model.num_queries"],
        most_objects=run.most_objects,
        images=run.images,
        clip_max_norm=run.settings["optim.clip_max_norm"],
    )


def run_cards(run: RunRecord) -> list[dict[str, Any]]:
    """Return the diagnosis and the curves of a run; nothing before its first epoch."""
    if not run.history:
        return []
    said = card("What the curves say", words=diagnosis(run) or [ALL_GOOD])
    legend = [("s0", "training"), ("s1", "validation")]
    explanation = (
        "AP is the thick line with its 95 % interval, AP50 the thin one, AP75 the dotted one. Losses are unweighted, except the total, "
        "which training minimizes."
    )
    curves = [chart("AP", _ap_chart(run)), *(chart(*each) for each in _loss_charts(run))]
    return [said, card("Curves", explanation, charts=curves, legend=legend)]


def epochs_axis(epochs: int) -> Axis:
    """Return an axis of epochs, from 1."""
    return Axis("epoch", 1 if epochs > 1 else 0, max(epochs, 2), whole=True)


def ap_axis(values: Sequence[float], label: str = "AP") -> Axis:
    """Return an axis of AP in points that begins at 0."""
    return Axis(label, 0.0, max(5.0, 1.08 * max(values, default=1.0)))


def _ap_chart(run: RunRecord):
    epochs = range(1, len(run.history) + 1)
    rows = {name: _series(run, name, 100) for name in ("AP", "AP50", "AP75", "AP_low", "AP_high")}
    upper = [value for row in rows.values() for _, value in row]
    figure = Chart("AP after every epoch", epochs_axis(len(epochs)), ap_axis(upper))
    if len(rows["AP_low"]) == len(rows["AP_high"]):
        figure.band(rows["AP_low"], rows["AP_high"], "s1")
    for name, css in (("AP50", "thin s1"), ("AP75", "thin dotted s1"), ("AP", "thick s1")):
        figure.line(rows[name], css, name)
    if run.best is not None:
        figure.dot(rows["AP"][_count_known(run, run.best)], "best", f"best: epoch {run.best + 1}, AP {points(run.history[run.best]['AP'])}")
    return figure.svg()


def _count_known(run: RunRecord, position: int) -> int:
    """Return how many epochs before a position have an AP."""
    return sum(each["AP"] is not None for each in run.history[:position])


def _loss_charts(run: RunRecord):
    names = {
        "loss": "loss (weighted total)",
        "loss_ce": "loss_ce (categories)",
        "loss_bbox": "loss_bbox",
        "loss_giou": "loss_giou",
        "class_error": "class_error (%)",
        "cardinality_error": "cardinality_error",
    }
    for name, heading in names.items():
        train, val = _series(run, f"train_{name}"), _series(run, f"val_{name}")
        if not train and not val:
            continue
        figure = Chart(f"{name} after every epoch", epochs_axis(len(run.history)), axis("", [value for _, value in (*train, *val)]))
        figure.line(train, "s0", "training")
        figure.line(val, "s1", "validation")
        yield heading, figure.svg()


def _series(run: RunRecord, name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    found = [(position + 1, each.get(name)) for position, each in enumerate(run.history)]
    return [(epoch, factor * value) for epoch, value in found if value is not None and math.isfinite(value)]


def metrics_card(run: RunRecord) -> dict[str, Any]:
    """Return the COCO numbers of the best epoch."""
    assert run.best is not None
    best = run.history[run.best]
    rows = [([name, best[name]], "best" if name == "AP" else "") for name in METRICS]
    return card(f"Metrics of epoch {run.best + 1}", "In points; a dash: there is no such object.", table=table(["metric", "value"], rows))


def settings_card(run: RunRecord) -> dict[str, Any]:
    """Return the settings of a run, those that were changed first."""
    defaults = preset_settings(run.settings["model.preset"])
    changed = {name: value for name, value in run.settings.items() if value != defaults[name] and name not in PATH_SETTINGS}
    rows = [([name, cell(value), cell(defaults[name]), SETTINGS[name].meaning], "") for name, value in changed.items()]
    everything = [([name, cell(value)], "") for name, value in run.settings.items()]
    return card(
        "Settings that were changed",
        table=table(["setting", "value", "default", "meaning"], rows, left=(3,)) if rows else None,
        words=[] if rows else ["None: all settings are the defaults of the network."],
        details=[("All settings", table(["setting", "value"], everything, left=(1,)))],
    )
