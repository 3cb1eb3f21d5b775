"""Predictions of a checkpoint on any images: a results file, annotated images, and a page that shows them.

The output folder contains:

- ``index.html``: the page, which needs only the folders ``pictures/`` (annotated images in full size) and ``thumbnails/``;
- ``predictions.json``: COCO results, a list of ``image_id``, ``category_id``, ``bbox`` (xywh in pixels, inside the image), and ``score``.
  It has the prediction of every object query, also those that are too uncertain to be drawn, because average precision needs all. With
  masks each has a ``segmentation``, a run-length encoding that pycocotools reads;
- ``images.json``: a COCO data set without annotations that tells the file of each image id and the name of each category id, so that
  ``COCO("images.json").loadRes("predictions.json")`` works;
- ``attention/``: what the network looked at, if it is asked for: a folder for each image (see :mod:`raydetr.predict.attention`);
- ``compare/``: the same files for the other checkpoint of a comparison.
"""

import dataclasses
import itertools
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from raydetr.config import load_config
from raydetr.data.categories import match_categories
from raydetr.data.images import read_image
from raydetr.data.loader import collate
from raydetr.data.masks import RLE, decode_masks, encode_masks
from raydetr.data.transforms import val_transforms
from raydetr.draw import Box, Colour, category_colours, draw_boxes, with_masks
from raydetr.errors import UserError
from raydetr.files import atomic_write
from raydetr.memory import kept_memory
from raydetr.model.attention import recorded_attention
from raydetr.model.detr import DETR, postprocess
from raydetr.pages import GENERATOR
from raydetr.predict.attention import AttentionWanted, ImageAttention, Place, check_points, image_attention, write_attention
from raydetr.predict.categories import find_categories
from raydetr.predict.gallery import Card, Column, gallery_page
from raydetr.predict.inputs import InputImage, find_images
from raydetr.predict.score import trained_with
from raydetr.predict.tiles import Tiles, View, is_whole, merge_boxes
from raydetr.training.console import PLAIN_INTERVAL_S
from raydetr.training.engine import choose_device, choose_dtype
from raydetr.training.masks import detected_masks
from raydetr.training.reporter import usable_cores
from raydetr.training.run import loading_processes
from raydetr.weights.fitting import load

THRESHOLD = 0.7  # lowest score of a box to draw, where nothing else is said
LETTERS = 1 / 70  # height of the letters as a fraction of the image's longest side
THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, THUMBNAIL_LETTERS = 640, 1920, 22  # pixels; the page shows thumbnails of one height side by side
OUTPUTS = ("index.html", "predictions.json", "images.json", "pictures", "thumbnails", "attention", "compare")
_MARK = f'<meta name="generator" content="{GENERATOR}">'  # in a page of raydetr
LONGEST_JPEG = 65_500  # pixels
DRAWERS = 4  # threads; each holds a few copies of an image
Reader = Callable[[Path, tuple[int, int] | None], torch.Tensor]


@dataclass
class ImagePrediction:
    """What one network predicts for one image: each of its Q object queries, the highest score first.

    Attributes:
        size: Width and height of the image in pixels.
        xyxy: Boxes [Q][4] in pixels, inside the image.
        labels: Labels [Q], positions in the categories.
        scores: Scores [Q].
        queries: Object queries [Q].
        attention: What the network looked at, if that was asked for.
        rles: The mask of each as an RLE of the image's size; None if the checkpoint has no masks.
    """

    size: tuple[int, int]
    xyxy: list[list[float]]
    labels: list[int]
    scores: list[float]
    queries: list[int]
    attention: ImageAttention | None = None
    rles: list[RLE] | None = None

    def masks(self, thresholds: Sequence[float]) -> np.ndarray | None:
        """Return the masks of the detections that :meth:`boxes` returns, bool [n, height, width]; None if the network has no masks.

        Args:
            thresholds: Lowest score of a detection that is kept, by label.
        """
        if self.rles is None:
            return None
        width, height = self.size
        each = zip(self.rles, self.labels, self.scores, strict=True)
        kept = [rle for rle, label, score in each if score >= thresholds[label]]
        return decode_masks(kept, (height, width))

    def labels_drawn(self, thresholds: Sequence[float]) -> list[int]:
        """Return the labels of the detections that :meth:`boxes` returns.

        Args:
            thresholds: Lowest score of a box that is kept, by label.
        """
        return [label for label, score in zip(self.labels, self.scores, strict=True) if score >= thresholds[label]]

    def boxes(self, categories: list[dict], thresholds: Sequence[float]) -> list[Box]:
        """Return the boxes to draw.

        Args:
            categories: Categories in label order, which name the boxes.
            thresholds: Lowest score of a box that is kept, by label.
        """
        each = zip(self.xyxy, self.labels, self.scores, strict=True)
        return [
            Box((x0, y0, x1, y1), categories[label]["name"], score) for (x0, y0, x1, y1), label, score in each if score >= thresholds[label]
        ]


