import json

import numpy as np
import pytest
import torch

from raydetr.cli import main
from raydetr.config import load_config, to_dict
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.predict.against import score_against
from raydetr.weights.checkpoint import save_checkpoint
from tests.helpers import add_outlines


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return module_coco_folder(train=1, val=8, boxes=3)


@pytest.fixture(scope="module")
def results(data):
    """``results(name, noise)``: a results file that finds every true box, moved by ``noise`` of its size."""
    coco = json.loads((data / "annotations" / "custom_val.json").read_text())

    def write(name, noise):
        random, path = np.random.default_rng(1), data.parent / name
        found = [{key: each[key] for key in ("image_id", "category_id")} for each in coco["annotations"]]
        for each, true in zip(found, coco["annotations"], strict=True):
            x, y, w, h = true["bbox"]
            dx, dy = random.normal(0, noise, 2)
            each |= {"bbox": [x + dx * w, y + dy * h, w, h], "score": float(random.random())}
        path.write_text(json.dumps(found))
        return path

    return write


@pytest.fixture(scope="module")
def checkpoint(data):
    def write(name, categories):
        torch.manual_seed(0)
        path = data.parent / "models" / name
        state = build_model("detr_tiny", len(categories)).state_dict()
        about = {"settings": to_dict(load_config({"model.preset": "detr_tiny", "data.val_size": 64})), "categories": categories}
        save_checkpoint(path, {"model": state, **about, "epoch": 1, "metrics": {}})
        return path

    return write


def test_the_difference_its_interval_and_the_verdict(data, results, tmp_path, capsys):
    good, bad, written = results("good.json", 0.0), results("bad.json", 0.2), tmp_path / "numbers.json"
    assert main(["evaluate", "--predictions", str(good), "--against", str(bad), "--data", str(data), "--json", str(written)]) == 0
    shown, numbers = capsys.readouterr().out, json.loads(written.read_text())
    low, high = numbers["against"]["AP_interval"]
    assert 0 < low < numbers["against"]["AP"] < high
    assert shown.splitlines()[-1] == numbers["verdict"]
    assert numbers["verdict"].startswith("The checkpoint is better than the other by ")
    assert f"AP         {numbers['against']['AP']:+.3f}  ({low:+.3f} to {high:+.3f})" in shown
    assert set(numbers["against"]["per_category"]) == {"square", "oblong"}


def test_evaluate_shows_and_writes_every_interval(data, results, tmp_path, capsys):
    written = tmp_path / "numbers.json"
    assert main(["evaluate", "--predictions", str(results("some.json", 0.1)), "--data", str(data), "--json", str(written)]) == 0
    shown, numbers = capsys.readouterr().out, json.loads(written.read_text())
    for name in ("AP", "AP50", "AR100"):
        low, high = numbers[f"{name}_interval"]
        assert low <= numbers[name] <= high
        assert f"{name:<10} {numbers[name]:.3f}  ({low:.3f} to {high:.3f})" in shown
    low, high = numbers["per_category"]["square"]["AP_interval"]
    assert f"({low:.3f} to {high:.3f})" in next(line for line in shown.splitlines() if line.startswith("square"))


def test_a_checkpoint_against_a_results_file_and_against_itself(data, results, checkpoint):
    mine = checkpoint("mine.pth", [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}])
    layers = {"data.path": str(data), "data.num_workers": 0}
    assert "worse than the other" in score_against(mine, results("good.json", 0.0), layers)["verdict"]
    assert score_against(mine, mine, layers)["against"]["AP"] == 0


def test_checkpoints_of_different_categories_are_refused_in_one_line(data, checkpoint, capsys):
    mine = checkpoint("mine.pth", [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}])
    other = checkpoint("other.pth", [{"id": 3, "name": "square"}, {"id": 7, "name": "circle"}])
    assert main(["evaluate", str(mine), "--against", str(other), "--data", str(data), "--data.num_workers", "0"]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "detects circle, square" in shown
    assert "only the same categories can be compared" in shown


def test_a_results_file_that_is_broken_is_named(data, results, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("[")
    with pytest.raises(UserError, match=r"broken\.json: not a JSON list"):
        score_against(results("good.json", 0.0), broken, {"data.path": str(data)})


def test_masks_are_compared_as_well(module_coco_folder, tmp_path, capsys):
    data = add_outlines(module_coco_folder(train=1, val=8, boxes=3, folder="outlined"))
    coco = json.loads((data / "annotations" / "custom_val.json").read_text())
    names = ("image_id", "category_id", "bbox", "segmentation")
    good = [{name: each[name] for name in names} | {"score": 0.9} for each in coco["annotations"]]
    cut = [each | {"segmentation": [each["segmentation"][0][:10]]} for each in good]  # its boxes are as good
    boxes = [{name: each[name] for name in ("image_id", "category_id", "bbox", "score")} for each in good]
    files = {"good": good, "cut": cut, "boxes": boxes}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def evaluate(mine, other):
        paths = ["--predictions", str(tmp_path / mine), "--against", str(tmp_path / other), "--json", str(tmp_path / "out.json")]
        assert main(["evaluate", *paths, "--data", str(data)]) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    shown, numbers = evaluate("good.json", "cut.json")
    assert numbers["against"]["AP"] == 0
    difference = numbers["segm"]["against"]
    low, high = difference["AP_interval"]
    assert 0 < low < difference["AP"] <= high
    assert numbers["segm"]["verdict"].startswith(f"The checkpoint is better than the other by {100 * difference['AP']:.1f} mask AP")
    assert shown.splitlines()[-1] == numbers["segm"]["verdict"]
    assert shown.index("difference of boxes to") < shown.index(numbers["verdict"]) < shown.index("difference of masks to")
    shown, numbers = evaluate("good.json", "boxes.json")
    assert "boxes.json has no masks: only boxes are compared." in shown
    assert numbers["segm"]["AP"] == 1
    assert "against" not in numbers["segm"]
    assert shown.splitlines()[-1] == numbers["verdict"]
    shown, numbers = evaluate("boxes.json", "good.json")
    assert "segm" not in numbers
