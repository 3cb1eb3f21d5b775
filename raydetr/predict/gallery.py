"""The HTML page that shows predictions on many images, side by side for several models; its template is ``gallery.html``."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import jinja2

from raydetr.draw import Box, Colour
from raydetr.pages import page_environment
from raydetr.predict.attention import SHADE, AttentionMaps


@dataclass
class Column:
    """What one model found in one image.

    Attributes:
        image: Path of the annotated image, relative to the page.
        thumbnail: Path of its thumbnail, relative to the page.
        boxes: The boxes that are drawn.
        best_score: The highest score in the image, drawn or not.
        attention: What the model looked at, if that was recorded.
    """

    image: str
    thumbnail: str
    boxes: list[Box]
    best_score: float
    attention: AttentionMaps | None = None


@dataclass
class Card:
    """One image of the page.

    Attributes:
        name: Its file name.
        size: Width and height in pixels.
        true: Its true boxes; None if they are unknown.
        columns: What each model found, in the models' order.
    """

    name: str
    size: tuple[int, int]
    true: list[Box] | None
    columns: list[Column] = field(default_factory=list)


def gallery_page(
    models: dict[str, str], cards: Sequence[Card], threshold: float | None, colours: dict[str, Colour], left_out: Sequence[str] = ()
) -> str:
    """Render the page: a legend of the categories that occur, and a card for each image with a column for each model.

    The page needs nothing but the files that its cards name. All text is escaped, because names come from files of others.

    Args:
        models: Heading of each column and the model that it stands for.
        cards: The images.
        threshold: Lowest score of a box that is drawn; None where each category has its own.
        colours: Color of each category by its name.
        left_out: A line for each image that is not shown.

    Returns:
        The page as HTML.
    """
    found = [Counter(box.name for card in cards for box in card.columns[column].boxes) for column in range(len(models))]
    truth = Counter(box.name for card in cards for box in card.true or ())
    seen = (truth + sum(found, Counter())).most_common()
    return _template().render(
        models=models,
        headings=list(models),
        cards=cards,
        threshold=_threshold_text(threshold),
        colours=colours,
        left_out=left_out,
        seen=[name for name, _ in seen],
        found=found,
        truth=truth,
        with_attention=any(column.attention and column.attention.spots for card in cards for column in card.columns),
        shade=SHADE,
        with_truth=any(card.true is not None for card in cards),
    )


def _threshold_text(threshold: float | None) -> str:
    if threshold is None:
        return "the threshold of their category"
    return f"{threshold:.2f}" if round(threshold, 2) == threshold else f"{threshold:g}"


def _template() -> jinja2.Template:
    environment = page_environment("raydetr.predict")
    environment.filters.update(url=quote, css_colour=_css_colour, count_boxes=_count, floored=_floored, percent=_percent)
    return environment.get_template("gallery.html")


def _count(boxes: Sequence[Box]) -> str:
    """Return the number of boxes of each category in words: ``3 balloon, 1 face``."""
    return ", ".join(f"{number} {name}" for name, number in Counter(box.name for box in boxes).most_common())


def _floored(score: float) -> str:
    """Return two decimals, rounded down: a score of 0.699 must not read 0.70 if boxes of 0.70 are drawn."""
    return f"{math.floor(score * 100) / 100:.2f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3f}%"


def _css_colour(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
