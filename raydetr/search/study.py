"""A search: an Optuna study in a journal file.

The study is the only record of a search. The driver asks it for the settings of the next trial, reports the objective after every
epoch, and tells it how a trial ended. Each of these calls can be repeated after a crash without harm. The folder of a search holds

    space.yaml      the search space
    config.yaml     the base settings, which are those of trial 0
    study.journal   the study; ``optuna-dashboard`` and ``optuna.load_study`` can read it while the search runs
"""

import math
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raydetr.config import PATH_SETTINGS, Config, by_name, read_config, with_settings, write_yaml
from raydetr.errors import UserError
from raydetr.search.halving import PAUSED, PROMOTED, best_of_rung, is_paused, last_rung, next_promotion, value_at
from raydetr.search.journal import STUDY_FILE, mend, read_study, readable, storage_of
from raydetr.search.methods import HALF, REDUCTION, check_count, check_request, make_pruner, make_sampler
from raydetr.search.population import better_trial, moved
from raydetr.search.record import STATES, TURNS, epochs_of, is_better_lower, objective, turns_of, where_of, with_end
from raydetr.search.space import Space, draw, read_space, short_name, without_repeats
from raydetr.storage import PATIENCE_S, check_owner, push, stamp, working_folder
from raydetr.text import compact, shortlist
from raydetr.training.metrics import LATENCY
from raydetr.values import is_finite

CONFIRMED = "confirms"  # the user attribute of a training of a confirmation: [trial of the confirmed search, seed, fold or None]
GIVEN_UP = "given up"  # the user attribute of a trial that the pruner stops
ALSO = "also"  # the user attribute of a trial with several objectives: the others after the epoch with the highest first one
# The user attribute for population-based training, a list of {"after": epoch, "from": trial, "settings": drawn}.
TAKEN_OVER = "taken over"
SPACE_FILE, CONFIG_FILE = "space.yaml", "config.yaml"
TRIALS_FOLDER = "trials"  # in the search's folder: a run folder for each trial


