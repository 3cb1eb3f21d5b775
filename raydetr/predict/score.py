"""COCO average precision of a checkpoint, or of a results file, on labeled images."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from raydetr import config as settings
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader
from raydetr.data.masks import no_mask, read_segmentation
from raydetr.data.sets import describe_sets, load_sets
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, check_results
from raydetr.evaluate.intervals import interval_metrics, mask_interval_metrics
from raydetr.files import atomic_write
from raydetr.loss.criterion import build_criterion
from raydetr.memory import kept_memory
from raydetr.model.detr import DETR
from raydetr.predict.box_formats import box_format_notes
from raydetr.predict.categories import find_categories
from raydetr.text import shortlist
from raydetr.training.engine import choose_device, choose_dtype, evaluate
from raydetr.training.reporter import usable_cores
from raydetr.training.run import loading_processes, val_batch_size
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.fitting import load
from raydetr.weights.official import located


class Detected(NamedTuple):
    """Detections in a data set.

    Attributes:
        coco: The data set, as :func:`raydetr.data.coco.load_coco` returns it.
        results: COCO results under the ids of its categories.
        names: Names of the categories that were detected; None for a results file, which has none.
        unknown: Those of ``names`` that the data set does not have.
        notes: Lines for the user.
        dataset: What reads the images. It has masks only if what was detected has some as well.
        category_ids: The id in the data set of each of ``names``; None where it has no such category.
    """

    coco: dict[str, list[dict]]
    results: list[dict]
    names: list[str] | None
    unknown: list[str]
    notes: list[str]
    dataset: CocoImages
    category_ids: Sequence[int | None] = ()


def score_checkpoint(checkpoint: str | Path, *layers: Mapping[str, Any], split: str = "val") -> dict[str, Any]:
    """Evaluate a checkpoint on a labeled data set.

    Settings that ``layers`` leave open (image sizes, batch size) are those that the checkpoint was trained with. Its categories are found
    in the data set as :func:`raydetr.predict.categories.find_categories` says.

    Args:
        checkpoint: Path or URL of the checkpoint.
        *layers: Settings, later ones winning; they name the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The numbers and intervals of :func:`raydetr.evaluate.intervals.interval_metrics`, ``unknown_categories`` (names of the categories
        that the data set does not have; what is detected of them cannot count), and ``notes`` (lines for the user); for a model with
        masks, and a data set that has some, also the numbers and intervals of
        :func:`raydetr.evaluate.intervals.mask_interval_metrics` under ``segm``.

    Raises:
        UserError: The checkpoint or the data set cannot be read, or nothing tells which classes are which categories.
    """
    detected = detect(checkpoint, *layers, split=split, masks=True)
    metrics = box_and_mask_metrics(detected)
    return {**metrics, "unknown_categories": detected.unknown, "notes": detected.notes}


def box_and_mask_metrics(detected: Detected) -> dict[str, Any]:
    """Return the numbers and intervals of the boxes, and those of the masks under ``segm`` where results and data set have masks."""
    metrics = interval_metrics(detected.coco, detected.results)
    if detected.dataset.has_masks:
        metrics["segm"] = mask_interval_metrics(detected.coco, detected.results)
    return metrics


def detections_of(source: str | Path, *layers: Mapping[str, Any], split: str = "val", masks: bool = False) -> Detected:
    """Return the detections of a checkpoint, or of a COCO results file (``.json``); the rest is as for :func:`detect`."""
    if Path(source).suffix.lower() == ".json":
        return read_predictions(source, settings.load_config(*layers).data, split)
    return detect(source, *layers, split=split, masks=masks)


def detect(checkpoint: str | Path, *layers: Mapping[str, Any], split: str = "val", masks: bool = False) -> Detected:
    """Run a checkpoint on a labeled data set; arguments and errors are those of :func:`score_checkpoint`.

    With ``masks`` the results have masks, if the model and the data set have some.
    """
    model = load(checkpoint)
    masks = masks and model.settings["masks"]
    config = settings.load_config(trained_with(checkpoint, model), *layers)
    dataset, divided = _images_of(config, split, masks)
    without = missing_masks(dataset) if masks else []
    device = choose_device(config.speed)
    with kept_memory(device.type):
        results, found, notes = detect_with(model.to(device), model, dataset, config, device, str(checkpoint))
    unknown = unknown_names(model, found, notes)
    ids = [None if position is None else dataset.categories[position]["id"] for position in found]
    notes = [*model.notes, *notes, *without, *divided]
    return Detected(dataset.coco, results, [each["name"] for each in model.categories], unknown, notes, dataset, ids)


def missing_masks(dataset: CocoImages) -> list[str]:
    """Return a line for the user if masks are wanted of a data set that has none."""
    return [] if dataset.has_masks else [f"{dataset.split.annotations} has no mask: only boxes are scored"]


def _images_of(config: settings.Config, split: str, masks: bool) -> tuple[CocoImages, list[str]]:
    """Return a split, and what to say of it: ``train`` and ``val`` are divided as they were for the training of the checkpoint."""
    divided = describe_sets(config.data)
    if split == "test" or not divided:
        return CocoImages(find_split(config.data, split), val_transforms(config.data), masks=masks), []
    train, val = load_sets(config.data, config.run.seed, masks=masks)
    train.transforms, train.copy_paste = val.transforms, 0.0
    return train if split == "train" else val, [f"{split} images as in the training of the checkpoint: {divided}"]


def found_categories(model: DETR, dataset: CocoImages, name: str) -> tuple[list[int | None], list[str]]:
    """Return the result of :func:`raydetr.predict.categories.find_categories`.

    Raises:
        UserError: Nothing tells which classes are which categories.
    """
    found, notes = find_categories(model, dataset.categories)
    if model.category_names != "file" and not any(position is not None for position in found):
        raise UserError(
            f"{name}: does not name the categories of its {len(found)} classes, and the data set has {len(dataset.categories)}: "
            "nothing tells which is which; evaluate it on the categories that it was trained with"
        )
    return found, notes


def unknown_names(model: DETR, found: Sequence[int | None], notes: Sequence[str]) -> list[str]:
    """Return the names of a model's categories that :func:`found_categories` did not find."""
    unknown = [category["name"] for category, position in zip(model.categories, found, strict=True) if position is None]
    # COCO's unused ids, and classes without a name, are nobody's category: there is nothing to say about them.
    return [name for name in unknown if name != "N/A" and not notes]


