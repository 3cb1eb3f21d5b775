"""Generate images of balloons with labels in the format of the VGG Image Annotator (version 1).

Each image depends only on seed, split and number. The same seed gives the same files, byte for byte, and a larger set starts with the
images of a smaller one.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from raydetr.demo.scenes import SUPERSAMPLE, Color, Part, Scene, color_of, darker, ellipse, mixed, place, polygon, stroke
from raydetr.demo.things import KINDS
from raydetr.errors import UserError

WIDTH, HEIGHT = 320, 240  # pixels, of all images
LEAST_VISIBLE = 0.5  # least share of a balloon's area that is visible behind other things and inside the image
JPEG_QUALITY = 92
TOLERANCE = 0.6  # pixels between the outline and the balloon's edge, at most

IN_THE_AIR = ("bird", "butterfly", "cloud", "kite", "leaf", "moon", "sun", "cloud", "bird")
ON_THE_GROUND = ("car", "crate", "house", "lamp", "pine", "street lamp", "tree", "tree", "umbrella", "boat", "mushroom", "flower")
IN_FRONT = ("apple", "ball", "bottle", "crate", "cup", "egg", "flower", "lemon", "pear", "pine", "star", "tree", "fish", "umbrella", "leaf")


def generate(dst: str | Path, train: int = 64, val: int = 16, seed: int = 0) -> None:
    """Generate images into ``dst``/train and ``dst``/val, each folder with a via_region_data.json.

    Each region of the annotations is a polygon around the visible part of a balloon. Its region attribute "name" is "balloon".

    Args:
        dst: folder to write to; it is created if needed.
        train: number of training images, 0 or more.
        val: number of validation images, 0 or more.
        seed: seed of all images.

    Raises:
        UserError: ``dst`` cannot be written, or a number is negative.
    """
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        if count < 0:
            raise UserError(f"{split}: {count} images cannot be generated; give 0 or more")
        folder = Path(dst) / split
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = {}
            for i in range(count):
                image, seen = draw(np.random.default_rng((seed, number, i)))
                path = folder / f"balloons_{split}_{i:04d}.jpg"
                Image.fromarray(image).save(path, quality=JPEG_QUALITY)
                size = path.stat().st_size
                entries[f"{path.name}{size}"] = _via_entry(path.name, size, [outline(mask) for mask in seen])
            (folder / "via_region_data.json").write_text(json.dumps(entries), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def _via_entry(name: str, size: int, outlines: list[np.ndarray]) -> dict:
    regions = {}
    for i, points in enumerate(outlines):
        shape = {"name": "polygon", "all_points_x": points[:, 0].tolist(), "all_points_y": points[:, 1].tolist()}
        regions[str(i)] = {"shape_attributes": shape, "region_attributes": {"name": "balloon"}}
    return {"fileref": "", "size": size, "filename": name, "base64_img_data": "", "file_attributes": {}, "regions": regions}


def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw an image of balloons among other things.

    Args:
        rng: random generator; the image depends only on its state.

    Returns:
        The image, uint8 [HEIGHT, WIDTH, 3] (RGB), and for each balloon a mask of its visible part, bool [HEIGHT * SUPERSAMPLE, WIDTH *
        SUPERSAMPLE].
    """
    scene = Scene(rng, WIDTH, HEIGHT)
    layout = _Layout(scene)
    for _ in range(rng.integers(2, 6)):
        layout.stand_about(IN_THE_AIR if rng.random() < 0.4 else ON_THE_GROUND)
    [_bunch, _loose, _loose, _row][rng.integers(4)](layout)
    for _ in range(rng.integers(0, 4)):
        layout.stand_about(IN_FRONT, in_front=True)
    while not layout.balloons:  # nearly always there is one already
        _loose(layout)
    return scene.finish(), [scene.numbers == number for number in layout.balloons]


