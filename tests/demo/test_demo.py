import functools
import json

import pytest

from raydetr.demo import balloons
from raydetr.demo import demo as steps
from raydetr.demo.demo import demo

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_the_demo_fine_tunes_the_bundled_model_to_half_and_more_and_confirms_its_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "TRIAL_EPOCHS", 2)
    result = demo(tmp_path / "demo", trials=3, seeds=2)
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
    logs = sorted((out / "runs" / "search" / "trials").glob("*/log.txt"))
    reached = [max(json.loads(line)["test_coco_eval_bbox"][0] for line in log.read_text().splitlines()) for log in logs]
    assert len(reached) == 3
    assert (result["default"], result["best"]) == (reached[0], max(reached))
    report = (out / "runs" / "search" / "report.html").read_text()
    assert len(report) > 100_000
    assert verdict["sentence"] in report


def test_the_demo_with_masks_ends_and_shows_them_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(balloons, "generate", functools.partial(balloons.generate, train=4, val=2))
    out = tmp_path / "demo"
    result = demo(out, workers=1, epochs=1, trials=0, masks=True)
    said = capsys.readouterr().out
    assert f"masks: AP {result['segm_before']:.3f} before, {result['segm_after']:.3f} after training" in said
    assert "--model.masks true" in said
    logged = json.loads((out / "runs" / "balloons" / "log.txt").read_text())
    assert result["segm_after"] == logged["test_coco_eval_masks"][0]
    found = json.loads((out / "gallery" / "predictions.json").read_text())
    assert all("segmentation" in each for each in found)
