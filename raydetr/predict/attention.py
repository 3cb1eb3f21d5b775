"""What a model looked at in an image: arrays, pictures, and the maps that the page lays over the picture.

Each image gets a folder with

- ``attention.npz``: all numbers, see :func:`write_attention`;
- ``detection-1.jpg``, ``point-1.jpg``, ...: the picture under the heat map of a detection or a point, heads averaged;
- ``maps.png``: the maps that the page shows, a row for each detection and point; in a row the average, then each head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from raydetr.draw import Box, Colour, draw_boxes
from raydetr.errors import UserError
from raydetr.model.attention import AttentionRecord

Place = tuple[float, float]  # x and y in pixels of the image

# From little to much attention: the colors of matplotlib's "inferno" without its black, and how opaque they are, all of 255.
HEAT = np.array([(40, 11, 84, 0), (101, 21, 110, 90), (159, 42, 99, 150), (212, 72, 66, 190), (245, 125, 21, 215), (252, 255, 164, 235)])
SHADE = 0.6  # brightness of the picture under a heat map


@dataclass(frozen=True)
class AttentionWanted:
    """Which attention a prediction records.

    Attributes:
        thresholds: Lowest score of the detections whose attention is recorded, by label; None for no detection.
        points: Places in the images, in pixels, whose self-attention in the encoder is recorded.
    """

    thresholds: Sequence[float] | None
    points: tuple[Place, ...] = ()


@dataclass(frozen=True)
class ImageAttention:
    """The attention in one image, on the h x w cells of the feature map.

    Attributes:
        detections: float32 [n, nheads, h, w], of the n detections with the highest scores.
        points: float32 [P, nheads, h, w], of the points.
    """

    detections: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class Spot:
    """What the page lets people click: a box, or a point that is a box without area.

    Attributes:
        label: What it is, for people.
        row: Its row in the image's ``maps.png``.
        xyxy: Its corners as fractions of the image.
    """

    label: str
    row: int
    xyxy: tuple[float, float, float, float]


@dataclass(frozen=True)
class AttentionMaps:
    """The maps of one image on the page.

    Attributes:
        file: Path of ``maps.png``, relative to the page.
        nheads: Number of heads.
        spots: What has a map, the largest first, so that later ones can be clicked inside of earlier ones.
    """

    file: str
    nheads: int
    spots: list[Spot]


def check_points(points: Sequence[Place], size: tuple[int, int], name: str) -> None:
    """Raise UserError if a point is outside an image.

    Args:
        points: The points (x, y), in pixels.
        size: Width and height of the image.
        name: The image, for the message.
    """
    for x, y in points:
        if not (0 <= x < size[0] and 0 <= y < size[1]):  # true for NaN
            raise UserError(f"--attention-at {x:g},{y:g}: is outside of {name}, which is {size[0]} x {size[1]} pixels")


def image_attention(
    record: AttentionRecord,
    wanted: AttentionWanted,
    row: int,
    queries: Sequence[int],
    labels: Sequence[int],
    scores: Sequence[float],
    size: tuple[int, int],
) -> ImageAttention:
    """Return the attention in one image of the batch that a record is about.

    Args:
        record: Of the forward pass.
        wanted: Which attention.
        row: Position of the image in the batch, which has no padding.
        queries: Object queries in order of their scores, the highest first.
        labels: Their labels.
        scores: Their scores.
        size: Width and height of the image, in pixels.
    """
    each = zip(queries, labels, scores, strict=True)
    kept = [] if wanted.thresholds is None else [query for query, label, score in each if score >= wanted.thresholds[label]]
    detections = record.decoder()[row, kept]
    places = [(x / size[0], y / size[1]) for x, y in wanted.points]
    points = record.encoder(places)[row] if places else detections[:0]
    return ImageAttention(*(each.to("cpu", torch.float32).numpy() for each in (detections, points)))


def write_attention(
    folder: Path,
    page: Path,
    image: Image.Image,
    size: tuple[int, int],
    found: ImageAttention,
    boxes: Sequence[Box],
    category_ids: Sequence[int],
    points: Sequence[Place],
    colours: dict[str, Colour],
    letters: float,
) -> AttentionMaps:
    """Write the files of one image; the module's docstring lists them.

    ``attention.npz`` holds, for n detections and P points, ``detections`` float32 [n, nheads, h, w], ``boxes`` [n, 4] (xyxy, pixels),
    ``scores`` [n], ``category_ids`` [n], ``points`` [P, 2] (x, y, pixels) and ``point_attention`` float32 [P, nheads, h, w].

    Args:
        folder: The image's folder; files of an earlier prediction in it are replaced.
        page: Folder of the page.
        image: The picture to draw on, of any size.
        size: Width and height of the image, in pixels.
        found: The attention.
        boxes: Boxes of the n detections, in pixels of the image.
        category_ids: Their category ids.
        points: The P points, in pixels of the image.
        colours: Color of each category by its name.
        letters: Height of the letters as a fraction of the picture's longest side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*-[0-9]*.jpg"):
        old.unlink()
    arrays = {"detections": found.detections, "point_attention": found.points, "points": np.array(points, float).reshape(-1, 2)}
    arrays |= {
        "boxes": np.array([box.xyxy for box in boxes], float).reshape(-1, 4),
        "scores": np.array([box.score for box in boxes], float),
    }
    np.savez_compressed(folder / "attention.npz", **arrays, category_ids=np.array(category_ids, np.int64))
    every = np.concatenate([found.detections, found.points])
    averages, scale = every.mean(1), image.width / size[0]
    for number, (box, weights) in enumerate(zip(boxes, averages, strict=False), 1):
        shown = Box(_scaled(box.xyxy, scale, scale), box.name, box.score)
        draw_boxes(heated(image, weights), [shown], [], colours, letters, False).save(folder / f"detection-{number}.jpg", quality=85)
    for number, (place, weights) in enumerate(zip(points, averages[len(boxes) :], strict=True), 1):
        marked(heated(image, weights), (place[0] * scale, place[1] * scale)).save(folder / f"point-{number}.jpg", quality=85)
    maps = np.concatenate([averages[:, None], every], axis=1)  # [rows, 1 + nheads, h, w]
    rows, columns, height, width = maps.shape
    sheet = heat_colours(_relative(maps)).transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 4)
    file = folder / "maps.png"
    if rows:
        Image.fromarray(sheet).save(file)
    else:
        file.unlink(missing_ok=True)
    return AttentionMaps(file.relative_to(page).as_posix(), columns - 1, _spots(boxes, points, size))


