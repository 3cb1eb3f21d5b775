"""The ready search spaces: each reads, holds the defaults it is meant for, and is found wherever raydetr is installed."""

import tomllib
from pathlib import Path

import optuna
import pytest

from raydetr.config import by_name, load_config, with_settings
from raydetr.search.space import as_drawn, bundled_spaces, read_space

ROOT = Path(__file__).parents[1]
NAMES = ("faster", "learning_rates", "loss", "masks", "matcher", "recipe", "tiny")


def base_of(name: str) -> dict:
    return by_name(load_config({"model.preset": "detr_tiny" if name == "tiny" else "detr_resnet50"}))


def test_all_are_there_under_their_bare_names():
    assert set(bundled_spaces()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_holds_the_default_settings(name):
    """So that trial 0 is a point of the space, from which the sampler learns like from any other."""
    space, base = read_space(name), base_of(name)
    drawn = space.drawn(base)
    assert space.contains(drawn, base)
    assert {each for each in space.distributions if not space.dimensions[each].when} <= set(drawn)
    for each in space.dimensions.values():
        if each.kind == "same_as":
            assert base[each.name] == base[each.of]  # tied by default too: the tie changes nothing for trial 0
        if each.kind == "fixed":
            assert base[each.name] == each.of


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tiny"}))
def test_draws_of_numbers_begin_near_the_defaults(name):
    """In all spaces but ``tiny``, whose ranges begin at the defaults and go to where better settings are expected."""
    space, base = read_space(name), base_of(name)
    numbers = {each.name for each in space.dimensions.values() if each.kind in ("loguniform", "uniform")}
    assert space.expected(base) == {each: value for each, value in space.drawn(base).items() if each in numbers}


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize("name", NAMES)
def test_both_ends_of_every_range_make_settings_that_fit_together(name, end):
    space, base = read_space(name), load_config({"model.preset": "detr_tiny" if name == "tiny" else "detr_resnet50"})
    ends = {each.name: as_drawn(each.of[end]) for each in space.dimensions.values() if each.kind not in ("same_as", "fixed")}
    drawn = space.suggest(optuna.trial.FixedTrial(ends), by_name(base))
    trial = by_name(with_settings(base, drawn))  # refuses what contradicts
    for each in space.dimensions.values():
        if each.kind == "same_as":
            assert trial[each.name] == trial[each.of]
        elif each.name in drawn:
            assert trial[each.name] == (each.of if each.kind == "fixed" else each.of[end])
        else:
            assert trial[each.name] == by_name(base)[each.name]  # its condition does not hold


def test_a_bare_name_reads_the_file_of_that_name(tmp_path, monkeypatch):
    assert read_space("loss").to_dict() == read_space(ROOT / "search_spaces" / "loss.yaml").to_dict()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss").mkdir()  # the package has a folder of that name; it is not in the way
    assert "loss.eos_coef" in read_space("loss").names


def test_a_file_of_ones_own_wins_over_a_ready_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss").write_text("optim.lr: {uniform: [0, 1]}\n")
    assert read_space("loss").names == ["optim.lr"]


def test_only_ratios_of_losses_and_costs_are_drawn():
    """A common factor changes nothing for AdamW with clipping, nor for the assignment: one weight of each kind stands still."""
    assert read_space("loss").fixed == {"loss.cls_loss_coef": 1.0}
    assert read_space("matcher").fixed == {"matcher.set_cost_class": 1.0}


def test_every_package_is_listed_for_installation():
    """The list is written out, because the spaces lie outside the package's folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "raydetr").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"raydetr.search_spaces"}
    assert project["tool"]["setuptools"]["package-dir"] == {"raydetr.search_spaces": "search_spaces"}
