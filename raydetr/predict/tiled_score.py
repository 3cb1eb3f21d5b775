"""COCO average precision of a checkpoint that predicts tiles of the images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydetr import config as settings
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.intervals import interval_metrics, mask_interval_metrics
from raydetr.predict.inputs import InputImage
from raydetr.predict.predict import detect, results_of
from raydetr.predict.score import found_categories, missing_masks, trained_with, unknown_names
from raydetr.predict.tiles import Tiles
from raydetr.training.engine import choose_device
from raydetr.training.run import val_batch_size
from raydetr.weights.fitting import load


def score_with_tiles(checkpoint: str | Path, tiles: Tiles, *layers: Mapping[str, Any], split: str = "val") -> dict[str, Any]:
    """Evaluate a checkpoint on tiles of labeled images and on the whole images, with the detections of each image merged.

    Args:
        checkpoint: Path or URL of the checkpoint.
        tiles: How images are divided.
        *layers: Settings, later ones winning; they name the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        What :func:`raydetr.predict.score.score_checkpoint` returns.

    Raises:
        UserError: The checkpoint, the data set or an image cannot be read, or nothing tells which classes are which categories.
    """
    model = load(checkpoint)
    config = settings.load_config(trained_with(checkpoint, model), *layers)
    masks = model.settings["masks"]
    dataset = CocoImages(find_split(config.data, split), val_transforms(config.data), masks=masks)
    without = missing_masks(dataset) if masks else []
    found, notes = found_categories(model, dataset, str(checkpoint))
    names = [image["file_name"] for image in dataset.coco["images"]]
    images = zip(dataset.files, names, dataset.image_ids, strict=True)
    inputs = [InputImage(path, name, image_id, size) for (path, size), name, image_id in images]
    batch_size, title = val_batch_size(config, choose_device(config.speed)), Path(checkpoint).name
    by_image, unread = detect(
        model, checkpoint, inputs, dataset.split.read, batch_size, config.speed.device, title, tiles=tiles, layers=layers
    )
    if unread:
        raise UserError(next(iter(unread.values())))
    categories = [{"id": None if position is None else dataset.categories[position]["id"]} for position in found]
    results = [each for image_id, prediction in by_image.items() for each in results_of(image_id, prediction, categories)]
    results = [result for result in results if result["category_id"] is not None]
    metrics = interval_metrics(dataset.coco, results)
    if masks and dataset.has_masks:
        metrics["segm"] = mask_interval_metrics(dataset.coco, results)
    return {**metrics, "unknown_categories": unknown_names(model, found, notes), "notes": [*model.notes, *notes, *without]}
