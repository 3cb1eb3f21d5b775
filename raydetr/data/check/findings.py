"""What a check found, gathered by kind and told to a person."""

import dataclasses
import shutil
import textwrap

from raydetr.data.values import plain

SHOWN = 3  # places named of each finding; the rest is counted


@dataclasses.dataclass
class Finding:
    """One kind of fault in one split: what it is, every place that has it, what to do about it."""

    split: str
    what: str
    advice: str
    places: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """One line: ``train: 2 x image is missing: a.jpg (image id 1), b.jpg (image id 2); put it there``."""
        return f"{self.split}: {self._head()}; {self.advice}"

    def _head(self) -> str:
        if not self.places:
            return self.what
        more = f" and {len(self.places) - SHOWN} more" if len(self.places) > SHOWN else ""
        times = f"{len(self.places)} × " if len(self.places) > 1 else ""
        return f"{times}{self.what}: {', '.join(self.places[:SHOWN])}{more}"

    def lines(self, width: int) -> list[str]:
        """The finding as a wrapped paragraph: the fault, below it what to do."""
        head = textwrap.wrap(self._head(), width - 8, break_long_words=False, break_on_hyphens=False)
        advice = textwrap.wrap(f"-> {self.advice}", width - 8, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
        return [f"  {self.split:<6}{head[0]}", *(f"        {line}" for line in head[1:] + advice)]


@dataclasses.dataclass
class Report:
    """What :func:`raydetr.data.check.check` found.

    ``errors``: training would fail, or its numbers would lie. ``warnings``: worth knowing. ``stats``: by split, ``images``, ``boxes``,
    ``crowds``, ``without_boxes``, ``most_boxes`` (in one image), ``categories`` (name to its ``images`` and ``boxes``) and ``sizes``
    (``small``, ``medium``, ``large`` as COCO counts them: by area, below 32 x 32, below 96 x 96, above).
    """

    errors: list[Finding] = dataclasses.field(default_factory=list)
    warnings: list[Finding] = dataclasses.field(default_factory=list)
    stats: dict[str, dict] = dataclasses.field(default_factory=dict)
    quick: bool = False

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return not self.errors

    def error(self, split: str, what: str, place: str | None, advice: str) -> None:
        """Add a place to an error, or the error itself where it has none."""
        _add(self.errors, split, what, place, advice)

    def warn(self, split: str, what: str, place: str | None, advice: str) -> None:
        """Add a place to a warning, or the warning itself where it has none."""
        _add(self.warnings, split, what, place, advice)

    def text(self, width: int | None = None) -> str:
        """The report for a terminal of ``width`` columns (None: this one's), ending with the verdict."""
        width = max(60, min(width or shutil.get_terminal_size((120, 24)).columns, 140))
        lines = [*_overview(self.stats), *_balance(self.stats)]
        for title, findings in (("Errors: training would fail or its numbers would lie", self.errors), ("Warnings", self.warnings)):
            if findings:
                lines += ["", title, *(line for finding in findings for line in finding.lines(width))]
        return "\n".join([*lines, "", self.verdict()]).lstrip("\n")

    def verdict(self) -> str:
        """The last line."""
        left = " (quick check: no picture was decoded)" if self.quick else ""
        warnings = f", {_plural(len(self.warnings), 'warning')}" if self.warnings else ""
        if self.errors:
            return f"NOT ready to train: {_plural(len(self.errors), 'error')}{warnings}{left}"
        return f"Ready to train{warnings or ', nothing to complain of'}{left}"


def _add(findings: list[Finding], split: str, what: str, place: str | None, advice: str) -> None:
    # Looked for from the end: the places of one finding come in a row, more or less, and kinds are few.
    finding = next((each for each in reversed(findings) if (each.split, each.what) == (split, what)), None)
    if finding is None:
        findings.append(finding := Finding(split, what, advice))
    if place is not None:
        finding.places.append(place)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _overview(stats: dict[str, dict]) -> list[str]:
    if not stats:
        return []
    counts = [("", "images", "without boxes", "boxes", "crowds", "most in one image")]
    sizes = [("box area", "small < 32x32", "medium", "large >= 96x96")]  # as in COCO's AP by size
    for split, each in stats.items():
        counts.append((split, *(each[key] for key in ("images", "without_boxes", "boxes", "crowds", "most_boxes"))))
        total = max(1, sum(each["sizes"].values()))
        sizes.append((split, *(f"{number} ({100 * number / total:.0f}%)" for number in each["sizes"].values())))
    return [*_table(counts), "", *_table(sizes)]


def _balance(stats: dict[str, dict]) -> list[str]:
    names = list(dict.fromkeys(name for each in stats.values() for name in each["categories"]))
    if not names:
        return []
    rows = [("category", *(f"{split} {what}" for split in stats for what in ("images", "boxes")))]
    for name in names:
        row = [plain(name)]
        for each in stats.values():
            count = each["categories"].get(name, {"images": 0, "boxes": 0})
            row += [count["images"], f"{count['boxes']} ({100 * count['boxes'] / max(1, each['boxes']):.1f}%)"]
        rows.append(tuple(row))
    return ["", *_table(rows)]


def _table(rows: list[tuple]) -> list[str]:
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(f"{cell!s:<{w}}" if column == 0 else f"{cell!s:>{w}}" for column, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
