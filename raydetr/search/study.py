"""One search: an Optuna study in a journal file, asked for settings and told results.

The study is the only memory. Whoever runs the trials asks for settings, reports the objective after every epoch and tells how a
trial ended; each of these may be said again after a crash without harm. The folder of a search holds

    space.yaml      what is drawn (a space file again)
    config.yaml     the base settings, which are also trial 0's
    study.journal   the study; ``optuna-dashboard`` and ``optuna.load_study`` read it while the search runs
"""

import difflib
import importlib.util
import math
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raydetr.config import Config, by_name, read_config, with_settings, write_yaml
from raydetr.errors import UserError
from raydetr.search.population import better_trial, check_population, moved
from raydetr.search.space import Space, as_drawn, draw, read_space
from raydetr.storage import PATIENCE_S, check_owner, fetched, push, working_folder

if TYPE_CHECKING:
    import pandas

SAMPLERS = ("tpe", "gp", "random", "cmaes")
SCHEDULERS = ("asha", "median", "none", "pbt")
GIVEN_UP = "given up"  # marks a trial that its pruner stops
TAKEN_OVER = "taken over"  # what a trial went on from in population-based training: [{"after": epoch, "from": trial, "settings": drawn}]
REDUCTION = 3  # of the trials that reach a rung of ASHA, a third goes on to the next, three times as many epochs away
LOCK_SECONDS = 2  # a living writer holds the journal's lock for milliseconds
SPACE_FILE, CONFIG_FILE, STUDY_FILE = "space.yaml", "config.yaml", "study.journal"
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
STATE_NAMES = {**{state: name for name, state in STATES.items()}, TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}


