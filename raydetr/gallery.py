"""What a person looks at: pictures with boxes drawn into them, and the page that shows many of them."""

import colorsys
import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import jinja2
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

GENERATOR = "raydetr"  # how a page of ours is told from somebody else's index.html

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


@dataclass
class Column:
    """What one model found in one picture: the files to show (paths below the page), the boxes drawn, the best score of all."""

    picture: str
    thumbnail: str
    boxes: list[Box]
    best_score: float


@dataclass
class Card:
    """One picture of the page: name, (width, height) in pixels, true boxes (None where they are not known), a column per model."""

    name: str
    size: tuple[int, int]
    true: list[Box] | None
    columns: list[Column] = field(default_factory=list)


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


def gallery_page(
    models: dict[str, str], cards: Sequence[Card], threshold: float, colours: dict[str, Colour], left_out: Sequence[str] = ()
) -> str:
    """The page as HTML: a legend of the categories that are to be seen, and a card per picture with a column per model.

    ``models`` are the columns' headings and what each stands for, ``left_out`` lines about pictures that are not shown. The page
    needs nothing but the files its cards name. Every text is escaped: names come from files that others wrote.
    """
    found = [Counter(box.name for card in cards for box in card.columns[place].boxes) for place in range(len(models))]
    truth = Counter(box.name for card in cards for box in card.true or ())
    seen = (truth + sum(found, Counter())).most_common()
    return _TEMPLATE.render(
        css=_CSS,
        generator=GENERATOR,
        models=models,
        headings=list(models),
        cards=cards,
        threshold=f"{threshold:.2f}" if round(threshold, 2) == threshold else f"{threshold:g}",
        colours=colours,
        left_out=left_out,
        seen=[name for name, _ in seen],
        found=found,
        truth=truth,
        with_truth=any(card.true is not None for card in cards),
    )


def _count(boxes: Sequence[Box]) -> str:
    """The boxes in words: ``3 balloon, 1 face``."""
    return ", ".join(f"{number} {name}" for name, number in Counter(box.name for box in boxes).most_common())


def _floored(score: float) -> str:
    """Two decimals, rounded down: 0.699 must not be said to be 0.70 where 0.70 would have been drawn."""
    return f"{math.floor(score * 100) / 100:.2f}"


def _url(path: str) -> str:
    return quote(path)


def _css_colour(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_CSS = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1b1d22; --soft: #5c6370; --line: #dfe2e8; --dark: #e9ebef; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #131519; --card: #1d2026; --ink: #e8eaee; --soft: #a0a7b4; --line: #30353e; --dark: #0c0e11; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 3rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; letter-spacing: -.01em; }
header p { margin: .35rem 0 0; color: var(--soft); }
header p::first-letter { text-transform: uppercase; }
.legend { display: inline-block; max-width: 100%; max-height: 60vh; overflow: auto; margin: 1.1rem 0 1.4rem; padding: .4rem .9rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .22rem 1.3rem .22rem 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .95em; height: .95em; margin-right: .55em; border-radius: .2em; vertical-align: -.1em; }
.dashed { margin-right: .45em; vertical-align: -.2em; }
.dashed rect { x: 2px; y: 2px; width: 20px; height: 12px; fill: none; stroke-width: 2; }
main { display: flex; flex-wrap: wrap; gap: 1rem; }
main::after { content: ""; flex: 1000 0 0; }
.card { flex: var(--wide) 1 calc(var(--wide) * 17rem); max-width: 100%; min-width: min(100%, 13rem); margin: 0; overflow: hidden;
  background: var(--card); border-radius: .7rem; box-shadow: 0 0 0 1px var(--line), 0 1px 4px rgb(0 0 0 / .08); }
.columns { display: flex; gap: 3px; }
.columns > div { flex: 1 1 0; min-width: 0; }
img { display: block; width: 100%; height: auto; max-height: 90vh; object-fit: contain; background: var(--dark); }
.card p { margin: .35rem .7rem; font-size: .9rem; }
figcaption { padding-bottom: .25rem; }
.soft { color: var(--soft); }
.tag { margin: 0 .4em 0 0; padding: .05em .5em; border-radius: .3em; background: var(--dark); color: var(--soft); font-size: .8rem; }
.warning { margin-bottom: 1.2rem; }
@media (max-width: 40rem) {
  .pair { flex-basis: 100%; }
  .pair .columns { flex-direction: column; gap: 0; }
}
""".strip()

_PAGE = """
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{{ generator }}">
<title>Predictions</title>
<style>
{{ css|safe }}
</style>
</head>
<body>
<header>
<h1>Predictions</h1>
<p>{% for heading, model in models.items() %}{{ heading }}{{ ":" if models|length > 1 else " by" }} {{ model }}
{{- " · " if not loop.last }}{% endfor %}</p>
<p>{{ cards|length }} picture{{ "s" if cards|length != 1 }}, boxes with a score of {{ threshold }} or more.
Click a picture to see it in its own size.</p>
<div class="legend"><table>
<tr><th>Category</th>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}{% if with_truth %}<th>true</th>{% endif %}</tr>
{% for name in seen %}
<tr><td><span class="swatch" style="background: {{ colours[name]|css_colour }}"></span>{{ name }}</td>
{%- for counts in found %}<td>{{ counts[name] }}</td>{% endfor %}{% if with_truth %}<td>{{ truth[name] }}</td>{% endif %}</tr>
{% endfor %}
{% if with_truth %}
<tr><td class="soft" colspan="{{ headings|length + 2 }}"><svg class="dashed" width="24" height="16">
<rect stroke="#000"/><rect stroke="#fff" stroke-dasharray="4 4"/></svg>true box</td></tr>
{% elif not seen %}
<tr><td class="soft" colspan="{{ headings|length + 1 }}">nothing above {{ threshold }} in any picture</td></tr>
{% endif %}
</table></div>
{% if left_out %}
<details class="warning"><summary>{{ left_out|length }} picture{{ "s" if left_out|length != 1 }} left out</summary>
<ul>{% for line in left_out %}<li>{{ line }}</li>{% endfor %}</ul></details>
{% endif %}
</header>
<main>
{% for card in cards %}
{% set ratio = [[card.size[0] / card.size[1], 0.6]|max, 3]|min %}
<figure class="card{{ " pair" if headings|length > 1 }}" style="--wide: {{ "%.3f"|format(ratio * headings|length) }}">
<div class="columns">
{% for column in card.columns %}
<div>
<a href="{{ column.picture|url }}"><img src="{{ column.thumbnail|url }}" width="{{ card.size[0] }}" height="{{ card.size[1] }}"
 loading="lazy" decoding="async" alt="{{ card.name }}: {{ column.boxes|count_boxes or "nothing found" }}"></a>
<p>{% if headings|length > 1 %}<span class="tag">{{ headings[loop.index0] }}</span>{% endif %}
{%- if column.boxes %}{{ column.boxes|count_boxes }}
{%- else %}<span class="soft">nothing above {{ threshold }} (best {{ column.best_score|floored }})</span>{% endif %}</p>
</div>
{% endfor %}
</div>
<figcaption>
{% if card.true is not none %}
<p><span class="tag">true</span>{{ card.true|count_boxes or "no box" }}</p>
{% endif %}
<p class="soft">{{ card.name }}</p>
</figcaption>
</figure>
{% endfor %}
</main>
</body>
</html>
""".lstrip()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(url=_url, css_colour=_css_colour, count_boxes=_count, floored=_floored)
    return environment.from_string(_PAGE)


_TEMPLATE = _template()
