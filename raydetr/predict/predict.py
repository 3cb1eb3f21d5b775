"""A trained network's predictions on any photographs: a results file, annotated pictures and a page that shows them.

What lies in the output folder afterwards:

- ``index.html``: the page, to be opened as it is, with the folders ``pictures/`` (annotated, in their own size) and ``thumbnails/``;
- ``predictions.json``: COCO results, a list of image_id, category_id, bbox (xywh in pixels, inside the picture) and score. It holds
  what every object query found, also what is too unsure to be drawn, since average precision needs all of it;
- ``images.json``: a COCO data set without annotations that says which file an image_id is and which name a category_id has; so
  ``COCO("images.json").loadRes("predictions.json")`` works;
- ``compare/``: the same of the other checkpoint, if one is compared with.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import to_pil_image

from raydetr.config import Data, load_config
from raydetr.data.coco import collate, find_split, load_coco
from raydetr.data.images import image_path, read_image
from raydetr.data.transforms import val_transforms
from raydetr.draw import Box, Colour, category_colours, draw_boxes
from raydetr.errors import UserError
from raydetr.memory import kept_memory
from raydetr.model.detr import postprocess
from raydetr.predict.gallery import GENERATOR, Card, Column, gallery_page
from raydetr.predict.score import trained_with
from raydetr.training.console import PLAIN_INTERVAL_S
from raydetr.training.engine import choose_device
from raydetr.weights.fitting import load

# Files in a folder that are taken for pictures; a file that is named itself may end as it likes.
SUFFIXES = frozenset([".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
LETTERS = 1 / 70  # their height, as a part of the picture's longest side
THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, THUMBNAIL_LETTERS = 640, 1920, 22  # pixels; the page shows thumbnails of one height side by side
OUTPUTS = ("index.html", "predictions.json", "images.json", "pictures", "thumbnails", "compare")
_MARK = f'<meta name="generator" content="{GENERATOR}">'  # in a page of ours
LONGEST_JPEG = 65_500  # pixels
DRAWERS = 4  # threads; each holds a few copies of a picture


@dataclass
class Picture:
    """One picture to look at."""

    path: Path
    name: str  # relative to the folder that holds all of them
    image_id: int
    size: tuple[int, int] | None = None  # (width, height) that the annotations say
    true: list[Box] | None = None  # None: not annotated


@dataclass
class Found:
    """What one network found in one picture: each of its Q queries, the surest first."""

    size: tuple[int, int]  # (width, height) of the picture in pixels
    xyxy: list[list[float]]  # [Q][4], pixels, inside the picture
    labels: list[int]  # [Q], places in the categories
    scores: list[float]  # [Q]

    def boxes(self, categories: list[dict], threshold: float) -> list[Box]:
        """Those of a score of ``threshold`` or more."""
        each = zip(self.xyxy, self.labels, self.scores, strict=True)
        return [Box(tuple(xyxy), categories[label]["name"], score) for xyxy, label, score in each if score >= threshold]


@dataclass
class Guess:
    """What one checkpoint found: the categories in label order and, by image id, the detections."""

    categories: list[dict]
    found: dict[int, Found]


@dataclass
class Summary:
    """What came of a prediction."""

    out: Path
    images: int  # pictures read
    boxes: Counter  # drawn ones by category name
    threshold: float
    left_out: list[str]  # a line about each picture that cannot be read
    warnings: list[str]

    def text(self) -> str:
        """A few lines for the terminal."""
        counts = ", ".join(f"{number} {name}" for name, number in self.boxes.most_common(10)) or "none"
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.left_out:
            more = f" (and {len(self.left_out) - 1} more, listed in index.html)" if len(self.left_out) > 1 else ""
            lines.append(f"warning: {_counted(len(self.left_out), 'picture')} left out: {self.left_out[0]}{more}")
        lines.append(f"{_counted(self.images, 'picture')}, boxes with a score of {self.threshold:g} or more: {counts}")
        lines.append(f"look at {self.out / 'index.html'}; every detection is in {self.out / 'predictions.json'}")
        return "\n".join(lines)


def predict(
    checkpoint: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    threshold: float = 0.7,
    compare: str | Path | None = None,
    annotations: str | Path | None = None,
    batch_size: int = 4,
    device: str = "auto",
) -> Summary:
    """Predict on ``sources`` and write what the module's docstring lists into the folder ``out``.

    ``sources`` are pictures and folders of pictures (searched with all they hold), or one data set folder (annotations/ and
    val2017/): then its validation pictures with their true boxes. ``threshold`` is the lowest score that is drawn. ``compare`` is a
    checkpoint whose predictions are shown to the left, as "before". ``annotations`` is a COCO file of some or all of the pictures;
    its boxes are drawn, and image and category ids are its own (categories that it lacks get free ones). Without it image ids count from
    1 and category ids are those of the checkpoint's training set. Pictures that cannot be read are left out and counted.

    Raises UserError for what the user can mend: a source, checkpoint or annotation file that is missing or broken, no picture that
    can be read, an output folder that holds something else or cannot be written.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold: {threshold} is out of bounds; it takes 0 to 1")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is out of bounds; it takes 1 or more")
    out = Path(out).expanduser()
    pictures, truth, warnings = find_pictures(sources, annotations, out)
    _check_free(out)
    checkpoints = [checkpoint] if compare is None else [compare, checkpoint]
    titles = _titles(checkpoints)
    columns, left_out = [], {}
    for path, title in zip(checkpoints, titles, strict=True):
        guess, unread = detect(path, pictures, batch_size, device, title)
        left_out |= unread
        pictures = [each for each in pictures if each.image_id not in unread]
        if not pictures:
            raise UserError(f"none of the pictures can be read; the first: {next(iter(left_out.values()))}")
        columns.append(Guess(_ids_for(guess.categories, truth), guess.found))
    lines = list(left_out.values())
    try:
        _claim(out)
        for folder, column in zip(_folders(out, len(columns)), columns, strict=True):
            _write_results(folder, pictures, column)
        cards = _draw_all(out, pictures, columns, style := _style(columns, threshold, truth))
        models = dict(zip(["found"] if compare is None else ["before", "after"], titles, strict=True))
        _write(out / "index.html", gallery_page(models, cards, threshold, style.colours, lines))
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None
    drawn = Counter(box.name for card in cards for box in card.columns[-1].boxes)
    return Summary(out, len(cards), drawn, threshold, lines, warnings)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _titles(checkpoints: Sequence[str | Path]) -> list[str]:
    """The ends of the checkpoints' paths, long enough to tell them apart: ``balloons/best.pth``."""
    parts = [Path(each).parts for each in checkpoints]
    length = next((n for n in range(2, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(parts)), 2)
    return ["/".join(each[-length:]) for each in parts]


# ------------------------------------------------------------------------------------------------------- which pictures


def find_pictures(
    sources: Sequence[str | Path], annotations: str | Path | None, out: Path
) -> tuple[list[Picture], list[dict] | None, list[str]]:
    """The pictures of ``sources``, the annotations' categories (None without annotations), and warnings; see :func:`predict`.

    What an earlier prediction wrote into ``out`` is not among them. Raises UserError where there is none.
    """
    sources = [Path(source).expanduser() for source in sources]
    data_sets = [source for source in sources if (source / "annotations").is_dir() and (source / "val2017").is_dir()]
    if data_sets and len(sources) > 1:
        raise UserError(f"{data_sets[0]} is a data set's folder: give it alone, or give {data_sets[0] / 'val2017'}")
    if data_sets:
        split = find_split(Data(path=str(data_sets[0]), val_annotations=annotations and str(annotations)), "val")
        coco, warnings = load_coco(split.annotations)
        files = [image_path(split.images, image["file_name"]) for image in coco["images"]]
        return _annotated(files, [image["file_name"] for image in coco["images"]], coco["images"], coco), coco["categories"], warnings
    files = list(dict.fromkeys(_files_of(sources, out)))
    if not files:
        raise UserError(f"no pictures in {', '.join(map(str, sources)) or 'nothing'}: looked for {' '.join(sorted(SUFFIXES))}")
    names = _names(files)
    if annotations is None:
        return [Picture(file, name, number) for number, (file, name) in enumerate(zip(files, names, strict=True), 1)], None, []
    coco, warnings = load_coco(annotations)
    images = _images_of(files, coco["images"], annotations)
    unknown = images.count(None)
    if unknown == len(files):
        raise UserError(
            f"{annotations} knows none of the {_counted(len(files), 'picture')}: the first is {names[0]}, not in its file names"
        )
    if unknown:
        warnings.append(f"{annotations}: {_counted(unknown, 'picture')} of {len(files)} not in it, shown without true boxes")
    return _annotated(files, names, images, coco), coco["categories"], warnings


def _files_of(sources: Sequence[Path], out: Path) -> Iterator[Path]:
    """The sources' files as absolute paths; links stay links, since their names are what the user knows."""
    ours = [(out / folder / name).resolve() for folder in ("", "compare") for name in ("pictures", "thumbnails")]
    for source in sources:
        if source.is_dir():
            for path in _walk(source):
                if not any(path.resolve().is_relative_to(folder) for folder in ours):
                    yield path
        elif source.exists():
            if any(source.resolve().is_relative_to(folder) for folder in ours):
                raise UserError(f"{source} lies where annotated pictures are written to; choose another folder for the output")
            yield Path(os.path.abspath(source))
        else:
            raise UserError(f"{source}: no such file or folder")


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_stop):
        if os.path.realpath(parent) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):
                yield Path(os.path.abspath(os.path.join(parent, file)))