@dataclass
class Predictions:
    """What one checkpoint predicts: its categories in label order with the lowest scores to draw and, by image id, the predictions."""

    categories: list[dict]
    thresholds: list[float]
    by_image: dict[int, ImagePrediction]


@dataclass
class Summary:
    """The result of :func:`predict`.

    Attributes:
        out: The output folder.
        images: Number of images that were read.
        boxes: Number of boxes drawn, by category name.
        threshold: Lowest score of a box that is drawn; None where each category has its own.
        left_out: A line about each image that cannot be read.
        warnings: Other lines for the user.
    """

    out: Path
    images: int
    boxes: Counter
    threshold: float | None
    left_out: list[str]
    warnings: list[str]

    def text(self) -> str:
        """Return a few lines for the terminal."""
        counts = ", ".join(f"{number} {name}" for name, number in self.boxes.most_common(10)) or "none"
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.left_out:
            more = f" (and {len(self.left_out) - 1} more, listed in index.html)" if len(self.left_out) > 1 else ""
            lines.append(f"warning: {_counted(len(self.left_out), 'image')} left out: {self.left_out[0]}{more}")
        which = "above the checkpoint's thresholds" if self.threshold is None else f"with a score of {self.threshold:g} or more"
        lines.append(f"{_counted(self.images, 'image')}, boxes {which}: {counts}")
        lines.append(f"look at {self.out / 'index.html'}; every detection is in {self.out / 'predictions.json'}")
        return "\n".join(lines)


