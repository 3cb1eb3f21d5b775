"""What tests of the report share: made-up searches, and what a reader of the page meets."""

import re
from html.parser import HTMLParser

from raydetr.config import load_config
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.eos_coef": {"uniform": [0.02, 0.5]},
    "optim.schedule": {"choice": ["step", "cosine"]},
    "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
}


class Page(HTMLParser):
    """What a reader of the page meets: headings, tables as lists of rows, charts by their names, links that leave it."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    def __init__(self, text: str):
        super().__init__()
        self.headings, self.tables, self.charts, self.links, self.words, self.open = [], [], [], [], "", []
        self.feed(text)
        assert not self.open, "unclosed tags"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        assert tag != "script"
        if "aria-label" in attrs:
            self.charts.append(attrs["aria-label"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """A mark of an SVG, which holds nothing."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.words += data
        if {"td", "th"} & set(self.open[-2:]):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += data

    def table(self, first: str):
        """The table whose heading row begins with this cell."""
        return next(table for table in self.tables if table[0][0] == first)


def page_of(path) -> Page:
    return Page(path.read_text())


def marks(svg: str, css: str) -> list[str]:
    """The marks of a chart that have a CSS class."""
    return [mark for mark in re.findall(r'<(?:path|circle|rect) class="([^"]*)"', svg) if css in mark.split()]


def make_search(folder, ends=(), metric="AP", trials=None, metrics=None, space=None, also=(), pruner="none", **settings) -> Search:
    """A search whose trials end as told: a number (complete), ("pruned", number), "failed" or "running".

    With ``also``, a complete trial ends with a tuple, ("complete", number, {name: number}).
    """
    config = load_config({"optim.epochs": 4, **{name.replace("__", "."): value for name, value in settings.items()}})
    options = {"trials": trials or max(1, len(ends)), "metric": metric, "sampler": "random", "also": also, "pruner": pruner}
    search = create_search(folder, read_space(space or SPACE), config, **options)
    for number, end in enumerate(ends):
        search.ask()
        state, value, *others = end if isinstance(end, tuple) else (end, None) if isinstance(end, str) else ("complete", end)
        others = others[0] if others else {}
        for epoch in range(1, 3 if state == "pruned" else 5):
            if value is not None:
                search.report(number, epoch, value * epoch / 4 if state == "complete" else value, others)
        if state != "running":
            reason = "out of memory: lower <optim.batch_size>"
            search.tell(number, state, value, reason=reason, metrics=metrics or {"AP50": 0.875}, latency=others.get("latency"))
    return search