def detect_with(
    network: nn.Module, model: DETR, dataset: CocoImages, config: settings.Config, device: torch.device, name: str = "the model"
) -> tuple[list[dict], list[int | None], list[str]]:
    """Run a network on a labeled data set.

    Args:
        network: What computes the outputs: ``model`` itself, or an export of it.
        model: Its categories are those of the outputs.
        dataset: Images, transformed for evaluation; if it has masks, so has the model, and the results get them.
        config: Settings of the loader and of the precision.
        device: Where ``network`` is.
        name: What to call the model in an error message.

    Returns:
        COCO results under the ids of the data set, and the result of :func:`raydetr.predict.categories.find_categories`.

    Raises:
        UserError: Nothing tells which classes are which categories.
    """
    found, notes = found_categories(model, dataset, name)
    data = config.data
    processes = loading_processes(data, device, usable_cores())
    loading = {"num_workers": processes, "device": device, "timeout_s": data.batch_timeout_s}
    loader = build_loader(dataset, val_batch_size(config, device), rank=0, world_size=1, shuffle=False, **loading)
    criterion = build_criterion(len(model.categories), aux_loss=False, masks=dataset.has_masks)
    _, detections = evaluate(network, criterion, _without_truth(loader), device, choose_dtype(config.speed, device))
    categories = [{"id": None if position is None else dataset.categories[position]["id"]} for position in found]
    return [result for result in detections.results(categories) if result["category_id"] is not None], found, notes


def trained_with(checkpoint: str | Path, model: DETR) -> dict[str, Any]:
    """Return the model and image settings that a checkpoint was trained with, by dotted name.

    On a GPU they include the precision, so that a score is that of the training; CPUs compute in float32 unless told otherwise. For a
    checkpoint without settings (an official one, a bare state dict) they are those of the preset that its tensors fit.

    Args:
        checkpoint: Path or URL of the checkpoint.
        model: Its model, of :func:`raydetr.load`.
    """
    values = settings.flatten(read_checkpoint(located(checkpoint)).get("settings", {"model.preset": model.settings["preset"]}))
    kept = ("model.", "data.", "optim.batch_size", *(["speed.precision"] if torch.cuda.is_available() else []))
    return {
        name: value
        for name, value in values.items()
        if name in settings.SETTINGS and name.startswith(kept) and name not in settings.PATH_SETTINGS
    }


def _without_truth(loader: Iterable[tuple]) -> Iterator[tuple]:
    # The data set's labels need not be the checkpoint's, and only the detections are wanted, not the losses.
    for images, mask, targets in loader:
        names = ("boxes", "labels", "masks", "has_mask")
        yield images, mask, [{name: each[:0] if name in names else each for name, each in target.items()} for target in targets]