def predict(
    checkpoint: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    threshold: float | None = None,
    compare: str | Path | None = None,
    annotations: str | Path | None = None,
    batch_size: int = 4,
    device: str = "auto",
    attention: bool = False,
    attention_at: Sequence[Place] = (),
    tiles: Tiles | None = None,
) -> Summary:
    """Predict on images and write results, annotated images, and a page into a folder (see the module's docstring).

    Images that cannot be read are left out and counted.

    Args:
        checkpoint: Path or URL of the checkpoint.
        sources: Images and folders of images (searched with their subfolders), or one data set folder (with ``annotations/`` and
            ``val2017/``), which stands for its validation images with their true boxes.
        out: The output folder. Files of an earlier prediction in it are replaced.
        threshold: Lowest score of a box that is drawn, from 0 to 1. None: the thresholds that ``raydetr evaluate --thresholds`` stored
            in the checkpoint, and 0.7 where there is none.
        compare: A checkpoint whose predictions are shown to the left, as "before".
        annotations: COCO file of some or all of the images. Its boxes are drawn, and image and category ids are its own (categories that
            it lacks get free ids). Without it, image ids count from 1 and category ids are those of the checkpoint's training set.
        batch_size: Images that are predicted at a time.
        device: ``"auto"``, ``"cpu"``, or ``"cuda"``.
        attention: Also write what the last decoder layer looked at for each box that is drawn.
        attention_at: Also write the self-attention of these places (x, y) in the last encoder layer; pixels of every image.
        tiles: Predict on these tiles of each image as well, for small objects.

    Returns:
        A summary of what was predicted.

    Raises:
        UserError: A source, a checkpoint, or the annotation file is missing or broken, no image can be read, a place is outside an image,
            or the output folder cannot be written or contains files of something else.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold: {threshold} is out of bounds; it takes 0 to 1")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is out of bounds; it takes 1 or more")
    if tiles and (attention or attention_at):
        raise UserError("--attention: is that of one forward pass, which an image in --tiles does not have; give one of the two")
    out = Path(out).expanduser()
    checkpoints = [checkpoint] if compare is None else [compare, checkpoint]
    models = [load(path) for path in checkpoints]
    inputs, truth, warnings = find_images(sources, annotations, out, masks=any(model.settings["masks"] for model in models))
    _check_free(out)
    titles = _titles(checkpoints)
    data = load_config(trained_with(checkpoint, models[-1])).data
    read = partial(read_image, exif=data.exif, max_megapixels=data.max_megapixels)
    points = tuple(attention_at)
    columns, left_out = [], {}
    for path, title, model in zip(checkpoints, titles, models, strict=True):
        categories, notes = _categories_for(model, truth)
        thresholds = lowest_scores(model, threshold)
        wanted = AttentionWanted(thresholds if attention else None, points) if attention or points else None
        by_image, unread = detect(model, path, inputs, read, batch_size, device, title, wanted, tiles)
        warnings += [*model.notes, *(f"{path}: {note}" for note in notes)]
        left_out |= unread
        inputs = [each for each in inputs if each.image_id not in unread]
        if not inputs:
            raise UserError(f"none of the images can be read; the first: {next(iter(left_out.values()))}")
        columns.append(Predictions(categories, thresholds, by_image))
    shown = columns[-1].thresholds[0] if len({each for column in columns for each in column.thresholds}) == 1 else None
    lines = list(left_out.values())
    try:
        _claim(out)
        for folder, column in zip(_folders(out, len(columns)), columns, strict=True):
            _write_results(folder, inputs, column)
        cards = _draw_all(out, inputs, columns, style := _style(columns, truth), read, points)
        headings = dict(zip(["found"] if compare is None else ["before", "after"], titles, strict=True))
        _write(out / "index.html", gallery_page(headings, cards, shown, style.colours, lines))
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None
    drawn = Counter(box.name for card in cards for box in card.columns[-1].boxes)
    return Summary(out, len(cards), drawn, shown, lines, warnings)


def lowest_scores(model: DETR, threshold: float | None) -> list[float]:
    """Return the lowest score to draw of each category: ``threshold``, else the checkpoint's own."""
    if threshold is not None or not model.thresholds:
        return [THRESHOLD if threshold is None else threshold] * len(model.categories)
    return [THRESHOLD if each is None else each for each in model.thresholds]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _titles(checkpoints: Sequence[str | Path]) -> list[str]:
    """Return the ends of the checkpoints' paths, long enough to tell them apart: ``balloons/best.pth``."""
    parts = [Path(each).parts for each in checkpoints]
    length = next((n for n in range(2, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(parts)), 2)
    return ["/".join(each[-length:]) for each in parts]


# --------------------------------------------------------------------------------------------------------- prediction


class InputImages(Dataset):
    """Images as the network takes them: for each view of an image ``image, target``, or once ``None, target`` with the error's line if it
    cannot be read.

    Args:
        inputs: The images.
        read: Decodes a file with an annotated size, as :func:`raydetr.data.images.read_image` does.
        transforms: What turns a decoded image into the network's input.
        tiles: Views besides the whole image; None for none.
    """

    def __init__(self, inputs: Sequence[InputImage], read: Reader, transforms: Callable, tiles: Tiles | None = None):
        self.inputs, self.read, self.transforms, self.tiles = inputs, read, transforms, tiles or Tiles(1, 1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor | None, dict[str, Any]]]:
        each = self.inputs[index]
        try:
            pixels = self.read(each.path, each.size)
        except UserError as error:
            return [(None, {"index": index, "error": str(error)})]
        return [(image, {"index": index, **target}) for image, target in image_views(pixels, self.transforms, self.tiles)]


