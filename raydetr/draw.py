"""Boxes and labels drawn on images: for TensorBoard, the gallery and reports."""

import colorsys
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Asked in this order for letters that Pillow's own font lacks: it knows little more than ASCII.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf"),
)


@dataclass(frozen=True)
class Box:
    """A box to draw: corners (x0, y0, x1, y1) in pixels, the category's name, and the score; a true box has none."""

    xyxy: tuple[float, float, float, float]
    name: str
    score: float | None = None


def category_colours(names: Iterable[str]) -> dict[str, Colour]:
    """An RGB colour per category name, in the order given: hues apart by the golden angle, every seven in another shade."""
    colours: dict[str, Colour] = {}
    shades = ((0.95, 1.0), (0.5, 1.0), (0.9, 0.65))  # saturation and value
    for turn, name in enumerate(dict.fromkeys(names)):
        rgb = colorsys.hsv_to_rgb((0.42 + 0.381966 * turn) % 1, *shades[turn // 7 % len(shades)])
        colours[name] = tuple(round(255 * part) for part in rgb)
    return colours


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], true: Sequence[Box], colours: dict[str, Colour], letters: float, name_true: bool
) -> Image.Image:
    """A copy of the RGB ``image``: predicted boxes in their category's colour with name and score, true ones dashed in white.

    Lines and letters grow with the picture; ``letters`` is the letters' height as a part of the longest side. ``name_true`` writes
    the names of true boxes, too.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    longest = max(image.size)
    width, height = max(2, round(longest / 300)), max(11, round(longest * letters))
    boxes = sorted(boxes, key=lambda box: box.score, reverse=True)
    for box in reversed(boxes):  # the surest on top
        draw.rectangle(_drawable(box.xyxy, image.size), outline=colours[box.name], width=width)
    for box in true:
        _dashed_rectangle(draw, _drawable(box.xyxy, image.size), max(1, round(width / 2)), dash=height // 2)
    labels = [(box, colours[box.name]) for box in boxes]
    labels += [(box, (255, 255, 255)) for box in true if name_true]
    _write_labels(draw, labels, height, image.size)
    return image


def _write_labels(draw: ImageDraw.ImageDraw, labels: Sequence[tuple[Box, Colour]], height: int, size: tuple[int, int]) -> None:
    """A label for each box, on that background; the first ones get the better places and lie on top."""
    pad, full = max(1, height // 6), height * 4 // 3
    placed: list[tuple[int, ...]] = []
    for box, _ in labels:
        width = round(sum(draw.textlength(text, font=font) for text, font in _pieces(box, height))) + 2 * pad
        placed.append(_free_place(_drawable(box.xyxy, size), (width, full), size, placed, below=box.score is None))
    for (box, background), (x0, y0, x1, y1) in reversed(list(zip(labels, placed, strict=True))):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=background)
        x = x0 + pad
        for text, font in _pieces(box, height):
            draw.text((x, (y0 + y1) / 2), text, font=font, fill=_ink(background), anchor="lm")
            x += draw.textlength(text, font=font)


def _pieces(box: Box, height: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """What a label says, name and score, each with its font: the one that has the name's letters may lack digits."""
    name = " ".join(box.name.split())
    name, font = _writable(name if len(name) <= 30 else name[:28] + "...", height)
    if box.score is None:
        return [(name, font)]
    return [(name, font), (f" {box.score:.2f}" if name else f"{box.score:.2f}", _fonts(height)[0])]


def _free_place(xyxy: tuple, label: tuple[int, int], size: tuple[int, int], taken: Sequence[tuple], below: bool) -> tuple[int, ...]:
    """Where a label (width, height) goes: to a corner of its box, in the picture, over no other label if one of the corners allows."""
    x0, y0, x1, y1 = (round(corner) for corner in xyxy)
    rows = [y1 + 1, y0 - label[1], y0] if below else [y0 - label[1], y1 + 1, y0]
    places = []
    for x, y in ((x, y) for y in rows for x in (x0, x1 + 1 - label[0])):
        x, y = max(0, min(x, size[0] - label[0])), max(0, min(y, size[1] - label[1]))
        places.append((x, y, x + label[0], y + label[1]))
    free = (p for p in places if not any(p[0] < t[2] and t[0] < p[2] and p[1] < t[3] and t[1] < p[3] for t in taken))
    return next(free, places[0])


def _drawable(xyxy: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box's corners as pixels of a picture of ``size`` (width, height); the corner is at least the first one's pixel."""
    x0, x1 = (min(max(x, 0), size[0] - 1) for x in xyxy[::2])
    y0, y1 = (min(max(y, 0), size[1] - 1) for y in xyxy[1::2])
    return x0, y0, max(x0, x1), max(y0, y1)


def _dashed_rectangle(draw: ImageDraw.ImageDraw, xyxy: tuple, width: int, dash: int) -> None:
    """White dashes on a black line, which stand out from any background."""
    draw.rectangle(xyxy, outline=(0, 0, 0), width=width)
    x0, y0, x1, y1 = xyxy
    dash = max(4, dash)
    for start in range(0, int(x1 - x0) + 1, 2 * dash):
        left, right = x0 + start, min(x0 + start + dash, x1)
        draw.rectangle((left, y0, right, min(y0 + width - 1, y1)), fill=(255, 255, 255))
        draw.rectangle((left, max(y1 - width + 1, y0), right, y1), fill=(255, 255, 255))
    for start in range(0, int(y1 - y0) + 1, 2 * dash):
        top, bottom = y0 + start, min(y0 + start + dash, y1)
        draw.rectangle((x0, top, min(x0 + width - 1, x1), bottom), fill=(255, 255, 255))
        draw.rectangle((max(x1 - width + 1, x0), top, x1, bottom), fill=(255, 255, 255))


def _ink(background: Colour) -> Colour:
    """Black or white, whichever can be read better on ``background`` (luma of BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)


@functools.lru_cache(maxsize=4096)
def _writable(text: str, height: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """``text`` and the first font that has all its letters: Pillow's own, or one installed. Without such a font, what is left of
    the text in Pillow's own."""
    for font in _fonts(height):
        if all(_has(font, letter) for letter in text):
            return text, font
    own = _fonts(height)[0]
    return "".join(letter for letter in text if _has(own, letter)).strip(), own


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))  # what is drawn for letters it lacks


@functools.lru_cache(maxsize=64)
def _fonts(height: int) -> list[ImageFont.FreeTypeFont]:
    fonts = [ImageFont.load_default(height)]
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, height))
        except OSError:  # not on this machine
            continue
    return fonts
