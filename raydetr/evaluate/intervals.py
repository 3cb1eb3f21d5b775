"""How much an average precision depends on which images were chosen: intervals, and the comparison of two results.

A validation set is a sample. On other images of the same kind the same model scores differently, and on a small set by many points. The
intervals here say by how much: they are 95 % intervals over images, by the jackknife with Student's t.

**Why the jackknife.** On synthetic sets with known AP, the plain percentile bootstrap contains the true AP in 88, 91 and 94 % of cases at
13, 50 and 200 images, where 95 % is promised. The bias-corrected and accelerated bootstrap does no better. The jackknife contains it in 92,
93 and 95 %, and the true difference of two results on the same images in 95, 96 and 97 %. ``python -m benchmarks.claims coverage`` repeats
the measurement. With several categories on very few images the interval of an AP itself covers less (90 % for five categories on 13
images), because the AP is then biased upwards: the AP of a category on its two or three objects is mostly 0 or 1. Differences are not
affected.

**Why it is fast.** Detections are matched once. For any weights of the images, the counts of true positives and of detections are weighted
cumulative sums over the detections in the order of their scores, so that leaving an image out, or drawing it twice, needs no new matching.
The result equals that of pycocotools on the resampled set. (If detections of different images have the same score, the result of
pycocotools on duplicated images depends on their order; leaving images out keeps the order.)
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit  # scipy.stats has the same quantiles, and takes a second to import

from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, Evaluation, category_names, run_coco_eval, run_mask_eval, summarize
from raydetr.evaluate.matches import AREAS, IOUS, Matches

CONFIDENCE = 0.95
RECALLS = np.linspace(0, 1, 101)  # at which COCO reads the precision
MOST_GROUPS = 500  # more images than that are left out in groups
_CELLS = 2**17  # numbers worked on at a time, so that they stay in the processor's cache


# ---------------------------------------------------------------------------------------------------- AP of weighted images


def weighted_metrics(matches: Matches, weights: np.ndarray, names: Sequence[str] = tuple(METRICS)) -> dict[str, np.ndarray]:
    """Return COCO numbers per category as if each image occurred as often as its weight says.

    Args:
        matches: The matches of :attr:`raydetr.evaluate.coco.Evaluation.matches`.
        weights: Whole numbers [R, images], one row for each set of weights.
        names: Which of ``METRICS``.

    Returns:
        Arrays [R, categories] by name, NaN where the weighted images have no object of the category and size.
    """
    weights = np.ascontiguousarray(weights, np.float32)
    categories = matches.objects.shape[2]
    values = {name: np.full((len(weights), categories), np.nan) for name in names}
    ends = np.searchsorted(matches.category, np.arange(categories + 1))
    wanted: dict[tuple[str, int], list[str]] = {}
    for name in names:
        what, _, size, _ = METRICS[name]
        wanted.setdefault((what, list(AREAS).index(size)), []).append(name)
    for category in range(categories):
        part = slice(ends[category], ends[category + 1])
        for (what, area), group in wanted.items():
            objects = weights @ matches.objects[area, :, category].astype(np.float32)
            there = objects > 0
            if what == "precision":
                curves = _precision(matches, part, area, weights, objects, _ious(group))
            for name in group:
                _, iou, _, most = METRICS[name]
                chosen = _chosen(iou)
                each = curves[:, chosen] if what == "precision" else _recall(matches, part, area, most, weights, objects)[:, chosen]
                values[name][there, category] = each.mean(1)[there]
    return values


def overall(per_category: np.ndarray) -> np.ndarray:
    """Return the mean over the categories that have objects.

    Args:
        per_category: Numbers [R, categories], NaN for categories without objects.

    Returns:
        The means, float [R], NaN where no category has objects.
    """
    there = ~np.isnan(per_category)
    count = there.sum(1)
    total = np.where(there, per_category, 0).sum(1)
    return np.divide(total, count, out=np.full(len(per_category), np.nan), where=count > 0)


def _chosen(iou: float | None) -> np.ndarray:
    return np.arange(len(IOUS)) if iou is None else np.flatnonzero(np.isclose(IOUS, iou))


def _ious(names: Iterable[str]) -> list[int]:
    return sorted({number for name in names for number in _chosen(METRICS[name][1])})


def _recall(matches: Matches, part: slice, area: int, most: int, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return the recall with ``most`` detections per image, [R, IoUs]; 0 where there are no objects."""
    hits = np.zeros((len(IOUS), weights.shape[1]), np.float32)
    within = matches.rank[part] < most
    for number in range(len(IOUS)):
        images = matches.image[part][matches.matched[area, number, part] & within]
        hits[number] = np.bincount(images, minlength=weights.shape[1])
    return (weights @ hits.T).astype(float) / np.maximum(objects, 1)[:, None]


