import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raydetr.errors import UserError
from raydetr.search.space import read_space

EVERY_KIND = """\
# a comment
optim.lr: {loguniform: [1e-5, 1e-3]}
loss:
  giou_loss_coef: {uniform: [1, 5]}
  eos_coef: {uniform: [0.05, 0.5], step: 0.05}
  bbox_loss_coef: {uniform: [1, 10]}
  cls_loss_coef: 1
model.dec_layers: {integer: [2, 6], step: 2}
optim.batch_size: {choice: [2, 4]}
optim.lr_drop: {uniform: [0.4, 0.9], when: {optim.schedule: step}}
optim.schedule: {choice: [step, cosine, constant]}
matcher.set_cost_bbox: {same_as: loss.bbox_loss_coef}
data.train_sizes: {choice: [[480, 512], [640]]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write


def draws(space, count=60, base=None):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask(), base) for _ in range(count)]


def test_every_kind_of_line_becomes_its_distribution(write):
    space = read_space(write(EVERY_KIND))
    assert space.distributions == {
        "optim.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "loss.giou_loss_coef": FloatDistribution(1, 5),
        "loss.eos_coef": FloatDistribution(0.05, 0.5, step=0.05),
        "loss.bbox_loss_coef": FloatDistribution(1, 10),
        "model.dec_layers": IntDistribution(2, 6, step=2),
        "optim.batch_size": CategoricalDistribution([2, 4]),
        "optim.lr_drop": FloatDistribution(0.4, 0.9),
        "optim.schedule": CategoricalDistribution(["step", "cosine", "constant"]),
        "data.train_sizes": CategoricalDistribution(["480, 512", "640"]),
    }
    assert space.fixed == {"loss.cls_loss_coef": 1.0}
    assert set(space.names) == {*space.distributions, "matcher.set_cost_bbox"}


def test_draws_stay_within_what_the_file_says(write):
    drawn = draws(read_space(write(EVERY_KIND)))
    for settings in drawn:
        assert 1e-5 <= settings["optim.lr"] <= 1e-3
        assert settings["loss.eos_coef"] in [round(0.05 * step, 10) for step in range(1, 11)]
        assert settings["model.dec_layers"] in (2, 4, 6)
        assert settings["loss.cls_loss_coef"] == 1
    assert {settings["optim.batch_size"] for settings in drawn} == {2, 4}
    assert {tuple(settings["data.train_sizes"]) for settings in drawn} == {(480, 512), (640,)}


def test_a_logarithmic_range_is_drawn_evenly_by_logarithm(write):
    drawn = [settings["optim.lr"] for settings in draws(read_space(write("optim.lr: {loguniform: [1e-5, 1e-1]}")), 200)]
    assert 80 < sum(value < 1e-3 for value in drawn) < 120


def test_a_setting_with_a_condition_is_drawn_only_where_it_holds(write):
    drawn = draws(read_space(write(EVERY_KIND)))
    assert {settings["optim.schedule"] for settings in drawn} == {"step", "cosine", "constant"}
    assert all(("optim.lr_drop" in settings) == (settings["optim.schedule"] == "step") for settings in drawn)


def test_a_condition_may_name_several_values_and_hang_on_another_condition(write):
    space = read_space(
        write(
            "optim.lr_drop: {uniform: [0.4, 0.9], when: {optim.schedule: [step, cosine], model.dec_layers: 3}}\n"
            "model.dec_layers: {integer: [2, 3], when: {optim.schedule: step}}\n"
            "optim.schedule: {choice: [step, cosine]}\n"
        )
    )
    drawn = draws(space)
    assert any("optim.lr_drop" in settings for settings in drawn)
    for settings in drawn:
        assert ("model.dec_layers" in settings) == (settings["optim.schedule"] == "step")
        assert ("optim.lr_drop" in settings) == (settings.get("model.dec_layers") == 3)


def test_ties_follow_what_the_trial_really_has(write):
    space = read_space(
        write(
            "matcher.set_cost_giou: {same_as: matcher.set_cost_bbox}\n"  # a tie to a tie, told before what it follows
            "matcher.set_cost_bbox: {same_as: loss.bbox_loss_coef}\n"
            "loss.bbox_loss_coef: {uniform: [1, 10]}\n"
            "optim.lr_backbone: {same_as: optim.lr}\n"  # follows a setting that is not drawn
        )
    )
    for settings in draws(space, 5, {"optim.lr": 0.25}):
        assert settings["matcher.set_cost_giou"] == settings["matcher.set_cost_bbox"] == settings["loss.bbox_loss_coef"]
        assert settings["optim.lr_backbone"] == 0.25


def test_a_tie_to_a_setting_that_was_not_drawn_takes_the_base_value(write):
    space = read_space(
        write(
            "optim.schedule: {choice: [step, cosine]}\n"
            "optim.lr_drop: {uniform: [0.1, 0.2], when: {optim.schedule: step}}\n"
            "optim.warmup: {same_as: optim.lr_drop}\n"
        )
    )
    for settings in draws(space, 20, {"optim.lr_drop": 0.7}):
        assert settings["optim.warmup"] == settings.get("optim.lr_drop", 0.7)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optim.lrr: {loguniform: [1e-5, 1e-3]}", "unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optim.lr: {loguniform: [1e-3, 1e-5]}", "reversed"),
        ("optim.lr: {loguniform: [1e-3, 1e-3]}", "empty"),
        ("optim.lr: {loguniform: [0, 1e-3]}", "must begin above 0"),
        ("optim.lr: {loguniform: [1e-5]}", "takes a lowest and a highest value"),
        ("optim.lr: {loguniform: 1e-5}", "takes a lowest and a highest value"),
        ("optim.lr: {loguniform: [1e-5, much]}", "'much' is not a number"),
        ("optim.lr: {loguniform: [1e-5, .nan]}", "nan is not a number"),
        ("loss.eos_coef: {uniform: [0.1, 2]}", "2 is out of bounds; it takes 0.0 to 1.0"),
        ("optim.lr: {logunifrom: [1e-5, 1e-3]}", "unknown kind 'logunifrom'; did you mean 'loguniform'?"),
        ("optim.lr: {}", "give exactly one of"),
        ("optim.lr: {uniform: [0, 1], choice: [1]}", "give exactly one of"),
        ("optim.lr: {loguniform: [1e-5, 1e-3], step: 1e-5}", "a step goes with uniform and integer only"),
        ("optim.lr: {uniform: [0, 1], step: 0}", "is no step"),
        ("optim.lr: {uniform: [0, 1], step: big}", "is no step"),
        ("optim.lr: {uniform: [0, 1], step: 2}", "is no step"),
        ("optim.lr: {uniform: [0, 1], step: 0.3}", "not a whole number of steps"),
        ("model.dec_layers: {integer: [2, 5], step: 1.5}", "is no step"),
        ("model.dec_layers: {uniform: [2, 5]}", "takes whole numbers; use integer"),
        ("model.dec_layers: {integer: [2, 5.5]}", "5.5 is not a whole number"),
        ("optim.lr_drop: {integer: [2, 5.5]}", "integer takes whole numbers"),
        ("optim.schedule: {uniform: [1, 2]}", "needs a numeric setting"),
        ("data.train_sizes: {integer: [400, 500]}", "needs a numeric setting"),
        ("optim.batch_size: {choice: [2, two]}", "'two' is not a whole number"),
        ("optim.schedule: {choice: [step, cosin]}", "'cosin' is out of bounds"),
        ("optim.batch_size: {choice: []}", "choice takes a list of values"),
        ("optim.batch_size: {choice: 2}", "choice takes a list of values"),
        ("optim.batch_size: {choice: [2, 4, 2]}", "the choice 2 stands twice"),
        ("optim.batch_size: [2, 4]", "{choice: [2, 4]}"),
        (
            "optim.lr: {loguniform: [1e-5, 1e-3], around: 2e-3}",
            "draws cannot begin around 0.002, which is not in {loguniform: [1.0e-05, 0.001]}",
        ),
        ("optim.lr: {loguniform: [1e-5, 1e-3], around: there}", "'there' is not a number"),
        ("optim.batch_size: {choice: [2, 4], around: 8}", "draws cannot begin around 8"),
        ("matcher.set_cost_bbox: {same_as: loss.bbox_loss_coef, around: default}", "around goes with ranges and choice only"),
        ("optim.batch_size: 0", "0 is out of bounds"),
        ("optim.batch_size: many", "'many' is not a whole number"),
        (
            "matcher.set_cost_bbox: {same_as: loss.bbox_loss_koef}",
            "unknown setting 'loss.bbox_loss_koef'; did you mean 'loss.bbox_loss_coef'?",
        ),
        ("matcher.set_cost_bbox: {same_as: matcher.set_cost_bbox}", "refer to each other in a circle"),
        ("loss.eos_coef: {same_as: loss.giou_loss_coef}", "out of bounds; it takes 0.0 to 1.0, and it follows loss.giou_loss_coef"),
        ("optim.batch_size: {same_as: optim.lr}", "of another type"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {optim.warmup: 0.1}}", "depends on optim.warmup, which this space does not draw"),
        (
            "optim.lr_drop: {uniform: [0.4, 0.9], when: {loss.cls_loss_coef: 1}}",
            "depends on loss.cls_loss_coef, which this space does not draw",
        ),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {loss.giou_loss_coef: 2}}", "neither choice nor integer"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {model.nheads: 4}}", "which it never is"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {model.nheads: four}}", "'four' is not a whole number"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {model.nheads: []}}", "names no value"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: step}", "when takes names and values"),
        ("optim.lr_drop: {uniform: [0.4, 0.9], when: {optim.lr_drop: 0.5}}", "neither choice nor integer"),
        ("run.name: {choice: [a, b]}", "is set by the search itself"),
        ("optim: 3", "unknown setting 'optim'"),
        ("loss.giou_loss_coef: {uniform: [1, 2]}", "stands twice (first on line 2)"),
        ("optim.lr: {uniform: [0, 1], uniform: [0, 2]}", "optim.lr.uniform stands twice"),
    ],
)
def test_a_fault_is_one_line_with_file_and_line(write, line, expected):
    path = write(f"# a space\nloss.giou_loss_coef: {{uniform: [1, 5]}}\nmodel.nheads: {{choice: [2, 8]}}\nloss.cls_loss_coef: 1\n{line}\n")
    with pytest.raises(UserError) as caught:
        read_space(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 5: ")
    assert expected in message
    assert "\n" not in message


def test_a_circle_of_conditions_and_ties_is_named(write):
    path = write("optim.warmup: {same_as: optim.lr_drop}\noptim.lr_drop: {same_as: optim.warmup}\noptim.lr: {uniform: [0, 1]}\n")
    with pytest.raises(UserError, match=r"line [12]: .*optim\.\w+ -> optim\.\w+ -> optim\.\w+ refer to each other in a circle"):
        read_space(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- optim.lr\n- loss.eos_coef\n", "line 1: expected settings by name, found a sequence"),
        ("just words\n", "line 1: expected settings by name, found a scalar"),
        ("", "draws no setting"),
        ("loss.cls_loss_coef: 1\n", "draws no setting"),
        ("optim.lr: {uniform: [0, 1\n", "not a YAML file"),
    ],
)
def test_a_file_that_is_no_space_is_refused(write, text, expected):
    with pytest.raises(UserError, match=expected):
        read_space(write(text))


def test_a_missing_file_names_the_ready_spaces(tmp_path):
    with pytest.raises(UserError, match=r"lots: no such search space file; the bundled ones are faster, learning_rates, loss, masks, "):
        read_space("lots")


def test_a_written_space_is_the_same_space(write, tmp_path):
    space = read_space(write(EVERY_KIND))
    space.write(tmp_path / "again.yaml")
    again = read_space(tmp_path / "again.yaml")
    assert again.to_dict() == space.to_dict()
    assert again.distributions == space.distributions
    assert space.differences(again) == []
    assert draws(again, 5) == draws(space, 5)
    assert read_space(yaml.safe_load((tmp_path / "again.yaml").read_text())).to_dict() == space.to_dict()


def test_draws_begin_around_the_default_or_a_value():
    space = read_space(
        {
            "optim.lr": {"loguniform": [2e-4, 1e-2], "around": "default"},  # the default, 1e-4, is below
            "loss.eos_coef": {"uniform": [0, 0.5], "around": 0.25},
            "optim.schedule": {"choice": ["step", "cosine"], "around": "default"},
            "optim.batch_size": {"choice": [8, 16], "around": "default"},  # the default is not among them
            "loss.giou_loss_coef": {"uniform": [1, 5]},
        }
    )
    assert space.expected(space.ground()) == {"optim.lr": 2e-4, "loss.eos_coef": 0.25, "optim.schedule": "step"}
    assert read_space(space.to_dict()).to_dict() == space.to_dict()
    changed = read_space({**space.to_dict(), "loss.eos_coef": {"uniform": [0, 0.5]}})
    assert space.differences(changed) == ["loss.eos_coef was {uniform: [0.0, 0.5], around: 0.25}, is {uniform: [0.0, 0.5]}"]


def test_differences_are_told_setting_by_setting():
    old = read_space({"optim.lr": {"loguniform": [1e-5, 1e-3]}, "loss.eos_coef": {"uniform": [0, 1]}, "optim.batch_size": 4})
    new = read_space({"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.giou_loss_coef": {"uniform": [1, 2]}, "optim.batch_size": 4})
    assert old.differences(new) == [
        "loss.eos_coef is gone (was {uniform: [0.0, 1.0]})",
        "loss.giou_loss_coef is new: {uniform: [1.0, 2.0]}",
        "optim.lr was {loguniform: [1.0e-05, 0.001]}, is {loguniform: [1.0e-05, 0.01]}",
    ]


def test_the_order_of_a_file_makes_no_difference():
    first = {"optim.lr": {"uniform": [0, 1]}, "loss.eos_coef": {"uniform": [0, 1]}}
    assert read_space(first).differences(read_space(dict(reversed(first.items())))) == []


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ({"optim.warmup": 0.1}, "the search space does not draw it"),
        ({"optim.lrr": 0.1}, "did you mean 'optim.lr'"),
        ({"optim.lr": 0.1}, "0.1 is not in {loguniform: [1.0e-05, 0.001]}"),
        ({"optim.lr": "fast"}, "'fast' is not a number"),
        ({"loss.eos_coef": 0.07}, "0.07 is not in"),
        ({"model.dec_layers": 3}, "3 is not in"),
        ({"optim.batch_size": 8}, "8 is not in"),
        ({"loss.cls_loss_coef": 2}, "2.0 differs from 1.0, which the search space fixes"),
        ({"loss.bbox_loss_coef": 4, "matcher.set_cost_bbox": 3}, "3.0 differs from loss.bbox_loss_coef, which it follows"),
        ({"matcher.set_cost_bbox": 3}, "follows loss.bbox_loss_coef; give that instead"),
        ({"optim.lr_drop": 0.5, "optim.schedule": "cosine"}, "drawn only when optim.schedule is step, and the point says cosine"),
    ],
)
def test_a_point_outside_the_space_is_refused(write, point, expected):
    space = read_space(write(EVERY_KIND))
    with pytest.raises(UserError) as caught:
        space.check_point(point)
    assert expected in str(caught.value)
    assert not space.contains(point)


def test_a_point_of_the_space_is_drawn_as_it_stands(write):
    space = read_space(write(EVERY_KIND))
    point = {
        "optim.lr": "2e-4",
        "loss": {"eos_coef": 0.35, "bbox_loss_coef": 4, "cls_loss_coef": 1},
        "optim.schedule": "step",
        "optim.lr_drop": 0.5,
        "matcher.set_cost_bbox": 4,
        "data.train_sizes": [480, 512],
    }
    assert space.contains(point)
    study = optuna.create_study()
    study.enqueue_trial(space.check_point(point))
    settings = space.suggest(study.ask())
    assert settings["optim.lr"] == 2e-4
    assert settings["loss.eos_coef"] == 0.35
    assert settings["matcher.set_cost_bbox"] == 4
    assert settings["optim.lr_drop"] == 0.5
    assert settings["data.train_sizes"] == [480, 512]


def test_of_complete_settings_what_optuna_can_keep_is_kept(write):
    space = read_space(
        write(
            "optim.lr: {loguniform: [1e-3, 1e-2]}\n"  # 1e-4 lies outside, and stays
            "optim.weight_decay: {loguniform: [1e-5, 1e-2]}\n"  # 0 has no logarithm
            "optim.batch_size: {choice: [4, 8]}\n"  # 2 is no choice
            "optim.schedule: {choice: [step, cosine]}\n"
            "optim.lr_drop: {integer: [2, 9], when: {optim.schedule: step}}\n"  # 0.667 is not whole
            "optim.warmup: {uniform: [0, 1], when: {optim.schedule: cosine}}\n"  # its condition does not hold
        )
    )
    assert space.drawn(space.ground({"optim.weight_decay": 0.0})) == {"optim.lr": 1e-4, "optim.schedule": "step"}


def test_hparam_domains_hold_every_value_and_the_base_value(write):
    domains = read_space(write(EVERY_KIND)).hparam_domains({"optim.lr": 0.5, "optim.batch_size": 16, "model.dec_layers": 1})
    assert domains["optim.lr"] == (1e-5, 0.5)
    assert domains["optim.batch_size"] == [16, 2, 4]
    assert domains["model.dec_layers"] == (1, 6)
    assert domains["matcher.set_cost_bbox"] == (1.0, 10.0)
    assert domains["optim.schedule"] == ["step", "cosine", "constant"]
    assert "480, 512" in domains["data.train_sizes"]
    assert "loss.cls_loss_coef" not in domains
