"""The HTML page that shows predictions on many images."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import jinja2

from raydetr.draw import Box, Colour

GENERATOR = "raydetr"  # how a page of ours is told from somebody else's index.html


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
