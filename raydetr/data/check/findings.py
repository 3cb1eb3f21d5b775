"""The findings of a data check, grouped by kind, and the report that a person reads."""

import dataclasses
import shutil
import textwrap

from raydetr.text import count, shortlist
from raydetr.values import plain

SHOWN = 3  # occurrences named of each finding, and findings in a summary; the rest is counted
MINOR, NORMAL, GRAVE = range(3)  # weights of warnings: without effect on a training, worth a look, results are likely to be wrong


@dataclasses.dataclass
class Finding:
    """One kind of fault in one split.

    Attributes:
        split: ``train``, ``val``, ``both`` (of these two), or ``test``.
        what: The fault.
        advice: What to do about it.
        occurrences: Everything that has the fault, such as ``a.jpg (image id 1)``; empty where the fault is the split's.
        weight: ``MINOR``, ``NORMAL`` or ``GRAVE``.
    """

    split: str
    what: str
    advice: str
    occurrences: list[str] = dataclasses.field(default_factory=list)
    weight: int = NORMAL

    def __str__(self) -> str:
        """Return one line: ``train: 2 × image is missing: a.jpg (image id 1), b.jpg (image id 2); put it there``."""
        return f"{self.split}: {self._head()}; {self.advice}"

    def _head(self) -> str:
        if not self.occurrences:
            return self.what
        times = f"{len(self.occurrences)} × " if len(self.occurrences) > 1 else ""
        return f"{times}{self.what}: {shortlist(self.occurrences, SHOWN)}"

    def lines(self, width: int) -> list[str]:
        """Return the finding as a paragraph of at most ``width`` columns: the fault, and below it what to do."""
        head = textwrap.wrap(self._head(), width - 8, break_long_words=False, break_on_hyphens=False)
        advice = textwrap.wrap(f"-> {self.advice}", width - 8, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
        return [f"  {self.split:<6}{head[0]}", *(f"        {line}" for line in head[1:] + advice)]


@dataclasses.dataclass
class Report:
    """What :func:`raydetr.data.check.check.check` found.

    Attributes:
        errors: Findings with which training would fail, or its results would be wrong.
        warnings: Findings that are worth knowing, the gravest first.
        stats: By split, ``images``, ``boxes``, ``crowds``, ``without_boxes``, ``most_boxes`` (in one image), ``categories`` (name to its
            ``images`` and ``boxes``) and ``sizes`` (``small``, ``medium``, ``large`` as COCO counts them: by area, below 32 x 32 pixels,
            below 96 x 96, above).
        quick: Whether the check decoded no image.
    """

    errors: list[Finding] = dataclasses.field(default_factory=list)
    stats: dict[str, dict] = dataclasses.field(default_factory=dict)
    quick: bool = False
    _warnings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def warnings(self) -> list[Finding]:
        """The warnings, the gravest first."""
        return sorted(self._warnings, key=lambda finding: -finding.weight)

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return not self.errors

    def error(self, split: str, what: str, where: str | None, advice: str) -> None:
        """Add an error, or another occurrence of one.

        Args:
            split: ``train``, ``val``, or ``both``.
            what: The fault, in the same words at every occurrence.
            where: What has the fault, such as ``a.jpg (image id 1)``; None if it is the whole split's.
            advice: What to do about it.
        """
        _add(self.errors, split, what, where, advice, NORMAL)

    def warn(self, split: str, what: str, where: str | None, advice: str, weight: int = NORMAL) -> None:
        """Add a warning, or another occurrence of one.

        Args:
            split: ``train``, ``val``, or ``both``.
            what: The fault, in the same words at every occurrence.
            where: What has the fault, such as ``a.jpg (image id 1)``; None if it is the whole split's.
            advice: What to do about it.
            weight: ``MINOR``, ``NORMAL`` or ``GRAVE``.
        """
        _add(self._warnings, split, what, where, advice, weight)

    def text(self, width: int | None = None) -> str:
        """Return the report for a terminal of ``width`` columns (None: those of this terminal), ending with the verdict."""
        width = max(60, min(width or shutil.get_terminal_size((120, 24)).columns, 140))
        lines = [*_overview(self.stats), *_balance(self.stats)]
        for title, findings in (("Errors: training would fail or its metrics would be wrong", self.errors), ("Warnings", self.warnings)):
            if findings:
                lines += ["", title, *(line for finding in findings for line in finding.lines(width))]
        return "\n".join([*lines, "", self.verdict()]).lstrip("\n")

    def verdict(self) -> str:
        """Return the last line of the report."""
        left = " (quick check: no image was decoded)" if self.quick else ""
        warnings = f", {count(len(self._warnings), 'warning')}" if self._warnings else ""
        if self.errors:
            return f"NOT ready to train: {count(len(self.errors), 'error')}{warnings}{left}"
        return f"Ready to train{warnings or ', nothing to complain of'}{left}"

    def summary(self) -> list[str]:
        """Return what a training should show of the warnings: their number and the gravest ones, one line each; [] without warnings."""
        if not self._warnings:
            return []
        worst = [str(finding) for finding in self.warnings if finding.weight > MINOR][:SHOWN]
        return [f"data: {count(len(self._warnings), 'warning')}; `raydetr data check` tells all", *(f"warning: {line}" for line in worst)]


def _add(findings: list[Finding], split: str, what: str, where: str | None, advice: str, weight: int) -> None:
    # Searched from the end: the occurrences of one finding follow each other, more or less, and kinds are few.
    finding = next((each for each in reversed(findings) if (each.split, each.what) == (split, what)), None)
    if finding is None:
        findings.append(finding := Finding(split, what, advice, weight=weight))
    if where is not None:
        finding.occurrences.append(where)


def _overview(stats: dict[str, dict]) -> list[str]:
    if not stats:
        return []
    counts: list[tuple] = [("", "images", "without boxes", "boxes", "crowds", "most in one image")]
    sizes: list[tuple] = [("box area", "small < 32x32", "medium", "large >= 96x96")]  # as in COCO's AP by size
    for split, each in stats.items():
        counts.append((split, *(each[key] for key in ("images", "without_boxes", "boxes", "crowds", "most_boxes"))))
        total = max(1, sum(each["sizes"].values()))
        sizes.append((split, *(f"{number} ({100 * number / total:.0f}%)" for number in each["sizes"].values())))
    return [*_table(counts), "", *_table(sizes)]


def _balance(stats: dict[str, dict]) -> list[str]:
    names = list(dict.fromkeys(name for each in stats.values() for name in each["categories"]))
    if not names:
        return []
    rows: list[tuple] = [("category", *(f"{split} {what}" for split in stats for what in ("images", "boxes")))]
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
