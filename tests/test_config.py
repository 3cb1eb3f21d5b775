import dataclasses
import pickle

import pytest
import yaml

from raydetr import config
from raydetr.errors import UserError


def test_every_setting_stands_within_its_own_bounds():
    for each in config.SETTINGS.values():
        assert each.parse(each.default) == each.default, each.name


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_change_only_known_settings_within_bounds(preset):
    loaded = config.load_config({"model.preset": preset})
    values = config.flatten(config.to_dict(loaded))
    assert values == config.preset_settings(preset)


def test_later_layers_win_and_a_preset_is_laid_before_its_own_layer():
    file_layer = {"model": {"preset": "detr_tiny", "num_queries": 7}, "optim.lr": 1e-3}
    loaded = config.load_config(file_layer, {"optim.lr": "2e-3"})
    assert (loaded.model.num_queries, loaded.optim.lr, loaded.model.backbone) == (7, 2e-3, "tiny")
    assert (
        config.load_config(file_layer, {"model.preset": "detr_tiny"}).model.num_queries == config.PRESETS["detr_tiny"]["model.num_queries"]
    )


def test_nothing_of_another_preset_stays():
    assert config.load_config({"model.preset": "detr_tiny"}, {"model.preset": "detr_resnet50"}) == config.load_config({})


def test_a_written_file_repeats_the_tree(tmp_path):
    before = config.load_config({"model.preset": "detr_resnet101_dc5", "data.train_sizes": [64, 96], "run.name": "1e5", "optim.lr": 3e-5})
    config.write_yaml(before, tmp_path / "config.yaml")
    assert config.load_config(config.read_yaml(tmp_path / "config.yaml")) == before


@pytest.mark.parametrize(("given", "ends"), [("1:4", (1, 4)), ("2:2", (2, 2)), (3, (3, 3)), ("3", (3, 3))])
def test_workers_are_a_number_or_a_span(tmp_path, given, ends):
    loaded = config.load_config({"run.workers": given})
    assert config.least_and_most_workers(loaded) == ends
    config.write_yaml(loaded, tmp_path / "config.yaml")
    assert config.load_config(config.read_yaml(tmp_path / "config.yaml")) == loaded


@pytest.mark.parametrize(
    ("given", "device", "gpus", "workers"),
    [
        ("auto", "auto", 4, 4),
        ("auto", "auto", 0, 1),
        ("auto", "cpu", 4, 1),
        ("auto", "cuda", 2, 2),
        (3, "auto", 4, 3),
        ("1:4", "auto", 2, "1:4"),
    ],
)
def test_automatic_workers_are_one_for_each_gpu(tmp_path, given, device, gpus, workers):
    asked = config.load_config({"run.workers": given, "speed.device": device})
    config.write_yaml(asked, tmp_path / "config.yaml")
    assert config.load_config(config.read_yaml(tmp_path / "config.yaml")) == asked
    assert config.with_workers(asked, gpus).run.workers == workers


@pytest.mark.parametrize(("given", "number"), [(3, 3), ("4", 4), ("auto", 2), ("auto:16", 16)])
def test_a_batch_size_may_be_left_to_the_gpu(tmp_path, given, number):
    asked = config.load_config({"model.preset": "detr_tiny", "optim.batch_size": given})
    config.write_yaml(asked, tmp_path / "config.yaml")
    assert config.load_config(config.read_yaml(tmp_path / "config.yaml")) == asked
    assert config.asked_batch_size(asked) == number


