"""Logs of a training run for people: TensorBoard events, and log.txt in the format of the official DETR.

The step of all TensorBoard events is the number of training images seen so far. It is the same after the same epoch, so that the curves of
runs with different batch sizes or numbers of workers lie over one another. By it a resumed run hides events that an interrupted process
wrote after its last checkpoint. Tags:

- per step: ``train/loss`` (weighted sum), ``train/loss_ce``, ``train/loss_bbox``, ``train/loss_giou`` (unweighted),
  ``train/class_error``, ``train/cardinality_error``, ``train/grad_norm``, ``lr/transformer``, ``lr/backbone``,
  ``speed/images_per_second``;
- per epoch: their means under ``train_epoch/``, the same losses and errors under ``val/``, ``val/AP`` and the other eleven COCO
  numbers, ``val/AP/<category>``, ``best/AP`` (the highest so far), ``epoch``, the curve ``val/precision_recall``, and in some epochs
  ``pictures/<file name>``;
- with masks, also ``loss_mask`` and ``loss_dice``, and per epoch ``val/segm/AP`` and the other eleven COCO numbers of masks,
  ``val/segm/AP_low`` and ``val/segm/AP_high``, and ``val/segm/AP/<category>``;
- once: the settings as text and as hparams, and the layout of the custom scalars;
- at the end: ``errors`` as text, and ``errors/<file name>``, the images with the most errors.
"""

import io
import json
import math
import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from raydetr.config import PATH_SETTINGS, SETTINGS, Config, flatten, preset_settings, to_dict
from raydetr.data.coco import CocoImages
from raydetr.data.masks import decode_masks
from raydetr.draw import Box, category_colours, draw_boxes
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, stats
from raydetr.files import atomic_write
from raydetr.storage import CONFIRM_FOLDER, split
from raydetr.text import compact
from raydetr.training.engine import Detections
from raydetr.training.metrics import LATENCY, LOSSES, MASK_LOSSES, MASK_METRICS, losses_in

STEP_TAGS = {
    **{name: f"train/{name}" for name in (*LOSSES, *MASK_LOSSES, "grad_norm")},
    "lr_transformer": "lr/transformer",
    "lr_backbone": "lr/backbone",
    "images_per_second": "speed/images_per_second",
}
HPARAM_METRICS = ("best/AP", "val/AP", "val/AP50", "val/AP75", "val/loss_ce", "val/loss_bbox", "val/loss_giou")
MASK_HPARAM_METRICS = ("val/segm/AP", "val/segm/AP50", "val/segm/AP75", "val/loss_mask", "val/loss_dice")  # as well, with model.masks

PICTURE_SIDE = 640  # longest side of the images in TensorBoard (pixels)
PICTURE_SCORE = 0.5  # lowest score of a box that is drawn


