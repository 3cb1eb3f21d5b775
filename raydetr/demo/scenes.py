"""Draw scenes: a background, things in front of each other, and a map of which thing each pixel shows.

Both the generated balloon images (balloons.py) and the images that ``detr_tiny`` is pre-trained on are such scenes. A thing is a list of
:class:`Part` in its own coordinates: about one unit from the center to the edge, with y pointing down. :func:`place` moves it into the
image. Everything is drawn at twice the size and then reduced. All random draws come from one NumPy generator, so that a seed always gives
the same image.
"""

import colorsys
import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 2

Color = tuple[float, float, float]


@dataclasses.dataclass
class Part:
    """One polygon of a thing.

    Attributes:
        points: corners (x, y), float [n, 2], in the thing's own coordinates or, after :func:`place`, in image pixels.
        color: RGB, 0 to 255.
        shade: ``"flat"``, ``"linear"`` (a gradient along the light), ``"round"`` (a ball) or ``"shiny"`` (a ball with a highlight).
        opacity: 0 to 1.
        solid: whether the part belongs to the thing's mask and hides what is behind it; strings do not.
    """

    points: np.ndarray
    color: Color
    shade: str = "flat"
    opacity: float = 1.0
    solid: bool = True


# --- shapes and colors, in a thing's own coordinates ---


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """Return corners (x, y) as an array, float64 [n, 2]."""
    return np.array(points, dtype=np.float64)


def rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Return the four corners of an axis-aligned rectangle.

    Args:
        left: x of the left edge.
        top: y of the upper edge.
        right: x of the right edge.
        bottom: y of the lower edge.

    Returns:
        Corners in clockwise order, float64 [4, 2].
    """
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 1.0, corners: int = 32) -> np.ndarray:
    """Return points on an ellipse, or on an arc of it.

    Args:
        x: horizontal position of the center.
        y: vertical position of the center.
        rx: horizontal radius.
        ry: vertical radius.
        start: where the arc begins, as a fraction of a turn, clockwise from the right.
        stop: where the arc ends; an arc of less than a whole turn includes this point.
        corners: number of points.

    Returns:
        Points (x, y) in clockwise order, float64 [corners, 2].
    """
    turn = 2 * np.pi * np.linspace(start, stop, corners, endpoint=stop - start < 1)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def stroke(points: np.ndarray, width: float) -> np.ndarray:
    """Return the outline of a line that is drawn along points.

    Args:
        points: the line, float [n, 2], with at least two points.
        width: width of the line, in the units of ``points``.

    Returns:
        A polygon, float [2 * n, 2]: one side of the line, then the other side backwards.
    """
    along = np.gradient(points, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= width / 2 / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-9)
    return np.concatenate([points + across, (points - across)[::-1]])


def smooth(points: np.ndarray, corners: int = 40) -> np.ndarray:
    """Return a smooth closed curve near points, a periodic quadratic B-spline.

    Args:
        points: control points of the curve, float [n, 2].
        corners: number of points on the curve.

    Returns:
        Points on the curve, float64 [corners, 2].
    """
    n = len(points)
    t = np.linspace(0, n, corners, endpoint=False)
    i, u = t.astype(int), (t % 1)[:, None]
    before, here, after = points[i - 1], points[i], points[(i + 1) % n]
    return 0.5 * (1 - u) ** 2 * before + (0.5 + u - u**2) * here + 0.5 * u**2 * after


def color_of(rng: np.random.Generator, saturation=(0.35, 1.0), value=(0.35, 1.0), hue=(0.0, 1.0)) -> Color:
    """Draw a color from uniform ranges of hue, saturation and value.

    Args:
        rng: random generator.
        saturation: lowest and highest saturation, 0 to 1.
        value: lowest and highest value, 0 to 1.
        hue: lowest and highest hue in turns of the color circle; numbers above 1 wrap around.

    Returns:
        The color as RGB, 0 to 255.
    """
    h, s, v = (low + (high - low) * rng.random() for low, high in (hue, saturation, value))
    red, green, blue = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return 255 * red, 255 * green, 255 * blue


def darker(color: Color, by: float) -> Color:
    """Return a color with every channel multiplied by a factor.

    Args:
        color: RGB, 0 to 255.
        by: the factor; above 1 the color becomes lighter, and channels stop at 255.

    Returns:
        The new color.
    """
    red, green, blue = (min(255.0, channel * by) for channel in color)
    return red, green, blue


def mixed(first: Color, second: Color, share: float) -> Color:
    """Return a mix of two colors.

    Args:
        first: RGB, 0 to 255.
        second: RGB, 0 to 255.
        share: share of the second color, 0 to 1.

    Returns:
        The mix as RGB, 0 to 255.
    """
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def place(parts: list[Part], x: float, y: float, size: float, angle: float = 0.0, stretch: float = 1.0) -> list[Part]:
    """Move a thing from its own coordinates into the image.

    Args:
        parts: the thing; it is not changed.
        x: horizontal position of its origin in image pixels.
        y: vertical position of its origin in image pixels.
        size: image pixels per unit of the thing's coordinates.
        angle: rotation in radians, clockwise as seen in the image.
        stretch: factor by which the thing is wider than it was, before the rotation.

    Returns:
        The same parts with points in image pixels.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = size * np.array([[cos, sin], [-sin, cos]])
    return [dataclasses.replace(part, points=(part.points * (stretch, 1.0)) @ matrix + (x, y)) for part in parts]


