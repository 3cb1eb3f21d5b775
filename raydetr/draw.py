"""Draw boxes, masks, and labels on images, for TensorBoard, the gallery, and reports."""

import colorsys
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Colour = tuple[int, int, int]
Pixels = tuple[int, int, int, int]  # the first and the last column and row of a rectangle: (x0, y0, x1, y1)

# Fonts that are tried in this order for characters that Pillow's own font lacks; it has little more than ASCII.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf"),
)

TINT = 0.4  # how much of a mask's color is in the pixels inside of its outline


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        xyxy: Corners (x0, y0, x1, y1) in pixels of the image.
        name: Name of the category.
        score: Score of a predicted box; None for a true box.
        mask: The object's pixels, bool [height, width] over the whole image, at any resolution; None if they are unknown.
    """

    xyxy: tuple[float, float, float, float]
    name: str
    score: float | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


def with_masks(boxes: Sequence[Box], masks: Iterable[np.ndarray | None] | None) -> list[Box]:
    """Return boxes with the mask of each; without ``masks``, the boxes as they are."""
    if masks is None:
        return list(boxes)
    return [dataclasses.replace(box, mask=mask) for box, mask in zip(boxes, masks, strict=True)]


def category_colours(names: Iterable[str]) -> dict[str, Colour]:
    """Return an RGB color for each category name; it depends on the name's position only.

    Hues are spaced by the golden angle, and every seven names the shade changes.
    """
    colours: dict[str, Colour] = {}
    shades = ((0.95, 1.0), (0.5, 1.0), (0.9, 0.65))  # saturation and value
    for turn, name in enumerate(dict.fromkeys(names)):
        red, green, blue = colorsys.hsv_to_rgb((0.42 + 0.381966 * turn) % 1, *shades[turn // 7 % len(shades)])
        colours[name] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], true: Sequence[Box], colours: dict[str, Colour], letters: float, name_true: bool
) -> Image.Image:
    """Draw boxes on a copy of an image: predicted ones in their category's color with name and score, true ones dashed in white.

    Where a box has a mask, its outline is drawn in the same way, and the inside of a predicted one is tinted.

    Any box can be drawn: corners are rounded to whole pixels and moved into the image, and a box whose corners are not numbers (NaN) is
    left out. Lines and letters grow with the image.

    Args:
        image: RGB image; it is not changed.
        boxes: Predicted boxes.
        true: True boxes.
        colours: Color of each category by its name.
        letters: Height of the letters as a fraction of the image's longest side.
        name_true: Label the true boxes with their category, too.

    Returns:
        The annotated image, of the same size.
    """
    longest = max(image.size)
    width, height = max(2, round(longest / 300)), max(11, round(longest * letters))
    image = _draw_masks(image, boxes, true, colours, width, dash=max(4, height // 2))
    draw = ImageDraw.Draw(image)
    found = [(box, pixels) for box in boxes if (pixels := _pixels(box.xyxy, image.size))]
    truth = [(box, pixels) for box in true if (pixels := _pixels(box.xyxy, image.size))]
    found.sort(key=lambda each: _order(each[0].score), reverse=True)
    for box, pixels in reversed(found):  # the highest score on top
        _rectangle(draw, pixels, colours[box.name], width)
    for _, pixels in truth:
        _dashed_rectangle(draw, pixels, max(1, round(width / 2)), dash=height // 2)
    labels = [(box, pixels, colours[box.name]) for box, pixels in found]
    labels += [(box, pixels, (255, 255, 255)) for box, pixels in truth if name_true]
    _write_labels(draw, labels, height, image.size)
    return image


def _draw_masks(
    image: Image.Image, boxes: Sequence[Box], true: Sequence[Box], colours: dict[str, Colour], width: int, dash: int
) -> Image.Image:
    """Draw the masks that there are on a copy of an image, that with the highest score on top, true ones above all."""
    found = sorted((box for box in boxes if box.mask is not None), key=lambda box: _order(box.score))
    truth = [box for box in true if box.mask is not None]
    if not found and not truth:
        return image.copy()
    pixels = np.array(image)
    for box in found:
        _paint_mask(pixels, _stretched(box, image.size), width, colour=colours[box.name])
    for box in truth:
        _paint_mask(pixels, _stretched(box, image.size), max(2, width), dash=dash)
    return Image.fromarray(pixels)


def _stretched(box: Box, size: tuple[int, int]) -> np.ndarray:
    mask = np.asarray(box.mask, bool)
    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST), bool)


def _paint_mask(pixels: np.ndarray, mask: np.ndarray, width: int, colour: Colour | None = None, dash: int = 1) -> None:
    """Paint a mask, bool [h, w], on pixels, uint8 [h, w, 3]: outlined and tinted in its color, or outlined in dashes of black and white."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    region = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    mask, target = mask[region], pixels[region]
    # Blurred, a pixel within ``width`` of the outside is less than full; a margin of nothing closes outlines at the edge of the image.
    solid = Image.fromarray(np.pad(mask, width).astype(np.uint8) * 255)
    blurred = np.asarray(solid.filter(ImageFilter.BoxBlur(width)), np.float32)[width:-width, width:-width]
    edge = mask & (blurred < 255)
    if colour is not None:
        inside = mask & ~edge
        target[inside] = (1 - TINT) * target[inside] + TINT * np.array(colour)
        target[edge] = colour
        return
    # A dash runs along the outline: counted in columns where that is rather horizontal, in rows elsewhere.
    margin = np.pad(blurred, 1)
    down, across = (np.abs(each)[1:-1, 1:-1] for each in np.gradient(margin))
    y, x = np.indices(mask.shape)
    white = np.where(down >= across, x, y) // dash % 2 == 0
    target[edge & white] = 255
    target[edge & ~white] = 0


