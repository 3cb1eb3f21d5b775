import pandas
import pytest

from raydetr.config import load_config, read_yaml
from raydetr.errors import UserError
from raydetr.search.results import top_trials, trials_frame, write_best, write_trials
from raydetr.training.metrics import REPORTED
from tests.search.searches import SPACE, hill, run


def test_trials_have_the_columns_of_settings_and_metrics_and_no_others(make):
    search = make(trials=2)
    internals = {"trial_id": "a1", "pid": 7, "experiment_tag": "1", "config/number": 0, "timestamp": 1, "done": "no", "hostname": "h"}
    for number in range(2):
        search.ask(str(number))
        search.report(number, 1, 0.5)
        search.tell(number, "complete", 0.5, metrics={**dict.fromkeys(REPORTED, 0.25), "node": "n", "cards": "0", **internals})
    columns = ["trial", "state", "AP", "epochs", "seconds", "started", "ended", *search.space.names]
    columns += [name for name in REPORTED if name not in columns] + ["node", "cards", "name", "reason"]
    assert trials_frame(search).columns.to_list() == columns
    header = write_trials(search.folder)[0].read_text().splitlines()[0]
    assert header.split(",") == columns


def test_best_yaml_holds_the_complete_settings_of_the_best_trial(make):
    search = run(make(config=load_config({"run.name": "first", "optim.epochs": 7, "model.preset": "detr_tiny"}), trials=20))
    config = load_config(read_yaml(write_best(search.folder)))
    assert config.optim.lr == search.settings(search.best().number)["optim.lr"] != 5e-4
    assert config.matcher.set_cost_bbox == config.loss.bbox_loss_coef
    assert (config.optim.epochs, config.model.preset, config.run.name) == (7, "detr_tiny", None)
    config.run.name = "first"
    assert config == search.config(search.best().number)


def test_there_is_no_best_before_a_trial_has_ended(make):
    search = make()
    search.ask()
    with pytest.raises(UserError, match="no trial has ended with a value of AP yet"):
        write_best(search.folder)
    assert not (search.folder / "best.yaml").exists()


def test_trials_are_written_as_csv_and_parquet(make):
    space = {**SPACE, "data.train_sizes": {"choice": [[480, 512], [640]]}}
    search = make(space, trials=5)
    for number in range(4):
        search.ask()
        search.report(number, 1, number / 10)
        search.tell(number, "failed" if number == 2 else "complete", number / 10, reason="boom", metrics={"AP50": 0.5})
    search.ask()
    csv, parquet = (read(path) for read, path in zip((pandas.read_csv, pandas.read_parquet), write_trials(search.folder), strict=True))
    for frame in (csv, parquet):
        assert frame["trial"].tolist() == [0, 1, 2, 3, 4]
        assert frame["state"].tolist() == ["complete", "complete", "failed", "complete", "running"]
        assert frame["AP"].tolist()[:2] == [0.0, 0.1]
        assert frame["AP50"].tolist()[:4] == [0.5] * 4
        assert frame["reason"].tolist()[2] == "boom"
        assert frame["optim.lr"].tolist() == [search.settings(number)["optim.lr"] for number in range(5)]
        assert set(frame["data.train_sizes"][1:]) <= {"480, 512", "640"}
        drawn = [search.settings(number)["optim.schedule"] == "step" for number in range(5)]
        assert frame["optim.lr_drop"].notna().tolist() == drawn


def test_the_top_trials_stand_beside_trial_0(make):
    search = run(make(), lambda settings: -hill(settings))  # the default is far from the worst rate, so others beat it
    lines = top_trials(search, 2).splitlines()
    best = search.best()
    assert lines[0].split()[:3] == ["trial", "state", "AP"]
    assert lines[1].split()[:2] == [str(best.number), "complete"]
    assert f"{best.value - search.frozen()[0].value:+.4f}" in lines[1]
    assert lines[-1].startswith("0 (default)")
    assert len(lines) == 4
