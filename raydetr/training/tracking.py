"""What a training run writes down for people: TensorBoard events and the official log.txt.

Tags, all at x = optimizer steps taken so far, so that a run that goes on after a stop can tell what to take back:

- per step: ``train/loss`` (weighted sum), ``train/loss_ce``, ``train/loss_bbox``, ``train/loss_giou`` (unweighted),
  ``train/class_error``, ``train/cardinality_error``, ``train/grad_norm``, ``lr/transformer``, ``lr/backbone``,
  ``speed/images_per_second``;
- per epoch: their means under ``train_epoch/``, the same losses and errors under ``val/``, ``val/AP`` and the other eleven COCO
  numbers, ``val/AP/<category>``, ``epoch``, the curve ``val/precision_recall``, and from time to time ``pictures/<file name>``;
- once: the settings as text and as hparams, and the layout of the custom scalars.
"""

import io
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from raydetr.config import SETTINGS, Config, flatten, to_dict
from raydetr.data.coco import CocoImages
from raydetr.data.images import image_path
from raydetr.draw import Box, category_colours, draw_boxes
from raydetr.evaluate.coco import METRICS, stats
from raydetr.training.engine import Detections
from raydetr.weights.files import written_whole

LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
STEP_TAGS = {
    **{name: f"train/{name}" for name in (*LOSSES, "grad_norm")},
    "lr_transformer": "lr/transformer",
    "lr_backbone": "lr/backbone",
    "images_per_second": "speed/images_per_second",
}
HPARAM_METRICS = ("val/AP", "val/AP50", "val/AP75", "val/loss_ce", "val/loss_bbox", "val/loss_giou")

PICTURE_SIDE = 640  # longest side (pixels) of the pictures in TensorBoard
PICTURE_SCORE = 0.5  # lowest score of a box that is drawn


class Tracker:
    """Writes a run's TensorBoard events into ``folder``; one worker of a run has one.

    ``step`` is how many optimizer steps the run has behind it: what an earlier process wrote after that is taken back.
    ``searched`` are the settings that the HPARAMS page shows, with their domains, ``(low, high)`` or a list of values; without it the
    page shows all. Every method raises OSError where the disk does.
    """

    def __init__(self, folder: Path, config: Config, step: int = 0, searched: Mapping[str, tuple | list] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob("*tfevents*"))
        if not step:  # a first epoch that was stopped: the run starts anew
            while before:
                before.pop().unlink()
        self._events = _Events(folder, step + 1 if before else None)
        self._settings = {name: _plain(value) for name, value in flatten(to_dict(config)).items()}
        self._searched = searched
        if not before:
            self._describe()

    def _describe(self) -> None:
        experiment, start, _ = self._hparams()
        self._events.add(experiment, 0)
        self._events.add(start, 0)
        rows = [f"| {name} | {value} | {SETTINGS[name].meaning} |" for name, value in self._settings.items()]
        self._events.add(summary().text("settings", "\n".join(["| setting | value | meaning |", "|---|---|---|", *rows])), 0)
        self._events.add(summary().custom_scalars(custom_scalars()), 0)
        self._events.flush()

    def _hparams(self) -> tuple:
        domains = dict.fromkeys(self._settings) if self._searched is None else self._searched
        shown = {name: self._settings[name] for name in domains}
        discrete = {name: [_plain(value) for value in domain] for name, domain in domains.items() if isinstance(domain, list)}
        experiment, start, end = summary().hparams(shown, dict.fromkeys(HPARAM_METRICS, 0.0), discrete)
        _set_intervals(experiment, {name: domain for name, domain in domains.items() if isinstance(domain, tuple)})
        return experiment, start, end

    def log_step(self, numbers: dict[str, float]) -> None:
        """A step's numbers, as ``train_one_epoch`` shows them."""
        self._scalars(numbers["step"], {tag: numbers[name] for name, tag in STEP_TAGS.items()})

    def log_epoch(
        self, step: int, epoch: int, train: dict[str, float], val: dict[str, float], metrics: dict[str, Any], curve: dict
    ) -> None:
        """An epoch's means, the validation losses, the result of ``coco_metrics`` and of ``precision_recall``."""
        scalars = {"epoch": epoch}
        scalars |= {f"train_epoch/{name}": train[name] for name in (*LOSSES, "grad_norm")}
        scalars |= {f"val/{name}": val[name] for name in LOSSES}
        scalars |= {f"val/{name}": metrics[name] for name in METRICS}
        scalars |= dict(zip(("val/AP_low", "val/AP_high"), metrics.get("AP_interval") or (None, None), strict=True))
        scalars |= {f"val/AP/{category}": numbers["AP"] for category, numbers in metrics["per_category"].items()}
        self._scalars(step, scalars)
        hits, false, missed = (curve[name] for name in ("true_positives", "false_positives", "false_negatives"))
        counts = (hits, false, 0 * hits, missed)  # nobody counts where rightly nothing was found
        curve = summary().pr_curve_raw("val/precision_recall", *counts, curve["precision"], curve["recall"], num_thresholds=len(hits))
        self._events.add(curve, step)

    def log_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Pictures by name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, picture in pictures.items():
            # JPEG, which TensorBoard shows as well, takes a fifth of the room and a fiftieth of the time of torch's PNG.
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=90, subsampling=0)  # coloured lines stay sharp
            image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue())
            self._events.add(Summary(value=[Summary.Value(tag=f"pictures/{name}", image=image)]), step)

    def _scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all: an event each would cost a tenth of a small model's step.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None]
        self._events.add(Summary(value=values), step)

    def flush(self) -> None:
        """Bring everything so far to the disk."""
        self._events.flush()

    def finish(self) -> None:
        """The run has come to its end."""
        self._events.add(self._hparams()[2], 0)
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