def test_a_span_written_by_hand_is_not_read_to_the_base_of_60(tmp_path):
    (tmp_path / "run.yaml").write_text("run:\n  workers: 1:4\n  seed: 12\n")
    assert config.read_yaml(tmp_path / "run.yaml") == {"run.workers": "1:4", "run.seed": 12}


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"optim.lrr": 1}, "did you mean 'optim.lr'"),
        ({"eos_coef": 0.1}, "did you mean 'loss.eos_coef'"),
        ({"wxyz": 1}, "the sections are model, loss"),
        ({"loss.eos_coef": 2}, "loss.eos_coef: 2 is out of bounds; it takes 0.0 to 1.0"),
        ({"optim.epochs": 0}, "it takes 1 to"),
        ({"optim.epochs": 1.5}, "not a whole number"),
        ({"optim.lr": float("nan")}, "not a number"),
        ({"optim.lr": "fast"}, "not a number"),
        ({"optim.lr": None}, "not a number"),
        ({"optim.epochs": 10**400}, "not a whole number"),
        ({"run.name": " "}, "run.name: is blank"),
        ({"run.name": "x" * 300}, "run.name: 'xxxxxxxxxxxxxxxxxxxx'... is 300 bytes long; it may have 200"),
        ({"run.name": "\u00e9" * 101}, "is 202 bytes long"),
        ({"run.name": "one\ntwo"}, "run.name: 'one\\ntwo' is not the name of a folder"),
        ({"run.name": "\x1b[2J"}, "is not the name of a folder"),
        ({"run.name": "../up"}, "is not the name of a folder"),
        ({"model.pre_norm": "perhaps"}, "not true or false"),
        ({"model.preset": "detr_resnet18"}, "one of detr_resnet50"),
        ({"data.train_sizes": []}, "not a list"),
        ({"data.train_sizes": [480, 3]}, "out of bounds"),
        ({"run.workers": "4:1"}, "run.workers: '4:1' counts down"),
        ({"run.workers": "0:2"}, "run.workers: '0' is out of bounds; it takes 1 to 4096"),
        ({"run.workers": "some:more"}, "run.workers: 'some' is not a whole number"),
        ({"run.workers": "1:2:3"}, "run.workers: '2:3' is not a whole number"),
        ({"run.pictures": "1:4"}, "run.pictures: '1:4' is not a whole number"),
        ({"optim.batch_size": "auto:0"}, "optim.batch_size: '0' is out of bounds; it takes 1 to 1024"),
        ({"optim.batch_size": "auto:many"}, "optim.batch_size: 'many' is not a whole number"),
        ({"optim.batch_size": "1:4"}, "optim.batch_size: '1:4' is not a whole number"),
        ({"run.workers": "auto:4"}, "run.workers: 'auto' is not a whole number"),
        ({"model.nheads": 7}, "not a multiple of model.nheads"),
        ({"data.crop_min": 700}, "larger than data.crop_max"),
        ({"matcher.set_cost_class": 0, "matcher.set_cost_bbox": 0, "matcher.set_cost_giou": 0}, "all three costs are 0"),
    ],
)
def test_bad_settings_are_one_line_that_says_what_is_right(layer, says):
    with pytest.raises(UserError) as caught:
        config.load_config(layer)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim:\n  lr: 1e-4\n  lrr: 1\n", "line 3: unknown setting 'optim.lrr'"),
        ("loss.eos_coef: 2\n", "line 1: loss.eos_coef: 2 is out of bounds"),
        ("? [1, 2]\n: 3\n", "line 1: unknown setting '(sequence)'"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        config.read_yaml(file)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert config.read_yaml(tmp_path / "empty.yaml") == {}


def test_plain_exponents_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("optim.lr: 1e-4\n")  # PyYAML alone reads text here
    assert isinstance(yaml.safe_load("1e-4"), str)
    assert config.read_yaml(tmp_path / "run.yaml") == {"optim.lr": 1e-4}


def test_loading_leaves_the_defaults_alone():
    config.load_config({}).data.train_sizes.append(1)
    assert config.load_config({}).data.train_sizes == config.SETTINGS["data.train_sizes"].default
    assert dataclasses.asdict(config.load_config({})) == dataclasses.asdict(config.Config())


def test_settings_are_parsed_once_on_the_way_from_a_file_to_a_changed_copy(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("optim.lr: 2e-4\n")
    parsed, parse = [], config.Setting.parse
    monkeypatch.setattr(config.Setting, "parse", lambda self, value: parsed.append(self.name) or parse(self, value))
    loaded = config.with_settings(config.Config(), config.read_yaml(tmp_path / "run.yaml"))
    changed = config.with_settings(loaded, {"run.name": "second"})
    assert (changed.optim.lr, changed.run.name, loaded.run.name) == (2e-4, "second", None)
    assert parsed == ["optim.lr"]


def test_a_changed_copy_follows_presets_and_is_checked():
    changed = config.with_settings(config.load_config({"optim.epochs": 7}), {"model.preset": "detr_tiny", "model.nheads": 2})
    assert (changed.model.backbone, changed.model.nheads, changed.optim.epochs) == ("tiny", 2, 7)
    with pytest.raises(UserError, match=r"not a multiple of model\.nheads"):
        config.with_settings(changed, {"model.nheads": 3})


def test_a_misspelt_setting_in_python_is_an_error():
    loaded = config.load_config({})
    with pytest.raises(AttributeError):
        loaded.optim.lrr = 5


def test_settings_travel_to_other_processes():
    loaded = config.load_config({"model.preset": "detr_tiny", "data.train_sizes": [96, 128]})
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_an_empty_file_of_a_run_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: is empty, and it should hold the settings of the run"):
        config.read_config(tmp_path / "config.yaml")


def test_a_file_of_an_earlier_version_gets_the_defaults_of_newer_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("optim: {lr: 3e-4}\n")
    assert config.read_config(tmp_path / "config.yaml") == config.load_config({"optim.lr": 3e-4})
