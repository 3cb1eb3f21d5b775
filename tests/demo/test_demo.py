import json
import os

import pytest

from raydetr.config import load_config
from raydetr.demo.demo import demo, untrained_mask_ap
from raydetr.weights.fitting import load
from tests.helpers import add_outlines

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_the_demo_fine_tunes_the_bundled_model_to_half_and_more_and_finds_better_settings(tmp_path, capsys):
    result = demo(tmp_path / "demo", seeds=2)
    assert result["before"] < 0.1
    assert result["after"] >= 0.5
    out = tmp_path / "demo"
    assert len((out / "runs" / "balloons" / "log.txt").read_text().splitlines()) == 10
    shown = json.loads((out / "gallery" / "images.json").read_text())["images"]
    assert len(shown) == 16
    page = (out / "gallery" / "index.html").read_text()
    assert "before" in page.lower()
    assert "after" in page.lower()
    said = capsys.readouterr().out
    assert f"AP {result['before']:.3f} before, {result['after']:.3f} after" in said
    assert "raydetr train --data DATA" in said
    assert f"raydetr confirm {out / 'runs' / 'search'} --top 1 --seeds 2" in said
    verdict = json.loads((out / "runs" / "search" / "verdict.json").read_text())
    assert (verdict["judged_on"], verdict["images"], verdict["seeds"]) == ("test", 40, 2)
    assert f"judged by new images: {verdict['sentence']}" in said
    assert result["best"] > result["default"]
    assert len(list((out / "runs" / "search" / "trials").iterdir())) == 8
    report = (out / "runs" / "search" / "report.html").read_text()
    assert len(report) > 100_000
    assert verdict["sentence"] in report
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    assert result["seconds"] < (360 if alone else 720)  # six minutes of two cores; beside other tests it has one of them


def test_the_masks_of_the_bundled_network_are_scored_before_they_are_trained(coco_folder, tmp_path):
    folder = add_outlines(coco_folder(train=1, val=2, categories=[{"id": 1, "name": "balloon"}]))
    config = load_config({"model.preset": "detr_tiny", "model.masks": True})
    assert untrained_mask_ap(config, folder, tmp_path) < 0.1
    model = load(tmp_path / "untrained.pth")
    assert model.settings["masks"]
    assert [each["name"] for each in model.categories] == ["balloon"]