def _stop(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}")


def _names(files: Sequence[Path]) -> list[str]:
    """Paths relative to the folder that holds all of them."""
    try:
        top = os.path.commonpath([file.parent for file in files])
    except ValueError:  # on different drives
        return [file.as_posix() for file in files]
    return [file.relative_to(top).as_posix() for file in files]


def _images_of(files: Sequence[Path], images: list[dict], annotations: str | Path) -> list[dict | None]:
    """For each file the image whose file_name is the end of its path; None where there is none."""
    by_name = {tuple(Path(image["file_name"]).parts): image for image in images}
    depth = max(map(len, by_name))
    found, taken = [], {}
    for file in files:
        image = next((by_name[end] for n in range(depth, 0, -1) if (end := file.parts[-n:]) in by_name), None)
        if image and image["id"] in taken:
            raise UserError(
                f"{taken[image['id']]} and {file} are both called {image['file_name']} as in {annotations}: give only one of them"
            )
        if image:
            taken[image["id"]] = file
        found.append(image)
    return found


def _annotated(files: Sequence[Path], names: Sequence[str], images: Sequence[dict | None], coco: dict[str, list[dict]]) -> list[Picture]:
    """Pictures with the true boxes and ids of ``images``; those without an image get the ids after the last one."""
    category = {each["id"]: each["name"] for each in coco["categories"]}
    true: dict[int, list[Box]] = {image["id"]: [] for image in coco["images"]}
    for each in coco["annotations"]:
        if not each["iscrowd"]:
            x, y, width, height = each["bbox"]
            true[each["image_id"]].append(Box((x, y, x + width, y + height), category[each["category_id"]]))
    free = max(true) + 1
    pictures = []
    for file, name, image in zip(files, names, images, strict=True):
        if image is None:
            pictures.append(Picture(file, name, free))
            free += 1
        else:
            size = (image["width"], image["height"]) if image["width"] else None
            pictures.append(Picture(file, name, image["id"], size, true[image["id"]]))
    return pictures


# --------------------------------------------------------------------------------------------------------- what is in them


class Photographs(Dataset):
    """Pictures as the network takes them: ``image, target``, or the error's line where one cannot be read."""

    def __init__(self, pictures: Sequence[Picture], transforms: Callable):
        self.pictures, self.transforms = pictures, transforms

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]] | tuple[None, dict[str, Any]]:
        picture = self.pictures[index]
        try:
            photograph = read_image(picture.path, picture.size)
        except UserError as error:
            return None, {"index": index, "error": str(error)}
        image = self.transforms(tv_tensors.Image(photograph)).as_subclass(torch.Tensor)
        return image, {"index": index, "orig_size": torch.tensor(photograph.shape[-2:])}


def _collate(batch: list[tuple]) -> tuple[tuple | None, list[dict]]:
    """The batch of those that could be read (None where none could), and the targets of the others."""
    read = [each for each in batch if each[0] is not None]
    return collate(read) if read else None, [target for image, target in batch if image is None]


@torch.inference_mode()
def detect(checkpoint: str | Path, pictures: Sequence[Picture], batch_size: int, device: str, title: str) -> tuple[Guess, dict[int, str]]:
    """What the checkpoint found, and by image id why a picture cannot be read; raises UserError where the checkpoint cannot."""
    model = load(checkpoint)
    config = load_config(trained_with(checkpoint), {"speed.device": device})
    place = choose_device(config.speed)
    model.to(place).eval()
    # On a CPU the network has use for every core; loading processes would only be in its way.
    workers = config.data.num_workers if place.type == "cuda" else 0
    dataset = Photographs(pictures, val_transforms(config.data))
    loader = DataLoader(dataset, batch_size, collate_fn=_collate, num_workers=workers, pin_memory=place.type == "cuda")
    found, unread = {}, {}
    with kept_memory(place.type), _progress(f"predicting with {title}", len(pictures)) as advance:
        for batch, broken in loader:
            unread |= {pictures[target["index"]].image_id: target["error"] for target in broken}
            if batch is not None:
                images, mask, targets = batch
                outputs = model(images.to(place, non_blocking=True), None if mask is None else mask.to(place, non_blocking=True))
                sizes = torch.stack([target["orig_size"] for target in targets])
                for target, detections in zip(targets, postprocess(outputs, sizes.to(place)), strict=True):
                    found[pictures[target["index"]].image_id] = _found(detections, target["orig_size"], checkpoint)
            advance(len(broken) + (len(targets) if batch is not None else 0))
    return Guess(model.categories, found), unread


def _found(detections: dict[str, torch.Tensor], orig_size: torch.Tensor, checkpoint: str | Path) -> Found:
    scores, order = detections["scores"].cpu().double().sort(descending=True, stable=True)
    boxes_xyxy = detections["boxes"].cpu().double()[order]
    if not (scores.isfinite().all() and boxes_xyxy.isfinite().all()):
        raise UserError(f"{checkpoint}: its outputs are not finite numbers; the weights in it are broken")
    height, width = orig_size.tolist()
    boxes_xyxy = boxes_xyxy.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return Found((width, height), boxes_xyxy.tolist(), detections["labels"].cpu()[order].tolist(), scores.tolist())


def _ids_for(mine: list[dict], truth: list[dict] | None) -> list[dict]:
    """The checkpoint's categories under the annotations' ids, found by name; what the annotations lack keeps its id or gets a free one."""
    if truth is None:
        return mine
    same = {(each["id"], _spelling(each["name"])) for each in truth}
    by_name = {_spelling(each["name"]): each["id"] for each in reversed(truth)}
    taken = {each["id"] for each in truth} | {each["id"] for each in mine}
    renamed = []
    for each in mine:
        name, category_id = _spelling(each["name"]), each["id"]
        if (category_id, name) not in same:
            if name in by_name:
                category_id = by_name[name]
            elif any(category_id == other["id"] for other in truth):
                category_id = max(taken) + 1
                taken.add(category_id)
        renamed.append({"id": category_id, "name": each["name"]})
    return renamed


def _spelling(name: str) -> str:
    return name.strip().casefold()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then; gives the function to call with how many are done more."""
    console = Console(highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda more: progress.advance(task, more)
        return
    console.print(f"{what}: {_counted(total, 'picture')}", markup=False, soft_wrap=True)
    done, last = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > PLAIN_INTERVAL_S:
            last = time.monotonic()
            console.print(f"{what}: {done}/{total}", markup=False, soft_wrap=True)

    yield advance


# --------------------------------------------------------------------------------------------------------- what is written


def _check_free(out: Path) -> None:
    """Raises UserError where ``out`` cannot become the output folder, or where something would be overwritten that is not ours."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())  # a new folder is made in the nearest one
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{out}: no folder that can be written to, because {place} is {'read-only' if place.is_dir() else 'a file'}")
    page = out / "index.html"
    ours = page.is_file() and _MARK in page.read_text(encoding="utf-8", errors="replace")
    others = [name for name in OUTPUTS if (out / name).exists()]
    if others and not ours:
        raise UserError(f"{out / others[0]} is there already and not of a prediction; choose another folder with --out")