def image_views(pixels: torch.Tensor, transforms: Callable, tiles: Tiles) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return each view of a decoded image as the network takes it, with its original size (height, width) and its place in the image.

    Args:
        pixels: The image, uint8 [3, height, width].
        transforms: What turns a view into the network's input.
        tiles: The views.
    """
    height, width = pixels.shape[-2:]
    views = []
    for left, top, right, bottom in tiles.views((width, height)):
        image = transforms(tv_tensors.Image(pixels[:, top:bottom, left:right])).as_subclass(torch.Tensor)
        size = torch.tensor([bottom - top, right - left])
        views.append((image, {"orig_size": size, "view": (left, top, right, bottom)}))
    return views


def collate_views(batch: Sequence[Sequence[tuple]], batch_size: int) -> tuple[list[tuple], list[dict]]:
    """Return the views of images that could be read, in batches of one size, and the targets of the others.

    Without padding the predictions do not depend on the batch size and are those that an evaluation scores.
    """
    by_size: dict[torch.Size, list[tuple]] = {}
    every = list(itertools.chain.from_iterable(batch))
    for image, target in every:
        if image is not None:
            by_size.setdefault(image.shape, []).append((image, target))
    batches = [same[start : start + batch_size] for same in by_size.values() for start in range(0, len(same), batch_size)]
    return [collate(same) for same in batches], [target for image, target in every if image is None]


def detect(
    model: DETR,
    checkpoint: str | Path,
    inputs: Sequence[InputImage],
    read: Reader,
    batch_size: int,
    device: str,
    title: str,
    wanted: AttentionWanted | None = None,
    tiles: Tiles | None = None,
    layers: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[int, ImagePrediction], dict[int, str]]:
    """Predict on images.

    Args:
        model: The model of ``checkpoint``.
        checkpoint: Path or URL of the checkpoint, whose image sizes and, on a GPU, precision are used.
        inputs: The images.
        read: Decodes them.
        batch_size: Images that are predicted at a time.
        device: ``"auto"``, ``"cpu"``, or ``"cuda"``.
        title: Name of the checkpoint for the progress display.
        wanted: Which attention to record; None for none. Not with tiles.
        tiles: Tiles of the images to predict on as well; None for none.
        layers: Settings that override those of the checkpoint's training, later ones winning.

    Returns:
        The predictions by image id, and by image id the reason why an image cannot be read.

    Raises:
        UserError: The outputs are not finite, or a place whose attention is wanted is outside an image.
    """
    config = load_config(trained_with(checkpoint, model), *layers, {"speed.device": device})
    target_device = choose_device(config.speed)
    dtype = choose_dtype(config.speed, target_device)
    on_gpu = target_device.type == "cuda"
    model.to(target_device).eval()
    # On a CPU the network uses every core, and loading processes would take them away.
    workers = loading_processes(config.data, target_device, usable_cores()) if on_gpu else 0
    dataset = InputImages(inputs, read, val_transforms(config.data), tiles)
    collated = partial(collate_views, batch_size=batch_size)
    loader = DataLoader(dataset, batch_size, collate_fn=collated, num_workers=workers, pin_memory=on_gpu)
    by_image, unread = {}, {}
    autocast = torch.autocast(target_device.type, dtype, enabled=dtype != torch.float32)
    shown = _progress(f"predicting with {title}", len(inputs))
    recording = recorded_attention(model) if wanted else nullcontext()
    with torch.inference_mode(), autocast, kept_memory(target_device.type), recording as record, shown as advance:
        for batches, broken in loader:
            unread |= {inputs[target["index"]].image_id: target["error"] for target in broken}
            views: dict[int, list[tuple[ImagePrediction, View]]] = defaultdict(list)
            for images, mask, targets in batches:
                predictions = predict_views(model, checkpoint, images, mask, targets, target_device)
                for row, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
                    each = inputs[target["index"]]
                    if wanted and record:
                        check_points(wanted.points, prediction.size, each.name)
                        ranked = prediction.queries, prediction.labels, prediction.scores
                        prediction.attention = image_attention(record, wanted, row, *ranked, prediction.size)
                    views[each.image_id].append((prediction, target["view"]))
            by_image |= {image_id: merge_views(parts) for image_id, parts in views.items()}
            advance(len(views) + len(broken))
    return by_image, unread


def predict_views(
    model: DETR,
    checkpoint: str | Path,
    images: torch.Tensor,
    mask: torch.Tensor | None,
    targets: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> list[ImagePrediction]:
    """Predict on a batch of views.

    Args:
        model: The model, on ``device``.
        checkpoint: Path or URL of the checkpoint, for messages.
        images: The views, float32 [B, 3, H, W].
        mask: Padding mask, bool [B, H, W]; None if nothing is padded.
        targets: For each view ``orig_size``, the height and width of its boxes.
        device: The device to compute on.

    Raises:
        UserError: The outputs are not finite.
    """
    sizes = torch.stack([target["orig_size"] for target in targets])
    images = images.to(device, non_blocking=True)
    mask = None if mask is None else mask.to(device, non_blocking=True)
    outputs, rles = _outputs_and_masks(model, images, mask, sizes)
    detections = postprocess(outputs, sizes.to(device, non_blocking=True))
    on_host = {name: torch.stack([each[name] for each in detections]).cpu() for name in ("scores", "labels", "boxes")}
    return [
        _prediction({name: values[row] for name, values in on_host.items()}, size, checkpoint, rles[row] if rles else None)
        for row, size in enumerate(sizes)
    ]


def _outputs_and_masks(
    model: DETR, images: torch.Tensor, mask: torch.Tensor | None, sizes: torch.Tensor
) -> tuple[dict[str, Any], list[list[RLE]] | None]:
    """Return the outputs of a batch of images of one size, and the masks of all queries at ``sizes``; None if the network has none."""
    if not model.settings["masks"]:
        return model(images, mask), None
    outputs, features = model.forward_features(images, mask)
    padded_size, every = (images.shape[-2], images.shape[-1]), list(range(outputs["pred_logits"].shape[1]))
    inside = torch.tensor([padded_size] * len(images))
    return outputs, detected_masks(model.predict_masks, features, [every] * len(images), padded_size, inside, sizes)


def _prediction(
    detections: dict[str, torch.Tensor], orig_size: torch.Tensor, checkpoint: str | Path, rles: list[RLE] | None = None
) -> ImagePrediction:
    scores, order = detections["scores"].double().sort(descending=True, stable=True)
    boxes_xyxy = detections["boxes"].double()[order]
    if not (scores.isfinite().all() and boxes_xyxy.isfinite().all()):
        raise UserError(f"{checkpoint}: its outputs are not finite numbers; the weights in it are broken")
    height, width = orig_size.tolist()
    boxes_xyxy = boxes_xyxy.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    ordered = None if rles is None else [rles[query] for query in order.tolist()]
    labels = detections["labels"][order].tolist()
    return ImagePrediction((width, height), boxes_xyxy.tolist(), labels, scores.tolist(), order.tolist(), rles=ordered)


def merge_views(views: Sequence[tuple[ImagePrediction, View]]) -> ImagePrediction:
    """Return the predictions in an image from those in its views, one of which is the whole image."""
    if len(views) == 1:
        return views[0][0]
    size, every = max(view[2:] for _, view in views), []
    for number, (prediction, view) in enumerate(views):
        boxes_xyxy = torch.tensor(prediction.xyxy, dtype=torch.float64)
        moved = (boxes_xyxy + torch.tensor(view[:2] * 2)).tolist()
        rows = zip(is_whole(boxes_xyxy, view, size).tolist(), moved, prediction.labels, prediction.scores, prediction.queries, strict=True)
        every += [(xyxy, label, score, query, number, row) for row, (whole, xyxy, label, score, query) in enumerate(rows) if whole]
    found = [torch.tensor([row[column] for row in every]) for column in range(3)]
    kept = [every[index] for index in merge_boxes(*found).tolist()]
    xyxy, labels, scores, queries = ([row[column] for row in kept] for column in range(4))
    merged = ImagePrediction(size, xyxy, labels, scores, queries)
    if views[0][0].rles is not None:
        merged.rles = [_placed(cast(list, views[number][0].rles)[row], views[number][1], size) for *_, number, row in kept]
    return merged


def _placed(rle: RLE, view: View, size: tuple[int, int]) -> RLE:
    """Return the mask of a view as one of the whole image, both as RLEs."""
    left, top, right, bottom = view
    mask = np.zeros((1, size[1], size[0]), bool)
    mask[0, top:bottom, left:right] = decode_masks([rle], (bottom - top, right - left))[0]
    return encode_masks(mask)[0]


def _categories_for(model: DETR, truth: list[dict] | None) -> tuple[list[dict], list[str]]:
    """Return the model's categories under the ids of the annotations, and notes; categories that the annotations lack keep their id or
    get a free one.
    """
    if truth is None:
        return model.categories, []
    # A head of COCO's size keeps COCO's names, whatever is annotated: what it finds is shown, not scored.
    assumed = model.category_names == "unknown"
    found, notes = find_categories(model, truth) if assumed else (match_categories(model.categories, truth), [])
    known = {each["id"] for each in truth}
    taken = known | {each["id"] for each in model.categories}
    categories = []
    for mine, position in zip(model.categories, found, strict=True):
        category = {"id": mine["id"], "name": mine["name"]}
        if position is not None:
            category = {"id": truth[position]["id"], "name": truth[position]["name"] if notes else mine["name"]}
        elif mine["id"] in known:
            category["id"] = max(taken) + 1
            taken.add(category["id"])
        categories.append(category)
    return categories, notes


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar in a terminal, otherwise a line now and then.

    Yields a function that takes how many more are done.
    """
    console = Console(highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda more: progress.advance(task, more)
        return
    console.print(f"{what}: {_counted(total, 'image')}", markup=False, soft_wrap=True)
    done, last = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > PLAIN_INTERVAL_S:
            last = time.monotonic()
            console.print(f"{what}: {done}/{total}", markup=False, soft_wrap=True)

    yield advance


# ------------------------------------------------------------------------------------------------------------- output


def _check_free(out: Path) -> None:
    """Raise UserError if ``out`` cannot become the output folder, or if files of something else would be overwritten."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())  # a new folder is made in the nearest one
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{out}: cannot be an output folder, because {nearest} is {'read-only' if nearest.is_dir() else 'a file'}")
    page = out / "index.html"
    ours = page.is_file() and _MARK in page.read_text(encoding="utf-8", errors="replace")
    others = [name for name in OUTPUTS if (out / name).exists()]
    if others and not ours:
        raise UserError(f"{out / others[0]} exists already and is not of a prediction; choose another folder with --out")


def _claim(out: Path) -> None:
    """Mark the folder as one of raydetr, so that it may be overwritten even if the prediction is interrupted."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "index.html").exists():
        _write(out / "index.html", gallery_page({}, [], 0, {}))


def _folders(out: Path, number: int) -> list[Path]:
    """Return the folder of each column; the last column is the checkpoint's own."""
    return [out / "compare", out][-number:]


def _write_results(folder: Path, inputs: Sequence[InputImage], column: Predictions) -> None:
    folder.mkdir(exist_ok=True)
    images, results = [], []
    for each in inputs:
        prediction = column.by_image[each.image_id]
        width, height = prediction.size
        images.append({"id": each.image_id, "file_name": each.name, "width": width, "height": height})
        results += results_of(each.image_id, prediction, column.categories)
    info = {"description": "the images and categories of predictions.json"}
    data_set = {"info": info, "images": images, "annotations": [], "categories": column.categories}
    _write(folder / "images.json", json.dumps(data_set))
    _write(folder / "predictions.json", json.dumps(results))


def results_of(image_id: int, prediction: ImagePrediction, categories: list[dict]) -> Iterator[dict]:
    """Yield the predictions in an image as COCO results, with masks where there are any; ``categories`` have an ``id``, in label order."""
    rles = prediction.rles or [None] * len(prediction.scores)
    for xyxy, label, score, rle in zip(prediction.xyxy, prediction.labels, prediction.scores, rles, strict=True):
        x0, y0, x1, y1 = (round(corner, 3) for corner in xyxy)
        bbox_xywh = [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)]
        result = {"image_id": image_id, "category_id": categories[label]["id"], "bbox": bbox_xywh, "score": round(score, 6)}
        yield result if rle is None else result | {"segmentation": rle}


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="replace"))  # file names need not be valid Unicode