def _spots(boxes: Sequence[Box], points: Sequence[Place], size: tuple[int, int]) -> list[Spot]:
    across, down = 1 / size[0], 1 / size[1]
    spots = [Spot(f"{box.name} {box.score:.2f}", row, _scaled(box.xyxy, across, down)) for row, box in enumerate(boxes)]
    spots.sort(key=lambda spot: (spot.xyxy[2] - spot.xyxy[0]) * (spot.xyxy[3] - spot.xyxy[1]), reverse=True)
    places = enumerate(points, len(boxes))
    return spots + [Spot(f"the place {x:g}, {y:g}", row, _scaled((x, y, x, y), across, down)) for row, (x, y) in places]


def _scaled(xyxy: tuple[float, float, float, float], across: float, down: float) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = xyxy
    return (x0 * across, y0 * down, x1 * across, y1 * down)


def _relative(maps: np.ndarray) -> np.ndarray:
    """Return maps [..., h, w] divided by their largest weight."""
    return maps / maps.max(axis=(-2, -1), keepdims=True, initial=np.finfo(np.float32).tiny)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Return the color of each value from 0 to 1 as RGBA, uint8 [..., 4]; small values are transparent."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, channel) for channel in HEAT.T], axis=-1).round().astype(np.uint8)


def heated(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return an image under the heat map of attention weights, float [h, w]; the largest weight gets the brightest color."""
    smooth = Image.fromarray(_relative(weights).astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    heat = Image.fromarray(heat_colours(np.asarray(smooth).clip(0, 1)))
    picture = image.point(lambda value: value * SHADE)
    picture.paste(heat, mask=heat.getchannel("A"))
    return picture


def marked(image: Image.Image, place: Place) -> Image.Image:
    """Mark a place (x, y) of an image with a cross in a ring, and return the image."""
    x, y = place
    draw, radius = ImageDraw.Draw(image), max(4, round(max(image.size) / 80))
    for width, colour in ((5, (0, 0, 0)), (2, (255, 255, 255))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
        draw.line((x - radius, y, x + radius, y), fill=colour, width=width)
        draw.line((x, y - radius, x, y + radius), fill=colour, width=width)
    return image