def _order(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score


def _pixels(xyxy: Sequence[float], size: tuple[int, int]) -> Pixels | None:
    """Return the rectangle that stands for a box on an image of ``size`` (width, height); None where a corner is not a number."""
    if any(math.isnan(corner) for corner in xyxy):
        return None
    # Clamped before they are rounded, since infinity has no integer.
    (x0, x1), (y0, y1) = (
        sorted(round(min(max(corner, 0), side - 1)) for corner in corners)
        for corners, side in zip((xyxy[::2], xyxy[1::2]), size, strict=True)
    )
    return x0, y0, x1, y1


def _write_labels(draw: ImageDraw.ImageDraw, labels: Sequence[tuple[Box, Pixels, Colour]], height: int, size: tuple[int, int]) -> None:
    # The first labels get the best positions and are drawn on top.
    pad, full = max(1, height // 6), height * 4 // 3
    placed: list[Pixels] = []
    for box, pixels, _ in labels:
        width = round(sum(draw.textlength(text, font=font) for text, font in _pieces(box, height))) + 2 * pad
        placed.append(_free_position(pixels, (width, full), size, placed, below=box.score is None))
    for (box, _, background), (x0, y0, x1, y1) in reversed(list(zip(labels, placed, strict=True))):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=background)
        x: float = x0 + pad
        for text, font in _pieces(box, height):
            draw.text((x, (y0 + y1) / 2), text, font=font, fill=_ink(background), anchor="lm")
            x += draw.textlength(text, font=font)


def _pieces(box: Box, height: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Return the parts of a label, name and score, each with its font: a font that has the name's characters may lack digits."""
    name = " ".join(box.name.split())
    name, font = _writable(name if len(name) <= 30 else name[:28] + "...", height)
    if box.score is None:
        return [(name, font)]
    return [(name, font), (f" {box.score:.2f}" if name else f"{box.score:.2f}", _fonts(height)[0])]


def _free_position(box: Pixels, label: tuple[int, int], size: tuple[int, int], taken: Sequence[Pixels], below: bool) -> Pixels:
    """Return where a label of (width, height) goes: at a corner of its box, inside the image, over no other label if a corner allows it."""
    x0, y0, x1, y1 = box
    rows = [y1 + 1, y0 - label[1], y0] if below else [y0 - label[1], y1 + 1, y0]
    positions = []
    for x, y in ((x, y) for y in rows for x in (x0, x1 + 1 - label[0])):
        x, y = max(0, min(x, size[0] - label[0])), max(0, min(y, size[1] - label[1]))
        positions.append((x, y, x + label[0], y + label[1]))
    free = (p for p in positions if not any(p[0] < t[2] and t[0] < p[2] and p[1] < t[3] and t[1] < p[3] for t in taken))
    return next(free, positions[0])


def _rectangle(draw: ImageDraw.ImageDraw, pixels: Pixels, colour: Colour, width: int) -> None:
    # Four filled strips, because Pillow's outlines leave rectangles that are thinner than their lines.
    x0, y0, x1, y1 = pixels
    draw.rectangle((x0, y0, x1, min(y0 + width - 1, y1)), fill=colour)
    draw.rectangle((x0, max(y1 - width + 1, y0), x1, y1), fill=colour)
    draw.rectangle((x0, y0, min(x0 + width - 1, x1), y1), fill=colour)
    draw.rectangle((max(x1 - width + 1, x0), y0, x1, y1), fill=colour)


def _dashed_rectangle(draw: ImageDraw.ImageDraw, pixels: Pixels, width: int, dash: int) -> None:
    # White dashes on a black line stand out from any background.
    _rectangle(draw, pixels, (0, 0, 0), width)
    x0, y0, x1, y1 = pixels
    dash = max(4, dash)
    for left in range(x0, x1 + 1, 2 * dash):
        right = min(left + dash, x1)
        draw.rectangle((left, y0, right, min(y0 + width - 1, y1)), fill=(255, 255, 255))
        draw.rectangle((left, max(y1 - width + 1, y0), right, y1), fill=(255, 255, 255))
    for top in range(y0, y1 + 1, 2 * dash):
        bottom = min(top + dash, y1)
        draw.rectangle((x0, top, min(x0 + width - 1, x1), bottom), fill=(255, 255, 255))
        draw.rectangle((max(x1 - width + 1, x0), top, x1, bottom), fill=(255, 255, 255))


def _ink(background: Colour) -> Colour:
    """Return black or white, whichever is easier to read on ``background`` (luma of BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)


@functools.lru_cache(maxsize=4096)
def _writable(text: str, height: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return ``text`` and the first font that has all its characters, Pillow's own or an installed one.

    Without such a font, return the characters that Pillow's own font has.
    """
    for font in _fonts(height):
        if all(_has(font, letter) for letter in text):
            return text, font
    own = _fonts(height)[0]
    return "".join(letter for letter in text if _has(own, letter)).strip(), own


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return letter == " " or _glyph(font, letter) != _glyph(font, "\uffff")  # the glyph for missing characters


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=64)
def _fonts(height: int) -> list[ImageFont.FreeTypeFont]:
    fonts = [cast(ImageFont.FreeTypeFont, ImageFont.load_default(height))]  # with a size it is one
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, height))
        except OSError:  # not installed
            continue
    return fonts