class Tracker:
    """Writes the TensorBoard events of a run. Every method raises OSError if the disk fails.

    Args:
        folder: Folder of the event files; created if it does not exist.
        config: The settings of the run.
        seen: Number of training images that the run has seen. Later events, by an earlier process, are hidden.
        searched: The settings that the HPARAMS page shows, by dotted name, with their domains: ``(low, high)`` or a list of values.
            Default: all settings.
        objectives: The objectives of a search, which this page shows among the metrics.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        seen: int = 0,
        searched: Mapping[str, tuple | list] | None = None,
        objectives: Iterable[str] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob("*tfevents*"))
        if not seen:  # the run starts again after a first epoch that was interrupted
            while before:
                before.pop().unlink()
        self._events = _Events(folder, seen + 1 if before else None)
        self._settings = {name: _plain(value) for name, value in flatten(to_dict(config)).items()}
        self._searched = searched
        self._masks = config.model.masks
        self._objectives = [objective_tag(name) for name in objectives]
        if not before:
            self._describe()

    def _describe(self) -> None:
        experiment, start, _ = self._hparams()
        self._events.add(experiment, 0)
        self._events.add(start, 0)
        rows = [f"| {name} | {value} | {SETTINGS[name].meaning} |" for name, value in self._settings.items()]
        self._events.add(summary().text("settings", "\n".join(["| setting | value | meaning |", "|---|---|---|", *rows])), 0)
        self._events.add(summary().custom_scalars(custom_scalars(self._masks)), 0)
        self._events.flush()

    def _hparams(self) -> tuple:
        domains = dict.fromkeys(self._settings) if self._searched is None else self._searched
        shown = {name: self._settings[name] for name in domains}
        discrete = {name: [_plain(value) for value in domain] for name, domain in domains.items() if isinstance(domain, list)}
        metrics = (*HPARAM_METRICS, *(MASK_HPARAM_METRICS if self._masks else ()), *self._objectives)
        experiment, start, end = summary().hparams(shown, dict.fromkeys(metrics, 0.0), discrete)
        changed = self._changed() if self._searched is None else self._searched
        _complete_hparams(experiment, start, domains, changed, "" if self._searched is None else self._group())
        return experiment, start, end

    def _changed(self) -> list[str]:
        """Return the settings of a plain run that are not the defaults of its network, without those that name folders."""
        defaults = {name: _plain(value) for name, value in preset_settings(str(self._settings["model.preset"])).items()}
        named = (*PATH_SETTINGS, "run.name")
        return [name for name, value in self._settings.items() if value != defaults[name] and name not in named]

    def _group(self) -> str:
        """Return the name of a trial on the HPARAMS page, which shows its beginning only: ``003 lr=2.7e-4 (name of the search)``.

        TensorBoard shows trials of one name as their means. These are the trials of a confirmation that differ in their seed or fold only.
        """
        number = str(self._settings["run.name"]).partition("_")[0]
        drawn = [name for name in self._searched or () if name not in ("run.seed", "data.fold")]
        values = [f"{name.split('.')[1]}={compact(self._settings[name])}" for name in drawn]
        above, search = split(split(str(self._settings["run.storage"]))[0])
        confirmed = search == CONFIRM_FOLDER
        words = [number, *(["confirmed"] if confirmed else []), *(values if number.strip("0") else ["defaults"])]
        return f"{' '.join(words)} ({split(above)[1] if confirmed else search})"

    def log_step(self, seen: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an optimizer step.

        Args:
            seen: Number of training images seen so far.
            numbers: What :func:`raydetr.training.engine.train_one_epoch` calls ``show`` with.
        """
        self.log_scalars(seen, {tag: numbers[name] for name, tag in STEP_TAGS.items() if name in numbers})

    def log_epoch(
        self,
        seen: int,
        epoch: int,
        train: dict[str, float],
        val: dict[str, float],
        metrics: dict[str, Any],
        curve: dict,
        best: float | None,
    ) -> None:
        """Write the numbers of an epoch.

        Args:
            seen: Number of training images seen so far.
            epoch: Number of the epoch, from 1.
            train: Means over the epoch, from :func:`raydetr.training.engine.train_one_epoch`.
            val: Losses, from :func:`raydetr.training.engine.evaluate`.
            metrics: Result of :func:`raydetr.evaluate.coco.summarize`; with masks, also that of
                :func:`raydetr.evaluate.coco.mask_metrics` under ``segm``.
            curve: Result of :func:`raydetr.evaluate.coco.precision_recall`.
            best: The highest AP so far; None if it is unknown.
        """
        self.log_scalars(seen, epoch_scalars(epoch, train, val, metrics, best))
        hits, false, missed = (curve[name] for name in ("true_positives", "false_positives", "false_negatives"))
        counts = (hits, false, 0 * hits, missed)  # detection has no true negatives
        event = summary().pr_curve_raw("val/precision_recall", *counts, curve["precision"], curve["recall"], num_thresholds=len(hits))
        self._events.add(event, seen)

    def log_text(self, seen: int, tag: str, markdown: str) -> None:
        """Write a text in Markdown after so many training images."""
        self._events.add(summary().text(tag, markdown), seen)

    def log_pictures(self, seen: int, pictures: dict[str, Image.Image], group: str = "pictures") -> None:
        """Write images to TensorBoard as JPEG.

        Args:
            seen: Number of training images seen so far.
            pictures: Images by file name, which becomes the end of the tag ``GROUP/NAME``.
            group: The beginning of the tag.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # protobuf defines it at run time

        for name, picture in pictures.items():
            # JPEG takes a fifth of the space and a fiftieth of the time of the PNG that torch would write.
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=90, subsampling=0)  # coloured lines stay sharp
            image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue())
            self._events.add(Summary(value=[Summary.Value(tag=f"{group}/{name}", image=image)]), seen)

    def log_scalars(self, seen: int, scalars: Mapping[str, float | None]) -> None:
        """Write numbers by tag; None is left out.

        Args:
            seen: Number of training images seen so far.
            scalars: The numbers.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # protobuf defines it at run time

        # One event for all: one for each would take a tenth of a small model's step.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None]
        self._events.add(Summary(value=values), seen)

    def flush(self) -> None:
        """Write everything so far to the disk."""
        self._events.flush()

    def finish(self) -> None:
        """Mark the run as finished on the HPARAMS page."""
        self._events.add(self._hparams()[2], 0)
        self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        self._events.close()


