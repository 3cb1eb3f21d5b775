"""Confirm a search: train its best settings and the defaults afresh with common seeds, and judge all of them on the same images.

The trainings are the trials of a search of their own in ``SEARCH/confirm/``, whose points are given: one for each pair of settings and
seed. So they are packed on the cluster, resumed and killed as any trials, and a finished one never runs again. ``scores.json`` in that
folder has the AP of each training on the judging images, and its values with one image left out. The verdict is
:func:`raydetr.search.confirm.judge`'s; it is written to ``SEARCH/verdict.json``, and ``best.yaml`` and ``best.pth`` of the search become
the confirmed ones.
"""

import dataclasses
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
from raydetr.errors import UserError
from raydetr.evaluate.coco import run_coco_eval
from raydetr.evaluate.intervals import left_out_metrics, overall, weighted_metrics
from raydetr.files import atomic_write_text
from raydetr.launch.nodes import check_nodes, reserved_slots
from raydetr.launch.scheduling import copy_file, tidy_search, trial_root
from raydetr.launch.session import ray_session
from raydetr.launch.signals import interruptible
from raydetr.launch.slots import ONE_WORKER_EACH, Demands, Slots, check_disk, find_slots
from raydetr.launch.train import naming_the_file
from raydetr.launch.tune import CONFIRM_FOLDER, driving, pushing, refresh_working_copy, run_trials, share_images
from raydetr.predict.score import detect
from raydetr.search.confirm import (
    DEFAULTS,
    LEAST_IMAGES,
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
from raydetr.search.space import Space, read_space
from raydetr.search.study import PAIR, STUDY_FILE, Search, create_search, open_search
from raydetr.storage import absolute, fetch, join, working_folder
from raydetr.text import count, shortlist
from raydetr.weights.checkpoint import read_checkpoint

SCORES_FILE = "scores.json"  # in the confirmation's folder, by the number of the training
LEAST_BUDGET = 6  # two candidates and the defaults with two seeds each
PLAN = "confirmation"  # the user attribute of the study: the Plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a confirmation trains.

    Attributes:
        candidates: Trials of the search, without trial 0.
        seeds: The seeds in the order in which they are used.
        budget: The number of trainings of a race; 0: every setting is trained with every seed.
    """

    candidates: list[int]
    seeds: list[int]
    budget: int = 0

    def next_trainings(self, scored: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
        """Return the pairs of settings and seed to train next; none where the confirmation is finished.

        Args:
            scored: AP by pair, of the trainings so far.
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
        seeds: The number of trainings of each.
        budget: The number of trainings in all, which replaces ``top`` and ``seeds``; None: these two.

    Raises:
        UserError: The search has nothing to confirm, or the numbers are too small to say anything.
    """
    if seeds < 2 or top < 1:
        raise UserError(f"--top {top} --seeds {seeds}: a confirmation needs at least 1 setting and 2 seeds of each")
    if budget is not None and budget < LEAST_BUDGET:
        raise UserError(f"--budget {budget}: a confirmation needs at least {LEAST_BUDGET} trainings")
    running = [trial.number for trial in search.frozen() if trial.state == TrialState.RUNNING]
    if running:
        raise UserError(
            f"{search.path}: trials {shortlist(running)} are still running; wait for their end, or finish them with "
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
    return Plan(candidates, list(range(first, first + rounds)), race)


def confirm(
    folder: str | Path, *, top: int = 3, seeds: int = 5, budget: int | None = None, demands: Demands = ONE_WORKER_EACH
) -> dict[str, Any]:
    """Confirm a search, or resume its confirmation with the plan that it began with.

    It is judged on the test split where there is one, otherwise on the validation images with a stricter correction.

    Args:
        folder: Path or URI of the search.
        top: The number of its best complete trials to train afresh, besides trial 0.
        seeds: The number of seeds of each.
        budget: The number of trainings in all, which replaces ``top`` and ``seeds``.
        demands: What each training asks of the cluster.

    Returns:
        The content of ``verdict.json``: the numbers of :class:`raydetr.search.confirm.Verdict`, ``sentence``, ``caveat``, ``judged_on``
        and ``chosen``, the trial whose settings are in ``best.yaml`` now.

    Raises:
        UserError: There is nothing to confirm, the data changed since the search, or a training failed.
        KeyboardInterrupt: A signal ended it; the message says how to resume.
    """
    root = absolute(folder)
    with naming_the_file(), interruptible(lambda: f"raydetr confirm {root}"):
        refresh_working_copy(root)
        search, place = Search(root), join(root, CONFIRM_FOLDER)
        plan = make_plan(search, top, seeds, budget)
        split = "test" if has_split(search.base_config.data, "test") else "val"
        check_judging_images(search.base_config.data, split)
        check_same_data(search)
        with driving(search.folder):
            refresh_working_copy(place)
            with ray_session(demands.workers, drivers=demands.workers > 1):
                confirmation, plan = _open(search, place, plan)
                with driving(confirmation.folder), pushing(confirmation):
                    scores = _train_and_score(confirmation, search, plan, split, demands)
            return _conclude(search, confirmation, plan, scores, split)


def check_judging_images(data: settings.Data, split: str) -> None:
    """Raise UserError if the images that are to judge cannot be found, or are too few for anybody to say anything."""
    images = len(CocoImages(find_split(data, split), lambda *sample: sample).files)
    if images < LEAST_IMAGES:
        raise UserError(f"confirm: {no_claim(images)}")


def check_same_data(search: Search) -> None:
    """Raise UserError, with the differences, if training or validation images changed since the search."""
    file = fetch(trial_root(search, DEFAULTS), only="best.pth") / "best.pth"
    if not file.is_file():
        raise UserError(f"{search.path}: trial 0 has no best.pth, so nothing can be compared with it")
    before, data = read_checkpoint(file).get("data", {}), search.base_config.data
    train = CocoImages(find_split(data, "train"), lambda *sample: sample)
    val = CocoImages(find_split(data, "val"), lambda *sample: sample, 0, train.categories)
    for split, dataset in (("train", train), ("val", val)):
        different = fingerprint_difference(before[split], data_fingerprint(dataset.coco)) if split in before else []
        if different:
            raise UserError(f"the {split} set is not the one of {search.path}: {'; '.join(different)}; undo that, or search anew")


def _open(search: Search, place: str, plan: Plan) -> tuple[Search, Plan]:
    """Return the confirmation, a new one or the one that is there, and its plan."""
    if (working_folder(place) / STUDY_FILE).exists():
        confirmation = open_search(place)
        if PLAN not in confirmation.study.user_attrs:
            raise UserError(f"{place}: was interrupted while it was being made; delete the folder and confirm again")
        return confirmation, Plan(**confirmation.study.user_attrs[PLAN])
    values = {"run.seed": plan.seeds[0], "run.name": CONFIRM_FOLDER, "run.storage": search.path}
    base = settings.with_settings(search.base_config, values)
    space = given_space(search, plan)
    confirmation = create_search(place, space, base, trials=1, metric=search.metric, sampler="random", pruner="none")
    confirmation.study.set_user_attr(PLAN, dataclasses.asdict(plan))
    return confirmation, plan


def given_space(search: Search, plan: Plan) -> Space:
    """Return a search space of exactly the values that the candidates and the defaults have, and the seeds."""
    everybody = [settings.by_name(search.config(number)) for number in (DEFAULTS, *plan.candidates)]
    choices: dict[str, list] = {"run.seed": plan.seeds}
    for name in everybody[0]:
        values = [each for row, each in enumerate(one[name] for one in everybody) if each not in [one[name] for one in everybody[:row]]]
        if len(values) > 1:
            choices[name] = values
    return read_space({name: {"choice": values} for name, values in choices.items()})


def _point(search: Search, confirmation: Search, setting: int, seed: int) -> dict[str, Any]:
    values = {**settings.by_name(search.config(setting)), "run.seed": seed}
    return confirmation.space.check_point({name: values[name] for name in confirmation.space.names}, confirmation.base)


def _train_and_score(confirmation: Search, search: Search, plan: Plan, split: str, demands: Demands) -> dict[tuple[int, int], dict]:
    """Train and score everything that is not yet; return the scores by pair."""
    base = confirmation.base_config
    base.run.storage = search.path  # where the search is now
    with reserved_slots(base, demands.workers, demands.gpus_per_worker()):
        check_nodes(base)
        confirmation.reclaim(())
        slots = find_slots(base, demands, len(plan.seeds) * (len(plan.candidates) + 1))
        check_disk(base, confirmation.folder, len(plan.seeds) * (len(plan.candidates) + 1), slots.concurrent)
    tidy_search(confirmation)
    images: list[ray.ObjectRef] = []
    scores = _read_scores(confirmation, plan)
    while wanted := plan.next_trainings({pair: each["AP"] for pair, each in scores.items()}):
        known = [_pair(trial, plan) for trial in confirmation.frozen()]
        for setting, seed in wanted:
            if (setting, seed) not in known:
                point = _point(search, confirmation, setting, seed)
                confirmation.study.enqueue_trial(point, user_attrs={PAIR: [setting, seed], "origin": "given point"})
        confirmation.extend(len(confirmation.frozen()))
        if not all(trial.state.is_finished() for trial in confirmation.frozen()):
            images = images or share_images(base)
            run_trials(confirmation, demands, slots, images, None)
        scores = _score(confirmation, plan, split, slots)
    return scores


def _pair(trial: FrozenTrial, plan: Plan) -> tuple[int, int]:
    """Return which trial of the search, with which seed, a training repeats; the first one is the defaults' own."""
    setting, seed = trial.user_attrs.get(PAIR, (DEFAULTS, plan.seeds[0]))
    return setting, seed


def _read_scores(confirmation: Search, plan: Plan) -> dict[tuple[int, int], dict]:
    file = confirmation.folder / SCORES_FILE
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return {_pair(trial, plan): kept[str(trial.number)] for trial in confirmation.frozen() if str(trial.number) in kept}


def _score(confirmation: Search, plan: Plan, split: str, slots: Slots) -> dict[tuple[int, int], dict]:
    """Score the trainings that have no score yet, each in a slot of the cluster."""
    failed = [trial for trial in confirmation.frozen() if trial.state != TrialState.COMPLETE]
    if failed:
        reason = failed[0].user_attrs.get("reason", "it did not finish")
        raise UserError(f"training {confirmation.trial_name(failed[0].number)} failed: {reason}; delete {confirmation.path} to begin anew")
    scores = _read_scores(confirmation, plan)
    new = [trial.number for trial in confirmation.frozen() if _pair(trial, plan) not in scores]
    task = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus)(score_checkpoint)
    data = {name: value for name, value in settings.by_name(confirmation.base_config).items() if name in settings.PATH_SETTINGS and value}
    try:
        found = ray.get([task.remote(join(trial_root(confirmation, number), "best.pth"), data, split) for number in new])
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    file = confirmation.folder / SCORES_FILE
    kept = json.loads(file.read_text()) if file.is_file() else {}
    atomic_write_text(file, json.dumps(kept | {str(number): each for number, each in zip(new, found, strict=True)}))
    confirmation.push()
    return _read_scores(confirmation, plan)