class Search:
    """A search in a folder or an object store. Make one with :func:`create_search`, resume one with :func:`open_search`.

    For a search in an object store, ``folder`` is its working copy on this computer. The caller fetches it, and pushes changes with
    :meth:`push`.

    Args:
        path: Path or URI of the search.

    Raises:
        UserError: There is no search, its files cannot be read, or its space or base settings were edited since it began.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.folder = str(path), working_folder(path)
        self.study = read_study(self.folder)
        # Kept, because Optuna copies all attributes for every look; only the process that runs a search changes it.
        self._plan: dict[str, Any] = self.study.user_attrs["search"]
        self.space = _read_own_space(self.folder / SPACE_FILE)
        self.base_config = read_config(self.folder / CONFIG_FILE)
        self.base = by_name(self.base_config)
        self._check_unedited()
        self.owner = ""  # the token of this process, where it runs the search
        self._pushed: tuple[int, int] | None = None  # the stamp of the journal in the store after this process's last push
        self._again: list[int] = []  # the trials to hand out again
        self._ids: dict[int, int] = {}  # of the trials in Optuna's storage, by number
        self._numbers: dict[str, int] = {}  # the trials by key, which a trial keeps while this process runs the search

    def __reduce__(self):
        return Search, (self.path,)

    def _check_unedited(self) -> None:
        """Raise a UserError if the space or the base settings differ from those that the study began with."""
        began = self._plan.get("space")  # missing in studies of version 0.1
        edits = read_space(began).differences(self.space) if began else []
        if edits:
            raise UserError(f"{self.folder / SPACE_FILE}: was edited after the search began: {'; '.join(edits)}; undo the edit")
        edits = [f"{name} was {old}, is {self.base[name]}" for name, old in self._plan.get("base", {}).items() if self.base[name] != old]
        if edits:
            raise UserError(f"{self.folder / CONFIG_FILE}: was edited after the search began: {shortlist(edits)}; undo the edit")

    def push(self, patience_s: float = PATIENCE_S) -> None:
        """Push changed files of the search, but not of its trials, to the object store. Does nothing for a local folder.

        Args:
            patience_s: How long to retry while the store does not answer, in seconds.

        Raises:
            UserError: The store refuses or does not answer, or another process has taken over the search that this one runs.
        """
        if self.owner:
            check_owner(self.path, self.owner, patience_s, lambda: self._pushed in (None, stamp(self.path, STUDY_FILE, patience_s)))
        push(self.path, recursive=False, patience_s=patience_s)
        if self.owner:
            self._pushed = stamp(self.path, STUDY_FILE, patience_s)

    @property
    def metric(self) -> str:
        """The name of the objective, which is maximized."""
        return self._plan["metric"]

    @property
    def also(self) -> list[str]:
        """The names of further objectives; :func:`is_better_lower` says which way each is better."""
        return self._plan.get("also", [])

    @property
    def objectives(self) -> list[str]:
        """The names of all objectives, the first of which is ``metric``."""
        return [self.metric, *self.also]

    @property
    def trials(self) -> int:
        """The number of trials requested, including trial 0 and failed ones."""
        return self._plan["trials"]

    @property
    def sampler(self) -> str:
        """The name of the sampler that draws settings, one of ``SAMPLERS``."""
        return self._plan["sampler"]

    @property
    def scheduler(self) -> str:
        """The name of the scheduler that stops trials early, one of ``SCHEDULERS``."""
        return self._plan["pruner"]

    @property
    def grace(self) -> int:
        """The first epoch after which a trial may be stopped."""
        return self._plan["grace"]

    def extend(self, trials: int) -> None:
        """Set the total number of trials requested. Raises a UserError if it is less than one."""
        check_count(trials)
        self._plan = {**self._plan, "trials": trials}
        self.study.set_user_attr("search", self._plan)

    def frozen(self) -> list[FrozenTrial]:
        """Return every trial in its current state, by number. The trials must not be changed."""
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        """Return one trial in its current state, as :meth:`frozen` does, without a list of all. It must not be changed."""
        if number not in self._ids:
            self._ids = {each.number: each._trial_id for each in self.frozen()}
        return self.study._storage.get_trial(self._ids[number])

    def ask(self, key: str = "") -> tuple[int, dict[str, Any]] | None:
        """Draw the settings of the next trial.

        Trial 0 has the base settings, whatever the space says. The points given to :func:`create_search` follow, then drawn trials. A
        paused trial that can be promoted comes before a new one.

        Args:
            key: The caller's name for the trial. Asking again with the same key returns the same trial.

        Returns:
            The number of the trial and the settings of the space by dotted name, for :meth:`complete`. None if all trials were
            handed out, and no paused one can be promoted now.
        """
        if key and (known := self.number(key)) is not None:
            return known, self._draw(optuna.Trial(self.study, self.trial(known)._trial_id))
        trials = self.frozen()
        if not self._again and (promoted := next_promotion(trials, HALF)) is not None:
            return self._promote(promoted, key)
        handed_out = sum(trial.state != TrialState.WAITING for trial in trials)
        if not self._again and handed_out >= self.trials:
            return None
        # A new sampler for every draw depends on the seed, the number of the draw and the study alone. An interrupted search
        # therefore draws the same settings as an undisturbed one.
        turn = [self._again[0], 1] if self._again else [handed_out, 0]
        seed = [self._plan["seed"], *turn]
        self.study.sampler = make_sampler(self.sampler, seed, self.trials, self.space, self._plan.get("prior", ()))
        trial = optuna.Trial(self.study, trials[self._again.pop(0)]._trial_id) if self._again else self.study.ask()
        if key:
            trial.set_user_attr("key", key)
        return trial.number, self._draw(trial)

    def _promote(self, number: int, key: str) -> tuple[int, dict[str, Any]]:
        """Hand out a paused trial again."""
        self.study.sampler = make_sampler("random", 0, self.trials, self.space)  # nothing is drawn
        trial = optuna.Trial(self.study, self.trial(number)._trial_id)
        trial.set_user_attr(PROMOTED, trial.user_attrs[PAUSED])
        trial.set_user_attr(TURNS, [*trial.user_attrs[TURNS], [time.time(), None, {}]])
        if key:
            trial.set_user_attr("key", key)
        return number, self._draw(trial)

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        if trial.number:
            return self.space.suggest(trial, self.base)
        with warnings.catch_warnings():  # Optuna keeps a default value outside of a range, and warns
            warnings.filterwarnings("ignore", "Fixed parameter", UserWarning)
            for name in self.space.drawn(self.base):
                draw(trial, self.space.dimensions[name])
        return self.settings(0)

    def number(self, key: str) -> int | None:
        """Return the number of the trial that was handed out under ``key``, or None."""
        if key not in self._numbers:
            self._numbers = {trial.user_attrs["key"]: trial.number for trial in self.frozen() if "key" in trial.user_attrs}
        return self._numbers.get(key)

    def settings(self, number: int) -> dict[str, Any]:
        """Return the drawn, tied and fixed settings of a trial that was handed out, by dotted name."""
        if number == 0:
            return {name: self.base[name] for name in self.space.dimensions}
        trial = self.trial(number)
        changes = trial.user_attrs.get(TAKEN_OVER)
        return self.space.suggest(optuna.trial.FixedTrial(changes[-1]["settings"]) if changes else trial, self.base)

    def config(self, number: int) -> Config:
        """Return the complete settings of a trial that was handed out."""
        return self.complete(self.settings(number))

    def complete(self, settings: Mapping[str, Any]) -> Config:
        """Return the base settings with those of a trial, as :meth:`ask` returns them."""
        return with_settings(self.base_config, settings)

    def _epochs(self, number: int) -> int:
        """Return the epochs of a trial that nobody stops, without building the whole tree of its settings."""
        return {**self.base, **self.settings(number)}["optim.epochs"]

    def better_trial(self, number: int, epoch: int) -> int | None:
        """Choose the trial whose weights a trial continues from in population-based training.

        Args:
            number: The trial that has finished ``epoch``.
            epoch: The epoch at which trials are compared.

        Returns:
            The number of a better running trial, or None if the trial keeps its own weights. Trial 0 always does, because the
            others are compared with it.
        """
        trials = self.frozen()
        values = {trial.number: value for trial in trials if (value := value_at(trial, epoch)) is not None}
        running = {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        if number == 0 or number not in values:
            return None
        return better_trial(values, number, running - {number}, self._random(number, epoch))

    def take_over(self, number: int, other: int, epoch: int) -> None:
        """Record that a trial continues from the weights of another, with perturbed settings of that other trial.

        Args:
            number: The trial.
            other: The trial whose weights it continues from.
            epoch: The epoch after which those weights were saved.
        """
        drawn = moved(self.space, self.space.drawn({**self.base, **self.settings(other)}), self._random(number, epoch, 1))
        trial = optuna.Trial(self.study, self.trial(number)._trial_id)
        change = {"after": epoch, "from": other, "settings": drawn}
        trial.set_user_attr(TAKEN_OVER, [*trial.user_attrs.get(TAKEN_OVER, []), change])

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._plan["seed"], *numbers])

    def report(self, number: int, epoch: int, value: float | None, also: Mapping[str, Any] | None = None) -> None:
        """Record the objective of a running trial (the best so far) after ``epoch``.

        A value for an epoch that already has one, and a value that is not a finite number, are ignored.

        Args:
            number: The trial.
            epoch: The epoch, from 1.
            value: The first objective.
            also: The metrics of this epoch by name, of which the further objectives are kept where the first one has risen: all
                objectives of a trial are those of one epoch.
        """
        trial = self.trial(number)
        if trial.state != TrialState.RUNNING or epoch in trial.intermediate_values or value is None or not is_finite(value):
            return
        if self.also and value > max(trial.intermediate_values.values(), default=-math.inf):
            found = {name: each for name in self.also if is_finite(each := (also or {}).get(name))}
            optuna.Trial(self.study, trial._trial_id).set_user_attr(ALSO, found)
        # Not Trial.report, which refuses a study of several objectives: the curve is that of the first one.
        self.study._storage.set_trial_intermediate_value(trial._trial_id, epoch, float(value))

    def should_stop(self, number: int) -> bool:
        """Return whether the pruner stops a running trial, judging by the reported values. The decision is final.

        Trial 0 is never stopped, because the others are compared with it. Nor is a trial after its last epoch, which would save
        nothing.
        """
        trial = self.trial(number)
        if trial.state != TrialState.RUNNING:
            return False
        if GIVEN_UP in trial.user_attrs:
            return True
        pruner = make_pruner(self._plan["pruner"], self.grace, self.trials)
        if not pruner.prune(self.study, trial) or number == 0 or epochs_of(trial) >= self._epochs(number):
            return False
        optuna.Trial(self.study, trial._trial_id).set_user_attr(GIVEN_UP, True)  # a pruner decides at a rung only once
        return True

    def pause(self, number: int, epoch: int, metrics: Mapping[str, Any] | None = None, end: float | None = None) -> bool:
        """Pause a running trial that has come to a rung, where it waits until :meth:`ask` promotes it. Only ``promote`` pauses trials.

        A trial that is among the best of its rung already trains on. Trial 0 is never paused, because the others are compared with it,
        nor is a trial after its last epoch. A trial whose report at the rung was lost is paused after the next one.

        Args:
            number: The trial.
            epoch: The epoch that it has finished and reported.
            metrics: Its metrics, to be kept beside the objective.
            end: When it ended to run, in seconds since 1970; None: now.

        Returns:
            Whether the trial is paused.
        """
        trial = self.trial(number)
        if self._plan["pruner"] != "promote" or number == 0 or trial.state != TrialState.RUNNING:
            return False
        rung = last_rung(epoch, self.grace, REDUCTION)
        asked = trial.user_attrs.get(PROMOTED, 0) >= rung or value_at(trial, rung) is None
        if asked or epoch >= self._epochs(number):
            return False
        live = optuna.Trial(self.study, trial._trial_id)
        if number in best_of_rung(self.frozen(), rung, HALF):
            live.set_user_attr(PROMOTED, rung)
            return False
        self._keep_metrics(live, metrics)
        live.set_user_attr(TURNS, with_end(turns_of(trial), time.time() if end is None else end, where_of(metrics or {})))
        live.set_user_attr(PAUSED, rung)
        return True

    def hand_out_again(self, number: int) -> None:
        """Let :meth:`ask` return a running trial again, because its process is gone and nobody starts it anew."""
        self._again.append(number)

    def end_paused(self) -> list[int]:
        """Record the paused trials as pruned, because no other trial will come to their rungs, and return their numbers."""
        paused = [trial.number for trial in self.frozen() if is_paused(trial)]
        for number in paused:
            self.tell(number, "pruned")
        return paused

    @staticmethod
    def _keep_metrics(live: optuna.Trial, metrics: Mapping[str, Any] | None) -> None:
        if metrics:
            live.set_user_attr("metrics", {name: each for name, each in metrics.items() if isinstance(each, str) or is_finite(each)})

    def tell(
        self,
        number: int,
        state: str,
        value: float | None = None,
        *,
        reason: str = "",
        metrics: Mapping[str, Any] | None = None,
        latency: float | None = None,
    ) -> bool:
        """Record how a trial ended.

        Args:
            number: The trial.
            state: ``complete``, ``pruned`` (the last reported value becomes the objective) or ``failed``.
            value: The objective of a complete trial. If it is not a finite number, the trial is recorded as failed.
            reason: Why the trial failed.
            metrics: The metrics to keep beside the objective. Numbers that are not finite are left out.
            latency: The latency of a complete trial in seconds, if it is an objective.

        Returns:
            False if the trial had already ended; then nothing changes.
        """
        trial = self.trial(number)
        if trial.state != TrialState.RUNNING:
            return False
        others = {**trial.user_attrs.get(ALSO, {}), LATENCY: latency}
        values = {self.metric: value} | {name: others.get(name) for name in self.also}
        found = {name: each for name, each in values.items() if each is not None and is_finite(each)}
        if state == "complete" and len(found) < len(values):
            missing = next(name for name in values if name not in found)
            state, reason = "failed", reason or f"its {missing} is {values[missing]}"
        live = optuna.Trial(self.study, trial._trial_id)
        if state == "failed":
            live.set_user_attr("reason", " ".join(reason.split()))
        self._keep_metrics(live, metrics)
        self.study.tell(number, list(found.values()) if state == "complete" else None, STATES[state])
        return True

    def reclaim(self, known: Collection[str]) -> list[int]:
        """Hand out unfinished trials again, before any new one, if their key is not in ``known`` because their driver crashed.

        Trials that the pruner had stopped are recorded as pruned instead. Those that had come to a rung are paused there.

        Returns:
            The numbers of the trials to hand out again.
        """
        stopped = (self.folder / STUDY_FILE).stat().st_mtime  # the last that is known of the process that ran the search
        lost = [trial for trial in self._unfinished(known) if not is_paused(trial)]
        for trial in lost:
            if GIVEN_UP in trial.user_attrs:
                self.tell(trial.number, "pruned")
        others = [trial for trial in lost if GIVEN_UP not in trial.user_attrs]
        self._again = [trial.number for trial in others if not self.pause(trial.number, epochs_of(trial), end=stopped)]
        return list(self._again)

    def _unfinished(self, known: Collection[str]) -> list[FrozenTrial]:
        return [trial for trial in self.frozen() if trial.state == TrialState.RUNNING and trial.user_attrs.get("key") not in known]

    def best(self) -> FrozenTrial | None:
        """Return the ended or paused trial with the highest (first) objective, the first of equals; None if no trial has one."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[FrozenTrial]:
        """Return the ended and paused trials that have an objective, best first; with several objectives, by the first one."""
        ended = [trial for trial in self.frozen() if (trial.state.is_finished() or is_paused(trial)) and is_finite(objective(trial))]
        return sorted(ended, key=lambda trial: (-(objective(trial) or 0.0), trial.number))

    def front(self) -> list[FrozenTrial]:
        """Return the Pareto front, best by the first objective first.

        These are the complete trials that no other equals or surpasses in all objectives and surpasses in one. Of one objective it is
        the best trial, and those that equal it.
        """
        return sorted(self.study.best_trials, key=lambda trial: (-(objective(trial) or 0.0), trial.number))

    def trial_name(self, number: int) -> str:
        """Return a folder name that shows the drawn settings, such as ``003_lr=3e-4_eos=0.05``; trial 0 is ``000_default``.

        In a confirmation it begins with the trial of the confirmed search and the seed: ``017_seed=2_lr=3e-4``.
        """
        if number == 0:
            return "000_default"
        trial = self.trial(number)
        setting, *seed_and_fold = trial.user_attrs.get(CONFIRMED, [number])
        told = zip(("seed", "fold"), seed_and_fold, strict=False)
        start = [f"{setting:03d}", *(f"{what}={value}" for what, value in told if value is not None)]
        told_already = ("run.seed", "data.fold") if seed_and_fold else ()
        names = [name for name in self.space.names if name in trial.params and name not in told_already]
        parts = (f"{short_name(name)}={compact(trial.params[name])}" for name in names)
        return re.sub(r"[^\w=.+-]+", "-", "_".join([*start, *parts]))[:100]