# --- the image ---


class Scene:
    """An image that is being drawn, with a map of which thing is visible at each pixel.

    Args:
        rng: random generator of the background, the light and the camera's noise.
        width: width of the finished image in pixels.
        height: height of the finished image in pixels.

    Attributes:
        numbers: number of the visible thing at each pixel, 0 for none: uint8 [height * SUPERSAMPLE, width * SUPERSAMPLE].
        image: the image so far, a Pillow image of the same size.
        light: direction towards the light in the image plane, a unit vector (x, y).
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int):
        self.rng, self.width, self.height = rng, width, height
        turn = rng.uniform(-0.9, 0.9)
        self.light = np.array([np.sin(turn), -np.cos(turn)])
        self.image = Image.fromarray(background(rng, width, height)).resize(
            (width * SUPERSAMPLE, height * SUPERSAMPLE), Image.Resampling.BILINEAR
        )
        self.numbers = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), dtype=np.uint8)
        self.grain = fractal_noise(rng, self.numbers.shape, 12)

    def footprint(self, parts: list[Part]) -> np.ndarray:
        """Return the mask of the pixels that solid parts would cover.

        Args:
            parts: parts from :func:`place`.

        Returns:
            The mask, bool, in the shape of ``numbers``.
        """
        canvas = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(canvas)
        for part in parts:
            if part.solid:
                draw.polygon(_corners(part.points), fill=1)
        return np.asarray(canvas).astype(bool)

    def add(self, parts: list[Part], number: int) -> None:
        """Draw a thing over the scene.

        Args:
            parts: the thing's parts from :func:`place`, from back to front.
            number: the thing's number, 1 to 255, which ``numbers`` gets at the pixels of its solid parts.
        """
        for part in parts:
            self._paint(part)
        self.numbers[self.footprint(parts)] = number

    def _paint(self, part: Part) -> None:
        points = part.points * SUPERSAMPLE
        left, top = np.maximum(np.floor(points.min(0)), 0).astype(int)
        right, bottom = np.minimum(np.ceil(points.max(0)) + 1, self.image.size).astype(int)
        if right <= left or bottom <= top:
            return
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon(_corners(part.points, left, top), fill=round(255 * part.opacity))
        if part.shade == "flat":
            self.image.paste(tuple(int(c) for c in part.color), (left, top), mask)
            return
        y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
        center, half = (points.min(0) + points.max(0)) / 2, np.maximum((points.max(0) - points.min(0)) / 2, 1)
        x, y = (x - center[0]) / half[0], (y - center[1]) / half[1]
        colors = self._lit(part, x, y)
        colors *= 0.95 + 0.1 * self.grain[top:bottom, left:right, None]
        self.image.paste(Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8)), (left, top), mask)

    def _lit(self, part: Part, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the shaded colors of a part, float [h, w, 3], at x and y from -1 to 1 across its extent."""
        towards = x * self.light[0] + y * self.light[1]
        base = np.asarray(part.color, dtype=np.float32)
        if part.shade == "linear":
            return base * (0.9 + 0.22 * towards)[..., None]
        depth = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
        facing = 0.75 * towards + 0.66 * depth
        colors = base * (0.5 + 0.58 * np.clip(facing, -0.3, 1))[..., None]
        if part.shade == "shiny":
            glint = np.clip(facing, 0, 1) ** 24
            rim = (1 - depth) ** 3 * 0.25  # light from behind through the skin, as in a balloon or a glass ball
            colors += (255 - colors) * (0.75 * glint + rim * np.clip(-towards, 0, 1))[..., None]
        return colors

    def finish(self) -> np.ndarray:
        """Return the image with the blur, vignette, tint and noise of a camera: uint8 [height, width, 3]."""
        rng, image = self.rng, self.image.reduce(SUPERSAMPLE)
        if rng.random() < 0.3:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
        pixels = np.asarray(image).astype(np.float32)
        y, x = np.ogrid[-1 : 1 : self.height * 1j, -1 : 1 : self.width * 1j]
        pixels *= (rng.uniform(0.85, 1.1) * (1 - rng.uniform(0, 0.22) * (x**2 + y**2) / 2))[..., None].astype(np.float32)
        pixels *= rng.uniform(0.92, 1.08, 3).astype(np.float32)
        pixels += rng.uniform(0, 6) * rng.standard_normal((self.height, self.width, 1), dtype=np.float32)
        return np.clip(pixels, 0, 255).astype(np.uint8)