class Search:
    """The search at a place. Make one with :func:`create_search`, go on with one with :func:`open_search`.

    Of a search in an object store, ``folder`` is the working copy: whoever made it had it fetched, and pushes what changes.
    """

    def __init__(self, place: str | Path) -> None:
        self.place, self.folder = str(place), working_folder(place)
        self.study = read_study(self.folder)
        self.space = read_space(self.folder / SPACE_FILE)
        self.base_config = read_config(self.folder / CONFIG_FILE)
        self.base = by_name(self.base_config)
        self.owner = ""  # of the place, in the process that runs the search; others push what they were asked to
        self._again: list[int] = []
        self._numbers: dict[str, int] = {}  # by key, which a trial keeps while this process runs the search

    def __reduce__(self):
        return Search, (self.place,)

    def push(self, patience_s: float = PATIENCE_S) -> None:
        """Bring what changed of the search's own files, not its trials', to its store; nothing for a folder.

        Raises UserError of the store, and where another process has begun to run the search that this one owns.
        """
        if self.owner:
            check_owner(self.place, self.owner, patience_s)
        push(self.place, recursive=False, patience_s=patience_s)

    @property
    def metric(self) -> str:
        """Name of the objective, which is maximized."""
        return self._plan["metric"]

    @property
    def trials(self) -> int:
        """How many trials were asked for, trial 0 and failed ones included."""
        return self._plan["trials"]

    @property
    def scheduler(self) -> str:
        """What stops trials early (``SCHEDULERS``)."""
        return self._plan["pruner"]

    @property
    def _plan(self) -> dict[str, Any]:
        return self.study.user_attrs["search"]

    def extend(self, trials: int) -> None:
        """Ask for ``trials`` in all from now on."""
        self.study.set_user_attr("search", {**self._plan, "trials": _trial_count(trials)})

    def frozen(self) -> list[FrozenTrial]:
        """Every trial as it stands, by number; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def ask(self, key: str = "") -> tuple[int, dict[str, Any]] | None:
        """The next trial's number and settings (dotted names; the others stay as in the base), None where all were handed out.

        ``key`` is the runner's own name for the trial; asking again with the same one gives the same trial. Trial 0 has the base
        settings whatever the space says, then come the enqueued points.
        """
        if key and (known := self.number(key)) is not None:
            return known, self._draw(optuna.Trial(self.study, self.frozen()[known]._trial_id))
        trials = self.frozen()
        handed_out = sum(trial.state != TrialState.WAITING for trial in trials)
        if not self._again and handed_out >= self.trials:
            return None
        # A fresh sampler for every draw: it depends on the seed, the trial's turn and the study alone, so a search that was
        # interrupted draws on as if it had not been.
        turn = [self._again[0], 1] if self._again else [handed_out, 0]
        self.study.sampler = make_sampler(self._plan["sampler"], [self._plan["seed"], *turn], self.trials)
        trial = optuna.Trial(self.study, trials[self._again.pop(0)]._trial_id) if self._again else self.study.ask()
        if key:
            trial.set_user_attr("key", key)
        return trial.number, self._draw(trial)

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        if trial.number:
            return self.space.suggest(trial, self.base)
        with warnings.catch_warnings():  # a default outside a range is kept as it is
            warnings.filterwarnings("ignore", "Fixed parameter", UserWarning)
            for name in self.space.drawn(self.base):
                draw(trial, self.space.dimensions[name])
        return self.settings(0)

    def number(self, key: str) -> int | None:
        """The trial that was handed out under ``key``."""
        if key not in self._numbers:
            self._numbers = {trial.user_attrs["key"]: trial.number for trial in self.frozen() if "key" in trial.user_attrs}
        return self._numbers.get(key)

    def settings(self, number: int) -> dict[str, Any]:
        """The settings of a trial that was handed out: drawn, tied and fixed ones by dotted name."""
        if number == 0:
            return {name: self.base[name] for name in self.space.dimensions}
        trial = self.frozen()[number]
        changes = trial.user_attrs.get(TAKEN_OVER)
        return self.space.suggest(optuna.trial.FixedTrial(changes[-1]["settings"]) if changes else trial, self.base)

    def config(self, number: int) -> Config:
        """Return the complete settings of a trial that was handed out."""
        return self.complete(self.settings(number))

    def complete(self, settings: Mapping[str, Any]) -> Config:
        """Return the base settings with those that :meth:`ask` drew; a trial that was just asked for is not drawn again."""
        return with_settings(self.base_config, settings)

    def better_trial(self, number: int, epoch: int) -> int | None:
        """Whose weights a trial at ``epoch`` goes on from in population-based training; None where it keeps its own.

        Trial 0 always does: the others are compared with it.
        """
        trials = self.frozen()
        values = {trial.number: _value_at(trial, epoch) for trial in trials if (trial.last_step or 0) >= epoch}
        running = {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        if number == 0 or number not in values:
            return None
        return better_trial(values, number, running - {number}, self._random(number, epoch))

    def take_over(self, number: int, other: int, epoch: int) -> None:
        """Note that a trial goes on from ``other`` after ``epoch``, with its settings a little changed."""
        drawn = moved(self.space, self.space.drawn({**self.base, **self.settings(other)}), self._random(number, epoch, 1))
        trial = optuna.Trial(self.study, self.frozen()[number]._trial_id)
        change = {"after": epoch, "from": other, "settings": drawn}
        trial.set_user_attr(TAKEN_OVER, [*trial.user_attrs.get(TAKEN_OVER, []), change])

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._plan["seed"], *numbers])

    def report(self, number: int, epoch: int, value: float | None) -> None:
        """Note the objective (the best so far) after ``epoch``; what was noted before, and what is no number, is passed over."""
        trial = self.frozen()[number]
        if trial.state == TrialState.RUNNING and epoch not in trial.intermediate_values and _is_finite(value):
            optuna.Trial(self.study, trial._trial_id).report(value, epoch)

    def should_stop(self, number: int) -> bool:
        """Whether a running trial, by what was reported of it, is to be given up; once it is, it stays so.

        Trial 0 never is: it is what the others must beat, and what they are compared with on the way. Nor is one after its last epoch,
        which would save nothing.
        """
        trial = self.frozen()[number]
        if trial.state != TrialState.RUNNING:
            return False
        if GIVEN_UP in trial.user_attrs:
            return True
        self.study.pruner = make_pruner(self._plan["pruner"], self._plan["grace"], self.trials)
        live = optuna.Trial(self.study, trial._trial_id)
        if not live.should_prune() or number == 0 or trial.last_step >= self.config(number).optim.epochs:
            return False
        live.set_user_attr(GIVEN_UP, True)  # a pruner decides at a rung once, and may not be asked again
        return True

    def tell(
        self, number: int, state: str, value: float | None = None, *, reason: str = "", metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Say how a trial ended: ``complete`` with its objective, ``pruned`` (the last reported value counts) or ``failed``.

        A complete trial whose objective is no finite number is failed. ``reason`` says why one failed; ``metrics`` are kept beside the
        objective. Returns False, and changes nothing, where the trial had ended before.
        """
        trial = self.frozen()[number]
        if trial.state != TrialState.RUNNING:
            return False
        if state == "complete" and not _is_finite(value):
            state, reason = "failed", reason or f"its {self.metric} is {value}"
        live = optuna.Trial(self.study, trial._trial_id)
        if state == "failed":
            live.set_user_attr("reason", " ".join(reason.split()))
        if metrics:
            live.set_user_attr("metrics", {name: each for name, each in metrics.items() if isinstance(each, str) or _is_finite(each)})
        self.study.tell(number, value if state == "complete" else None, STATES[state])
        return True

    def reclaim(self, known: Collection[str]) -> list[int]:
        """Hand unfinished trials whose key is not ``known`` (the runner lost them in a crash) out again, before any new one.

        Those that had been given up are told as pruned instead. Returns the numbers of the others.
        """
        lost = self._unfinished(known)
        for trial in lost:
            if GIVEN_UP in trial.user_attrs:
                self.tell(trial.number, "pruned")
        self._again = [trial.number for trial in lost if GIVEN_UP not in trial.user_attrs]
        return list(self._again)

    def fail_unknown(self, known: Collection[str], reason: str = "its runner is gone") -> list[int]:
        """Mark unfinished trials whose key is not ``known`` as failed."""
        numbers = [trial.number for trial in self._unfinished(known)]
        for number in numbers:
            self.tell(number, "failed", reason=reason)
        return numbers

    def _unfinished(self, known: Collection[str]) -> list[FrozenTrial]:
        return [trial for trial in self.frozen() if trial.state == TrialState.RUNNING and trial.user_attrs.get("key") not in known]

    def best(self) -> FrozenTrial | None:
        """The ended trial with the highest objective, the earliest of equals; None where none has one."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[FrozenTrial]:
        """The ended trials that have an objective, best first."""
        ended = [trial for trial in self.frozen() if trial.state.is_finished() and _is_finite(trial.value)]
        return sorted(ended, key=lambda trial: (-trial.value, trial.number))

    def trial_name(self, number: int) -> str:
        """A folder name that tells the drawn settings, such as ``003_lr=3e-4_eos=0.05``; trial 0 is ``000_default``."""
        if number == 0:
            return "000_default"
        drawn = self.frozen()[number].params
        parts = (f"{_short(name)}={_compact(drawn[name])}" for name in self.space.names if name in drawn)
        return re.sub(r"[^\w=.+-]+", "-", "_".join([f"{number:03d}", *parts]))[:100]


def create_search(
    place: str | Path,
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
) -> Search:
    """A new search at ``place``: trial 0 with the settings of ``config``, then ``points`` (of :meth:`Space.check_point`), then draws.

    ``grace`` is the epoch before which ``pruner`` stops no trial. Raises UserError where the place holds a search already, for an
    unknown sampler or pruner, and where ``trials`` are too few.
    """
    folder = working_folder(place)
    base = by_name(config)
    make_sampler(sampler, seed, _trial_count(trials))
    make_pruner(pruner, grace, trials)
    if pruner == "pbt":
        check_population(space)
    points = _without_repeats([space.check_point(point, base) for point in points])
    if len(points) >= trials:
        raise UserError(f"{len(points)} points to start from and trial 0 need {len(points) + 1} trials; {trials} were asked for")
    if (folder / STUDY_FILE).exists():
        raise UserError(f"{place}: holds a search already; go on with it (--resume {place}) or take another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space.write(folder / SPACE_FILE)
        write_yaml(config, folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror or error})") from None
    study = optuna.create_study(storage=_storage(folder), study_name=folder.name, direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([metric])  # labels the axes of Optuna's pictures and dashboard
    study.enqueue_trial(space.drawn(space.ground(base)), user_attrs={"origin": "default settings"})
    for point in points:
        study.enqueue_trial(point, user_attrs={"origin": "given point"})
    # Last, so that a search without it is known to be half made.
    plan = {"metric": metric, "trials": trials, "sampler": sampler, "seed": seed, "pruner": pruner, "grace": grace}
    study.set_user_attr("search", plan)
    return Search(place)


def open_search(place: str | Path, space: Space | None = None, trials: int | None = None) -> Search:
    """The search at ``place``, to go on with. Raises UserError where ``space`` is given and is not the one it began with."""
    _mend(working_folder(place) / STUDY_FILE)
    search = Search(place)
    changes = search.space.differences(space) if space else []
    if changes:
        raise UserError(f"{place}: the search space changed since the search began: {'; '.join(changes)}; start a new search for it")
    if trials is not None and trials != search.trials:
        search.extend(trials)
    return search


def read_study(folder: str | Path) -> optuna.Study:
    """The Optuna study in ``folder``, also while somebody else writes it. Raises UserError where there is none."""
    path = Path(folder) / STUDY_FILE
    if not path.is_file():  # Optuna would make an empty one
        raise UserError(f"{folder}: holds no search ({STUDY_FILE} is missing)")
    try:
        study = optuna.load_study(study_name=None, storage=_storage(Path(folder)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: not the journal of an Optuna study, or a damaged one") from None
    if "search" not in study.user_attrs:
        raise UserError(f"{folder}: this search was interrupted while it was being made; delete the folder and start it again")
    return study


def _storage(folder: Path) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))


def _mend(path: Path) -> None:
    """Clear away what a killed writer leaves: its lock, which Optuna would wait for half a minute, and a last line that is cut short.

    What is appended to such a line would make the whole journal unreadable.
    """
    lock = Path(f"{path}.lock")
    if lock.is_symlink():
        taken = lock.lstat().st_mtime_ns
        time.sleep(LOCK_SECONDS)
        if lock.is_symlink() and lock.lstat().st_mtime_ns == taken:
            lock.unlink()
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _trial_count(trials: int) -> int:
    if trials < 1:
        raise UserError(f"--trials {trials}: a search needs at least one trial, which has the default settings")
    return trials


def make_sampler(name: str, seed: int | Sequence[int], trials: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name (``SAMPLERS``) for a search of ``trials``, seeded.

    Raises UserError for an unknown name and for a missing package.
    """
    _check_name("sampler", name, SAMPLERS)
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("the sampler cmaes needs the package of that name: pip install cmaes")
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    startup = min(10, max(3, trials // 4))  # random draws before the sampler learns; Optuna's 10 would be all of a short search
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "tpe":
            # Groups keep settings that are drawn only under a condition from spoiling the joint model of the others.
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(name: str, grace: int, trials: int) -> optuna.pruners.BasePruner:
    """What stops trials under that scheduler (``SCHEDULERS``), none before epoch ``grace``; UserError for an unknown name.

    Population-based training stops none: its trials go on from better ones instead.
    """
    _check_name("scheduler", name, SCHEDULERS)
    if grace < 1:
        raise UserError(f"a grace of {grace} epochs: a trial runs for one epoch at least")
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=REDUCTION)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=min(5, max(1, trials // 4)), n_warmup_steps=grace)
    return optuna.pruners.NopPruner()


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))


def read_points(path: str | Path, space: Space, config: Config) -> list[dict[str, Any]]:
    """Hand-written points, a YAML or JSON list of settings by dotted name, each checked against ``space``; errors name file and line.

    A point may leave settings out; they are drawn.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not a YAML or JSON file") from None
    if not isinstance(given, list) or not given:
        raise UserError(f"{path}: expected a list of points, such as  - {{optim.lr: 2e-4, loss.eos_coef: 0.05}}")
    points = []
    for node, point in zip(root.value, given, strict=True):
        where = f"{path}, line {node.start_mark.line + 1}"
        if not isinstance(point, dict):
            raise UserError(f"{where}: a point is a mapping from settings to values, not {point!r}")
        try:
            points.append(space.check_point(point, by_name(config)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return points


def best_points(folder: str | Path, space: Space, config: Config, count: int = 3) -> list[dict[str, Any]]:
    """The best ``count`` points of an earlier search that fit ``space``, best first.

    Of each earlier trial's complete settings those count that ``space`` draws; a point outside its ranges does not fit. They are run
    again rather than believed: their values were measured on other data or for other epochs.
    """
    earlier = Search(fetched(folder, recursive=False))
    points: list[dict[str, Any]] = []
    for trial in earlier.ranked():
        point = space.drawn(space.ground(by_name(earlier.config(trial.number))))
        if point and space.contains(point, by_name(config)):
            points = _without_repeats([*points, point])
    return points[:count]


def _without_repeats(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for index, point in enumerate(points) if point not in points[:index]]


def importances(study: optuna.Study) -> dict[str, float]:
    """Of each drawn setting its share in what tells the better trials from the rest (PED-ANOVA), largest first.

    Empty where nothing can be told: fewer than four complete trials, or all with the same objective.
    """
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if len(values) < 4 or len(set(values)) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few trials make it rough, which the report says itself
        evaluator = importance_evaluator(len(values))
        found = get_param_importances(study, evaluator=evaluator)
    return found if all(math.isfinite(each) for each in found.values()) else {}


def importance_evaluator(complete: int) -> PedAnovaImportanceEvaluator:
    """The evaluator for so many complete trials; "better" are the best tenth, but at least five trials or half of them."""
    return PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / max(complete, 1))))


def best_config(search: Search) -> Config:
    """The complete settings of the best trial, ready for a run of their own; UserError where no trial has an objective yet."""
    best = search.best()
    if best is None:
        raise UserError(f"{search.folder}: no trial has ended with a value of {search.metric} yet")
    # The search's own name would collide with it.
    return with_settings(search.config(best.number), {"run.name": None})


def write_best(folder: str | Path, out: str | Path | None = None) -> Path:
    """:func:`best_config` as YAML (``best.yaml`` in the folder), ready for ``raydetr train --config``."""
    search = Search(folder)
    out = Path(out) if out else search.folder / "best.yaml"
    write_yaml(best_config(search), out)
    return out


def trials_frame(search: Search) -> "pandas.DataFrame":
    """One row a trial: number, state, objective, epochs, seconds, times, then its settings, then its metrics, then why it failed."""
    import pandas

    rows = []
    for trial in search.frozen():
        settings = search.settings(trial.number) if _is_drawn(search, trial) else {}
        seconds = trial.duration.total_seconds() if trial.duration else None
        row = {
            "trial": trial.number,
            "state": STATE_NAMES[trial.state],
            search.metric: trial.value,
            "epochs": epochs_of(trial),
        }
        row |= {"seconds": seconds, "started": trial.datetime_start, "ended": trial.datetime_complete}
        row |= {name: as_drawn(settings.get(name)) for name in search.space.names}
        row |= {name: value for name, value in trial.user_attrs.get("metrics", {}).items() if name not in row}
        rows.append({**row, "name": search.trial_name(trial.number), "reason": trial.user_attrs.get("reason")})
    return pandas.DataFrame(rows)


def write_trials(folder: str | Path) -> list[Path]:
    """The trials as ``trials.csv`` and ``trials.parquet`` in the search's folder."""
    search = Search(folder)
    frame = trials_frame(search)
    frame.to_csv(search.folder / "trials.csv", index=False)
    frame.to_parquet(search.folder / "trials.parquet", index=False)
    return [search.folder / "trials.csv", search.folder / "trials.parquet"]


def top_trials(search: Search, count: int = 5) -> str:
    """The best trials and trial 0 as a table in plain text."""
    from rich.console import Console
    from rich.table import Table

    trials = search.frozen()
    shown = search.ranked()[:count]
    shown += [trial for trial in trials[:1] if trial not in shown]
    varied = [name for name in search.space.names if name in search.space.distributions]
    table = Table(box=None, pad_edge=False)
    for heading in ("trial", "state", search.metric, "to trial 0", "epochs", *map(_short, varied)):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for trial in shown:
        gain = f"{trial.value - trials[0].value:+.4f}" if trial.number and None not in (trial.value, trials[0].value) else ""
        settings = search.settings(trial.number) if _is_drawn(search, trial) else {}
        cells = ["0 (default)" if trial.number == 0 else str(trial.number), STATE_NAMES[trial.state]]
        cells += ["-" if trial.value is None else f"{trial.value:.4f}", gain, str(epochs_of(trial))]
        table.add_row(*cells, *(_compact(settings[name]) if name in settings else "-" for name in varied))
    console = Console(width=40 + 30 * len(varied), color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def epochs_of(trial: FrozenTrial) -> int:
    """How many epochs a trial was trained: the last one reported (one in between may be missing after a crash)."""
    return trial.last_step or 0


def _value_at(trial: FrozenTrial, epoch: int) -> float:
    return max((value for step, value in trial.intermediate_values.items() if step <= epoch), default=-math.inf)


def _is_drawn(search: Search, trial: FrozenTrial) -> bool:
    """False for a trial that waits, and for one whose runner died in the middle of drawing it."""
    try:
        search.settings(trial.number)
    except ValueError:
        return False
    return trial.state != TrialState.WAITING


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(name: str) -> str:
    return name.split(".")[1].removesuffix("_coef").removesuffix("_loss")


def _compact(value: Any) -> str:
    """A value in few characters: ``0.05``, ``3.2e-4``, ``cosine``."""
    if not isinstance(value, float):
        return str(as_drawn(value))
    if value == 0 or 0.01 <= abs(value) < 10000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