def _precision(matches: Matches, part: slice, area: int, weights: np.ndarray, objects: np.ndarray, ious: list[int]) -> np.ndarray:
    """Return the precision of one category and size, averaged over the recall levels, [R, IoUs]; 0 where there are no objects."""
    image, matched, ignored = matches.image[part], matches.matched[area, :, part], matches.ignored[area, :, part]
    averages = np.zeros((len(weights), len(IOUS)))
    # The number of counted detections above each hit is the same at all IoUs unless some are ignored at one of them only.
    together = bool((ignored == ignored[:1]).all())
    for group in [ious] if together else [[number] for number in ious]:
        hits = np.flatnonzero(matched[group].any(0))
        if len(hits) == 0:
            continue
        counts = _counts_above(image, ~ignored[group[0]], hits, weights.shape[1])
        rows = max(1, _CELLS // len(hits))
        for first in range(0, len(weights), rows):
            some = slice(first, first + rows)
            detected, of_hits = weights[some] @ counts, weights[some][:, image[hits]]
            for number in group:
                there = matched[number, hits]
                true_positives = np.cumsum(of_hits[:, there], 1, dtype=float)
                averages[some, number] = _area_under(true_positives, detected[:, there], objects[some])
    return averages


def _counts_above(image: np.ndarray, counted: np.ndarray, hits: np.ndarray, images: int) -> np.ndarray:
    """Return how many counted detections each image has down to each of ``hits``, float32 [images, hits] (whole numbers, exact)."""
    next_hit = np.searchsorted(hits, np.arange(len(image)))
    kept = counted & (next_hit < len(hits))
    counts = np.bincount(image[kept] * len(hits) + next_hit[kept], minlength=images * len(hits))
    return np.cumsum(counts.reshape(images, len(hits)), 1, dtype=np.float32)


def _area_under(true_positives: np.ndarray, detected: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return COCO's average, over its recall levels, of the highest precision at that recall or more, [R] (pycocotools' ``accumulate``).

    ``true_positives`` and ``detected`` [R, hits] count down to each hit; ``objects`` [R].
    """
    precision = true_positives / np.maximum(detected, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    recall = true_positives / np.maximum(objects, 1)[:, None]
    reached = (recall * 100 + 1e-9).astype(np.int64)  # the last recall level that is reached, unless rounding put it just above
    reached -= RECALLS[reached] > recall
    return (envelope * np.diff(reached, axis=1, prepend=-1)).sum(1) / len(RECALLS)


# ----------------------------------------------------------------------------------------------------------- sets of weights


def leave_out_weights(images: int) -> np.ndarray:
    """Return the weights of the jackknife, each row of which leaves out one image.

    Args:
        images: Number of images.

    Returns:
        Ones with zeros on the diagonal, float32 [images, images].
    """
    return 1 - np.eye(images, dtype=np.float32)


def grouped(matches: Matches, groups: int) -> Matches:
    """Return matches in which groups of images are taken as one image each, so that weights apply to groups.

    Args:
        matches: The matches of single images.
        groups: Number of groups. Image i belongs to group i modulo ``groups``.
    """
    objects = np.stack([matches.objects[:, group::groups].sum(1) for group in range(groups)], 1)
    return dataclasses.replace(matches, image=matches.image % groups, objects=objects)


def left_out_metrics(matches: Matches, names: Sequence[str] = tuple(METRICS)) -> dict[str, np.ndarray]:
    """Return COCO numbers per category without each image in turn.

    If there are more than ``MOST_GROUPS`` images, each row leaves out a group of images, which estimates the same variance at a bounded
    cost.

    Args:
        matches: The matches of :attr:`raydetr.evaluate.coco.Evaluation.matches`.
        names: Which of ``METRICS``.

    Returns:
        Arrays [images or groups, categories] by name, NaN where undefined.
    """
    images = matches.objects.shape[1]
    groups = min(images, MOST_GROUPS)
    return weighted_metrics(matches if groups == images else grouped(matches, groups), leave_out_weights(groups), names)


def bootstrap_weights(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Draw bootstrap samples of the images.

    Args:
        images: Number of images, which is also the size of a sample.
        resamples: Number of samples.
        seed: Seed of the draws.

    Returns:
        How often each image is in each sample, float32 [resamples, images].
    """
    random = np.random.default_rng(seed)
    return random.multinomial(images, np.full(images, 1 / images), resamples).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------- jackknife


def jackknife_variance(values: np.ndarray) -> float:
    """Return the jackknife's estimate of the variance of a number.

    Args:
        values: The number with each image (or group of images) left out, float [n].

    Returns:
        The variance, NaN for fewer than two values.
    """
    count = len(values)
    return (count - 1) / count * float(((values - values.mean()) ** 2).sum()) if count > 1 else float("nan")


def jackknife_interval(value: float, left_out: np.ndarray, low: float = 0.0, high: float = 1.0) -> list[float] | None:
    """Return the 95 % interval of a number, by the jackknife with Student's t of n - 1 degrees of freedom.

    Args:
        value: The number on all images.
        left_out: The number with each image (or group of images) left out, float [n].
        low: The smallest possible value of the number.
        high: The largest possible value of the number.

    Returns:
        The two ends, within ``low`` and ``high``. None if n is below 2, or if the number is undefined on all images or with one left out,
        for example because all objects of a category are in that image.
    """
    if len(left_out) < 2 or not np.isfinite(value) or not np.isfinite(left_out).all():
        return None
    half = float(stdtrit(len(left_out) - 1, (1 + CONFIDENCE) / 2)) * jackknife_variance(left_out) ** 0.5
    return [max(low, value - half), min(high, value + half)]


def interval_metrics(coco: dict, results: list[dict]) -> dict[str, Any]:
    """Return the twelve COCO numbers of detections with their 95 % intervals.

    Args:
        coco: A COCO data set, as for :func:`raydetr.evaluate.coco.coco_metrics`.
        results: COCO results, as for :func:`raydetr.evaluate.coco.coco_metrics`.

    Returns:
        The numbers of :func:`raydetr.evaluate.coco.coco_metrics` with the intervals of :func:`with_intervals`.

    Raises:
        UserError: An entry of ``results`` is not a detection, or belongs to an image that ``coco`` does not have.
    """
    evaluation = run_coco_eval(coco, results)
    return with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"])


def mask_interval_metrics(coco: dict, results: list[dict], names: Sequence[str] = tuple(METRICS)) -> dict[str, Any]:
    """Return the twelve COCO numbers of masks with their 95 % intervals.

    Args:
        coco: A COCO data set, as for :func:`raydetr.evaluate.coco.run_mask_eval`.
        results: COCO results, as for :func:`raydetr.evaluate.coco.run_mask_eval`.
        names: Which of ``METRICS`` get an interval.
    """
    evaluation = run_mask_eval(coco, results)
    return with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"], names)


def with_intervals(
    metrics: dict[str, Any], evaluation: Evaluation, categories: Iterable[dict], names: Sequence[str] = tuple(METRICS)
) -> dict:
    """Return metrics with the 95 % interval of each number beside it.

    Args:
        metrics: The result of :func:`raydetr.evaluate.coco.summarize`.
        evaluation: The evaluation that ``metrics`` summarizes, of boxes or of masks.
        categories: The data set's categories.
        names: Which of ``METRICS`` get an interval.

    Returns:
        A copy with ``AP_interval: [low, high]`` and so on, over all categories and in each of ``per_category``. An interval is None if the
        number is undefined on all images or with one left out.
    """
    left_out = left_out_metrics(evaluation.matches, names)
    per_category = {}
    for number, name in category_names(categories).items():
        own = metrics["per_category"][name]
        column = evaluation.category_ids.index(number)
        per_category[name] = {**own, **_intervals(own, {each: values[:, column] for each, values in left_out.items()})}
    return {**metrics, **_intervals(metrics, {name: overall(values) for name, values in left_out.items()}), "per_category": per_category}


def _intervals(metrics: dict[str, Any], left_out: dict[str, np.ndarray]) -> dict[str, list[float] | None]:
    return {
        f"{name}_interval": None if metrics[name] is None else jackknife_interval(metrics[name], values)
        for name, values in left_out.items()
    }


# ---------------------------------------------------------------------------------------------------------- two results compared


def compare(evaluation: Evaluation, other: Evaluation, categories: Iterable[dict], names: Sequence[str] = tuple(METRICS)) -> dict[str, Any]:
    """Compare two results on the same images.

    Some images are hard for both models and some easy, so that the difference, taken image by image, is known far better than either AP.

    Args:
        evaluation: The evaluation of one model.
        other: The evaluation of the other model, on the same data set.
        categories: The data set's categories.
        names: Which of ``METRICS`` to compare.

    Returns:
        For each name the difference, ``evaluation`` minus ``other``, and its interval under ``<name>_interval``, None where undefined; and
        the same for each category under ``per_category``.

    Raises:
        UserError: The two are not of the same images and categories.
    """
    if evaluation.image_ids != other.image_ids or evaluation.category_ids != other.category_ids:
        raise UserError("two results can only be compared on the same images and categories")
    ones = np.ones((1, len(evaluation.image_ids)))
    whole = [weighted_metrics(each.matches, ones, names) for each in (evaluation, other)]
    left_out = [left_out_metrics(each.matches, names) for each in (evaluation, other)]
    per_category = {}
    for number, name in category_names(categories).items():
        column = evaluation.category_ids.index(number)
        per_category[name] = _differences(*({each: values[:, column] for each, values in part.items()} for part in (*whole, *left_out)))
    return {
        **_differences(*({name: overall(values) for name, values in part.items()} for part in (*whole, *left_out))),
        "per_category": per_category,
    }


def _differences(mine: dict, theirs: dict, mine_left_out: dict, theirs_left_out: dict) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in mine:
        difference = float(mine[name][0] - theirs[name][0])
        found[name] = None if np.isnan(difference) else round(difference, 12)
        found[f"{name}_interval"] = jackknife_interval(difference, mine_left_out[name] - theirs_left_out[name], -1.0)
    return found


def verdict(difference: dict[str, Any], images: int, measure: str = "AP") -> str:
    """Return the difference in AP of two results in words, which call the first result the checkpoint and the second the other.

    Args:
        difference: The result of :func:`compare`.
        images: The number of images.
        measure: What AP is called: that of boxes, or that of masks.
    """
    gain, interval = difference["AP"], difference["AP_interval"]
    if gain is None:
        return "The images hold no object to find, so nothing can be said about a difference."
    if interval is None:
        return f"Nothing can be said about a difference: {_images(images)}, and all objects of a category or of all may be in one of them."
    words = f"(95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}; {_images(images)})"
    if interval[0] > 0:
        return f"The checkpoint is better than the other by {100 * gain:.1f} {measure} {words}."
    if interval[1] < 0:
        return f"The checkpoint is worse than the other by {-100 * gain:.1f} {measure} {words}."
    return f"No difference can be shown with these images: {100 * gain:+.1f} {measure} {words}."


def _images(number: int) -> str:
    return f"{number} image" if number == 1 else f"{number} images"