def epoch_scalars(
    epoch: int, train: dict[str, float], val: dict[str, float], metrics: dict[str, Any], best: float | None
) -> dict[str, float | None]:
    """Return the numbers of an epoch by tag, None for an undefined one; the arguments are those of :meth:`Tracker.log_epoch`."""
    scalars: dict[str, float | None] = {"epoch": epoch, "best/AP": best}
    scalars |= {f"train_epoch/{name}": train[name] for name in (*losses_in(train), "grad_norm")}
    scalars |= {f"val/{name}": val[name] for name in losses_in(val)}
    scalars |= {f"val/{name}": metrics[name] for name in METRICS}
    scalars |= _interval("val/", metrics)
    scalars |= {f"val/AP/{category}": numbers["AP"] for category, numbers in metrics["per_category"].items()}
    if "segm" in metrics:
        scalars |= {f"val/segm/{name}": metrics["segm"][name] for name in METRICS}
        scalars |= _interval("val/segm/", metrics["segm"])
        scalars |= {f"val/segm/AP/{category}": numbers["AP"] for category, numbers in metrics["segm"]["per_category"].items()}
    return scalars


def _interval(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return dict(zip((f"{prefix}AP_low", f"{prefix}AP_high"), metrics.get("AP_interval") or (None, None), strict=True))


def objective_tag(name: str) -> str:
    """Return the tag of an objective of a search."""
    if name == LATENCY:
        return f"speed/{name}"
    return f"val/segm/{MASK_METRICS[name]}" if name in MASK_METRICS else f"val/{name}"


def summary():
    """Return the module that makes TensorBoard's messages. It is imported late, because that takes a second or more."""
    from torch.utils.tensorboard import summary

    return summary


class _Events:
    """An event file that the calling thread writes, so that disk errors are raised in it.

    TensorBoard hides the events of ``purge_step`` and later steps in earlier files of the folder.
    """

    flush_interval_s = 10.0

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # protobuf defines it at run time
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names: the time comes first.
        file = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._writer, self._flushed = Event, RecordWriter(file.open("wb")), time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, step: int) -> None:
        """Append an event, and flush the file if the last flush was more than ``flush_interval_s`` ago."""
        self._write(self._event(summary=summary, step=step))
        if time.monotonic() - self._flushed > self.flush_interval_s:
            self.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> str | int | float:
    """Return a setting as hparams take it: a number or text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, (int, float, str)) else "null"


def _complete_hparams(experiment, start, domains: Mapping[str, Any], first: Iterable[str], group: str) -> None:
    """Add to the summaries of hparams what torch has no argument for.

    Args:
        experiment: The summary that describes the hparams.
        start: The summary of the run's own values.
        domains: The domain of each hparam; ``(low, high)`` is an interval.
        first: The hparams that TensorBoard shows before the others.
        group: The name of the run's group; empty: the run's own name.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]  # protobuf defines it at run time

    first = set(first)
    described, own = (summary.value[0].metadata.plugin_data for summary in (experiment, start))
    content = HParamsPluginData.FromString(described.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first
        if isinstance(domain := domains[info.name], tuple):
            info.domain_interval.min_value, info.domain_interval.max_value = domain
    described.content = content.SerializeToString()
    content = HParamsPluginData.FromString(own.content)
    content.session_start_info.group_name = group
    own.content = content.SerializeToString()


def custom_scalars(masks: bool = False) -> dict[str, dict[str, list]]:
    """Return the layout of TensorBoard's custom scalars: charts of AP, and of each loss. Tags are regular expressions there."""
    losses = (*LOSSES, *(MASK_LOSSES if masks else ()))

    def together(*tags: str) -> list:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        # TensorBoard shows the charts of a section in this order, but those with an interval last.
        "AP": {
            "AP": together("val/AP"),
            "AP with 95 % interval": ["Margin", ["val/AP", "val/AP_low", "val/AP_high"]],
            "AP50 and AP75": together("val/AP50", "val/AP75"),
            "AP by size": together("val/AP_small", "val/AP_medium", "val/AP_large"),
            "AP by category": together("val/AP/.*"),
            "AR": together("val/AR1", "val/AR10", "val/AR100"),
            **({"AP of masks by IoU": together("val/segm/AP", "val/segm/AP50", "val/segm/AP75")} if masks else {}),
            **({"AP of masks with 95 % interval": ["Margin", ["val/segm/AP", "val/segm/AP_low", "val/segm/AP_high"]]} if masks else {}),
        },
        # Not both in one chart: with several runs nobody could tell the curves apart.
        "validation": {name: together(f"val/{name}") for name in losses},
        "training": {name: together(f"train_epoch/{name}") for name in losses},
    }