def _corners(points: np.ndarray, left: int = 0, top: int = 0) -> list[tuple[float, float]]:
    return [tuple(corner) for corner in (points * SUPERSAMPLE - (left, top)).tolist()]


# --- backgrounds ---


def fractal_noise(rng: np.random.Generator, shape: tuple[int, int], coarse: float = 4.0, octaves: int = 3) -> np.ndarray:
    """Return smooth random noise: coarse bumps with finer ones on top.

    Args:
        rng: random generator.
        shape: height and width of the result.
        coarse: number of the coarsest bumps along the shorter side.
        octaves: number of layers; each has bumps half as large and half as strong as the layer before.

    Returns:
        Noise from 0 to 1, float32 [height, width].
    """
    height, width = shape
    total = np.zeros(shape, dtype=np.float32)
    for octave in range(octaves):
        step = min(shape) / (coarse * 2**octave)
        cells = rng.random((max(2, round(height / step)), max(2, round(width / step))), dtype=np.float32)
        total += np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    total -= total.min()
    return total / max(total.max(), 1e-6)


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw a random background: open air, a town, the sea, a room, foliage or a texture.

    Args:
        rng: random generator.
        width: width in pixels.
        height: height in pixels.

    Returns:
        The background, uint8 [height, width, 3] (RGB).
    """
    family = [_open_air, _open_air, _town, _sea, _room, _room, _foliage, _texture][rng.integers(8)]
    return np.clip(family(rng, width, height), 0, 255).astype(np.uint8)


def _rgb(color: Color) -> np.ndarray:
    return np.array(color, np.float32)


def _gradient(top: Color, bottom: Color, width: int, height: int) -> np.ndarray:
    t = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.broadcast_to(_rgb(top) * (1 - t) + _rgb(bottom) * t, (height, width, 3)).copy()


def _sky(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    day = rng.random()
    if day < 0.65:
        top, low = color_of(rng, (0.3, 0.8), (0.6, 0.95), (0.53, 0.64)), color_of(rng, (0.03, 0.3), (0.85, 1.0), (0.5, 0.62))
    elif day < 0.85:
        top, low = color_of(rng, (0.3, 0.7), (0.35, 0.75), (0.6, 0.8)), color_of(rng, (0.3, 0.7), (0.8, 1.0), (0.02, 0.12))
    else:
        top, low = color_of(rng, (0.0, 0.12), (0.6, 0.8)), color_of(rng, (0.0, 0.1), (0.75, 0.95))
    sky = _gradient(top, low, width, height)
    cover = np.clip((fractal_noise(rng, (height, width), rng.uniform(1.5, 4), 4) - rng.uniform(0.45, 0.8)) * rng.uniform(2, 5), 0, 1)
    return sky + (_rgb(mixed(low, (255, 255, 255), 0.7)) - sky) * (0.9 * cover)[..., None]


def _ground(rng: np.random.Generator, image: np.ndarray, color: Color, horizon: np.ndarray) -> None:
    """Paint ground into an image, in place, below ``horizon``: a row for each column."""
    height, width = image.shape[:2]
    below = np.arange(height)[:, None] >= horizon[None, :]
    texture = 0.75 + 0.35 * fractal_noise(rng, (height, width), rng.uniform(6, 30), 3)
    fall = np.linspace(1.1, 0.8, height, dtype=np.float32)[:, None]
    image[below] = (_rgb(color) * (texture * fall)[..., None])[below]


def _ridge(rng: np.random.Generator, width: int, height: float, swing: float) -> np.ndarray:
    x = np.linspace(0, 2 * np.pi, width)
    waves = [rng.uniform(0.1, 1) / k * np.sin(k * rng.uniform(0.4, 0.9) * x + rng.uniform(0, 6.3)) for k in (1, 2, 4)]
    return height + swing * (waves[0] + waves[1] + waves[2])


def _open_air(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    image = _sky(rng, width, height)
    haze = tuple(image[height // 2].mean(0))
    land = color_of(rng, (0.25, 0.6), (0.3, 0.65), rng.choice([[0.2, 0.38], [0.08, 0.14]], p=[0.8, 0.2]))
    layers = rng.integers(0, 4)
    for layer in range(layers):
        share = (layer + 1) / layers
        level = height * (rng.uniform(0.45, 0.7) + 0.25 * share * rng.uniform(0.6, 1.1))
        _ground(rng, image, mixed(haze, land, 0.35 + 0.65 * share), _ridge(rng, width, level, height * rng.uniform(0.02, 0.1)))
    return image


def _town(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    image = _sky(rng, width, height)
    haze = tuple(image[height // 2].mean(0))
    for far in (0.6, 0.2)[rng.integers(2) :]:
        left = -rng.integers(0, width // 6)
        while left < width:
            wide, top = int(rng.uniform(0.08, 0.25) * width), int(height * rng.uniform(0.25, 0.75))
            wall = mixed(color_of(rng, (0.0, 0.4), (0.35, 0.85), (0.0, 0.14)), haze, far)
            image[top:, max(left, 0) : max(left + wide, 0)] = wall
            pane, step = darker(wall, rng.choice([0.6, 1.25])), max(6, int(rng.uniform(0.03, 0.07) * height))
            for row in range(top + step // 2, height, step):
                for column in range(left + step // 2, left + wide - step // 2, step):
                    image[row : row + step // 2, max(column, 0) : max(column + step // 3 + 1, 0)] = pane
            left += wide + int(rng.choice([0, 0, 0.05]) * width)
    if rng.random() < 0.6:
        _ground(rng, image, color_of(rng, (0.0, 0.3), (0.3, 0.6)), np.full(width, height * rng.uniform(0.8, 0.95)))
    return image


def _sea(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    image = _sky(rng, width, height)
    horizon = int(height * rng.uniform(0.35, 0.75))
    water = _gradient(
        color_of(rng, (0.3, 0.6), (0.5, 0.85), (0.48, 0.6)), color_of(rng, (0.4, 0.8), (0.3, 0.6), (0.5, 0.62)), width, height
    )
    waves = np.asarray(
        Image.fromarray(fractal_noise(rng, (height, max(width // 6, 8)), 20, 3)).resize((width, height), Image.Resampling.BILINEAR)
    )
    image[horizon:] = (water * (0.75 + 0.5 * waves)[..., None])[horizon:]
    if rng.random() < 0.5:
        _ground(rng, image, color_of(rng, (0.2, 0.45), (0.7, 0.95), (0.09, 0.13)), _ridge(rng, width, height * 0.85, height * 0.04))
    return image


def _room(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    wall = color_of(rng, (0.05, 0.5), (0.45, 0.95))
    image = _gradient(wall, darker(wall, rng.uniform(0.7, 1.0)), width, height)
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    period, paper = rng.uniform(0.04, 0.2) * height, rng.integers(5)
    pattern = {
        0: np.sin(2 * np.pi * x / period) + 0 * y,
        1: np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period),
        2: np.maximum(np.sin(2 * np.pi * x / period), np.sin(2 * np.pi * y / period)),
    }.get(int(paper), np.zeros((height, width), dtype=np.float32))
    image *= (1 + rng.uniform(0.03, 0.2) * np.where(pattern > 0.3, 1, -0.3))[..., None] if paper < 3 else 1
    if rng.random() < 0.4:  # a painting or a window on the wall
        wide, tall = int(width * rng.uniform(0.15, 0.4)), int(height * rng.uniform(0.2, 0.45))
        left, top = rng.integers(0, width - wide), rng.integers(0, height // 3)
        frame = color_of(rng, (0.0, 0.6), (0.2, 0.95), (0.05, 0.12))
        image[top : top + tall, left : left + wide] = frame
        inner = _sky(rng, wide, tall) if rng.random() < 0.6 else _texture(rng, wide, tall)
        edge = max(2, wide // 14)
        image[top + edge : top + tall - edge, left + edge : left + wide - edge] = inner[edge : tall - edge, edge : wide - edge]
    if rng.random() < 0.75:
        level = height * rng.uniform(0.65, 0.92)
        _ground(rng, image, color_of(rng, (0.1, 0.6), (0.25, 0.75), (0.03, 0.13)), np.full(width, level) + rng.uniform(-0.05, 0.05) * x[0])
    return image * (0.9 + 0.2 * fractal_noise(rng, (height, width), 1.5, 1))[..., None]


def _foliage(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    hue = rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4)
    dark, light = color_of(rng, (0.4, 0.8), (0.1, 0.35), hue), color_of(rng, (0.3, 0.8), (0.5, 0.9), hue)
    share = fractal_noise(rng, (height, width), rng.uniform(2, 12), 5)[..., None]
    image = _rgb(dark) * (1 - share) + _rgb(light) * share
    bokeh = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(bokeh)
    for _ in range(rng.integers(0, 14)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.02, 0.08) * height
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in mixed(light, color_of(rng, (0.0, 0.5), (0.7, 1.0)), 0.4)))
    return np.asarray(bokeh.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 5)))).astype(np.float32)


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    first, second = color_of(rng, (0.0, 0.7), (0.2, 0.95)), color_of(rng, (0.0, 0.7), (0.2, 0.95))
    share = fractal_noise(rng, (height, width), rng.uniform(1, 10), int(rng.integers(1, 6)))
    if rng.random() < 0.3:  # wood or marble: bands bent by the noise
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
        share = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(1, 6) * x + rng.uniform(-6, 6) * y + rng.uniform(0.3, 1.5) * share))
    return _rgb(first) * (1 - share)[..., None] + _rgb(mixed(first, second, rng.uniform(0.3, 1))) * share[..., None]
