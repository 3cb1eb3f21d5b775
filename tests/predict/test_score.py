"""Scores of checkpoints and of results files: which category counts as which, and what the command prints and writes."""

import json

import pytest
import torch

from raydetr.cli import main
from raydetr.config import Data, load_config, to_dict
from raydetr.data.masks import decode_masks, read_segmentation
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS
from raydetr.model.detr import build_model
from raydetr.predict import score, tiled_score
from raydetr.predict.score import metrics_table, score_checkpoint, score_predictions, trained_with, write_metrics
from raydetr.predict.tiles import Tiles
from raydetr.weights.checkpoint import save_checkpoint
from raydetr.weights.fitting import load
from tests.helpers import add_outlines

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return module_coco_folder(train=1, val=4, boxes=3)


@pytest.fixture(scope="module")
def detector(data):
    """A checkpoint whose AP differs between its two categories, made by pointing its class rows at the true labels."""
    torch.manual_seed(0)
    model = build_model("detr_tiny", 2)
    path = data.parent / "models" / "best.pth"
    settings = to_dict(load_config({"model.preset": "detr_tiny", "data.path": "/elsewhere", "data.val_size": 64}))
    save_checkpoint(path, {"model": model.state_dict(), "settings": settings, "categories": CATEGORIES, "epoch": 1, "metrics": {}})
    return path


def rewritten(path, target, change):
    content = torch.load(path, weights_only=True)
    content = change(content) or content
    torch.save(content, target)
    return target