class Pictures:
    """Some validation images, spread over the set, which are drawn with their true boxes and the detections.

    Args:
        dataset: The validation set. The images are read once, and kept in the size in which they are shown.
        number: How many images, at most.
    """

    def __init__(self, dataset: CocoImages, number: int):
        images = dataset.coco["images"]
        self.number = min(number, len(images))
        self._shown = [images[index * len(images) // self.number]["id"] for index in range(self.number)]
        self._images = {image["id"]: image for image in images}
        self._dataset = dataset
        self._names = {category["id"]: category["name"] for category in dataset.categories}
        self._resized: dict[int, tuple[Image.Image, float]] = {}  # by image id: the image, and its size relative to the original

    def draw(self, detections: Detections, image_ids: Collection[int] | None = None) -> dict[str, Image.Image]:
        """Draw the true boxes and the detections on the images.

        Args:
            detections: The detections on the validation set. Those with a score of at least ``PICTURE_SCORE`` are drawn.
            image_ids: Which images to draw; None for those that are spread over the set.

        Returns:
            The drawn images by file name.
        """
        labels = [category["id"] for category in self._dataset.categories]
        drawn = {}
        for image in (self._images[image_id] for image_id in (self._shown if image_ids is None else image_ids)):
            picture, scale = self._picture(image)
            true = [each for each in self._dataset.coco["annotations"] if each["image_id"] == image["id"] and not each["iscrowd"]]
            row = detections.image_ids.searchsorted(image["id"])
            rles = detections.rles[row] if detections.rles else [None] * len(detections.scores[row])
            found = [
                self._box(box_xywh, scale, labels[label], score, rle)
                for box_xywh, label, score, rle in zip(
                    detections.boxes_xywh[row].tolist(), detections.labels[row], detections.scores[row].tolist(), rles, strict=True
                )
                if score >= PICTURE_SCORE
            ]
            true = [self._box(each["bbox"], scale, each["category_id"], rle=each.get("segmentation")) for each in true]
            colours = category_colours(self._names.values())
            drawn[image["file_name"]] = draw_boxes(picture, found, true, colours, letters=1 / 45, name_true=len(self._names) > 1)
        return drawn

    def _picture(self, image: dict) -> tuple[Image.Image, float]:
        if image["id"] not in self._resized:
            row = self._dataset.image_ids.index(image["id"])
            picture = to_pil_image(self._dataset.images(*self._dataset.files[row]))
            longest = max(picture.size)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            self._resized[image["id"]] = picture, max(picture.size) / longest
        return self._resized[image["id"]]

    def _box(
        self, box_xywh: list[float], scale: float, category_id: int, score: float | None = None, rle: dict[str, Any] | None = None
    ) -> Box:
        x, y, width, height = (scale * side for side in box_xywh)
        mask = decode_masks([rle], (rle["size"][0], rle["size"][1]))[0] if rle else None
        return Box((x, y, x + width, y + height), self._names[category_id], score, mask)


def log_line(
    epoch: int, train: dict[str, float], val: dict[str, float], metrics: dict[str, Any], weights: dict[str, float], parameters: int
) -> dict[str, Any]:
    """Return a line of log.txt as the official ``main.py`` writes it: losses weighted, and unweighted with the suffix ``_unscaled``.

    Args:
        epoch: Number of the epoch, from 0 as in the official log.
        train: Means over the epoch, from :func:`raydetr.training.engine.train_one_epoch`.
        val: Losses, from :func:`raydetr.training.engine.evaluate`.
        metrics: Result of :func:`raydetr.evaluate.coco.summarize`, with the interval of AP if it is known.
        weights: ``weight_dict`` of the criterion.
        parameters: Number of trained parameters.
    """
    line: dict[str, Any] = {"train_lr": train["lr_transformer"]}
    # Numbers only, and left out where there is none: the official plot_logs interpolates every column.
    extra = {"train_grad_norm": train["grad_norm"]}
    extra |= zip(("test_AP_low", "test_AP_high"), metrics.get("AP_interval") or (math.nan, math.nan), strict=True)
    line |= {name: value for name, value in extra.items() if math.isfinite(value)}
    for part, losses in (("train", train), ("test", val)):
        line |= {f"{part}_class_error": losses["class_error"], f"{part}_loss": losses["loss"]}
        line |= {f"{part}_{name}": losses[name] * weight for name, weight in weights.items()}
        errors = ("loss_", "class_error", "cardinality_error")
        line |= {f"{part}_{name}_unscaled": value for name, value in losses.items() if name.startswith(errors)}
    return {
        **line,
        "test_coco_eval_bbox": stats(metrics),
        **({"test_coco_eval_masks": stats(metrics["segm"])} if "segm" in metrics else {}),
        "epoch": epoch,
        "n_parameters": parameters,
    }


class Log:
    """A run's log.txt: one line of JSON for each epoch.

    Lines that an interrupted process wrote for unfinished epochs are dropped, and so is a last line that was cut short. Every call writes
    the complete file, so that a line that could not be written is written with the next one.

    Args:
        path: The file; it need not exist.
        epochs: How many epochs the run has finished.

    Attributes:
        was_cut: Whether the last line of the file was cut short.

    Raises:
        UserError: The file cannot be read, or a line of it is damaged.
    """

    def __init__(self, path: Path, epochs: int):
        self._path = path
        lines, self.was_cut = _read_log(path)
        self._lines = [text for epoch, text in lines if epoch < epochs]

    def append(self, line: dict[str, Any]) -> None:
        """Add the line of an epoch.

        Args:
            line: The result of :func:`log_line`.

        Raises:
            OSError: The file cannot be written. The next call writes this line as well.
        """
        self._lines.append(json.dumps(line, allow_nan=False))
        with atomic_write(self._path) as file:
            file.write("".join(f"{text}\n" for text in self._lines).encode())


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the metrics of each epoch from a log.txt, under the names that ``fit`` reports.

    Args:
        path: The file.

    Returns:
        For each epoch the metrics that the file has; empty if the file does not exist.

    Raises:
        UserError: The file cannot be read, or a line of it is damaged.
    """
    lines, _ = _read_log(path)
    history = []
    for epoch, text in lines:
        try:
            history.append(_as_metrics(json.loads(text)))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: the line of epoch {epoch} is not one of a training log of raydetr") from None
    return history


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log.txt.

    Raises:
        UserError: The file cannot be read, or a line of it is damaged.
    """
    return [json.loads(text) for _, text in _read_log(path)[0]]


def _as_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: None if value < 0 else value for name, value in zip(METRICS, line["test_coco_eval_bbox"], strict=True)}
    for mine, theirs in (("train", "train"), ("val", "test")):
        numbers |= {f"{mine}_{name}": line[f"{theirs}_{name}"] for name in ("loss", "class_error")}
        unscaled = [name for name in LOSSES if name not in ("loss", "class_error")]
        numbers |= {f"{mine}_{name}": line[f"{theirs}_{name}_unscaled"] for name in unscaled}
    return {
        **numbers,
        "AP_low": line.get("test_AP_low"),
        "AP_high": line.get("test_AP_high"),
        "train_grad_norm": line.get("train_grad_norm"),
    }


def logged_epochs(path: Path) -> int:
    """Return the number of epochs in a log.txt.

    Args:
        path: The file.

    Returns:
        The number, 0 if the file does not exist or cannot be read.
    """
    try:
        lines, _ = _read_log(path)
    except UserError:
        return 0
    return max((epoch + 1 for epoch, _ in lines), default=0)


def _read_log(path: Path) -> tuple[list[tuple[int, str]], bool]:
    """Return the epoch and the text of every line, and whether a last line was left out because it was cut short."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return [], False
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a log of this run ({getattr(error, 'strerror', None) or error}); move it away") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append((int(json.loads(text)["epoch"]), text))
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                return lines, True
            raise UserError(f"{path}, line {number}: not a line of a training log; correct it, remove it, or move the file away") from None
    return lines, False