def score_predictions(predictions: str | Path, data: settings.Data, split: str = "val") -> dict[str, Any]:
    """Evaluate a COCO results file.

    Args:
        predictions: JSON file with a list of detections (``image_id``, ``category_id``, ``bbox`` xywh in pixels, ``score``).
        data: Settings that name the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The numbers and intervals of :func:`raydetr.evaluate.intervals.interval_metrics`, and ``notes`` (lines for the user); those of
        masks under ``segm``, if the detections have ``segmentation`` and the data set has masks.

    Raises:
        UserError: The file cannot be read, or has an entry that is no detection in an image of the data set.
    """
    detected = read_predictions(predictions, data, split)
    return {**box_and_mask_metrics(detected), "notes": detected.notes}


def read_predictions(predictions: str | Path, data: settings.Data, split: str = "val") -> Detected:
    """Read a COCO results file; arguments and errors are those of :func:`score_predictions`."""
    try:
        results = json.loads(Path(predictions).read_text(encoding="utf-8-sig"))  # Windows programs put a byte order mark first
    except OSError as error:
        raise UserError(f"{predictions}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{predictions}: not a JSON list of detections ({error})") from None
    with_masks = isinstance(results, list) and any(isinstance(each, dict) and each.get("segmentation") for each in results)
    dataset = CocoImages(find_split(data, split), val_transforms(data), masks=with_masks)
    try:
        check_results(dataset.coco, results)
        if dataset.has_masks:  # otherwise only boxes are scored, whatever else the results hold
            results = _with_rles(dataset.coco, results)
    except UserError as error:
        raise UserError(f"{predictions}: {str(error).removeprefix('results: ')}") from None
    known = {category["id"] for category in dataset.coco["categories"]}
    foreign = Counter(result["category_id"] for result in results if result["category_id"] not in known)
    ids = shortlist(foreign, 5)
    note = f"{foreign.total()} of {len(results)} detections have a category id that the data set lacks ({ids}) and do not count"
    return Detected(dataset.coco, results, None, [], [*([note] if foreign else []), *box_format_notes(dataset.coco, results)], dataset)


def _with_rles(coco: dict[str, list[dict]], results: list[dict]) -> list[dict]:
    """Return ``results`` with every ``segmentation`` as an RLE; raise UserError if one cannot be read."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    read = []
    for number, result in enumerate(results):
        try:
            rle = read_segmentation(result.get("segmentation"), sizes[result["image_id"]])
        except UserError as error:
            raise UserError(f"entry {number} (image {result['image_id']}): {error}") from None
        there = "segmentation" in result and result["segmentation"] is not None
        read.append(result | ({"segmentation": rle or no_mask(sizes[result["image_id"]])} if there else {}))
    return read


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the notes, the twelve COCO numbers, and those of each category as aligned text, with 95 % intervals over images.

    Where there are numbers of masks, they follow those of the boxes.
    """
    notes = _notes(metrics)
    lines = [*notes, *([""] if notes else [])]
    if "segm" not in metrics:
        return "\n".join([*lines, *_numbers_table(metrics)])
    return "\n".join([*lines, "boxes", *_numbers_table(metrics), "", "masks", *_numbers_table(metrics["segm"])])


def _numbers_table(metrics: Mapping[str, Any]) -> list[str]:
    lines = [f"{name:<10} {_number(metrics[name])}{_interval(metrics, name)}" for name in METRICS]
    columns = ("AP", "AP50", "AP75", "AR100")
    names = list(metrics["per_category"])
    width = max([len("category"), *map(len, names)])
    lines += ["", f"{'category':<{width}}  " + "  ".join(f"{column:>5}" for column in columns)]
    lines[-1] += "  AP, 95 % interval over images" if "AP_interval" in metrics else ""
    for name in names:
        numbers = "  ".join(f"{_number(metrics['per_category'][name][column]):>5}" for column in columns)
        lines.append(f"{name:<{width}}  {numbers}{_interval(metrics['per_category'][name], 'AP')}")
    return lines


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    notes = [f"{note[0].upper()}{note[1:]}." for note in metrics.get("notes", ())]
    unknown = metrics.get("unknown_categories")
    if unknown:
        notes.append(f"The data set has no category named {shortlist(unknown, 5)}: what the checkpoint detects of them does not count.")
    return notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    interval = metrics.get(f"{name}_interval")
    return "" if interval is None else f"  ({interval[0]:.3f} to {interval[1]:.3f})"


def write_metrics(metrics: Mapping[str, Any], file: str | Path) -> None:
    """Write ``metrics`` as JSON, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with atomic_write(Path(file)) as out:
            out.write((json.dumps(metrics, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
