"""Confirm a search: train its best settings and the defaults again with common seeds, and judge all of them on the same images.

The trainings are the trials of another search in ``SEARCH/confirm/``, whose points are given: one for each pair of settings and seed, or
with ``data.folds`` for each fold of such a pair. They are therefore packed on the cluster, resumed and stopped like any trials, and a
finished one never runs again. ``scores.json`` in that folder has the AP of each pair on the images that judge, and the AP without each of
these images. The verdict is computed by
:func:`raydetr.search.confirm.judge` and written to ``SEARCH/verdict.json``. ``best.yaml`` and ``best.pth`` of the search are replaced by
the confirmed ones.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from optuna.trial import FrozenTrial, TrialState
from ray.exceptions import RayTaskError

from raydetr import config as settings
from raydetr.data.coco import CocoImages, find_split, has_split
from raydetr.data.fingerprint import data_fingerprint, fingerprint_difference
from raydetr.data.sets import check_folds, load_sets
from raydetr.data.splits import file_digest
from raydetr.errors import UserError
from raydetr.evaluate.coco import run_coco_eval, run_mask_eval
from raydetr.evaluate.intervals import left_out_metrics, overall, weighted_metrics
from raydetr.files import atomic_write_text
from raydetr.launch.nodes import check_nodes, reserved_slots
from raydetr.launch.scheduling import copy_file, tidy_search, trial_root
from raydetr.launch.session import ray_session
from raydetr.launch.signals import interruptible
from raydetr.launch.slots import ONE_WORKER_EACH, Demands, Slots, check_disk, find_slots
from raydetr.launch.train import naming_the_file
from raydetr.launch.tune import driving, pushing, refresh_working_copy, run_trials, share_images
from raydetr.predict.score import detect
from raydetr.search.confirm import (
    DEFAULTS,
    JUDGES,
    LEAST_IMAGES,
    MASK_AP,
    RACE_BUDGET,
    VERDICT_FILE,
    Runs,
    Verdict,
    candidate_count,
    caveat,
    judge,
    next_round,
    no_claim,
    sentence,
)
from raydetr.search.journal import STUDY_FILE
from raydetr.search.record import state_of
from raydetr.search.results import AS_A_RUN
from raydetr.search.space import Space, read_space
from raydetr.search.study import CONFIRMED, Search, create_search, open_search
from raydetr.storage import CONFIRM_FOLDER, absolute, fetch, join, working_folder
from raydetr.text import count, shortlist
from raydetr.training.metrics import MASK_METRICS
from raydetr.weights.checkpoint import read_checkpoint

SCORES_FILE = "scores.json"  # in the confirmation's folder; its keys are the numbers of the trainings
LEAST_BUDGET = 6  # two candidates and the defaults with two seeds each
PLAN, JUDGING = "confirmation", "judging"  # user attributes of the study: the Plan, and a digest of the images of scores.json


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a confirmation trains.

    Attributes:
        candidates: Numbers of trials of the search, without trial 0.
        seeds: The seeds in the order in which they are used.
        budget: The number of trainings of a race. 0 means no race: every setting is trained with every seed.
        folds: The number of folds in which each setting is trained with each seed, judged together; 0 for one training.
    """

    candidates: list[int]
    seeds: list[int]
    budget: int = 0
    folds: int = 0

    @property
    def parts(self) -> list[int | None]:
        """The folds, from 1; a single None where there are none."""
        return list(range(1, self.folds + 1)) or [None]

    @property
    def most_trainings(self) -> int:
        """The largest number of trainings."""
        return len(self.seeds) * (len(self.candidates) + 1) * len(self.parts)

    def next_trainings(self, scored: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
        """Return the pairs of settings (the number of a trial) and seed to train next; none if the confirmation is finished.

        Args:
            scored: The AP of the trainings so far, by pair.
        """
        everybody = [DEFAULTS, *self.candidates]
        if not self.budget:
            return [(setting, seed) for seed in self.seeds for setting in everybody if (setting, seed) not in scored]
        results = {setting: [scored[setting, seed] for seed in self.seeds if (setting, seed) in scored] for setting in everybody}
        rounds = max(map(len, results.values()))
        for done in range(max(0, rounds - 1), rounds + 1):  # the last round may be incomplete
            chosen = next_round({setting: aps[:done] for setting, aps in results.items()}, self.budget)
            if missing := [setting for setting in chosen if len(results[setting]) == done]:
                return [(setting, self.seeds[done]) for setting in missing]
        return []


def make_plan(search: Search, top: int, seeds: int, budget: int | None) -> Plan:
    """Return what to train to confirm a search.

    Args:
        search: The search.
        top: The number of its best complete trials to confirm, besides trial 0.
        seeds: The number of trainings of each, with different seeds.
        budget: The number of trainings in all, from which ``top`` and ``seeds`` are then derived; None: use ``top`` and ``seeds``.

    Raises:
        UserError: The search has nothing to confirm, or the numbers are too small for a verdict.
    """
    if seeds < 2 or top < 1:
        raise UserError(f"--top {top} --seeds {seeds}: a confirmation needs at least 1 setting and 2 seeds of each")
    data = search.base_config.data
    folds = 0 if has_split(data, "test") else data.folds or 0
    if budget is not None:
        least, budget = LEAST_BUDGET * max(1, folds), budget // max(1, folds)
        if budget < LEAST_BUDGET:
            raise UserError(f"--budget: a confirmation needs at least {least} trainings{f' in {folds} folds' if folds else ''}")
    running = [trial.number for trial in search.frozen() if state_of(trial) == "running"]
    if running:
        raise UserError(
            f"{search.path}: {count(len(running), 'trial')} still running ({shortlist(running)}); wait for the end, or finish with "
            f"raydetr tune --resume {search.path}"
        )
    candidates: list[int] = []
    drawn = [settings.by_name(search.base_config)]
    for trial in search.ranked():
        values = settings.by_name(search.config(trial.number))
        if trial.state == TrialState.COMPLETE and values not in drawn:
            candidates.append(trial.number)
            drawn.append(values)
    candidates = candidates[: top if budget is None else candidate_count(budget)]
    if not candidates:
        raise UserError(f"{search.path}: no complete trial has other settings than trial 0, so there is nothing to confirm")
    race = budget if budget is not None and budget >= RACE_BUDGET else 0
    rounds = seeds if budget is None else budget // 2 if race else budget // (len(candidates) + 1)
    first = int(search.base_config.run.seed) + 1  # the search's own seed chose the candidates
    return Plan(candidates, list(range(first, first + rounds)), race, folds)


def confirm(
    folder: str | Path, *, top: int = 3, seeds: int = 5, budget: int | None = None, demands: Demands = ONE_WORKER_EACH
) -> dict[str, Any]:
    """Confirm a search, or resume its confirmation with the plan that it began with.

    The measure is AP: that of masks if the search maximized ``segm_AP`` or another number of masks, otherwise that of boxes. The test split
    judges if there is one. Otherwise, with ``data.folds``, the training images do, each in the fold that holds it out, and
    without folds the validation images with a stricter correction.

    Args:
        folder: Path or URI of the search.
        top: The number of its best complete trials to train again, besides trial 0.
        seeds: The number of seeds for each of them.
        budget: The number of trainings in all, which replaces ``top`` and ``seeds``; None: use these.
        demands: What each training requests from the cluster.

    Returns:
        The content of ``verdict.json``: the numbers of :class:`raydetr.search.confirm.Verdict`, ``sentence``, ``caveat``, ``judged_on``,
        ``judged_by`` and ``chosen``, the trial whose settings are in ``best.yaml`` now.

    Raises:
        UserError: There is nothing to confirm, the data changed since the search, or a training failed.
        KeyboardInterrupt: A signal ended it; the message says how to resume.
    """
    root = absolute(folder)
    with naming_the_file(), interruptible(lambda: f"raydetr confirm {root}"):
        refresh_working_copy(root)
        search, place = Search(root), join(root, CONFIRM_FOLDER)
        plan = make_plan(search, top, seeds, budget)
        check_judging_images(search.base_config.data, judged_on(search, plan), judged_by(search) == MASK_AP)
        check_same_data(search)
        with driving(search.folder):
            refresh_working_copy(place)
            with ray_session(demands.workers, drivers=demands.workers > 1):
                confirmation, plan = _open(search, place, plan)
                split = judged_on(search, plan)
                with driving(confirmation.folder), pushing(confirmation):
                    forget_stale_scores(confirmation, search.base_config.data, split)
                    scores = _train_and_score(confirmation, search, plan, split, demands)
            return _conclude(search, confirmation, plan, scores, split)


def judged_on(search: Search, plan: Plan) -> str:
    """Return which images judge: ``"test"``, ``"folds"`` or ``"val"``."""
    return "folds" if plan.folds else "test" if has_split(search.base_config.data, "test") else "val"


def judged_by(search: Search) -> str:
    """Return what is compared, a key of :data:`raydetr.search.confirm.MEASURES`: the AP of masks if the search maximized one of them."""
    return MASK_AP if search.metric in MASK_METRICS else "AP"


def check_judging_images(data: settings.Data, split: str, masks: bool = False) -> None:
    """Check the images that judge a confirmation.

    Args:
        data: Settings that name the data set.
        split: ``"test"``, ``"folds"`` or ``"val"``.
        masks: Whether masks are judged.

    Raises:
        UserError: The images cannot be read, are fewer than ``LEAST_IMAGES``, have no masks to judge by, or are among those that the models
            were trained on.
    """
    judging = CocoImages(find_split(data, "train" if split == "folds" else split), _as_it_is, masks=masks)
    if len(judging) < LEAST_IMAGES:
        raise UserError(f"confirm: {no_claim(len(judging))}")
    if masks and not judging.has_masks:
        raise UserError(f"confirm: {judging.split.annotations} has no mask, and the search maximized the AP of masks; add the outlines")
    if split == "folds":
        check_folds(judging.coco, data.folds or 0)
    if split == "test":
        known = {file_digest(path): path for part in ("train", "val") for path, _ in CocoImages(find_split(data, part), _as_it_is).files}
        shared = [(known[digest], path) for path, _ in judging.files if (digest := file_digest(path)) in known]
        if shared:
            one, other = shared[0]
            raise UserError(
                f"confirm: {count(len(shared), 'test image')} {'is' if len(shared) == 1 else 'are'} also in the data that was trained on, "
                f"the first is {other} (the same as {one}); take them out of the test set"
            )


def forget_stale_scores(confirmation: Search, data: settings.Data, split: str) -> None:
    """Delete the scores of a confirmation if other images judge than before, so that its trainings are scored again.

    That happens if a test set was added, or changed, after the confirmation had begun.

    Args:
        confirmation: The search of the confirmation.
        data: Settings that name the data set.
        split: ``"test"``, ``"folds"`` or ``"val"``.
    """
    known = data_fingerprint(CocoImages(find_split(data, "train" if split == "folds" else split), _as_it_is).coco)
    content = [split, *(each.tolist() if hasattr(each, "tolist") else each for each in known.values())]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if confirmation.study.user_attrs.get(JUDGING) != digest:
        (confirmation.folder / SCORES_FILE).unlink(missing_ok=True)
        confirmation.study.set_user_attr(JUDGING, digest)


def _as_it_is(*sample: Any) -> Any:
    return sample


def check_same_data(search: Search) -> None:
    """Check that the training and validation images are those that the search was run on.

    Args:
        search: The search, whose trial 0 has a fingerprint of its data in ``best.pth``.

    Raises:
        UserError: The images or their annotations have changed (the message names the differences), or trial 0 has no ``best.pth``.
    """
    file = fetch(trial_root(search, DEFAULTS), only="best.pth") / "best.pth"
    if not file.is_file():
        raise UserError(f"{search.path}: trial 0 has no best.pth, so nothing can be compared with it")
    before, config = read_checkpoint(file).get("data", {}), search.config(DEFAULTS)
    train, val = load_sets(config.data, config.run.seed, masks=config.model.masks)
    for split, dataset in (("train", train), ("val", val)):
        different = fingerprint_difference(before[split], data_fingerprint(dataset.coco)) if split in before else []
        if different:
            raise UserError(f"the {split} set is not the one of {search.path}: {'; '.join(different)}; undo that, or search anew")


def _open(search: Search, place: str, plan: Plan) -> tuple[Search, Plan]:
    """Return the confirmation, which is created if it does not exist, and its plan."""
    if (working_folder(place) / STUDY_FILE).exists():
        confirmation = open_search(place)
        if PLAN not in confirmation.study.user_attrs:
            raise UserError(f"{place}: was interrupted while it was being made; delete the folder and confirm again")
        return confirmation, Plan(**confirmation.study.user_attrs[PLAN])
    values = {"run.seed": plan.seeds[0], "run.name": CONFIRM_FOLDER, "run.storage": search.path}
    values |= {"data.folds": plan.folds or None, "data.fold": plan.parts[0], "data.reshuffle": False}  # no image that judges is trained on
    base = settings.with_settings(search.base_config, values)
    space = given_space(search, plan)
    confirmation = create_search(place, space, base, trials=1, metric=search.metric, sampler="random", pruner="none")
    confirmation.study.set_user_attr(PLAN, dataclasses.asdict(plan))
    return confirmation, plan


def given_space(search: Search, plan: Plan) -> Space:
    """Return a search space with exactly the values that the candidates, the defaults and the seeds have.

    Args:
        search: The search that is confirmed.
        plan: Its candidates and seeds.

    Returns:
        A space with a choice for ``run.seed`` and for each setting in which the candidates and the defaults differ.
    """
    everybody = [settings.by_name(search.config(number)) for number in (DEFAULTS, *plan.candidates)]
    choices: dict[str, list] = {"run.seed": plan.seeds, **({"data.fold": plan.parts} if plan.folds else {})}
    for name in everybody[0]:
        values = [each for row, each in enumerate(one[name] for one in everybody) if each not in [one[name] for one in everybody[:row]]]
        if len(values) > 1:
            choices[name] = values
    return read_space({name: {"choice": values} for name, values in choices.items()})


def _point(search: Search, confirmation: Search, setting: int, seed: int, fold: int | None) -> dict[str, Any]:
    values = {**settings.by_name(search.config(setting)), "run.seed": seed, "data.fold": fold}
    return confirmation.space.check_point({name: values[name] for name in confirmation.space.names}, confirmation.base)


def _train_and_score(confirmation: Search, search: Search, plan: Plan, split: str, demands: Demands) -> dict[tuple[int, int], dict]:
    """Run and score the trainings that have no score yet, and return all scores by pair of settings and seed."""
    base = confirmation.base_config
    base.run.storage = search.path  # the search may have been moved since it began
    with reserved_slots(base, demands.workers, demands.gpus_per_worker()):
        check_nodes(base)
        confirmation.reclaim(())
        slots = find_slots(base, demands, plan.most_trainings)
        check_disk(base, confirmation.folder, plan.most_trainings, slots.concurrent)
    tidy_search(confirmation)
    images: list[ray.ObjectRef] = []
    scores = _read_scores(confirmation, plan)
    while wanted := plan.next_trainings({pair: each["AP"] for pair, each in scores.items()}):
        known = [_training(trial, plan) for trial in confirmation.frozen()]
        for (setting, seed), fold in itertools.product(wanted, plan.parts):
            if (setting, seed, fold) not in known:
                point = _point(search, confirmation, setting, seed, fold)
                confirmation.study.enqueue_trial(point, user_attrs={CONFIRMED: [setting, seed, fold], "origin": "given point"})
        confirmation.extend(len(confirmation.frozen()))
        if not all(trial.state.is_finished() for trial in confirmation.frozen()):
            images = images or share_images(base)
            run_trials(confirmation, demands, slots, images, None)
        scores = _score(confirmation, plan, split, slots)
    return scores


def _training(trial: FrozenTrial, plan: Plan) -> tuple[int, int, int | None]:
    """Return which trial of the search, with which seed and fold, a training repeats; the first one is the defaults' own."""
    setting, seed, *fold = trial.user_attrs.get(CONFIRMED, (DEFAULTS, plan.seeds[0], plan.parts[0]))
    return setting, seed, fold[0] if fold else None


def _pairs(confirmation: Search, plan: Plan) -> dict[tuple[int, int], list[int]]:
    """Return the trainings of each setting and seed, in the order of the folds."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for trial in confirmation.frozen():
        setting, seed, _ = _training(trial, plan)
        pairs.setdefault((setting, seed), []).append(trial.number)
    return pairs


def _read_scores(confirmation: Search, plan: Plan) -> dict[tuple[int, int], dict]:
    """Return the scores by setting and seed; the file has them by the number of the first training of both."""
    file = confirmation.folder / SCORES_FILE
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return {pair: kept[str(numbers[0])] for pair, numbers in _pairs(confirmation, plan).items() if str(numbers[0]) in kept}


def _score(confirmation: Search, plan: Plan, split: str, slots: Slots) -> dict[tuple[int, int], dict]:
    """Score the settings and seeds that have no score yet, each in a slot of the cluster."""
    failed = [trial for trial in confirmation.frozen() if trial.state != TrialState.COMPLETE]
    if failed:
        reason = failed[0].user_attrs.get("reason", "it did not finish")
        raise UserError(f"training {confirmation.trial_name(failed[0].number)} failed: {reason}; delete {confirmation.path} to begin anew")
    scores = _read_scores(confirmation, plan)
    new = [numbers for pair, numbers in _pairs(confirmation, plan).items() if pair not in scores]
    task = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus)(score_trainings)
    data = {name: value for name, value in settings.by_name(confirmation.base_config).items() if name in settings.PATH_SETTINGS and value}
    # A fold's best epoch was chosen by the images that judge; its last one was not.
    checkpoint = "last.pth" if split == "folds" else "best.pth"
    trained = [[join(trial_root(confirmation, number), checkpoint) for number in numbers] for numbers in new]
    masks = judged_by(confirmation) == MASK_AP
    try:
        found = ray.get([task.remote(each, data, split, masks) for each in trained])
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    file = confirmation.folder / SCORES_FILE
    kept = json.loads(file.read_text()) if file.is_file() else {}
    atomic_write_text(file, json.dumps(kept | {str(numbers[0]): each for numbers, each in zip(new, found, strict=True)}))
    confirmation.push()
    return _read_scores(confirmation, plan)


def score_trainings(checkpoints: Sequence[str], data: Mapping[str, Any], split: str, masks: bool) -> dict[str, Any]:
    """Return the AP of a training on the images that judge, and what AP would be without each single image.

    Args:
        checkpoints: Path or URI of its checkpoint; with folds those of all folds, each of which is scored on the images of its fold.
        data: Settings of the data set by dotted name, such as ``data.path``.
        split: ``"test"``, ``"folds"`` or ``"val"``.
        masks: Whether AP is that of masks.

    Returns:
        ``AP`` (float), ``left_out`` (a list with the AP without each image in turn) and ``images`` (the number of images).

    Raises:
        UserError: A checkpoint or the data cannot be read, or AP is undefined without one of the images, since it has all the objects.
    """
    detected = [detect(each, data, split="test" if split == "test" else "val", masks=masks) for each in checkpoints]
    boxes = [box for part in detected for box in part.coco["annotations"]]
    coco = {
        "images": [image for part in detected for image in part.coco["images"]],
        "annotations": [{**box, "id": number} for number, box in enumerate(boxes, 1)],
        "categories": detected[0].coco["categories"],
    }
    evaluation = (run_mask_eval if masks else run_coco_eval)(coco, [result for part in detected for result in part.results])
    images = len(evaluation.image_ids)
    ap = float(overall(weighted_metrics(evaluation.matches, np.ones((1, images)), ["AP"])["AP"])[0])
    left_out = overall(left_out_metrics(evaluation.matches, ["AP"])["AP"])
    if not np.isfinite([ap, *left_out]).all():
        raise UserError(f"confirm: all objects of the {JUDGES[split]} images are in one of them, so nothing can be said about chance")
    return {"AP": ap, "left_out": left_out.tolist(), "images": images}


def _conclude(search: Search, confirmation: Search, plan: Plan, scores: Mapping[tuple[int, int], dict], split: str) -> dict[str, Any]:
    """Judge the scores, and write the verdict, best.yaml and best.pth of the search."""
    runs = {}
    for setting in (DEFAULTS, *plan.candidates):
        own = [scores[setting, seed] for seed in plan.seeds if (setting, seed) in scores]
        runs[setting] = Runs(np.array([each["AP"] for each in own]), np.array([each["left_out"] for each in own]))
    images, searched = next(iter(scores.values()))["images"], len(search.frozen())
    verdict = judge(runs, images, searched if split == "val" else 0)
    chosen = choose(verdict)
    settings.write_yaml(settings.with_settings(search.config(chosen), AS_A_RUN), search.folder / "best.yaml")
    # Of the chosen settings' trainings, by the validation images: those that judge must not choose weights. The folds' are not trained on
    # all images, but the search's own trial is.
    trainings = [trial_root(confirmation, trial.number) for trial in confirmation.ranked() if _training(trial, plan)[0] == chosen]
    weights = trial_root(search, chosen) if plan.folds else trainings[0]
    copy_file(fetch(weights, only="best.pth") / "best.pth", search.folder / "best.pth")
    content = {
        **dataclasses.asdict(verdict),
        "judged_on": split,
        "judged_by": judged_by(search),
        "sentence": sentence(verdict, split, judged_by(search)),
        "caveat": caveat(split, searched),
        "chosen": chosen,
    }
    atomic_write_text(search.folder / VERDICT_FILE, json.dumps(content, indent=1) + "\n")
    search.push()
    return content


def choose(verdict: Verdict) -> int:
    """Return the trial whose settings to keep.

    Args:
        verdict: The result of the confirmation.

    Returns:
        The number of the best candidate if its gain over the defaults is positive, otherwise ``DEFAULTS``.
    """
    return verdict.setting if verdict.gain > 0 else DEFAULTS


def confirmed_text(content: Mapping[str, Any], folder: str | Path) -> str:
    """Return a verdict for the terminal.

    Args:
        content: The result of :func:`confirm`.
        folder: Path or URI of the search.
    """
    kept = "the defaults" if content["chosen"] == DEFAULTS else f"settings {content['chosen']}"
    lines: Sequence[str] = (
        content["sentence"],
        content["caveat"],
        f"best.yaml and best.pth of {folder} now hold {kept}, "
        + ("as the search trained them" if content.get("judged_on") == "folds" else f"trained with {count(content['seeds'], 'seed')}"),
    )
    return "\n".join(filter(None, lines))
