"""Thresholds are stored in a checkpoint, and used by predictions and exports."""

import json
import shutil

import numpy as np
import pytest
import torch

import raydetr
from raydetr.cli import main
from raydetr.config import load_config, to_dict
from raydetr.errors import UserError
from raydetr.export.onnx import metadata
from raydetr.model.detr import build_model
from raydetr.predict import score
from raydetr.predict.predict import predict
from raydetr.training.engine import Detections
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint

CATEGORIES = [{"id": 7, "name": "oblong"}, {"id": 9, "name": "zebra"}, {"id": 3, "name": "square"}]  # the data set has no zebra


@pytest.fixture
def data(coco_folder):
    return coco_folder(train=1, val=4)


@pytest.fixture
def detector(tmp_path, data):
    torch.manual_seed(0)
    model = build_model("detr_tiny", 3, enc_layers=1, dec_layers=1)
    model.query_embed.weight.data *= 20
    settings = {"model.preset": "detr_tiny", "model.enc_layers": 1, "model.dec_layers": 1, "data.val_size": 64}
    about = {"settings": to_dict(load_config(settings)), "categories": CATEGORIES, "epoch": 1, "metrics": {}}
    save_checkpoint(tmp_path / "best.pth", {"model": model.state_dict(), **about, "optimizer": {"state": torch.arange(3)}})
    return tmp_path / "best.pth"


@pytest.fixture
def finds(data, monkeypatch):
    """The evaluation finds each true box with a score of 0.9 (square) or 0.6 (oblong), and beside it a false one with 0.5."""
    coco = json.loads((data / "annotations" / "custom_val.json").read_text())
    labels, scores = {3: 2, 7: 0}, {3: 0.9, 7: 0.6}

    def evaluate(*_):
        images = sorted(image["id"] for image in coco["images"])
        rows = []
        for image_id in images:
            true = [each for each in coco["annotations"] if each["image_id"] == image_id]
            found = [(each["bbox"], labels[each["category_id"]], scores[each["category_id"]]) for each in true]
            rows.append(found + [([0.0, 0.0, 2.0, 2.0], labels[each["category_id"]], 0.5) for each in true])
        boxes = np.array([[bbox for bbox, _, _ in row] for row in rows], np.float32)
        values = np.array([[value for _, _, value in row] for row in rows], np.float32)
        return {}, Detections(np.array(images), boxes, values, np.array([[label for _, label, _ in row] for row in rows]))

    monkeypatch.setattr(score, "evaluate", evaluate)


def test_thresholds_are_stored_and_loaded(data, detector, finds, tmp_path, capsys):
    before = read_checkpoint(detector)
    assert raydetr.load(detector).thresholds == []
    assert main(["evaluate", str(detector), "--data", str(data), "--thresholds", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "score thresholds for f1" in shown
    assert f"stored in {detector}; raydetr predict and raydetr export use them" in shown
    model = raydetr.load(detector)
    assert model.thresholds == [pytest.approx(0.55, abs=1e-6), None, pytest.approx(0.7, abs=1e-6)]
    numbers = json.loads((tmp_path / "out.json").read_text())["thresholds"]
    assert numbers["square"]["score"] == model.thresholds[2]
    assert numbers["square"]["interval"][0] <= model.thresholds[2] <= numbers["square"]["interval"][1]
    assert (numbers["square"]["goal"], numbers["square"]["f1"]) == ("f1", 1)
    after = read_checkpoint(detector)
    assert after.keys() - before.keys() == {"thresholds"}
    assert after["thresholds"][2]["interval"] == numbers["square"]["interval"]
    assert torch.equal(after["optimizer"]["state"], torch.arange(3))
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    assert json.loads(metadata(model, load_config({}).data)["thresholds"]) == model.thresholds


def stored(detector, thresholds):
    content = read_checkpoint(detector)
    content["thresholds"] = thresholds
    save_checkpoint(detector, content)
    return detector


def test_predictions_draw_what_is_above_the_thresholds_of_their_category(data, detector, tmp_path):
    images = [data / "val2017"]
    predict(detector, images, tmp_path / "all", threshold=0)
    results = json.loads((tmp_path / "all" / "predictions.json").read_text())
    limits = {}
    for each in CATEGORIES:
        scores = [one["score"] for one in results if one["category_id"] == each["id"]]
        limits[each["id"]] = float(np.median(scores or [1])) - 1e-6  # scores in the file are rounded
    kept = [each for each in results if each["score"] >= limits[each["category_id"]]]
    assert 0 < len(kept) < len(results)
    stored(detector, [{"score": limits[each["id"]], "interval": None, "goal": "f1"} for each in CATEGORIES])
    summary = predict(detector, images, tmp_path / "own")
    assert summary.boxes.total() == len(kept)
    assert "boxes above the checkpoint's thresholds" in summary.text()
    assert "boxes with a score of the threshold of their category or more" in " ".join(
        (tmp_path / "own" / "index.html").read_text().split()
    )
    assert json.loads((tmp_path / "own" / "predictions.json").read_text()) == results
    assert predict(detector, images, tmp_path / "given", threshold=0).boxes.total() == len(results)
    stored(detector, [None, None, None])
    assert "boxes with a score of 0.7 or more" in predict(detector, images, tmp_path / "default").text()


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, 2.0], {"square": 0.5}, [0.5, 0.5, "x"], [0.5, 0.5, {"score": float("nan")}], "x"])
def test_damaged_thresholds_are_named(detector, thresholds):
    with pytest.raises(UserError, match=r"best\.pth: damaged: its thresholds are not a score from 0 to 1 for each of its 3 categories"):
        raydetr.load(stored(detector, thresholds))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "results.json"], "--thresholds takes a CHECKPOINT, without --predictions and --against"),
        (["{detector}", "--against", "{detector}"], "--thresholds takes a CHECKPOINT, without --predictions and --against"),
        (["{detector}", "--threshold-goal", "best"], "--threshold-goal: 'best' is none of f1"),
        (["s3://bucket/best.pth"], "s3://bucket/best.pth: no file on this computer"),
        (["{none}"], "none.pth: no file on this computer"),
        (["{bare}"], "bare.pth: thresholds are stored in checkpoints of raydetr only"),
    ],
)
def test_bad_requests_are_one_line(data, detector, finds, tmp_path, capsys, words, message):
    save_checkpoint(tmp_path / "bare.pth", read_checkpoint(detector)["model"])
    names = {"detector": detector, "none": tmp_path / "none.pth", "bare": tmp_path / "bare.pth"}
    before = detector.read_bytes()
    assert main(["evaluate", *(word.format(**names) for word in words), "--data", str(data), "--thresholds"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert detector.read_bytes() == before


def test_a_checkpoint_that_is_replaced_meanwhile_is_left_alone(data, detector, finds, tmp_path, monkeypatch):
    newer = tmp_path / "newer.pth"
    shutil.copy(detector, newer)
    found = score.evaluate

    def evaluate(*arguments):
        newer.replace(detector)  # as a training does at the end of an epoch
        return found(*arguments)

    monkeypatch.setattr(score, "evaluate", evaluate)
    with pytest.raises(UserError, match="was replaced meanwhile"):
        raydetr_thresholds(detector, data)
    assert raydetr.load(detector).thresholds == []


def raydetr_thresholds(detector, data):
    from raydetr.evaluate.thresholds import Goal
    from raydetr.predict.thresholds import store_thresholds

    return store_thresholds(detector, Goal("f1"), {"data.path": str(data)})