def summary():
    """The module that makes TensorBoard's messages; importing it takes a second or more, which only a training run has to wait."""
    from torch.utils.tensorboard import summary

    return summary


class _Events:
    """An event file that is written at once and by the caller's own thread, where an error of the disk can be told to the user.

    TensorBoard takes back what the folder's earlier files have at ``purge_step`` and after it.
    """

    flush_interval_s = 10.0

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names.
        file = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._writer, self._flushed = Event, RecordWriter(file.open("wb")), time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Any, step: int) -> None:
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
    """A setting as hparams take it: number or text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, (int, float, str)) else "null"


def _set_intervals(experiment, intervals: Mapping[str, tuple[float, float]]) -> None:
    """Give an experiment's summary the domains that torch cannot say."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        if info.name in intervals:
            info.domain_interval.min_value, info.domain_interval.max_value = intervals[info.name]
    plugin.content = content.SerializeToString()


def custom_scalars() -> dict[str, dict[str, list]]:
    """The layout of TensorBoard's custom scalars: AP together, losses together. Tags are regular expressions there."""

    def together(*tags: str) -> list:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        "AP": {
            "AP": ["Margin", ["val/AP", "val/AP_low", "val/AP_high"]],
            "AP by IoU": together("val/AP", "val/AP50", "val/AP75"),
            "AP by size": together("val/AP_small", "val/AP_medium", "val/AP_large"),
            "AP by category": together("val/AP/.*"),
            "AR": together("val/AR1", "val/AR10", "val/AR100"),
        },
        "losses": {name: together(f"train/{name}", f"train_epoch/{name}", f"val/{name}") for name in LOSSES},
    }


class Pictures:
    """A few of the validation pictures, spread over the set, with their true boxes; read once and kept small."""

    def __init__(self, dataset: CocoImages, number: int):
        images = dataset.coco["images"]
        number = min(number, len(images))
        self._images = [images[place * len(images) // number] for place in range(number)]
        self._dataset = dataset
        self._names = {category["id"]: category["name"] for category in dataset.categories}
        self._shown: dict[int, tuple[Image.Image, float]] = {}  # by image id: picture and how much smaller it is

    def draw(self, detections: Detections) -> dict[str, Image.Image]:
        """By file name the pictures with true boxes and those detected with a score of ``PICTURE_SCORE`` or more."""
        labels = [category["id"] for category in self._dataset.categories]
        drawn = {}
        for image in self._images:
            picture, scale = self._picture(image)
            true = [each for each in self._dataset.coco["annotations"] if each["image_id"] == image["id"] and not each["iscrowd"]]
            row = detections.image_ids.searchsorted(image["id"])
            found = [
                self._box(box_xywh, scale, labels[label], score)
                for box_xywh, label, score in zip(
                    detections.boxes_xywh[row].tolist(), detections.labels[row], detections.scores[row].tolist(), strict=True
                )
                if score >= PICTURE_SCORE
            ]
            true = [self._box(each["bbox"], scale, each["category_id"]) for each in true]
            colours = category_colours(self._names.values())
            drawn[image["file_name"]] = draw_boxes(picture, found, true, colours, letters=1 / 45, name_true=len(self._names) > 1)
        return drawn

    def _picture(self, image: dict) -> tuple[Image.Image, float]:
        if image["id"] not in self._shown:
            path = image_path(self._dataset.split.images, image["file_name"])
            picture = to_pil_image(self._dataset.images(path, (image["width"], image["height"])))
            longest = max(picture.size)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            self._shown[image["id"]] = picture, max(picture.size) / longest
        return self._shown[image["id"]]

    def _box(self, box_xywh: list[float], scale: float, category_id: int, score: float | None = None) -> Box:
        x, y, width, height = (scale * side for side in box_xywh)
        return Box((x, y, x + width, y + height), self._names[category_id], score)


def log_line(
    epoch: int, train: dict[str, float], val: dict[str, float], metrics: dict[str, Any], weights: dict[str, float], parameters: int
) -> dict[str, Any]:
    """A line of the official log.txt, which counts epochs from 0: losses weighted, and unweighted with the suffix ``_unscaled``.

    ``weights`` is the criterion's ``weight_dict``, ``parameters`` how many are trained.
    """
    line: dict[str, Any] = {"train_lr": train["lr_transformer"]}
    for split, losses in (("train", train), ("test", val)):
        line |= {f"{split}_class_error": losses["class_error"], f"{split}_loss": losses["loss"]}
        line |= {f"{split}_{name}": losses[name] * weight for name, weight in weights.items()}
        errors = ("loss_", "class_error", "cardinality_error")
        line |= {f"{split}_{name}_unscaled": value for name, value in losses.items() if name.startswith(errors)}
    return {**line, "test_coco_eval_bbox": stats(metrics), "epoch": epoch, "n_parameters": parameters}


def write_log(path: Path, line: dict[str, Any]) -> None:
    """Append ``line`` to log.txt, after taking out what stands there of its epoch and later ones (by a process that was stopped)."""
    earlier = [text for text in _lines(path) if json.loads(text)["epoch"] < line["epoch"]]
    with written_whole(path) as file:
        file.write("".join(f"{text}\n" for text in (*earlier, json.dumps(line, allow_nan=False))).encode())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