@pytest.fixture(scope="module")
def perfect(data):
    """Perfect results of the validation images."""
    coco = json.loads((data / "annotations" / "custom_val.json").read_text())
    return [{name: each[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for each in coco["annotations"]]


@pytest.fixture
def detections_of(monkeypatch, perfect):
    """``detections_of(ids)``: the evaluation finds every true box; the label of a box is the position of its category id in ``ids``."""
    import numpy as np

    from raydetr.training.engine import Detections

    def install(ids):
        def evaluate(model, criterion, loader, device, dtype):
            by_image = {
                image_id: [each for each in perfect if each["image_id"] == image_id] for image_id in {e["image_id"] for e in perfect}
            }
            images = sorted(by_image)
            boxes = np.array([[each["bbox"] for each in by_image[image_id]] for image_id in images], np.float32)
            labels = np.array([[ids.index(each["category_id"]) for each in by_image[image_id]] for image_id in images])
            return {}, Detections(np.array(images), boxes, np.full(labels.shape, 0.9, np.float32), labels)

        monkeypatch.setattr(score, "evaluate", evaluate)

    return install


def layers(data):
    return {"data.path": str(data)}


def test_the_test_set_is_evaluated_on_request(coco_folder, tmp_path):
    root = coco_folder(train=1, val=3)
    (root / "val2017").rename(root / "test2017")
    (root / "annotations" / "custom_val.json").rename(root / "annotations" / "custom_test.json")
    coco = json.loads((root / "annotations" / "custom_test.json").read_text())
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps([{name: each[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for each in coco["annotations"]])
    )
    assert main(["evaluate", "--predictions", str(file), "--data", str(root), "--split", "test", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["AP"] == 1
    assert main(["evaluate", "--predictions", str(file), "--data", str(root)]) == 2


def test_ids_of_a_checkpoint_are_found_by_name_whatever_their_order(data, detector, detections_of, tmp_path):
    """The checkpoint has the data set's ids for the other category each, and its labels in the other order."""

    def change(content):
        content["categories"] = [{"id": 3, "name": "oblong"}, {"id": 7, "name": "square"}]

    detections_of([7, 3])
    metrics = score_checkpoint(rewritten(detector, tmp_path / "best.pth", change), layers(data))
    assert metrics["AP"] == 1
    assert (metrics["unknown_categories"], metrics["notes"]) == ([], [])


def test_names_that_differ_by_case_only_are_two_categories(module_coco_folder, data, detector, detections_of, tmp_path):
    annotations = json.loads((data / "annotations" / "custom_val.json").read_text())
    annotations["categories"] = [{"id": 3, "name": "Box"}, {"id": 7, "name": "box"}]
    (tmp_path / "twins.json").write_text(json.dumps(annotations))
    detections_of([7, 3])

    def change(content):
        content["categories"] = [{"id": 1, "name": "box"}, {"id": 2, "name": "Box"}]

    where = layers(data) | {"data.val_annotations": str(tmp_path / "twins.json")}
    assert score_checkpoint(rewritten(detector, tmp_path / "best.pth", change), where)["AP"] == 1


def test_a_category_that_the_data_set_lacks_is_named_and_does_not_count(data, detector, detections_of, tmp_path):
    def change(content):
        content["categories"] = [{"id": 3, "name": "Square "}, {"id": 7, "name": "zebra"}]

    detections_of([3, 7])
    metrics = score_checkpoint(rewritten(detector, tmp_path / "best.pth", change), layers(data))
    assert metrics["unknown_categories"] == ["zebra"]
    assert metrics["per_category"]["square"]["AP"] == 1
    assert metrics["per_category"]["oblong"]["AP"] == 0
    assert "The data set has no category named zebra" in metrics_table(metrics)


def test_classes_without_names_are_taken_by_position_and_this_is_said(data, detector, detections_of, tmp_path):
    detections_of([3, 7])
    metrics = score_checkpoint(rewritten(detector, tmp_path / "bare.pth", lambda content: content["model"]), layers(data))
    assert metrics["AP"] == 1
    assert metrics["unknown_categories"] == []
    assert metrics_table(metrics).startswith(
        "The checkpoint does not name its categories; its 2 classes are taken for the data set's: square, oblong."
    )


def test_classes_without_names_are_category_ids_where_there_are_as_many(data, detector, detections_of, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": build_model("detr_tiny", 8).state_dict()}, tmp_path / "official.pth")
    detections_of(list(range(8)))
    metrics = score_checkpoint(tmp_path / "official.pth", layers(data))
    assert metrics["AP"] == 1
    assert "its 8 classes are taken for the category ids 0 to 7" in metrics_table(metrics)


def test_classes_that_nothing_tells_apart_are_an_error(data, tmp_path):
    torch.save(build_model("detr_tiny", 3).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth: does not name the categories of its 3 classes, and the data set has 2: nothing tells"):
        score_checkpoint(tmp_path / "bare.pth", layers(data))


def test_the_network_itself_is_evaluated_as_it_was_trained(data, detector):
    """A random network scores next to nothing, and its image size is the checkpoint's, its data set the one that is named."""
    trained = trained_with(detector, load(detector))
    assert trained["data.val_size"] == 64
    assert "data.path" not in trained
    metrics = score_checkpoint(detector, layers(data))
    assert metrics["AP"] < 0.1
    assert set(metrics["per_category"]) == {"square", "oblong"}


def test_weights_alone_are_evaluated_at_the_image_size_of_their_preset(data, tmp_path):
    torch.manual_seed(0)
    model, settings = build_model("detr_tiny", 2), to_dict(load_config({"model.preset": "detr_tiny"}))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    save_checkpoint(tmp_path / "best.pth", {"model": model.state_dict(), "settings": settings, "categories": CATEGORIES})
    assert trained_with(tmp_path / "bare.pth", load(tmp_path / "bare.pth")) == {"model.preset": "detr_tiny"}
    bare, own = (score_checkpoint(tmp_path / name, layers(data)) for name in ("bare.pth", "best.pth"))
    assert bare["per_category"] == own["per_category"]


def test_detections_of_categories_that_the_data_set_lacks_are_counted(data, perfect, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([*perfect, {**perfect[0], "category_id": 77}]))
    metrics = score_predictions(tmp_path / "results.json", Data(path=str(data)))
    assert metrics["AP"] == 1
    assert metrics_table(metrics).startswith(
        f"1 of {len(perfect) + 1} detections have a category id that the data set lacks (77) and do not count.\n\nAP "
    )


def test_perfect_predictions_score_one_with_a_byte_order_mark_too(data, perfect, tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "results.json").write_text(json.dumps(perfect), encoding=encoding)
        assert score_predictions(tmp_path / "results.json", Data(path=str(data)))["AP"] == 1


def test_boxes_in_another_format_are_the_first_thing_that_is_said(data, perfect, tmp_path):
    corners = [{**each, "bbox": [(box := each["bbox"])[0], box[1], box[0] + box[2], box[1] + box[3]]} for each in perfect]
    (tmp_path / "results.json").write_text(json.dumps(corners))
    shown = metrics_table(score_predictions(tmp_path / "results.json", Data(path=str(data))))
    assert shown.startswith("The boxes look like [x1, y1, x2, y2] in pixels, but are read as COCO's")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON list of detections"),
        ('{"image_id": 1}\n{"image_id": 2}', "not a JSON list of detections"),
        ('{"annotations": []}', "expected a list of detections, found a dict"),
        (
            '[{"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]}]',
            "entry 0 is not a detection with image_id, category_id, bbox and score",
        ),
    ],
)
def test_results_files_that_are_none(data, tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        score_predictions(tmp_path / "results.json", Data(path=str(data)))
    assert str(error.value).startswith(f"{tmp_path / 'results.json'}: ")
    with pytest.raises(UserError, match=r"absent\.json: No such file or directory"):
        score_predictions(tmp_path / "absent.json", Data(path=str(data)))


def test_the_command_prints_and_writes_the_scores_of_a_results_file(data, perfect, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(perfect))
    written = tmp_path / "metrics.json"
    assert main(["evaluate", "--predictions", str(tmp_path / "results.json"), "--data", str(data), "--json", str(written)]) == 0
    assert capsys.readouterr().out.startswith("AP         1.000  (1.000 to 1.000)\n")
    assert json.loads(written.read_text())["per_category"]["oblong"]["AP75"] == 1


def test_the_command_prints_and_writes_the_scores_of_a_checkpoint(data, detector, tmp_path, capsys):
    written = tmp_path / "metrics.json"
    assert main(["evaluate", str(detector), "--data", str(data), "--json", str(written)]) == 0
    printed, metrics = capsys.readouterr().out, json.loads(written.read_text())
    assert f"AP50       {metrics['AP50']:.3f}  (" in printed
    assert metrics["unknown_categories"] == []


def test_a_checkpoint_and_results_exclude_each_other(detector, capsys):
    for arguments in ([], [str(detector), "--predictions", "results.json"]):
        assert main(["evaluate", *arguments]) == 2
        assert "give either a CHECKPOINT or --predictions FILE" in capsys.readouterr().err


def test_scores_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"absent/metrics\.json: No such file or directory"):
        write_metrics({"AP": 1.0}, tmp_path / "absent" / "metrics.json")


# ------------------------------------------------------------------------------------------------------------------- masks


@pytest.fixture
def outlined(coco_folder):
    return add_outlines(coco_folder(train=1, val=3))


@pytest.fixture
def with_masks(tmp_path):
    torch.manual_seed(0)
    model, path = build_model("detr_tiny", 2, masks=True), tmp_path / "masks.pth"
    settings = to_dict(load_config({"model.preset": "detr_tiny", "data.val_size": 64, "model.masks": True}))
    save_checkpoint(path, {"model": model.state_dict(), "settings": settings, "categories": CATEGORIES, "epoch": 1, "metrics": {}})
    return path


def test_perfect_masks_of_a_results_file_score_one(outlined, tmp_path, capsys):
    """As polygons and as RLE, which results files of other programs have."""
    coco = json.loads((outlined / "annotations" / "custom_val.json").read_text())
    names = ("image_id", "category_id", "bbox", "segmentation")
    results = [{name: each[name] for name in names} | {"score": 0.9} for each in coco["annotations"]]
    for each in results[::2]:
        each["segmentation"] = read_segmentation(each["segmentation"], (64, 96))
    file, out = tmp_path / "results.json", tmp_path / "metrics.json"
    file.write_text(json.dumps(results))
    assert main(["evaluate", "--predictions", str(file), "--data", str(outlined), "--json", str(out)]) == 0
    metrics = json.loads(out.read_text())
    assert metrics["AP"] == metrics["segm"]["AP"] == metrics["segm"]["per_category"]["square"]["AP"] == 1
    shown = capsys.readouterr().out
    assert shown.index("boxes") < shown.index("masks")
    assert shown.count("AR_large") == 2
    assert metrics["segm"]["AP50_interval"] == metrics["segm"]["per_category"]["square"]["AP_interval"] == [1, 1]
    assert shown.count("AP75       1.000  (1.000 to 1.000)") == 2
    results[1]["segmentation"] = {"size": [5, 5], "counts": [25]}
    file.write_text(json.dumps(results))
    assert main(["evaluate", "--predictions", str(file), "--data", str(outlined)]) == 2
    assert "results.json: entry 1 (image 10): segmentation: an RLE of 5 x 5 pixels in an image of 96 x 64" in capsys.readouterr().err


def test_masks_of_a_results_file_do_not_matter_where_the_set_has_none(coco_folder, tmp_path, capsys):
    folder = coco_folder(train=1, val=2)
    coco = json.loads((folder / "annotations" / "custom_val.json").read_text())
    results = [{name: each[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for each in coco["annotations"]]
    results[0]["segmentation"] = {"size": [1, 1], "counts": ""}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["evaluate", "--predictions", str(tmp_path / "results.json"), "--data", str(folder)]) == 0
    assert "AP         1.000" in capsys.readouterr().out


def test_masks_of_a_checkpoint_are_scored_where_the_set_has_some(outlined, with_masks, coco_folder):
    metrics = score_checkpoint(with_masks, layers(outlined))
    assert set(METRICS) <= metrics["segm"].keys()
    boxes = score_checkpoint(with_masks, layers(coco_folder(train=1, val=3, folder="boxes")))
    assert "segm" not in boxes
    assert boxes["AP"] == metrics["AP"]
    assert any("has no mask: only boxes are scored" in note for note in boxes["notes"])
    assert "masks" not in metrics_table(boxes).splitlines()


def test_tiles_are_scored_with_their_masks(outlined, with_masks, coco_folder, monkeypatch):
    seen = {}
    for module in (score, tiled_score):
        monkeypatch.setattr(module, "mask_interval_metrics", lambda coco, results, name=module: seen.update({name: results}) or {})
    assert "segm" in score_checkpoint(with_masks, layers(outlined))
    assert "segm" in tiled_score.score_with_tiles(with_masks, Tiles(1, 1), layers(outlined))
    plain, tiled = (sorted(seen[name], key=lambda each: (each["image_id"], -each["score"])) for name in (score, tiled_score))
    different = [
        (decode_masks([mine["segmentation"]], (64, 96)) != decode_masks([other["segmentation"]], (64, 96))).mean()
        for mine, other in zip(tiled, plain, strict=True)
    ]
    assert max(different) < 1e-3
    tiled_score.score_with_tiles(with_masks, Tiles(2, 1), layers(outlined))
    assert {each["score"] for each in seen[tiled_score]} - {each["score"] for each in tiled}, "tiles have a part in it"
    assert {tuple(each["segmentation"]["size"]) for each in seen[tiled_score]} == {(64, 96)}
    boxes = tiled_score.score_with_tiles(with_masks, Tiles(1, 1), layers(coco_folder(train=1, val=3, folder="boxes")))
    assert "segm" not in boxes
    assert any("has no mask: only boxes are scored" in note for note in boxes["notes"])


def test_the_detections_for_other_commands_have_no_masks(outlined, with_masks):
    assert not any("segmentation" in each for each in score.detections_of(with_masks, layers(outlined)).results)
