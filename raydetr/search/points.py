"""Points of a search space to try first, from a file or from earlier searches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raydetr.config import Config, by_name
from raydetr.errors import UserError
from raydetr.search.space import Space, without_repeats
from raydetr.search.study import Search
from raydetr.storage import fetched
from raydetr.yaml_files import read_yaml_nodes, yaml_value

FIRST_POINTS, PRIOR_POINTS = 3, 5  # of an earlier search: those that are tried first, and those that the draws begin near


def read_points(path: str | Path, space: Space, config: Config) -> list[dict[str, Any]]:
    """Read points to try from a YAML or JSON file.

    Args:
        path: A list of points; a point maps dotted names to values. Settings that it leaves out are drawn.
        space: The search space, which every point must fit.
        config: The base settings.

    Returns:
        The points, as :func:`raydetr.search.study.create_search` takes them.

    Raises:
        UserError: The file cannot be read, or a point is not in the space. The message names file and line.
    """
    root = read_yaml_nodes(path)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"{path}: expected a list of points, such as  - {{optim.lr: 2e-4, loss.eos_coef: 0.05}}")
    points = []
    for node in root.value:
        where, point = f"{path}, line {node.start_mark.line + 1}", yaml_value(node, path)
        if not isinstance(point, dict):
            raise UserError(f"{where}: a point is a mapping from settings to values, not {point!r}")
        try:
            points.append(space.check_point(point, by_name(config)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return points


def best_points(folder: str | Path, space: Space, config: Config, count: int = 3) -> list[dict[str, Any]]:
    """Return the best points of an earlier search that fit a new space.

    From the complete settings of each earlier trial, a point has those that ``space`` draws. Points outside of its ranges are left
    out. The new search trains the points again, because their objectives were measured on other data or for other epochs.

    Args:
        folder: Path or URI of the earlier search.
        space: The new search space.
        config: The base settings of the new search.
        count: The number of points to return at most.

    Returns:
        The points, best first.
    """
    earlier = Search(fetched(folder, recursive=False))
    points: list[dict[str, Any]] = []
    for trial in earlier.ranked():
        point = space.drawn(space.ground(by_name(earlier.config(trial.number))))
        if point and space.contains(point, by_name(config)):
            points = without_repeats([*points, point])
    return points[:count]


def warm_start_from(folders: Sequence[str | Path], space: Space, config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what earlier searches, also of other data sets, say about a new one.

    Args:
        folders: Paths or URIs of the earlier searches.
        space: The new search space.
        config: The base settings of the new search.

    Returns:
        The points to try first, the best three of a single search and the best one of each of several; and the prior of the draws, the
        best five of each.

    Raises:
        UserError: There is no search in a folder, or no trial of it has settings within the new space.
    """
    points, prior = [], []
    for folder in folders:
        best = best_points(folder, space, config, PRIOR_POINTS)
        if not best:
            raise UserError(f"--warm-start {folder}: no ended trial of it has settings within the new search space")
        points += best[: max(1, FIRST_POINTS // len(folders))]
        prior += best
    return without_repeats(points), prior