class _Layout:
    """Adds things to a scene, each only where enough of every balloon stays visible and in one piece."""

    def __init__(self, scene: Scene):
        self.scene, self.rng = scene, scene.rng
        self.things = 0
        self.balloons: dict[int, float] = {}  # a balloon's number to its whole area, in the pixels of scene.numbers

    def stand_about(self, kinds: tuple[str, ...], in_front: bool = False) -> None:
        """Add a thing of a random kind at a random position.

        Nothing is added if six positions in a row would hide too much of a balloon.

        Args:
            kinds: names of things, keys of :data:`raydetr.demo.things.KINDS`, from which one is drawn.
            in_front: whether the thing is one in front of the balloons: large, and anywhere in the image. Otherwise it is small, and stands
                on the ground or is in the air.
        """
        rng, width, height = self.rng, self.scene.width, self.scene.height
        kind = kinds[rng.integers(len(kinds))]
        parts = KINDS[kind](rng)
        for _ in range(6):
            y = rng.uniform(0.05, 0.45) if kind in IN_THE_AIR else rng.uniform(0.62, 0.95)
            y = rng.uniform(0.1, 1.0) if in_front else y
            size = height * (rng.uniform(0.05, 0.13) if in_front else rng.uniform(0.04, 0.09) + 0.1 * y * rng.random())
            tilt = 0.4 if in_front else 0.25 if kind in IN_THE_AIR else 0.04
            placed = place(parts, rng.uniform(0.02, 0.98) * width, y * height, size, tilt * rng.normal(), rng.uniform(0.85, 1.2))
            if self._leaves_balloons_visible(self.scene.footprint(placed)):
                self._add(placed)
                return

    def add_balloon(self, x: float, y: float, size: float, string_to: tuple[float, float] | None = None) -> bool:
        """Add a balloon and its string, if enough of this balloon and of all earlier ones is visible.

        Args:
            x: horizontal position of its center in image pixels.
            y: vertical position of its center in image pixels.
            size: pixels from its center to its top.
            string_to: where its string ends, (x, y) in image pixels; None draws a position below the balloon.

        Returns:
            Whether the balloon was added.
        """
        rng = self.rng
        placed = place(_balloon(rng), x, y, size, rng.normal() * 0.22, rng.uniform(0.9, 1.1))
        footprint = self.scene.footprint(placed)
        whole = sum(_area(part.points) for part in placed[:1]) * SUPERSAMPLE**2
        if footprint.sum() < LEAST_VISIBLE * 1.1 * whole or not self._leaves_balloons_visible(footprint):
            return False
        knot = placed[-1].points.mean(0)
        self.scene.add([_string(rng, knot, string_to, size)], self.things)
        self._add(placed)
        self.balloons[self.things] = whole
        return True

    def _add(self, placed: list[Part]) -> None:
        self.things += 1
        self.scene.add(placed, self.things)

    def _leaves_balloons_visible(self, footprint: np.ndarray) -> bool:
        touched = np.bincount(self.scene.numbers[footprint], minlength=1)
        for number in self.balloons.keys() & set(np.flatnonzero(touched)):
            seen = self.scene.numbers == number
            window = _window(seen)
            left = seen[window] & ~footprint[window]
            if left.sum() < LEAST_VISIBLE * self.balloons[number]:
                return False
            pieces = _pieces(left)
            if np.bincount(pieces[left]).max() < 0.97 * left.sum():
                return False
        return True


# --- balloons ---


def _balloon(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a balloon, the body first and the knot last."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    lower = np.maximum(-np.cos(turn), 0)
    half = rng.uniform(0.78, 0.98) * (1 - rng.uniform(0.05, 0.3) * lower**1.5)
    body = np.stack([half * np.sin(turn), -np.cos(turn) + rng.uniform(0.02, 0.3) * lower**2], axis=1)
    color, low = _balloon_color(rng), body[:, 1].max()
    opacity = rng.choice([1.0, 0.93, 0.82], p=[0.5, 0.35, 0.15])
    parts = [Part(body, color, "shiny", opacity)]
    pattern = rng.random()
    print_color = mixed(color, (255, 255, 255), 0.6) if rng.random() < 0.6 else color_of(rng, (0.5, 1.0), (0.4, 1.0))
    if pattern < 0.1:
        spots = rng.uniform(-0.6, 0.6, (12, 2))
        parts += [Part(ellipse(x * 0.95, y, 0.09, 0.09, corners=12), print_color, opacity=0.85) for x, y in spots if np.hypot(x, y) < 0.68]
    elif pattern < 0.16:
        bands = ((-0.45, -0.2), (0.1, 0.35))
        parts += [Part(_band(body, *band), print_color, "round", 0.9) for band in bands]
    elif pattern < 0.22:
        spikes = ellipse(0, -0.05, 0.42, 0.42, corners=10) * np.where(np.arange(10) % 2, 0.5, 1.0)[:, None]
        parts.append(Part(spikes, print_color, opacity=0.9))
    glint = ellipse(-0.3 * half.max(), -0.45, 0.1, 0.2, corners=16)
    parts.append(Part(glint, mixed(color, (255, 255, 255), 0.75), opacity=rng.uniform(0.25, 0.75)))
    knot = polygon((-0.05, low - 0.03), (0.05, low - 0.03), (0.11, low + 0.12), (0, low + 0.09), (-0.11, low + 0.12))
    return [*parts, Part(knot, darker(color, 0.75))]


def _balloon_color(rng: np.random.Generator) -> Color:
    kind = rng.random()
    if kind < 0.65:
        return color_of(rng, (0.75, 1.0), (0.7, 1.0))
    if kind < 0.82:
        return color_of(rng, (0.25, 0.5), (0.85, 1.0))
    return [(240, 240, 238), (190, 192, 198), (205, 165, 75), (60, 60, 66), (130, 20, 40)][rng.integers(5)]


def _band(body: np.ndarray, top: float, bottom: float) -> np.ndarray:
    """Return the outline of the body between two heights."""
    right = body[(body[:, 0] >= 0) & (body[:, 1] >= top) & (body[:, 1] <= bottom)]
    left = body[(body[:, 0] < 0) & (body[:, 1] >= top) & (body[:, 1] <= bottom)]
    return np.concatenate([right, left])


def _string(rng: np.random.Generator, knot: np.ndarray, end: tuple[float, float] | None, size: float) -> Part:
    if end is None:
        end = (knot[0] + rng.normal() * 0.25 * size, knot[1] + rng.uniform(1.0, 3.0) * size)
    t = np.linspace(0, 1, 24)[:, None]
    sway = np.sin(np.pi * t * rng.integers(1, 4)) * rng.normal() * 0.07 * size * np.array([1.0, 0.1])
    return Part(
        stroke(knot * (1 - t) + np.array(end) * t + sway, rng.uniform(0.6, 1.1)),
        darker((205, 205, 200), rng.uniform(0.3, 1.15)),
        solid=False,
    )


def _bunch(layout: _Layout) -> None:
    """Add balloons whose strings meet below them, as if one hand held them."""
    rng, width, height = layout.rng, layout.scene.width, layout.scene.height
    size = height * rng.uniform(0.13, 0.2)
    x, y = rng.uniform(0.25, 0.75) * width, rng.uniform(0.25, 0.45) * height
    hand = (x + rng.normal() * size, min(y + rng.uniform(3, 5) * size, height * 1.02))
    for _ in range(rng.integers(3, 6)):
        aside, above = rng.normal(0, 1.15 * size, 2)
        layout.add_balloon(x + aside * 1.2, y + above, size * rng.uniform(0.8, 1.15), hand)
    if rng.random() < 0.4:
        _loose(layout, most=2)


def _loose(layout: _Layout, most: int = 6) -> None:
    """Add balloons that fly separately, near and far."""
    rng, width, height = layout.rng, layout.scene.width, layout.scene.height
    for _ in range(rng.integers(1, most + 1)):
        size = height * np.exp(rng.uniform(np.log(0.12), np.log(0.3)))
        layout.add_balloon(rng.uniform(0.0, 1.0) * width, rng.uniform(0.02, 0.85) * height, size)


def _row(layout: _Layout) -> None:
    """Add balloons side by side, as on a line at a party."""
    rng, width, height = layout.rng, layout.scene.width, layout.scene.height
    count, size = int(rng.integers(3, 6)), height * rng.uniform(0.11, 0.16)
    level, sag, spread = rng.uniform(0.15, 0.5) * height, rng.uniform(-0.15, 0.2) * height, rng.uniform(0.5, 0.95)
    for at in np.linspace(-1, 1, count):
        x = width * (0.5 + 0.5 * spread * at) + rng.normal() * 0.2 * size
        layout.add_balloon(x, level + sag * (1 - at**2) + rng.normal() * 0.2 * size, size * rng.uniform(0.85, 1.15))
    if rng.random() < 0.5:
        _loose(layout, most=2)


# --- outlines ---


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the outline of the largest connected piece of a mask.

    Args:
        mask: mask from :func:`draw`, bool [h, w], with at least one set pixel.

    Returns:
        Corners (x, y) in clockwise order, float64 [n, 2], in image pixels (the mask is ``SUPERSAMPLE`` times larger).

    Raises:
        ValueError: the mask is empty.
    """
    return simplified(edge(mask), TOLERANCE * SUPERSAMPLE) / SUPERSAMPLE


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns that contain a set pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _pieces(mask: np.ndarray) -> np.ndarray:
    """Return the connected pieces of a mask, numbered from 1."""
    pieces = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=pieces)
    return pieces


def edge(mask: np.ndarray) -> np.ndarray:
    """Trace the outer edge of the largest piece of a mask.

    The trace follows the borders between pixels with the piece on its right.

    Args:
        mask: bool [h, w].

    Returns:
        Pixel corners (x, y) in clockwise order, int64 [n, 2].

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("the mask is empty")
    window = _window(mask)
    pieces = _pieces(mask[window])
    piece = np.pad(pieces == np.bincount(pieces[mask[window]]).argmax(), 1)
    start = tuple(int(each) for each in np.argwhere(piece)[0])  # topmost, then leftmost: its upper edge is an edge of the piece
    y, x, dy, dx = *start, 0, 1
    corners = []
    while True:
        # The pixels ahead of the corner (y, x), to the left and right of the direction (dy, dx).
        left = piece[y + (dy - dx - 1) // 2, x + (dx + dy - 1) // 2]
        right = piece[y + (dy + dx - 1) // 2, x + (dx - dy - 1) // 2]
        if left or not right:
            corners.append((x, y))
            dy, dx = (-dx, dy) if left else (dx, -dy)
        y, x = y + dy, x + dx
        if (y, x) == start and (dy, dx) == (-1, 0):
            return np.array([start[::-1], *corners], dtype=np.int64) + (window[1].start - 1, window[0].start - 1)


def simplified(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Return a closed outline with fewer corners, by the algorithm of Douglas and Peucker (1973).

    Args:
        points: corners (x, y) of the outline, [n, 2], without a repeated first corner at the end.
        tolerance: greatest distance of a dropped corner from the new outline, in the units of ``points``.

    Returns:
        The corners that are kept, [m, 2], in the same order and with the dtype of ``points``.
    """
    far = int(np.linalg.norm(points - points[0], axis=1).argmax())
    closed = np.concatenate([points, points[:1]])
    return np.concatenate([_thinned(closed[: far + 1], tolerance)[:-1], _thinned(closed[far:], tolerance)[:-1]])


def _thinned(line: np.ndarray, tolerance: float) -> np.ndarray:
    start, along = line[0], line[-1] - line[0]
    length = max(float(np.hypot(*along)), 1e-9)
    apart = np.abs((line[:, 0] - start[0]) * along[1] - (line[:, 1] - start[1]) * along[0]) / length
    worst = int(apart.argmax())
    if apart[worst] <= tolerance:
        return line[[0, -1]]
    return np.concatenate([_thinned(line[: worst + 1], tolerance)[:-1], _thinned(line[worst:], tolerance)])