def score_checkpoint(checkpoint: str, data: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Return the ``AP`` of a checkpoint on one split, its values with one image ``left_out``, and the number of ``images``.

    Raises:
        UserError: The checkpoint or the data cannot be read, or AP hangs on a single image.
    """
    detected = detect(checkpoint, data, split=split)
    evaluation = run_coco_eval(detected.coco, detected.results)
    images = len(evaluation.image_ids)
    ap = float(overall(weighted_metrics(evaluation.matches, np.ones((1, images)), ["AP"])["AP"])[0])
    left_out = overall(left_out_metrics(evaluation.matches, ["AP"])["AP"])
    if not np.isfinite([ap, *left_out]).all():
        raise UserError(f"confirm: all objects of the {split} images are in one of them, so nothing can be said about chance")
    return {"AP": ap, "left_out": left_out.tolist(), "images": images}


def _conclude(search: Search, confirmation: Search, plan: Plan, scores: Mapping[tuple[int, int], dict], split: str) -> dict[str, Any]:
    """Judge the scores, and write the verdict, best.yaml and best.pth of the search."""
    runs = {}
    for setting in (DEFAULTS, *plan.candidates):
        own = [scores[setting, seed] for seed in plan.seeds if (setting, seed) in scores]
        runs[setting] = Runs(np.array([each["AP"] for each in own]), np.array([each["left_out"] for each in own]))
    images, searched = next(iter(scores.values()))["images"], len(search.frozen())
    verdict = judge(runs, images, 0 if split == "test" else searched)
    chosen = choose(verdict)
    settings.write_yaml(settings.with_settings(search.config(chosen), {"run.name": None}), search.folder / "best.yaml")
    # Of the chosen settings' trainings, by the validation images: those that judge must not choose weights.
    trainings = [trial for trial in confirmation.ranked() if _pair(trial, plan)[0] == chosen]
    copy_file(fetch(trial_root(confirmation, trainings[0].number), only="best.pth") / "best.pth", search.folder / "best.pth")
    content = {
        **dataclasses.asdict(verdict),
        "judged_on": split,
        "sentence": sentence(verdict, split),
        "caveat": caveat(split, searched),
        "chosen": chosen,
    }
    atomic_write_text(search.folder / VERDICT_FILE, json.dumps(content, indent=1) + "\n")
    search.push()
    return content


def choose(verdict: Verdict) -> int:
    """Return the trial whose settings to keep: the winner, or the defaults where these scored as high or higher."""
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
        f"best.yaml and best.pth of {folder} now hold {kept}, trained with {count(content['seeds'], 'seed')}",
    )
    return "\n".join(filter(None, lines))