def create_search(
    path: str | Path,
    space: Space,
    config: Config,
    *,
    trials: int,
    metric: str = "AP",
    sampler: str = "tpe",
    pruner: str = "none",
    grace: int = 1,
    seed: int = 0,
    points: Sequence[Mapping[str, Any]] = (),
    prior: Sequence[Mapping[str, Any]] = (),
    also: Sequence[str] = (),
) -> Search:
    """Make a new search: trial 0 with the settings of ``config``, then ``points``, then drawn trials.

    Args:
        path: Path or URI of the search.
        space: The search space.
        config: The base settings.
        trials: The number of trials, including trial 0.
        metric: The name of the objective, which is maximized.
        sampler: How settings are drawn, one of ``SAMPLERS``.
        pruner: What stops trials early, one of ``SCHEDULERS``.
        grace: The first epoch after which a trial may be stopped.
        seed: The seed of the draws.
        points: Settings to try after trial 0, as :meth:`Space.check_point` takes them.
        prior: Settings that are believed to be good, in the same form: the sampler ``gp`` begins near them, and near the values that the
            space says (``around``).
        also: The names of further objectives, of which the search finds the best trade-offs.

    Raises:
        UserError: There is a search already, the folder cannot be written, a name is unknown, a point is not in the space, or there
            are more points than trials.
    """
    folder = working_folder(path)
    base = by_name(config)
    check_request(space, trials, sampler, pruner, grace, [metric, *also])
    points = without_repeats([space.check_point(point, base) for point in points])
    prior = [*(space.check_point(point, base) for point in prior), *([expected] if (expected := space.expected(base)) else [])]
    if len(points) >= trials:
        raise UserError(f"{len(points)} points to start from and trial 0 need {len(points) + 1} trials; {trials} were requested")
    with readable(folder):
        if (folder / STUDY_FILE).exists():
            raise UserError(f"{path}: holds a search already; resume it (--resume {path}) or choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space.write(folder / SPACE_FILE)
        write_yaml(config, folder / CONFIG_FILE)
        study = optuna.create_study(storage=storage_of(folder), study_name=folder.name, directions=_directions([metric, *also]))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([metric, *also])  # labels the axes of Optuna's plots and dashboard
    study.enqueue_trial(space.drawn(base), user_attrs={"origin": "default settings"})
    for point in points:
        study.enqueue_trial(point, user_attrs={"origin": "given point"})
    # Set last: a search without it was interrupted while it was made.
    plan = {"metric": metric, "trials": trials, "sampler": sampler, "seed": seed, "pruner": pruner, "grace": grace, "prior": prior}
    plan |= {"also": list(also)} if also else {}
    kept = {name: value for name, value in base.items() if name not in PATH_SETTINGS and not name.startswith(("run.", "speed."))}
    study.set_user_attr("search", {**plan, "space": space.to_dict(), "base": kept})
    return Search(path)


def _directions(objectives: Sequence[str]) -> list[StudyDirection]:
    return [StudyDirection.MINIMIZE if is_better_lower(name) else StudyDirection.MAXIMIZE for name in objectives]


def open_search(path: str | Path, space: Space | None = None, trials: int | None = None) -> Search:
    """Open a search to resume it.

    Args:
        path: Path or URI of the search.
        space: The search space that the user names again; it must be the one that the search began with.
        trials: The new total number of trials; None keeps it.

    Raises:
        UserError: There is no search, it cannot be written, or ``space`` is another one.
    """
    mend(working_folder(path) / STUDY_FILE)
    search = Search(path)
    changes = search.space.differences(space) if space else []
    if changes:
        raise UserError(f"{path}: the search space changed since the search began: {'; '.join(changes)}; start a new search for it")
    if trials is not None and trials != search.trials:
        search.extend(trials)
    return search


def _read_own_space(path: Path) -> Space:
    with readable(path):
        if not path.is_file():
            raise UserError(f"{path}: is missing, and with it what the search draws; restore the file")
    return read_space(path)
