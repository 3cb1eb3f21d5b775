import json
import math
import sys

import pytest

from benchmarks import recipe


def line(images, setting, value, seed, ap, seconds=1.0, epochs=15):
    return {"images": images, "setting": setting, "value": value, "seed": seed, "epochs": epochs, "AP": ap, "seconds": seconds}


def test_the_interval_is_students_t_of_paired_differences():
    mean, low, high = recipe.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_the_table_pairs_seeds_and_says_what_an_interval_shows():
    aps = {0: 0.1, 1: 0.5, 2: 0.3}
    lines = [line("cells", recipe.DEFAULTS, None, seed, ap) for seed, ap in aps.items()]
    for name, gains in {
        "data.color": (0.010, 0.011, 0.012),
        "data.zoom_out": (-0.01, 0.0, 0.02),
        "optim.layer_decay": (-0.02, -0.021),
    }.items():
        lines += [line("cells", name, 0.5, seed, aps[seed] + gain, 1.5) for seed, gain in enumerate(gains)]
    lines += [line("balloons", "data.color", 0.5, 0, 0.9), line("cells", "data.color", 0.5, 0, 0.9, epochs=3)]
    rows = {row[1]: row for row in recipe.summarize(lines, 15)}
    assert rows[recipe.DEFAULTS][3:5] == [3, "30.0"]
    assert rows["data.color"] == ["cells", "data.color", "0.5", 3, "31.1", "+1.1 (+0.9 to +1.3)", "yes", "1.50x"]
    assert rows["data.zoom_out"][6] == "not shown"
    assert rows["optim.layer_decay"][3] == 2
    assert rows["optim.layer_decay"][6] == "harms"


def test_settings_that_can_have_no_effect_are_left_out(tmp_path):
    names = [name for name, _ in recipe.variants(recipe.SETTINGS, recipe.Images("cells", tmp_path, 1.0))]
    assert names == [recipe.DEFAULTS, *(name for name in recipe.SETTINGS if name != "data.copy_paste")]


def test_the_command_trains_and_continues_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    out = tmp_path / "recipe.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmarks.recipe", "--quick", "--settings", "data.copy_paste", "--out", str(out)])
    recipe.main()
    first = [json.loads(each) for each in out.read_text().splitlines()]
    assert [each["setting"] for each in first] == [recipe.DEFAULTS, "data.copy_paste"]
    assert all(0 <= each["AP"] <= 1 and each["seconds"] > 0 for each in first)
    assert first[0]["AP"] != first[1]["AP"]
    out.write_text(json.dumps(first[0] | {"AP": 0.25}) + "\n")
    recipe.main()
    assert [json.loads(each)["AP"] for each in out.read_text().splitlines()] == [0.25, first[1]["AP"]]
    assert "| balloons | data.copy_paste | 0.5 " in capsys.readouterr().out