@dataclass(frozen=True)
class Style:
    """How the images of one page are drawn.

    Attributes:
        colours: Color of each category by its name.
        name_true: Label true boxes; with a single category the dashes say enough.
    """

    colours: dict[str, Colour]
    name_true: bool


def _style(columns: Sequence[Predictions], truth: list[dict] | None) -> Style:
    # The checkpoint's own categories come first: they get the hues that are furthest apart.
    categories = [each for column in reversed(columns) for each in column.categories] + (truth or [])
    return Style(category_colours(each["name"] for each in categories), name_true=truth is not None and len(truth) > 1)


def _draw_all(
    out: Path,
    inputs: Sequence[InputImage],
    columns: Sequence[Predictions],
    style: Style,
    read: Reader,
    points: Sequence[tuple[float, float]],
) -> list[Card]:
    """Write every image and its thumbnail for each column, and return the page's cards."""
    for folder in _folders(out, len(columns)):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / "thumbnails").mkdir(exist_ok=True)
    cards = []
    pool = ThreadPoolExecutor(min(DRAWERS, os.cpu_count() or 1))
    try:
        with _progress("drawing", len(inputs)) as advance:
            draw = partial(_draw, out=out, columns=columns, style=style, read=read, points=points)
            for card in pool.map(draw, inputs, _stems(inputs)):
                cards.append(card)
                advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return cards


