"""Search spaces: which settings a search draws, from which range, and under which condition.

A space file is a YAML mapping from dotted names of the settings tree to one of

    optim.lr: {loguniform: [1e-5, 1e-3]}                    # a number, uniform on a logarithmic scale
    loss.giou_loss_coef: {uniform: [1, 5]}                  # a number, uniform
    loss.eos_coef: {uniform: [0.05, 0.5], step: 0.05}       # ... in steps, including both ends
    model.dec_layers: {integer: [2, 6]}                     # an integer, including both ends; takes a step as well
    optim.batch_size: {choice: [2, 4]}                      # one of a list
    optim.lr_drop: {uniform: [0.4, 0.9], when: {optim.schedule: step}}   # drawn only if another setting has this value
    optim.weight_decay: {loguniform: [1e-5, 0.1], around: default}   # draws begin near the default, or near a value that is given
    matcher.set_cost_bbox: {same_as: loss.bbox_loss_coef}   # the value of another setting
    loss.cls_loss_coef: 1                                   # a fixed value

``when`` can name several settings, of which all must agree, and lists of values, of which one must agree. A setting whose condition
does not hold keeps its base value. Trial 0 of a search has only base settings; the space, including its fixed values, applies from
trial 1 on.
"""

import contextlib
import dataclasses
import difflib
import graphlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raydetr.config import SETTINGS, Setting, find_setting, flatten
from raydetr.errors import UserError
from raydetr.files import atomic_write_text
from raydetr.yaml_files import yaml_leaves

RANGES = ("uniform", "loguniform", "integer")
KINDS = (*RANGES, "choice", "same_as")
DEFAULT = "default"  # in ``around``: the base value
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
# The search itself sets these for each of its trials.
NOT_SEARCHED = ("run.name", "run.storage", "run.workers", "run.max_failures", "run.tracker")


@dataclasses.dataclass(frozen=True)
class Dimension:
    """How one setting of a space gets its value; its domain."""

    name: str
    kind: str  # one of KINDS, or "fixed"
    of: Any  # range: [low, high]; choice: its values; same_as: the name of the other setting; fixed: the value
    step: float | int | None = None
    when: Mapping[str, list] = dataclasses.field(default_factory=dict)
    around: Any = None  # the value that draws begin near, or "default"; None: anywhere

    @property
    def distribution(self) -> Distribution | None:
        """Optuna's distribution; None for a tied or a fixed setting."""
        if self.kind == "choice":
            return CategoricalDistribution([as_drawn(value) for value in self.of])
        if self.kind == "integer":
            return IntDistribution(*self.of, step=int(self.step or 1))
        if self.kind in RANGES:
            return FloatDistribution(*self.of, log=self.kind == "loguniform", step=self.step)
        return None

    def plain(self) -> Any:
        """Return the entry of a space file."""
        if self.kind == "fixed":
            return self.of
        step = {} if self.step is None else {"step": self.step}
        around = {} if self.around is None else {"around": self.around}
        return {self.kind: self.of, **step, **({"when": dict(self.when)} if self.when else {}), **around}


class Space:
    """The dimensions of a search. Make one with :func:`read_space`."""

    def __init__(self, dimensions: Iterable[Dimension]) -> None:
        by_name = {each.name: each for each in dimensions}
        needs = {each.name: [name for name in (*each.when, *_followed(each)) if name in by_name] for each in by_name.values()}
        # Sorted so that a setting comes after those that it follows or depends on.
        self.dimensions: dict[str, Dimension] = {name: by_name[name] for name in graphlib.TopologicalSorter(needs).static_order()}

    @property
    def names(self) -> list[str]:
        """The drawn and tied settings, which vary from trial to trial."""
        return [each.name for each in self.dimensions.values() if each.kind != "fixed"]

    @property
    def distributions(self) -> dict[str, Distribution]:
        """Optuna's distribution of every drawn setting."""
        return {each.name: found for each in self.dimensions.values() if (found := each.distribution) is not None}

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that the space sets to a fixed value."""
        return {each.name: each.of for each in self.dimensions.values() if each.kind == "fixed"}

    def ground(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return every setting by dotted name: the values of ``base``, and defaults for those that it does not have."""
        return {**{name: each.default for name, each in SETTINGS.items()}, **(base or {})}

    def suggest(self, trial: optuna.trial.BaseTrial, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Draw the settings of a trial.

        Args:
            trial: Optuna's trial, which draws or replays the values.
            base: The base settings by dotted name, which tied settings may follow.

        Returns:
            The fixed settings, and the drawn and tied ones whose condition holds, by dotted name and parsed.
        """
        ground, values = self.ground(base), self.fixed
        for each in self.dimensions.values():
            if each.kind == "fixed" or not _holds(each.when, values):
                continue
            value = values.get(each.of, ground[each.of]) if each.kind == "same_as" else draw(trial, each)
            values[each.name] = SETTINGS[each.name].parse(value)
        return values

    def drawn(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Select the settings that this space draws from complete settings.

        Values outside of a range are kept, because Optuna can record them. Values that Optuna cannot record are left out: one that is
        not among the choices, 0 on a logarithmic scale, and a fraction among integers.

        Args:
            settings: The value of every setting by dotted name.

        Returns:
            The values by dotted name, as Optuna records them.
        """
        kept: dict[str, Any] = {}
        for name, distribution in self.distributions.items():
            value = as_drawn(settings[name])
            known = {parent: SETTINGS[parent].parse(drawn) for parent, drawn in kept.items()}
            if _holds(self.dimensions[name].when, known) and _can_hold(distribution, value):
                kept[name] = value
        return kept

    def expected(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values near which draws begin, of the settings that say ``around``, as Optuna records them.

        A default outside of a range stands for the nearest end of it. One that is not among the choices is left out.
        """
        values = {}
        for name, distribution in self.distributions.items():
            around = self.dimensions[name].around
            if around is None:
                continue
            value = as_drawn(base[name] if around == DEFAULT else around)
            if not isinstance(distribution, CategoricalDistribution):
                values[name] = min(max(value, distribution.low), distribution.high)
            elif value in distribution.choices:
                values[name] = value
        return values

    def check_point(self, point: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check a point to try.

        Args:
            point: Settings of the point by dotted name; those that it leaves out are drawn.
            base: The base settings.

        Returns:
            The values for Optuna to use instead of drawing them.

        Raises:
            UserError: The space does not draw a setting or never takes its value, a tied or fixed setting has another value, or the
                point contradicts the condition of one of its settings.
        """
        values = {name: find_setting(name).parse(value) for name, value in flatten(point).items()}
        for name, value in values.items():
            each = self.dimensions.get(name)
            if each is None:
                raise UserError(f"{name}: the search space does not draw it")
            if each.kind == "fixed" and value != each.of:
                raise UserError(f"{name}: {value} differs from {each.of}, which the search space fixes")
            if each.kind == "same_as" and each.of in self.dimensions and each.of not in values:
                raise UserError(f"{name}: follows {each.of}; give that instead")
            if each.kind == "same_as" and value != values.get(each.of, {**self.ground(base), **self.fixed}[each.of]):
                raise UserError(f"{name}: {value} differs from {each.of}, which it follows")
            if each.distribution is not None and not _contains(each.distribution, as_drawn(value)):
                raise UserError(f"{name}: {value} is not in {_shown(each.plain())}")
            for parent, wanted in each.when.items():
                if parent in values and values[parent] not in wanted:
                    raise UserError(f"{name}: it is drawn only when {parent} is {_listed(wanted)}, and the point says {values[parent]}")
        return {name: as_drawn(value) for name, value in values.items() if self.dimensions[name].distribution is not None}

    def contains(self, point: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> bool:
        """Return whether :meth:`check_point` accepts a point."""
        try:
            self.check_point(point, base)
        except UserError:
            return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain data, which :func:`read_space` takes; it is equal for equal spaces."""
        return {name: self.dimensions[name].plain() for name in self.dimensions}

    def write(self, path: str | Path) -> None:
        """Write the space file, atomically. Raises OSError."""
        atomic_write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None))

    def differences(self, other: "Space") -> list[str]:
        """Return how another space differs from this one, a text for each setting; empty for equal spaces."""
        old, new = self.to_dict(), other.to_dict()
        lines = [f"{name} is gone (was {_shown(old[name])})" for name in old if name not in new]
        lines += [f"{name} is new: {_shown(new[name])}" for name in new if name not in old]
        return lines + [f"{name} was {_shown(old[name])}, is {_shown(new[name])}" for name in old if new.get(name, old[name]) != old[name]]

    def hparam_domains(self, base: Mapping[str, Any] | None = None) -> dict[str, tuple | list]:
        """Return the domains for TensorBoard's HPARAMS page, which hides runs with values outside of them.

        Returns:
            For every setting that varies, ``(low, high)`` of an interval or the list of its values. The base value is always in it,
            because trial 0 may have a value that is never drawn.
        """
        ground, domains = self.ground(base), {}
        for name in self.names:
            each = self.dimensions[name]
            while each.kind == "same_as" and each.of in self.dimensions:
                each = self.dimensions[each.of]
            own = as_drawn(ground[name])
            if each.kind in RANGES:
                number = SETTINGS[name].type
                domains[name] = (number(min(each.of[0], own)), number(max(each.of[1], own)))
            else:
                taken = each.of if each.kind == "choice" else [each.of if each.kind == "fixed" else ground[each.of]]
                values = [as_drawn(value) for value in taken]
                domains[name] = values if own in values else [own, *values]
        return domains


def draw(trial: optuna.trial.BaseTrial, each: Dimension) -> Any:
    """Draw the value of a setting, as Optuna records it."""
    if each.kind == "choice":
        return trial.suggest_categorical(each.name, [as_drawn(choice) for choice in each.of])
    if each.kind == "integer":
        return trial.suggest_int(each.name, *each.of, step=int(each.step or 1))
    value = trial.suggest_float(each.name, *each.of, log=each.kind == "loguniform", step=each.step)
    return round(value, 10) if each.step else value  # 0.35 rather than 0.35000000000000003


def as_drawn(value: Any) -> Any:
    """Return a value as Optuna can record it: a list becomes text, which the setting parses again."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _followed(each: Dimension) -> list[str]:
    return [each.of] if each.kind == "same_as" else []


def _holds(when: Mapping[str, list], values: Mapping[str, Any]) -> bool:
    return all(name in values and values[name] in wanted for name, wanted in when.items())


def _can_hold(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return distribution.to_external_repr(float(value)) == value and not (distribution.log and value <= 0)


def _contains(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if not _can_hold(distribution, value):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-6


def _shown(plain: Any) -> str:
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10000).removesuffix("\n").removesuffix("\n...")


def _listed(values: list) -> str:
    return " or ".join(map(str, values))


def bundled_spaces() -> dict[str, Path]:
    """Return the paths of the bundled search spaces by name."""
    package = Path(__file__).parents[1]
    # They are inside the installed package, and beside the package in a checkout.
    folder = next((each for each in (package / "search_spaces", package.parent / "search_spaces") if each.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def read_space(source: str | Path | Mapping[str, Any]) -> Space:
    """Read a search space.

    Args:
        source: A path, the name of a bundled space, or plain data in the form of a space file.

    Raises:
        UserError: The file cannot be read, or an entry is not valid. The message names file and line.
    """
    if isinstance(source, Mapping):
        items = [(name, value, "search space") for name, value in _top_level(source).items()]
        return _space_of(items, "search space")
    path = Path(source)
    if not path.is_file():
        ready = bundled_spaces()
        if str(source) not in ready:
            raise UserError(f"{source}: no such search space file; the bundled ones are {', '.join(ready)}")
        path = ready[str(source)]
    for _ in yaml_leaves(path, depth=3):
        pass  # finds names that stand twice in a nested mapping
    return _space_of([(name, value, f"{path}, line {line}") for name, value, line in yaml_leaves(path, depth=1)], str(path))


def _top_level(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"optim.lr": x}`` for ``{"optim": {"lr": x}}``."""
    flat = {}
    for key, value in tree.items():
        sections = isinstance(value, Mapping) and "." not in str(key)
        flat.update({f"{key}.{leaf}": inner for leaf, inner in value.items()} if sections else {str(key): value})
    return flat


def _space_of(items: list[tuple[str, Any, str]], source: str) -> Space:
    dimensions, locations = {}, {}
    for name, plain, where in items:
        with _at(where):
            dimensions[name] = _dimension(find_setting(name), plain)
            locations[name] = where
    for each in dimensions.values():
        with _at(locations[each.name]):
            _check_references(each, dimensions)
    if all(each.kind not in (*RANGES, "choice") for each in dimensions.values()):
        raise UserError(f"{source}: draws no setting; write for example  optim.lr: {{loguniform: [1e-5, 1e-3]}}")
    try:
        space = Space(dimensions.values())
    except graphlib.CycleError as error:
        circle = error.args[1]
        raise UserError(f"{locations[circle[0]]}: {' -> '.join(circle)} refer to each other in a circle") from None
    for each in dimensions.values():
        with _at(locations[each.name]):
            _check_tie_bounds(each, space)
    return space


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Prefix the message of a UserError with file and line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _dimension(setting: Setting, plain: Any) -> Dimension:
    """Parse one entry of a space, without checking references to other settings."""
    name = setting.name
    if name in NOT_SEARCHED:
        raise UserError(f"{name}: is set by the search itself; a search space cannot draw it")
    if not isinstance(plain, Mapping):
        if isinstance(plain, list) and not setting.is_list:
            raise UserError(f"{name}: a list alone is not valid here; to draw from it write {{choice: {_shown(plain)}}}")
        return Dimension(name, "fixed", setting.parse(plain))
    kinds = [key for key in plain if key not in ("step", "when", "around")]
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KINDS)}"
            raise UserError(f"{name}: unknown kind {kind!r}; {hint}")
    if len(kinds) != 1:
        raise UserError(f"{name}: give exactly one of {', '.join(KINDS)}, not {len(kinds)}")
    kind = kinds[0]
    if "step" in plain and kind not in ("uniform", "integer"):
        raise UserError(f"{name}: a step goes with uniform and integer only, not with {kind}")
    when = _conditions(name, plain.get("when", {}))
    if kind == "same_as":
        if "around" in plain:
            raise UserError(f"{name}: around goes with ranges and choice only, not with same_as")
        return Dimension(name, kind, find_setting(str(plain[kind])).name, when=when)
    if kind == "choice":
        return _with_around(setting, Dimension(name, kind, _choices(setting, plain[kind]), when=when), plain)
    low, high = _range(setting, kind, plain[kind])
    step = _step(name, kind, low, high, plain["step"]) if "step" in plain else None
    return _with_around(setting, Dimension(name, kind, [low, high], step, when), plain)


def _with_around(setting: Setting, each: Dimension, plain: Mapping[str, Any]) -> Dimension:
    if "around" not in plain:
        return each
    around = plain["around"]
    if around != DEFAULT:
        around, distribution = setting.parse(around), each.distribution
        assert distribution is not None
        if not _contains(distribution, as_drawn(around)):
            raise UserError(f"{each.name}: draws cannot begin around {_shown(around)}, which is not in {_shown(each.plain())}")
    return dataclasses.replace(each, around=around)


def _range(setting: Setting, kind: str, given: Any) -> tuple:
    name, number = setting.name, int if kind == "integer" else float
    if setting.is_list or setting.type not in (int, float):
        raise UserError(f"{name}: {kind} needs a numeric setting; use choice")
    if setting.type is int and kind != "integer":
        raise UserError(f"{name}: takes whole numbers; use integer instead of {kind}")
    if not isinstance(given, list) or len(given) != 2:
        raise UserError(f"{name}: {kind} takes a lowest and a highest value, such as {{{kind}: [1, 5]}}, not {_shown(given)}")
    low, high = (setting.parse(value) for value in given)
    if kind == "integer" and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(f"{name}: integer takes whole numbers, not {_shown(given)}")
    if low == high:
        raise UserError(f"{name}: the range {_shown(given)} is empty; to fix the setting write {name}: {_shown(low)}")
    if low > high:
        raise UserError(f"{name}: the range {_shown(given)} is reversed; write the lowest value first")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{name}: a logarithmic range must begin above 0, not at {low}")
    return number(low), number(high)


def _step(name: str, kind: str, low: float, high: float, given: Any) -> float | int:
    number = int if kind == "integer" else float
    try:
        step = number(given)
    except (TypeError, ValueError):
        step = 0
    if isinstance(given, bool) or not 0 < step <= high - low or (number is int and step != float(given)):
        raise UserError(f"{name}: {_shown(given)} is no step for a range from {low} to {high}")
    if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise UserError(f"{name}: the range from {low} to {high} is not a whole number of steps of {step}")
    return step


def _choices(setting: Setting, given: Any) -> list:
    if not isinstance(given, list) or not given:
        raise UserError(f"{setting.name}: choice takes a list of values, such as {{choice: [2, 4]}}, not {_shown(given)}")
    values = [setting.parse(value) for value in given]
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UserError(f"{setting.name}: the choice {_shown(value)} stands twice")
    return values


def _conditions(name: str, given: Any) -> dict[str, list]:
    if not isinstance(given, Mapping):
        raise UserError(f"{name}: when takes names and values, such as {{optim.schedule: step}}, not {_shown(given)}")
    conditions = {}
    for parent, wanted in flatten(given).items():
        setting = find_setting(parent)
        several = isinstance(wanted, list) and (not setting.is_list or all(isinstance(each, list) for each in wanted))
        conditions[parent] = [setting.parse(each) for each in (wanted if several else [wanted])]
        if not conditions[parent]:
            raise UserError(f"{name}: the condition on {parent} names no value")
    return conditions


def _check_references(each: Dimension, dimensions: Mapping[str, Dimension]) -> None:
    for parent, wanted in each.when.items():
        source = dimensions.get(parent)
        if source is None or source.kind in ("fixed", "same_as"):
            raise UserError(f"{each.name}: depends on {parent}, which this space does not draw")
        if source.kind in ("uniform", "loguniform"):
            raise UserError(f"{each.name}: depends on {parent}, which is neither choice nor integer; a condition needs one of them")
        distribution = source.distribution
        assert distribution is not None  # it is a choice or an integer
        for value in wanted:
            if not _contains(distribution, as_drawn(value)):
                raise UserError(f"{each.name}: depends on {parent} being {as_drawn(value)}, which it never is: {_shown(source.plain())}")


def _check_tie_bounds(each: Dimension, space: Space) -> None:
    """Check that a tied setting can take every value of the setting that it follows."""
    source = each
    while source.kind == "same_as" and source.of in space.dimensions:
        source = space.dimensions[source.of]
    if each.kind != "same_as":
        return
    follower, leader = SETTINGS[each.name], SETTINGS[source.of if source.kind == "same_as" else source.name]
    if follower.is_list != leader.is_list or (follower.type is not leader.type and not (follower.type is float and leader.type is int)):
        raise UserError(f"{each.name}: cannot follow {leader.name}, which is of another type")
    if source.kind == "same_as":
        return
    for value in [source.of] if source.kind == "fixed" else source.of:
        try:
            follower.parse(value)
        except UserError as error:
            raise UserError(f"{error}, and it follows {leader.name}, which takes that value") from None


def without_repeats(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return points without those that stand earlier in the list already.

    Args:
        points: Settings by dotted name.
    """
    return [point for index, point in enumerate(points) if point not in points[:index]]


def short_name(name: str) -> str:
    """Return the name of a setting for tables and folders: ``bbox`` for ``loss.bbox_loss_coef``.

    Args:
        name: The dotted name.
    """
    return name.split(".")[1].removesuffix("_coef").removesuffix("_loss")
