import math

import pytest

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.search.points import best_points, read_points, warm_start_from
from raydetr.search.space import read_space
from raydetr.search.study import Search
from tests.search.searches import SPACE, run


def test_points_are_tried_right_after_the_defaults(make):
    point = {"optim.lr": 2e-4, "optim.schedule": "step", "optim.lr_drop": 0.5}
    search = make(points=[point, {"optim.lr": 3e-4}, dict(point)])
    assert search.ask()[0] == 0
    first, second, third = (search.ask()[1] for _ in range(3))
    assert {name: first[name] for name in point} == point
    assert second["optim.lr"] == 3e-4  # the rest is drawn
    assert third["optim.lr"] not in (2e-4, 3e-4)  # the same point is not tried twice


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("points.yaml", "- {optim.lr: 2e-4}\n- optim: {lr: 3e-4, schedule: cosine}\n"),
        ("points.json", '[{"optim.lr": 2e-4},\n {"optim": {"lr": 3e-4, "schedule": "cosine"}}]'),
    ],
)
def test_points_are_read_from_yaml_and_json(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    points = read_points(tmp_path / name, read_space(SPACE), load_config())
    assert points == [{"optim.lr": 2e-4}, {"optim.lr": 3e-4, "optim.schedule": "cosine"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr: 2e-4\n", "expected a list of points"),
        ("[]\n", "expected a list of points"),
        ("- {optim.lr: 2e-4}\n- 3\n", "line 2: a point is a mapping"),
        ("- {optim.lr: 2e-4}\n\n- {optim.lr: 2e-2}\n", "line 3: optim.lr: 0.02 is not in {loguniform"),
        ("- {optim.lr: [\n", "line 2: not a YAML file"),
        ("- &p {optim.lr: 2e-4}\n- &q [*q]\n", "line 2: refers to itself"),
    ],
)
def test_faults_in_points_are_told_with_their_line(tmp_path, text, expected):
    path = tmp_path / "points.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_points(path, read_space(SPACE), load_config())
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_missing_points_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: No such file"):
        read_points(tmp_path / "none.yaml", read_space(SPACE), load_config())


def test_the_best_points_of_an_earlier_search_that_fit_are_taken(make):
    earlier = run(make(name="earlier", trials=12, config=load_config({"loss.giou_loss_coef": 3})))
    narrow = read_space({"optim.lr": {"loguniform": [1e-4, 2e-4]}, "loss.giou_loss_coef": {"uniform": [1, 5]}})
    points = best_points(earlier.folder, narrow, load_config(), count=2)
    fitting = [trial.params["optim.lr"] for trial in earlier.ranked() if 1e-4 <= trial.params["optim.lr"] <= 2e-4]
    assert len(fitting) > 2
    assert points == [{"optim.lr": rate, "loss.giou_loss_coef": 3.0} for rate in fitting[:2]]  # what it did not draw comes from its base
    search = make(narrow.to_dict(), points=points)
    search.ask()
    assert search.ask()[1]["optim.lr"] == fitting[0]


def test_several_earlier_searches_give_first_points_and_a_prior(make):
    earlier = [run(make(name=name, trials=8, seed=seed, sampler="random")) for seed, name in enumerate(("one", "two"))]
    space = read_space(SPACE)
    points, prior = warm_start_from([search.folder for search in earlier], space, load_config())
    assert points == [best_points(search.folder, space, load_config(), 1)[0] for search in earlier]
    assert prior == [point for search in earlier for point in best_points(search.folder, space, load_config(), 5)]
    assert len(warm_start_from([earlier[0].folder], space, load_config())[0]) == 3
    search = make(name="new", points=points, prior=prior, sampler="gp", trials=30)
    for _ in range(3):
        search.ask()
    drawn = [search.ask()[1]["optim.lr"] for _ in range(16)]  # nothing is reported: drawn from the prior, or anywhere
    believed = [math.log10(point["optim.lr"]) for point in prior]
    near = [min(abs(math.log10(rate) - each) for each in believed) < 0.4 for rate in drawn]
    assert sum(near) >= 10
    assert Search(search.folder).study.user_attrs["search"]["prior"] == prior  # a resumed search has it as well


def test_an_earlier_search_without_anything_in_the_new_space_is_refused(make):
    earlier = run(make(name="earlier"))
    space = read_space({"optim.lr": {"loguniform": [1e-2, 1e-1]}})
    with pytest.raises(UserError, match=r"--warm-start .*earlier: no ended trial of it has settings within the new search space"):
        warm_start_from([earlier.folder], space, load_config())


def test_a_space_can_say_where_draws_begin(make):
    search = make({"optim.lr": {"loguniform": [1e-5, 1e-3], "around": "default"}, "loss.eos_coef": {"uniform": [0, 1]}})
    assert search.study.user_attrs["search"]["prior"] == [{"optim.lr": 1e-4}]