def _draw(
    each: InputImage,
    stem: str,
    out: Path,
    columns: Sequence[Predictions],
    style: Style,
    read: Reader,
    points: Sequence[tuple[float, float]],
) -> Card:
    image = to_pil_image(read(each.path, each.size))
    scale = min(THUMBNAIL_HEIGHT / image.height, THUMBNAIL_WIDTH / image.width)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    file = stem + (".jpg" if max(image.size) <= LONGEST_JPEG else ".png")
    card = Card(each.name, image.size, each.true)
    true = with_masks(each.true or [], each.true_masks(image.size))
    for folder, column in zip(_folders(out, len(columns)), columns, strict=True):
        prediction = column.by_image[each.image_id]
        boxes = prediction.boxes(column.categories, column.thresholds)
        large, thumbnail = folder / "pictures" / file, folder / "thumbnails" / file
        shapes = with_masks(boxes, prediction.masks(column.thresholds))
        draw_boxes(image, shapes, true, style.colours, LETTERS, style.name_true).save(large, quality=90)
        small_boxes, small_true = ([_scaled(box, scale) for box in some] for some in (shapes, true))
        letters = THUMBNAIL_LETTERS / max(small.size)
        draw_boxes(small, small_boxes, small_true, style.colours, letters, style.name_true).save(thumbnail, quality=85)
        shown, small_shown = (path.relative_to(out).as_posix() for path in (large, thumbnail))
        card.columns.append(Column(shown, small_shown, boxes, prediction.scores[0]))
        if prediction.attention:
            attended = boxes[: len(prediction.attention.detections)]
            ids = [column.categories[label]["id"] for label in prediction.labels_drawn(column.thresholds)[: len(attended)]]
            place = folder / "attention" / stem, out, small, image.size
            drawing = prediction.attention, attended, ids, points, style.colours, letters
            card.columns[-1].attention = write_attention(*place, *drawing)
    return card


def _scaled(box: Box, scale: float) -> Box:
    x0, y0, x1, y1 = (scale * corner for corner in box.xyxy)
    return dataclasses.replace(box, xyxy=(x0, y0, x1, y1))


def _stems(inputs: Sequence[InputImage]) -> list[str]:
    """Return a file name without suffix for each image: plain characters, unique on file systems that ignore case as well."""
    stems, taken = [], set()
    for each in inputs:
        plain = re.sub(r"[^\w.-]+", "_", os.path.splitext(each.name)[0]).strip("._")[-100:] or "image"
        stem, number = plain, 2
        while stem.casefold() in taken:
            stem, number = f"{plain}-{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems
