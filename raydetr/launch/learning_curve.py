"""A learning curve: train on nested parts of the data, and say what twice the images would bring.

``<run.storage>/<run.name>/`` gets a run folder for each part and seed, and ``learning_curve.json`` with the settings, the scores so far
and, at the end, the result. All trainings take as many optimizer steps as one on all images, so that the curve shows what images bring
and not what steps bring.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydetr import config as settings
from raydetr.data.coco import find_split, has_split, load_coco
from raydetr.data.splits import box_counts
from raydetr.errors import UserError
from raydetr.files import atomic_write_text
from raydetr.launch.signals import Interrupted
from raydetr.launch.train import RESUMABLE, check_data, naming_the_file, run_folder, run_root, train, with_absolute_paths
from raydetr.predict.score import score_checkpoint
from raydetr.search.learning_curve import check_plan, conclude, curve_table
from raydetr.storage import fetch, join, push

FILE = "learning_curve.json"


def learning_curve(config: settings.Config, fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0), seeds: int = 3) -> dict[str, Any]:
    """Train on parts of the training set with several seeds, and fit a power law through their AP.

    A part is nested in every larger one of its seed, and has its share of every category. The test images judge where there are any,
    otherwise the validation images. Called again, it resumes: finished trainings do not run again.

    Args:
        config: The settings of each training; ``optim.epochs`` is that on all images.
        fractions: Fractions of the training images.
        seeds: The number of trainings on each fraction, with the seeds from ``run.seed`` on.

    Returns:
        The result of :func:`raydetr.search.learning_curve.conclude`, with ``trainings`` and a ``table``.

    Raises:
        UserError: Bad settings or data, a folder with a curve of other settings, or a training that failed.
        KeyboardInterrupt: A signal ended it; the message says how to resume.
    """
    for name in ("folds", "reshuffle"):
        if getattr(config.data, name):
            raise UserError(f"data.{name}: a learning curve trains on parts of the training set and scores on one set; leave it out")
    if config.data.fraction != 1:
        raise UserError("data.fraction: a learning curve sets it itself; use --fractions")
    fractions = check_plan(fractions, seeds)
    config = with_absolute_paths(config)
    check_data(config)
    coco = _training_set(config)
    total = len(coco["images"])
    check_plan(fractions, seeds, total)
    content = _open(config)
    plan = [(fraction, config.run.seed + number) for number in range(seeds) for fraction in fractions]
    trainings = []
    for number, (fraction, seed) in enumerate(plan, 1):
        own = part_config(config, fraction, seed)
        if own.run.name not in content["scores"]:
            print(f"training {number} of {len(plan)}: {round(fraction * total)} of {total} images, seed {seed}", flush=True)
            content["scores"][own.run.name] = _trained(own)
            _write(config, content)
        trainings.append({"fraction": fraction, "seed": seed, **content["scores"][own.run.name]})
    images = (box_counts(coco) > 0).sum(0).tolist()
    by_category = dict(zip((each["name"] for each in coco["categories"]), images, strict=True))
    result = {**conclude(trainings, by_category, total), "trainings": trainings, "table": curve_table(trainings, total)}
    _write(config, content | {"result": result})
    return result


def part_config(config: settings.Config, fraction: float, seed: int) -> settings.Config:
    """Return the settings of the training on one part: as many optimizer steps as on all images."""
    values = {"data.fraction": fraction, "run.seed": seed, "run.storage": run_root(config), "run.name": f"{fraction:g}-seed-{seed}"}
    return settings.with_settings(config, {**values, "optim.epochs": max(1, round(config.optim.epochs / fraction))})


def _training_set(config: settings.Config) -> dict[str, list[dict]]:
    split = find_split(config.data, "train")
    return load_coco(split.annotations, split.images, split.exif, split.max_megapixels)[0]


def _open(config: settings.Config) -> dict[str, Any]:
    """Return what the folder of the curve holds, to resume it.

    Raises:
        UserError: The file is damaged, or of other settings.
    """
    now = {name: value for name, value in settings.by_name(config).items() if name not in RESUMABLE or name == "optim.epochs"}
    now = {name: value for name, value in now.items() if name not in ("run.name", "run.storage")}
    with naming_the_file():
        file = fetch(run_root(config), only=FILE) / FILE
        if (fetch(run_root(config), only="config.yaml") / "config.yaml").exists():
            raise UserError(f"{run_root(config)} holds a run already; choose another --name")
        if not file.exists():
            return {"settings": now, "scores": {}}
        try:
            content = json.loads(file.read_text())
            before, _ = content["settings"], content["scores"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: is damaged; restore it, or choose another --name") from None
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{run_root(config)}: holds a learning curve with {name} {before[name]}, not {value}; choose another --name for a new one"
            )
    return content


def _write(config: settings.Config, content: dict[str, Any]) -> None:
    with naming_the_file():
        run_folder(config).mkdir(parents=True, exist_ok=True)
        atomic_write_text(run_folder(config) / FILE, json.dumps(content, indent=1) + "\n")
    push(run_root(config), only=FILE)


def _trained(config: settings.Config) -> dict[str, Any]:
    """Train on one part, or resume it, and return its AP and that of each category."""
    begun = (fetch(run_root(config), only="config.yaml") / "config.yaml").exists()
    try:
        train(config, resume=begun)
    except Interrupted as error:
        raise Interrupted("finished trainings are kept: give the same command again to resume", error.exit_code - 128) from None
    layer = {name: value for name, value in settings.by_name(config).items() if name in settings.PATH_SETTINGS and value}
    scores = score_checkpoint(
        join(run_root(config), "best.pth"), layer, {"data.num_workers": 0}, split="test" if has_split(config.data, "test") else "val"
    )
    return {"AP": scores["AP"], "per_category": {name: numbers["AP"] for name, numbers in scores["per_category"].items()}}


def curve_text(result: dict[str, Any], folder: str | Path) -> str:
    """Return a learning curve for the terminal: the table, and what it says."""
    return f"{result['table']}\n{result['sentence']}\nnumbers: {join(folder, FILE)}"
