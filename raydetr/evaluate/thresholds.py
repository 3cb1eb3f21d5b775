"""A score threshold for each category: which detections to keep when a model is used.

A threshold is chosen on labeled images, at an IoU of 0.5. It either gives the best F1, the harmonic mean of precision and recall, or
reaches a precision or a recall that is asked for. Its 95 % interval is that of the bootstrap over images: other images of the same kind
would have given another threshold, and on few images a very different one.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from raydetr.errors import UserError
from raydetr.evaluate.coco import Evaluation
from raydetr.evaluate.intervals import CONFIDENCE, bootstrap_weights

RESAMPLES = 500
GOALS = ("f1", "precision", "recall")


class Goal(NamedTuple):
    """What a threshold is chosen for.

    Attributes:
        what: One of ``GOALS``.
        least: The precision or recall to reach, more than 0 and at most 1; None for ``f1``.
    """

    what: str
    least: float | None = None

    def __str__(self) -> str:
        """Return it as :func:`read_goal` reads it."""
        return self.what if self.least is None else f"{self.what}={self.least:g}"


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The score threshold of a category, and what it gives on the images on which it was chosen.

    Attributes:
        score: Detections with this score or more are kept.
        interval: Its 95 % interval over images; None on a single image.
        reached: Whether the precision or recall that was asked for is reached.
        precision: Share of the kept detections that hit an object.
        recall: Share of the objects that are found.
        objects: Number of objects.
    """

    score: float
    interval: tuple[float, float] | None
    reached: bool
    precision: float
    recall: float
    objects: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def read_goal(text: str) -> Goal:
    """Return the goal that a text such as ``f1``, ``precision=0.9`` or ``recall=0.8`` names.

    Raises:
        UserError: It is none of them.
    """
    what, given, number = text.partition("=")
    try:
        least = float(number) if given else None
    except ValueError:
        least = -1.0
    if what not in GOALS or (what == "f1") != (least is None) or (least is not None and not 0 < least <= 1):
        raise UserError(f"--threshold-goal: {text!r} is none of f1, precision=P and recall=R, with P and R above 0 and up to 1")
    return Goal(what, least)


def choose_thresholds(evaluation: Evaluation, goal: Goal = Goal("f1"), seed: int = 0) -> dict[int, Threshold]:  # noqa: B008  # immutable
    """Choose a score threshold for every category.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval` on the images to choose on.
        goal: What they are chosen for.
        seed: Seed of the bootstrap.

    Returns:
        The thresholds by category id, without those of categories that have no object, or of which nothing was detected.
    """
    matches, images = evaluation.matches, len(evaluation.image_ids)
    weights = bootstrap_weights(images, RESAMPLES, seed) if images > 1 else np.empty((0, images))
    chosen = {}
    for category, category_id in enumerate(evaluation.category_ids):
        mine = np.flatnonzero((matches.category == category) & ~matches.ignored[0, 0])
        objects = matches.objects[0, :, category]
        if not len(mine) or not objects.sum():
            continue
        image, scores, hits = matches.image[mine], matches.score[mine], matches.matched[0, 0][mine]
        score, (precision, recall, reached) = _choose(scores, hits, np.ones(len(mine)), float(objects.sum()), goal)
        counts = ((row[image], float(row @ objects)) for row in weights)
        drawn = [_choose(scores, hits, row, there, goal)[0] for row, there in counts if there and row.any()]
        tails = (1 - CONFIDENCE) / 2
        interval = np.quantile(drawn, [tails, 1 - tails]) if drawn else None
        limits = None if interval is None else (min(float(interval[0]), score), max(float(interval[1]), score))
        chosen[category_id] = Threshold(score, limits, reached, precision, recall, int(objects.sum()))
    return chosen


def _choose(
    scores: np.ndarray, hits: np.ndarray, weights: np.ndarray, objects: float, goal: Goal
) -> tuple[float, tuple[float, float, bool]]:
    """Return the threshold for detections in descending order of their scores, each counted as often as its weight says; and its
    precision, its recall, and whether the goal is reached."""
    drawn = weights > 0
    scores, hits, weights = scores[drawn], hits[drawn], weights[drawn]
    detected, found = np.cumsum(weights), np.cumsum(weights * hits)
    ends = np.flatnonzero(np.diff(scores, append=-np.inf) < 0)  # behind the last of several equal scores: no threshold lies elsewhere
    precision, recall = found[ends] / detected[ends], found[ends] / objects
    reached = True
    if goal.what == "f1":
        best = int(np.argmax(found[ends] / (detected[ends] + objects)))
    else:
        values = precision if goal.what == "precision" else recall
        enough = np.flatnonzero(values >= (goal.least or 0) - 1e-12)
        reached = len(enough) > 0
        # For a precision as many detections as possible, for a recall as few; the best there is where neither reaches it.
        best = int(np.argmax(values)) if not reached else int(enough[-1] if goal.what == "precision" else enough[0])
    end = ends[best]
    below = scores[end + 1] if end + 1 < len(scores) else 0.0
    return float((scores[end] + below) / 2), (float(precision[best]), float(recall[best]), reached)


def thresholds_table(names: Iterable[tuple[int, str]], thresholds: dict[int, Threshold], goal: Goal) -> str:
    """Return the thresholds as aligned text.

    Args:
        names: Id and name of each category, in order.
        thresholds: Of :func:`choose_thresholds`.
        goal: What they were chosen for.
    """
    rows = list(names)
    width = max([len("category"), *(len(name) for _, name in rows)])
    lines = [f"score thresholds for {goal}", f"{'category':<{width}}  threshold  95 % interval   precision  recall     F1  objects"]
    for category_id, name in rows:
        each = thresholds.get(category_id)
        if each is None:
            lines.append(f"{name:<{width}}  none: no object of it, or nothing was detected")
            continue
        interval = "one image only " if each.interval is None else f"{each.interval[0]:.3f} to {each.interval[1]:.3f} "
        numbers = f"{each.precision:>9.3f}  {each.recall:>6.3f}  {each.f1:.3f}  {each.objects:>7}"
        lines.append(f"{name:<{width}}  {each.score:>9.3f}  {interval:<15} {numbers}{'' if each.reached else '  not reached'}")
    return "\n".join(lines)
