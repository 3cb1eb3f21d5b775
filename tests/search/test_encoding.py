import math

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raydetr.search.encoding import ABSENT, Cube, from_unit, to_unit
from raydetr.search.space import read_space

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "model.dropout": {"uniform": [0, 0.3], "step": 0.05},
    "model.dec_layers": {"integer": [2, 6]},
    "optim.schedule": {"choice": ["step", "cosine", "constant"]},
    "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
    "optim.batch_size": {"choice": [4]},
    "matcher.set_cost_bbox": {"same_as": "loss.bbox_loss_coef"},
}


@pytest.mark.parametrize(
    ("distribution", "value", "position"),
    [
        (FloatDistribution(1e-5, 1e-3, log=True), 1e-4, 0.5),
        (FloatDistribution(0, 0.3, step=0.05), 0.15, 0.5),
        (IntDistribution(2, 6), 3, 0.25),
        (CategoricalDistribution(["a", "b"]), "b", 0.75),
    ],
)
def test_values_and_positions_are_the_same_thing(distribution, value, position):
    assert to_unit(distribution, value) == pytest.approx(position)
    assert from_unit(distribution, position) == pytest.approx(value) if isinstance(value, float) else value
    for end in (0.0, 1.0):
        assert distribution._contains(distribution.to_internal_repr(from_unit(distribution, end)))


def test_only_what_varies_has_a_coordinate():
    cube = Cube(read_space(SPACE))
    assert set(cube.distributions) == set(SPACE) - {"optim.batch_size", "matcher.set_cost_bbox"}
    assert len(cube.owner) == len(cube.distributions) + 2  # three for the choice


def test_positions_outside_of_a_range_are_at_its_end_and_absent_ones_are_nan():
    cube = Cube(read_space(SPACE))
    row = cube.positions([{"optim.lr": 1.0, "optim.schedule": "cosine", "model.dropout": 0.0, "model.dec_layers": 6}])[0]
    found = dict(zip(cube.distributions, row, strict=True))
    assert found["optim.lr"] == 1.0
    assert math.isnan(found["optim.lr_drop"])
    assert cube.positions([]).shape == (0, 5)


def test_snapped_positions_can_be_drawn():
    """Numbers are on their steps, conditions hold, and what is not drawn has no influence."""
    cube = Cube(read_space(SPACE))
    snapped = cube.snap(np.random.default_rng(0).uniform(size=(200, 5)))
    drawn = [cube.values(row) for row in snapped]
    assert {point["optim.schedule"] for point in drawn} == {"step", "cosine", "constant"}
    for point in drawn:
        assert ("optim.lr_drop" in point) == (point["optim.schedule"] == "step")
        assert all(cube.distributions[name]._contains(cube.distributions[name].to_internal_repr(value)) for name, value in point.items())
    assert {point["model.dec_layers"] for point in drawn} == {2, 3, 4, 5, 6}
    assert cube.positions(drawn) == pytest.approx(snapped, nan_ok=True)


def test_choices_are_equally_far_apart_and_absent_settings_alike():
    cube = Cube(read_space(SPACE))
    point = {"optim.lr": 1e-4, "model.dropout": 0.1, "model.dec_layers": 3}
    points = [{**point, "optim.schedule": schedule} for schedule in ("step", "cosine", "constant")]
    places = cube.coordinates(cube.positions(points))
    apart = ((places[:, None] - places[None]) ** 2).sum(2)
    assert apart == pytest.approx(1 - np.eye(3))
    drop = list(cube.distributions).index("optim.lr_drop")
    assert (places[:, cube.owner == drop] == ABSENT).all()
