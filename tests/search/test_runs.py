import json
import os

import pytest

from raydetr.cli import main
from raydetr.config import load_config, write_yaml
from raydetr.errors import UserError
from raydetr.search.runs import list_runs, runs_table, sort_runs
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search

pytest_plugins = "tests.stores"


def write_run(folder, scores, *, owned=False, **settings):
    folder.mkdir(parents=True)
    write_yaml(load_config({name.replace("__", "."): value for name, value in settings.items()}), folder / "config.yaml")
    (folder / "log.txt").write_text("".join(json.dumps({"test_coco_eval_bbox": [score, 0.9]}) + "\n" for score in scores))
    if owned:
        (folder / ".owner").write_text("0" * 32)


@pytest.fixture
def storage(tmp_path):
    """Two runs, one of them unfinished, and a search of two trials with the folder of one."""
    write_run(tmp_path / "first", [0.1, 0.5, 0.4], optim__lr=1e-4)
    write_run(tmp_path / "deep" / "second", [0.25], owned=True, optim__lr=2e-4, optim__epochs=9)
    search = create_search(tmp_path / "search", read_space("loss"), load_config(), trials=2)
    number, _ = search.ask()
    search.report(number, 1, 0.75)
    search.tell(number, "complete", 0.75)
    write_run(tmp_path / "search" / "trials" / "000_default", [0.75])
    return tmp_path


def test_runs_and_searches_are_listed_with_what_tells_them_apart(storage):
    rows = {row["name"]: row for row in list_runs(str(storage))}
    assert list(rows) == ["deep/second", "first", "search"]
    told = {name: (row["kind"], row["state"], row["epochs"], row["best"]) for name, row in rows.items()}
    assert told == {
        "deep/second": ("run", "unfinished, 1 of 9 epochs", 1, 0.25),
        "first": ("run", "finished", 3, 0.5),
        "search": ("search", "unfinished, 1 of 2 trials", 1, 0.75),
    }
    assert rows["deep/second"]["settings"] == {"optim.lr": 2e-4, "optim.epochs": 9}
    files = [file for file in (storage / "search").rglob("*") if file.is_file()]
    assert rows["search"]["size"] == sum(file.stat().st_size for file in files)


def test_a_damaged_run_is_a_row_and_no_end(storage):
    (storage / "first" / "config.yaml").write_text("")
    (storage / "deep" / "second" / "log.txt").write_text('{"test_coco_eval_bbox": [0.25]}\n{"half a li')
    rows = {row["name"]: row for row in list_runs(str(storage))}
    assert "first/config.yaml: is empty" in rows["first"]["state"]
    assert rows["deep/second"]["best"] == 0.25
    assert [row["name"] for row in sort_runs(list(rows.values()), "best")] == ["search", "deep/second", "first"]


def test_the_command_prints_a_table_or_json(storage, capsys):
    os.utime(storage / "first" / "log.txt", (0, 0))
    assert main(["runs", str(storage)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["name", "kind", "state", "epochs"]
    assert lines[-1].startswith("first ")  # the oldest
    assert "optim.lr=1e-4" in lines[-1]
    assert main(["runs", str(storage), "--json", "--sort", "best"]) == 0
    assert [row["best"] for row in json.loads(capsys.readouterr().out)] == [0.75, 0.5, 0.25]
    assert main(["runs", str(storage / "absent")]) == 2
    assert capsys.readouterr().err == f"raydetr: {storage}/absent: there is no such folder\n"


def test_the_status_of_a_search_counts_its_paused_trials(tmp_path, capsys):
    options = {"trials": 4, "sampler": "random", "pruner": "promote"}
    search = create_search(tmp_path / "search", read_space({"optim.lr": {"loguniform": [1e-5, 1e-2]}}), load_config({}), **options)
    for number, value in enumerate((0.5, 0.4, 0.3)):
        search.ask()
        search.report(number, 1, value)
        search.pause(number, 1)
    search.tell(0, "complete", 0.5)
    assert main(["status", str(search.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 complete, 2 paused; 4 trials requested")
    assert not any(line.startswith(("running:", "paused:")) for line in lines)


def test_the_status_of_a_search_names_running_and_best_trials(storage, capsys):
    search = Search(storage / "search")
    number, _ = search.ask()
    search.report(number, 1, 0.5)
    assert main(["status", str(storage / "search")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 complete, 1 running; 2 trials requested; last change 2")
    assert lines[1] == "best AP: 0.7500 in trial 0"
    assert lines[2] == f"running: {search.trial_name(1)}, 1 epoch, best AP 0.5000"
    assert lines[-1].split()[:3] == ["0", "(default)", "complete"]
    assert main(["status", str(storage / "first")]) == 2
    assert "first: holds no search" in capsys.readouterr().err


def test_the_status_before_any_trial_ended(tmp_path, capsys):
    create_search(tmp_path / "search", read_space("loss"), load_config(), trials=2)
    assert main(["status", str(tmp_path / "search")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no trial has a value of AP yet"]


def test_a_confirmed_search_is_one_row_with_the_interval_of_its_best_trial(storage):
    folder = storage / "search"
    create_search(folder / "confirm", read_space("loss"), load_config(), trials=1)
    (folder / "verdict.json").write_text(json.dumps({"sentence": "", "caveat": "", "chosen": 0, "judged_on": "test"}))
    line = {"test_coco_eval_bbox": [0.75], "test_AP_low": 0.5, "test_AP_high": 0.9}
    (folder / "trials" / "000_default" / "log.txt").write_text(json.dumps(line) + "\n")
    rows = {row["name"]: row for row in list_runs(str(storage))}
    assert list(rows) == ["deep/second", "first", "search"]
    assert rows["search"]["state"] == "unfinished, 1 of 2 trials, confirmed"
    assert rows["search"]["interval"] == [0.5, 0.9]


def test_an_undefined_ap_is_no_best(storage):
    (storage / "first" / "log.txt").write_text('{"test_coco_eval_bbox": [-1]}\n')
    assert {row["name"]: row["best"] for row in list_runs(str(storage))}["first"] is None


def test_runs_in_an_object_store_are_listed(storage, store):
    store.upload(storage, store.uri)
    here, there = list_runs(str(storage)), list_runs(store.uri)
    for row in (*here, *there):
        del row["when"]  # the store has its own
    assert there == here
    with pytest.raises(UserError, match="there is no bucket"):
        list_runs("s3://no-such-bucket/runs")


def test_the_best_ap_comes_with_its_interval_where_the_run_wrote_one(storage):
    lines = [
        {"test_coco_eval_bbox": [0.2], "test_AP_low": 0.1, "test_AP_high": 0.3},
        {"test_coco_eval_bbox": [0.6], "test_AP_low": 0.44, "test_AP_high": 0.76},
    ]
    (storage / "first" / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {row["name"]: row for row in list_runs(str(storage))}
    assert rows["first"]["interval"] == [0.44, 0.76]
    assert rows["deep/second"]["interval"] is None  # written by an earlier version
    assert "0.6000 (0.44 to 0.76)" in runs_table(list(rows.values()))