def _claim(out: Path) -> None:
    """From now on the folder is known as ours, also if what follows is cut short."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "index.html").exists():
        _write(out / "index.html", gallery_page({}, [], 0, {}))


def _folders(out: Path, number: int) -> list[Path]:
    """Where each column's files go; the last column is the checkpoint's own."""
    return [out / "compare", out][-number:]


def _write_results(folder: Path, pictures: Sequence[Picture], column: Guess) -> None:
    folder.mkdir(exist_ok=True)
    images, results = [], []
    for each in pictures:
        found = column.found[each.image_id]
        width, height = found.size
        images.append({"id": each.image_id, "file_name": each.name, "width": width, "height": height})
        results += _results(each.image_id, found, column.categories)
    info = {"description": "the pictures and categories of predictions.json"}
    data_set = {"info": info, "images": images, "annotations": [], "categories": column.categories}
    _write(folder / "images.json", json.dumps(data_set))
    _write(folder / "predictions.json", json.dumps(results))


def _results(image_id: int, found: Found, categories: list[dict]) -> Iterator[dict]:
    for xyxy, label, score in zip(found.xyxy, found.labels, found.scores, strict=True):
        x0, y0, x1, y1 = (round(corner, 3) for corner in xyxy)
        bbox_xywh = [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)]
        yield {"image_id": image_id, "category_id": categories[label]["id"], "bbox": bbox_xywh, "score": round(score, 6)}


def _write(path: Path, text: str) -> None:
    """Whole or not at all; what is no valid Unicode (names from foreign files) becomes question marks."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Style:
    """How the pictures of one page are drawn."""

    threshold: float
    colours: dict[str, Colour]
    name_true: bool  # with one category the dashes say enough


def _style(columns: Sequence[Guess], threshold: float, truth: list[dict] | None) -> Style:
    # The checkpoint's own categories first: they get the hues that lie furthest apart.
    categories = [each for column in reversed(columns) for each in column.categories] + (truth or [])
    return Style(threshold, category_colours(each["name"] for each in categories), name_true=truth is not None and len(truth) > 1)


def _draw_all(out: Path, pictures: Sequence[Picture], columns: Sequence[Guess], style: Style) -> list[Card]:
    """Write every picture and its thumbnail, for each column; returns the page's cards."""
    for folder in _folders(out, len(columns)):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / "thumbnails").mkdir(exist_ok=True)
    cards = []
    pool = ThreadPoolExecutor(min(DRAWERS, os.cpu_count() or 1))
    try:
        with _progress("drawing", len(pictures)) as advance:
            for card in pool.map(partial(_draw, out=out, columns=columns, style=style), pictures, _stems(pictures)):
                cards.append(card)
                advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return cards


def _draw(picture: Picture, stem: str, out: Path, columns: Sequence[Guess], style: Style) -> Card:
    image = to_pil_image(read_image(picture.path, picture.size))
    scale = min(THUMBNAIL_HEIGHT / image.height, THUMBNAIL_WIDTH / image.width)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    file = stem + (".jpg" if max(image.size) <= LONGEST_JPEG else ".png")
    card = Card(picture.name, image.size, picture.true)
    true = picture.true or []
    for folder, column in zip(_folders(out, len(columns)), columns, strict=True):
        found = column.found[picture.image_id]
        boxes = found.boxes(column.categories, style.threshold)
        large, thumbnail = folder / "pictures" / file, folder / "thumbnails" / file
        draw_boxes(image, boxes, true, style.colours, LETTERS, style.name_true).save(large, quality=90)
        here, there = ([_scaled(box, scale) for box in some] for some in (boxes, true))
        letters = THUMBNAIL_LETTERS / max(small.size)
        draw_boxes(small, here, there, style.colours, letters, style.name_true).save(thumbnail, quality=85)
        paths = (path.relative_to(out).as_posix() for path in (large, thumbnail))
        card.columns.append(Column(*paths, boxes, found.scores[0]))
    return card


def _scaled(box: Box, scale: float) -> Box:
    return Box(tuple(scale * corner for corner in box.xyxy), box.name, box.score)


def _stems(pictures: Sequence[Picture]) -> list[str]:
    """A file name for each, without suffix: of plain letters, and unique also where upper and lower case are one."""
    stems, taken = [], set()
    for picture in pictures:
        plain = re.sub(r"[^\w.-]+", "_", os.path.splitext(picture.name)[0]).strip("._")[-100:] or "picture"
        stem, number = plain, 2
        while stem.casefold() in taken:
            stem, number = f"{plain}-{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems
