"""COCO numbers of a checkpoint, or of a results file, on labelled photographs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raydetr import config as settings
from raydetr.data.coco import CocoImages, build_loader, find_split
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, check_results
from raydetr.evaluate.intervals import interval_metrics
from raydetr.loss.criterion import build_criterion
from raydetr.memory import kept_memory
from raydetr.training.engine import Detections, choose_device, evaluate
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.fitting import load
from raydetr.weights.official import located


def score_checkpoint(checkpoint: str | Path, *layers: Mapping[str, Any], split: str = "val") -> dict[str, Any]:
    """Evaluate ``checkpoint`` on the data set that ``layers`` of settings name.

    Returns:
        The numbers and intervals of :func:`raydetr.evaluate.intervals.interval_metrics`, and ``unknown_categories``: the names of the
        checkpoint's categories that the data set does not have, whose detections cannot count.
    """
    coco, results, categories = detect(checkpoint, *layers, split=split)
    unknown = [each["name"] for each in categories if each["id"] is None]
    return {**interval_metrics(coco, results), "unknown_categories": unknown}


def detect(checkpoint: str | Path, *layers: Mapping[str, Any], split: str = "val") -> tuple[dict, list[dict], list[dict]]:
    """Run ``checkpoint`` on the data set that ``layers`` of settings name.

    What ``layers`` leave open (image sizes, batch size) is as the checkpoint was trained.

    Returns:
        The COCO data set, the detections as COCO results, and the checkpoint's categories under the data set's ids, where they are
        found by their names: id None where the data set has no such name.
    """
    model = load(checkpoint)
    config = settings.load_config(trained_with(checkpoint), *layers)
    device = choose_device(config.speed)
    dataset = CocoImages(find_split(config.data, split), val_transforms(config.data))
    loader = build_loader(
        dataset, config.optim.batch_size, rank=0, world_size=1, shuffle=False, num_workers=config.data.num_workers, device=device
    )
    criterion = build_criterion(len(model.categories), aux_loss=False)
    with kept_memory(device.type):
        _, detections = evaluate(model.to(device), criterion, _without_truth(loader), device)
    categories = in_data_set(model.categories, dataset.categories)
    return dataset.coco, _known(detections, categories), categories


def trained_with(checkpoint: str | Path) -> dict[str, Any]:
    """The model and image settings that a checkpoint was trained with; an official checkpoint has none: the defaults hold."""
    values = settings.flatten(read_checkpoint(located(checkpoint)).get("settings", {}))
    places = {"data.path", "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations"}
    kept = ("model.", "data.", "optim.batch_size")
    return {name: value for name, value in values.items() if name in settings.SETTINGS and name.startswith(kept) and name not in places}


def in_data_set(mine: list[dict], its: list[dict]) -> list[dict]:
    """The checkpoint's categories, in label order, under the data set's ids; id None where the data set has no such name."""
    ids = {category["name"].strip().lower(): category["id"] for category in its}
    return [{"id": ids.get(category["name"].strip().lower()), "name": category["name"]} for category in mine]


def _without_truth(loader) -> Iterator[tuple]:
    # The data set's labels need not be the checkpoint's: only the detections are wanted, no losses.
    for images, mask, targets in loader:
        yield images, mask, [{**target, "boxes": target["boxes"][:0], "labels": target["labels"][:0]} for target in targets]


def _known(detections: Detections, categories: list[dict]) -> list[dict]:
    return [result for result in detections.results(categories) if result["category_id"] is not None]


def score_predictions(predictions: str | Path, data: settings.Data, split: str = "val") -> dict[str, Any]:
    """Evaluate a COCO results file; raises UserError where it cannot be read or names an image that the data set does not have."""
    return interval_metrics(*read_predictions(predictions, data, split))


def read_predictions(predictions: str | Path, data: settings.Data, split: str = "val") -> tuple[dict, list[dict]]:
    """Return the COCO data set and the detections of a results file; raises UserError as :func:`score_predictions`."""
    try:
        results = json.loads(Path(predictions).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{predictions}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{predictions}: broken JSON ({error})") from None
    dataset = CocoImages(find_split(data, split), val_transforms(data))
    try:
        check_results(dataset.coco, results)
    except UserError as error:
        raise UserError(f"{predictions}: {error}") from None
    return dataset.coco, results


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the twelve numbers, then each category's, as aligned text, with their 95 % intervals over images."""
    lines = [f"{name:<10} {_number(metrics[name])}{_interval(metrics, name)}" for name in METRICS]
    columns = ("AP", "AP50", "AP75", "AR100")
    names = list(metrics["per_category"])
    width = max([len("category"), *map(len, names)])
    lines += ["", f"{'category':<{width}}  " + "  ".join(f"{column:>5}" for column in columns)]
    lines[-1] += "  AP, 95 % interval over images"
    for name in names:
        numbers = "  ".join(f"{_number(metrics['per_category'][name][column]):>5}" for column in columns)
        lines.append(f"{name:<{width}}  {numbers}{_interval(metrics['per_category'][name], 'AP')}")
    unknown = metrics.get("unknown_categories")
    if unknown:
        lines += ["", f"The data set has no category named {', '.join(unknown)}: what the checkpoint finds of them does not count."]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    interval = metrics.get(f"{name}_interval")
    return "" if interval is None else f"  ({interval[0]:.3f} to {interval[1]:.3f})"


def write_metrics(metrics: Mapping[str, Any], file: str | Path) -> None:
    """``metrics`` as JSON; raises UserError where the file cannot be written."""
    try:
        Path(file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
