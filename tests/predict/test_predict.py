import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors

from raydetr.config import load_config, to_dict
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.images import read_image
from raydetr.data.loader import build_loader
from raydetr.data.masks import encode_masks
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model
from raydetr.model.masks import postprocess_masks
from raydetr.predict.inputs import InputImage, find_images
from raydetr.predict.predict import ImagePrediction, detect, predict
from raydetr.training.engine import evaluate
from raydetr.weights.checkpoint import save_checkpoint
from raydetr.weights.fitting import load

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]  # those of the coco_folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint("name.pth", categories, seed)``: a detr_tiny with random weights."""

    def write(name="best.pth", categories=CATEGORIES, seed=0, masks=False) -> Path:
        torch.manual_seed(seed)
        model = build_model("detr_tiny", num_classes=len(categories), masks=masks)
        model.query_embed.weight.data *= 20  # else the queries of random weights all find the same
        model.class_embed.weight.data *= 2
        settings = to_dict(load_config({"model.preset": "detr_tiny", "model.masks": masks}))
        path = tmp_path / "models" / name
        save_checkpoint(path, {"model": model.state_dict(), "settings": settings, "categories": categories, "epoch": 1, "metrics": {}})
        return path

    return write


@pytest.fixture
def photos(tmp_path):
    """``photos("a.jpg", "b/c.png", size=(96, 64))``: coloured noise in the folder it returns."""

    def write(*names, size=(96, 64), folder="photos") -> Path:
        for number, name in enumerate(names):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return tmp_path / folder

    return write


def _load(out: Path) -> tuple[dict, list[dict]]:
    return json.loads((out / "images.json").read_text()), json.loads((out / "predictions.json").read_text())


def _page(out: Path) -> str:
    return (out / "index.html").read_text(encoding="utf-8")


def _files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------- what is written


def test_the_output_is_complete_and_pycocotools_reads_it(checkpoint, photos, tmp_path):
    folder, out = photos("a.jpg", "b.png", "deep/c.jpg"), tmp_path / "out"
    summary = predict(checkpoint(), [folder], out, threshold=0.6)
    pictures = ["a.jpg", "b.jpg", "deep_c.jpg"]
    expected = ["images.json", "index.html", "predictions.json", *(f"{kind}/{n}" for kind in ("pictures", "thumbnails") for n in pictures)]
    assert _files(out) == sorted(expected)
    images, results = _load(out)
    assert [(each["id"], each["file_name"]) for each in images["images"]] == [(1, "a.jpg"), (2, "b.png"), (3, "deep/c.jpg")]
    assert images["categories"] == CATEGORIES
    assert len(results) == 3 * load_config({"model.preset": "detr_tiny"}).model.num_queries, "every query, not only what is drawn"
    assert {each["category_id"] for each in results} <= {3, 7}
    drawn = sum(each["score"] >= 0.6 for each in results)
    assert 0 < drawn < len(results), "the threshold divides these results"
    assert sum(summary.boxes.values()) == drawn
    assert summary.images == 3
    loaded = COCO(str(out / "images.json")).loadRes(str(out / "predictions.json"))
    assert len(loaded.getAnnIds(imgIds=[2])) == len(results) // 3


def test_predictions_do_not_depend_on_the_batch_size(checkpoint, photos, tmp_path):
    """Images of other sizes in a batch would pad an image, and an evaluation pads none."""
    photos("wide.jpg", "wider.jpg", size=(130, 40))
    folder, found = photos("high.jpg", size=(33, 121)), {}
    for batch_size in (1, 3):
        predict(checkpoint(), [folder], tmp_path / f"out{batch_size}", batch_size=batch_size)
        found[batch_size] = np.array([[*each["bbox"], each["score"]] for each in _load(tmp_path / f"out{batch_size}")[1]])
    np.testing.assert_allclose(found[1], found[3], atol=2e-3)


@pytest.mark.parametrize(("exif", "turned"), [("upright", True), ("stored", False)])
def test_images_are_turned_as_in_training_where_the_annotated_size_does_not_tell(checkpoint, photos, tmp_path, exif, turned):
    folder, path = photos("a.png", size=(64, 64)), checkpoint()
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    tag = Image.Exif()
    tag[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(folder / "a.png", exif=tag)
    content = torch.load(path, weights_only=True)
    content["settings"]["data"]["exif"] = exif
    torch.save(content, path)
    predict(path, [folder], tmp_path / "out", threshold=1)
    drawn = np.asarray(Image.open(tmp_path / "out" / "pictures" / "a.jpg"))
    assert (drawn[:16].mean() < 9, drawn[48:].mean() < 9) == (turned, not turned)


def test_boxes_lie_within_their_pictures(checkpoint, photos, tmp_path):
    photos("wide.jpg", size=(130, 40))
    folder = photos("high.jpg", size=(33, 121))
    predict(checkpoint(), [folder], tmp_path / "out", threshold=0)
    images, results = _load(tmp_path / "out")
    sizes = {each["id"]: (each["width"], each["height"]) for each in images["images"]}
    assert sorted(sizes.values()) == [(33, 121), (130, 40)]
    reaches_out = 0
    for each in results:
        (width, height), (x, y, w, h) = sizes[each["image_id"]], each["bbox"]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 1e-6
        assert y + h <= height + 1e-6
        reaches_out += x + w > 33 or y + h > 40  # more than the short sides
    assert reaches_out, "boxes are in the picture's pixels, not in parts of it"


def test_boxes_are_those_of_the_evaluation(checkpoint, coco_folder, tmp_path):
    path, data = checkpoint(), coco_folder(val=3)
    predict(path, [data], tmp_path / "out", batch_size=2)
    _, results = _load(tmp_path / "out")
    model, config = load(path), load_config({"model.preset": "detr_tiny", "data.path": str(data)})
    dataset = CocoImages(find_split(config.data, "val"), val_transforms(config.data))
    criterion = build_criterion(2, aux_loss=False)
    _, detections = evaluate(model, criterion, build_loader(dataset, 2), torch.device("cpu"))
    expected = detections.results(CATEGORIES)
    mine, theirs = (sorted(some, key=lambda each: (each["image_id"], -each["score"])) for some in (results, expected))
    assert [(each["image_id"], each["category_id"]) for each in mine] == [(each["image_id"], each["category_id"]) for each in theirs]
    np.testing.assert_allclose([each["score"] for each in mine], [each["score"] for each in theirs], atol=1e-6)
    low, high = np.split(np.array([each["bbox"] for each in theirs]), 2, axis=1)
    inside_xyxy = np.concatenate([low, low + high], axis=1).clip(0, [96, 64, 96, 64])
    x, y, w, h = np.array([each["bbox"] for each in mine]).T
    np.testing.assert_allclose(np.stack([x, y, x + w, y + h], axis=1), inside_xyxy, atol=2e-3)


def test_boxes_are_drawn_into_pictures_of_their_own_size(checkpoint, photos, tmp_path):
    folder, out = photos("a.png", size=(200, 150)), tmp_path / "out"
    predict(checkpoint(), [folder], out, threshold=0)
    predict(checkpoint(), [folder], tmp_path / "none", threshold=1)
    with Image.open(out / "pictures" / "a.jpg") as drawn, Image.open(tmp_path / "none" / "pictures" / "a.jpg") as plain:
        assert drawn.size == plain.size == (200, 150)
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max() > 100
    with Image.open(out / "thumbnails" / "a.jpg") as thumbnail:
        assert thumbnail.height == 640, "small pictures are enlarged, so that their labels can be read"


def test_nothing_above_the_threshold_is_said_with_the_best_score(checkpoint, photos, tmp_path):
    summary = predict(checkpoint(), [photos("a.jpg")], tmp_path / "out", threshold=1.0)
    best = max(each["score"] for each in _load(tmp_path / "out")[1])
    assert f"nothing above 1.00 (best {int(best * 100) / 100:.2f})" in _page(tmp_path / "out")
    assert not summary.boxes
    assert "none" in summary.text()


def test_a_second_prediction_replaces_the_first_and_leaves_other_files_alone(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    predict(checkpoint(), [photos("a.jpg", "b.jpg")], out)
    (out / "notes.txt").write_text("mine")
    predict(checkpoint(), [photos("c.jpg", folder="others")], out)
    assert [each["file_name"] for each in _load(out)[0]["images"]] == ["c.jpg"]
    assert "b.jpg" not in _page(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_the_output_folder_may_be_the_pictures_own(checkpoint, photos, tmp_path):
    folder = photos("a.jpg", "b.jpg")
    before = (folder / "a.jpg").read_bytes()
    for _ in range(2):  # the second time annotated pictures lie in it
        assert predict(checkpoint(), [folder], folder, compare=checkpoint("other.pth", seed=1)).images == 2
    assert (folder / "a.jpg").read_bytes() == before
    with pytest.raises(UserError, match="is in a folder that annotated images are written to"):
        predict(checkpoint(), [folder / "pictures" / "a.jpg"], folder)


@pytest.mark.parametrize("name", ["index.html", "predictions.json", "pictures"])
def test_what_others_put_into_the_output_folder_is_not_overwritten(checkpoint, photos, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("somebody's")
    with pytest.raises(UserError, match=f"{name} exists already"):
        predict(checkpoint(), [photos("a.jpg")], out)
    assert _files(out) == [name]
    assert (out / name).read_text() == "somebody's"


def test_progress_is_plain_lines_where_there_is_no_terminal(checkpoint, photos, tmp_path, capsys):
    predict(checkpoint(), [photos("a.jpg", "b.jpg")], tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == ["predicting with models/best.pth: 2 images", "drawing: 2 images"]


# ----------------------------------------------------------------------------------------------------------- which pictures


def test_equal_names_from_several_folders_stay_apart(checkpoint, photos, tmp_path):
    first, second = photos("x.jpg", "x.png", "X.JPG", folder="all/a"), photos("x.jpg", folder="all/b")
    out = tmp_path / "out"
    predict(checkpoint(), [first, second], out)
    assert [each["file_name"] for each in _load(out)[0]["images"]] == ["a/X.JPG", "a/x.jpg", "a/x.png", "b/x.jpg"]
    written = _files(out / "pictures")
    assert len(written) == 4
    assert len({name.casefold() for name in written}) == 4, "also where upper and lower case are one"


def test_a_picture_given_twice_is_one_and_only_pictures_are_taken(photos, tmp_path):
    folder = photos("a.jpg", ".hidden.jpg", ".cache/b.jpg", "c.webp")
    (folder / "notes.txt").write_text("no picture")
    shutil.copy(folder / "a.jpg", folder / "named.dat")
    (folder / "link").symlink_to(folder)
    pictures, truth, _ = find_images([folder, folder / "a.jpg", folder / "named.dat"], None, tmp_path / "out")
    assert [each.name for each in pictures] == ["a.jpg", "c.webp", "named.dat"]
    assert truth is None


def test_linked_pictures_and_folders_are_followed(photos, tmp_path):
    folder = photos("one.jpg", folder="elsewhere/deep")
    links = tmp_path / "links"
    links.mkdir()
    (links / "two.jpg").symlink_to(folder / "one.jpg")
    (links / "three").symlink_to(folder)
    pictures, _, _ = find_images([links], None, tmp_path / "out")
    assert [each.name for each in pictures] == ["two.jpg", "three/one.jpg"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_kind_of_picture_is_shown(checkpoint, tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.random.default_rng(0).integers(0, 65536, (50, 70), dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (70, 50), (200, 30, 90)).convert(mode).save(path)
    assert predict(checkpoint(), [path], tmp_path / "out").images == 1
    with Image.open(tmp_path / "out" / "pictures" / "picture.jpg") as drawn:
        assert drawn.mode == "RGB"
        assert drawn.size == (70, 50)


def test_a_turned_photograph_is_upright_and_its_boxes_are_in_what_is_shown(checkpoint, photos, tmp_path):
    folder = photos("a.jpg", size=(90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(folder / "a.jpg") as image:
        image.save(folder / "a.jpg", exif=exif)
    predict(checkpoint(), [folder], tmp_path / "out")
    image = _load(tmp_path / "out")[0]["images"][0]
    assert (image["width"], image["height"]) == (60, 90)
    with Image.open(tmp_path / "out" / "pictures" / "a.jpg") as drawn:
        assert drawn.size == (60, 90)


def test_names_with_odd_letters_become_plain_files_and_escaped_text(checkpoint, photos, tmp_path):
    name = "<b>&'\" #1?%20 ä.jpg"
    out = tmp_path / "out"
    predict(checkpoint(categories=[{"id": 1, "name": "<i>x</i>"}]), [photos(name)], out, threshold=0)
    html = _page(out)
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;b&gt;&amp;&#39;&#34; #1?%20 ä.jpg" in html
    assert "&lt;i&gt;x&lt;/i&gt;" in html
    (written,) = _files(out / "pictures")
    assert not set(written) & set("<>&'\"#?% ")
    assert _load(out)[0]["images"][0]["file_name"] == name


def test_a_name_that_is_no_text_does_not_stop_the_page(checkpoint, photos, tmp_path):
    folder = photos("a.jpg")
    try:
        os.rename(folder / "a.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    assert predict(checkpoint(), [folder], tmp_path / "out").images == 1
    assert "caf?.jpg" in _page(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- true boxes


def test_a_data_set_folder_gives_its_validation_pictures_with_their_boxes_and_ids(checkpoint, coco_folder, tmp_path):
    data, out = coco_folder(train=2, val=3, boxes=4), tmp_path / "out"
    predict(checkpoint(), [data], out, threshold=1)
    coco = json.loads((data / "annotations" / "custom_val.json").read_text())
    images, results = _load(out)
    assert [(each["id"], each["file_name"]) for each in images["images"]] == [(each["id"], each["file_name"]) for each in coco["images"]]
    assert {each["image_id"] for each in results} == {each["id"] for each in coco["images"]}
    assert "<td>12</td></tr>" not in _page(out).replace("\n", ""), "two categories share the twelve true boxes"
    counts = {name: sum(each["category_id"] == i for each in coco["annotations"]) for i, name in ((3, "square"), (7, "oblong"))}
    for name, count in counts.items():
        assert f"{name}</td><td>0</td><td>{count}</td></tr>" in _page(out)
    COCO(str(data / "annotations" / "custom_val.json")).loadRes(str(out / "predictions.json"))


def test_annotations_are_found_by_file_name_and_other_pictures_get_free_ids(checkpoint, coco_folder, photos, tmp_path):
    data = coco_folder(val=2)
    annotations = data / "annotations" / "custom_val.json"
    coco = json.loads(annotations.read_text())
    shutil.copy(photos("more.jpg") / "more.jpg", data / "val2017")
    summary = predict(checkpoint(), [data / "val2017"], tmp_path / "out", annotations=annotations)
    ids = {each["file_name"]: each["id"] for each in _load(tmp_path / "out")[0]["images"]}
    known = {each["file_name"]: each["id"] for each in coco["images"]}
    assert ids == {**known, "more.jpg": max(known.values()) + 1}
    assert "1 of 3 images not in it" in summary.text()


def test_true_boxes_are_drawn_dashed_where_they_are(checkpoint, coco_folder, tmp_path):
    data, out = coco_folder(val=1, boxes=1, size=(320, 240), categories=({"id": 3, "name": "square"},)), tmp_path / "out"
    predict(checkpoint(categories=CATEGORIES[:1]), [data], out, threshold=1)
    x, y, w, h = json.loads((data / "annotations" / "custom_val.json").read_text())["annotations"][0]["bbox"]
    with Image.open(out / "pictures" / "val_000.jpg") as drawn, Image.open(data / "val2017" / "val_000.jpg") as plain:
        changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max(-1) > 90
    rows, columns = np.nonzero(changed)
    assert rows.min() == pytest.approx(y, abs=3)
    assert columns.min() == pytest.approx(x, abs=3)
    assert rows.max() == pytest.approx(y + h, abs=3)
    assert columns.max() == pytest.approx(x + w, abs=3)


def test_masks_are_drawn_where_a_prediction_and_the_annotations_have_them(checkpoint, coco_folder, tmp_path, monkeypatch):
    """As a checkpoint with masks gives them: an RLE for each score, and one or none for each true box."""
    data = coco_folder(val=1, boxes=2, size=(320, 240))
    predicted, true = np.zeros((2, 240, 320), bool)
    predicted[20:220, 20:120] = True
    true[40:200, 180:300] = True

    def detects(rles, true_rles):
        def detect(_model, _checkpoint, inputs, *_):
            inputs[0].true_rles = true_rles
            found = ImagePrediction((320, 240), [[20, 20, 120, 220]] * 2, [0, 0], [0.9, 0.1], [0, 1], rles=rles)
            return {inputs[0].image_id: found}, {}

        return detect

    plain, masked = tmp_path / "plain", tmp_path / "masked"
    monkeypatch.setattr("raydetr.predict.predict.detect", detects(None, []))
    predict(checkpoint(), [data], plain, threshold=0.5)
    rles = encode_masks(np.stack([predicted, ~predicted]))
    monkeypatch.setattr("raydetr.predict.predict.detect", detects(rles, [encode_masks(true[None])[0], None]))
    predict(checkpoint(), [data], masked, threshold=0.5)
    for kind in ("pictures", "thumbnails"):
        with Image.open(plain / kind / "val_000.jpg") as before, Image.open(masked / kind / "val_000.jpg") as after:
            changed = np.abs(np.asarray(before).astype(int) - np.asarray(after)).max(-1) > 12

        changed = np.asarray(Image.fromarray(changed).resize((320, 240)))
        assert changed[60:180, 40:100].mean() > 0.8, "the predicted mask above the threshold is tinted"
        assert changed[60:180, 179:184].any(1).mean() > 0.8, "the true mask has an outline"
        assert changed[80:180, 200:280].mean() < 0.1, "its inside stays free"
        assert changed[:, 130:170].mean() < 0.1, "the mask below the threshold is not drawn"


def test_a_true_mask_of_another_size_than_its_image_is_left_out():
    image = InputImage(Path("a.jpg"), "a.jpg", 1, true_rles=[encode_masks(np.ones((1, 30, 40), bool))[0], None])
    assert image.true_masks((40, 30))[0].all()
    assert image.true_masks((40, 30))[1] is None
    assert image.true_masks((30, 40)) == [None, None]
    assert InputImage(Path("a.jpg"), "a.jpg", 1).true_masks((40, 30)) is None


def test_category_ids_are_those_of_the_annotations_and_never_another_category_s(checkpoint, coco_folder, tmp_path):
    data = coco_folder(val=1)
    mine = [{"id": 7, "name": "Square "}, {"id": 1, "name": "zebra"}, {"id": 3, "name": "kite"}]
    predict(checkpoint(categories=mine), [data], tmp_path / "out")
    ids = {each["name"]: each["id"] for each in _load(tmp_path / "out")[0]["categories"]}
    assert ids == {"Square ": 3, "zebra": 1, "kite": 8}


def test_annotations_that_fit_no_picture_or_two_are_an_error(checkpoint, coco_folder, photos, tmp_path):
    data = coco_folder(val=1)
    annotations = data / "annotations" / "custom_val.json"
    with pytest.raises(UserError, match=r"custom_val\.json knows none of the 1 image"):
        predict(checkpoint(), [photos("other.jpg")], tmp_path / "out", annotations=annotations)
    copy = photos("val_000.jpg", folder="copy")
    with pytest.raises(UserError, match=r"both called val_000\.jpg"):
        predict(checkpoint(), [data / "val2017", copy], tmp_path / "out", annotations=annotations)
    with pytest.raises(UserError, match=r"absent\.json"):
        predict(checkpoint(), [data / "val2017"], tmp_path / "out", annotations=tmp_path / "absent.json")
    with pytest.raises(UserError, match="give it alone"):
        predict(checkpoint(), [data, copy], tmp_path / "out")


def test_names_that_differ_by_case_only_stay_two_categories(checkpoint, coco_folder, tmp_path):
    data = coco_folder(val=1, categories=({"id": 3, "name": "Box"}, {"id": 7, "name": "box"}))
    predict(checkpoint(categories=[{"id": 1, "name": "box"}, {"id": 2, "name": "Box"}]), [data], tmp_path / "out")
    assert {each["name"]: each["id"] for each in _load(tmp_path / "out")[0]["categories"]} == {"box": 7, "Box": 3}


def test_classes_without_names_get_those_of_the_annotations(checkpoint, coco_folder, photos, tmp_path):
    content = torch.load(checkpoint(), weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pth")
    summary = predict(tmp_path / "bare.pth", [coco_folder(val=1)], tmp_path / "out")
    assert _load(tmp_path / "out")[0]["categories"] == CATEGORIES
    assert "bare.pth: the checkpoint does not name its categories; its 2 classes are taken for the data set's: square" in summary.text()
    predict(tmp_path / "bare.pth", [photos("a.jpg")], tmp_path / "alone")
    assert [each["name"] for each in _load(tmp_path / "alone")[0]["categories"]] == ["class 0", "class 1"]


def test_how_a_checkpoint_was_read_is_said(checkpoint, photos, tmp_path):
    content = torch.load(checkpoint(), weights_only=True)
    torch.save({"model_ema": content["model"]}, tmp_path / "average.pth")
    summary = predict(tmp_path / "average.pth", [photos("a.jpg")], tmp_path / "out")
    assert "average.pth: the file holds a moving average (EMA) of the weights, under 'model_ema': it is used" in summary.text()


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000), (1, 1), (2000, 12)])
def test_very_narrow_and_very_small_images_are_shown(checkpoint, photos, tmp_path, size):
    folder, out = photos("a.png", size=size), tmp_path / "out"
    assert predict(checkpoint(), [folder], out, threshold=0).images == 1
    with Image.open(out / "pictures" / "a.jpg") as image:
        assert image.size == size
    boxes = [each["bbox"] for each in _load(out)[1]]
    assert boxes
    assert all(x + w <= size[0] + 1e-3 and y + h <= size[1] + 1e-3 for x, y, w, h in boxes)


@pytest.mark.parametrize("bbox", [[20.67, 3.27, 53.89, 40.91], [0.1, 0.4, 0.3, 0.2], [95.9, 63.9, 0.05, 0.05]])
def test_true_boxes_with_fractions_are_drawn(checkpoint, coco_folder, tmp_path, bbox):
    data = coco_folder(val=1, boxes=1)
    annotations = data / "annotations" / "custom_val.json"
    coco = json.loads(annotations.read_text())
    coco["annotations"][0].update(bbox=bbox, area=bbox[2] * bbox[3])
    annotations.write_text(json.dumps(coco))
    assert predict(checkpoint(), [data], tmp_path / "out", threshold=1).images == 1


# ---------------------------------------------------------------------------------------------------------------- compare


def test_compare_shows_both_with_their_own_categories_and_files(checkpoint, coco_folder, tmp_path):
    other = [{"id": number, "name": name} for number, name in enumerate(["person", "square", "kite", "dog"])]
    before, after = checkpoint("before.pth", other, seed=1), checkpoint("after.pth")
    data, out = coco_folder(val=2), tmp_path / "out"
    predict(after, [data / "val2017"], out, threshold=0, compare=before)
    html = _page(out)
    assert "before: models/before.pth" in html
    assert "after: models/after.pth" in html
    order = [html.index(f'"{path}/val_000.jpg"') for path in ("compare/pictures", "pictures")]
    assert order == sorted(order), "before is on the left"
    assert {each["category_id"] for each in _load(out)[1]} <= {3, 7}
    assert {each["category_id"] for each in _load(out / "compare")[1]} <= {0, 1, 2, 3}
    assert _load(out / "compare")[0]["categories"] == other
    assert _files(out / "pictures") == _files(out / "compare" / "pictures") == _files(out / "thumbnails") == ["val_000.jpg", "val_001.jpg"]
    COCO(str(out / "compare" / "images.json")).loadRes(str(out / "compare" / "predictions.json"))
    with Image.open(out / "pictures" / "val_000.jpg") as mine, Image.open(out / "compare" / "pictures" / "val_000.jpg") as other:
        assert mine.size == other.size
        assert (np.asarray(mine) != np.asarray(other)).any()


def test_compared_checkpoints_of_one_name_are_told_apart(checkpoint, photos, tmp_path):
    first, second = checkpoint("a/run/best.pth"), checkpoint("b/run/best.pth", seed=1)
    predict(first, [photos("a.jpg")], tmp_path / "out", compare=second)
    assert "before: b/run/best.pth · after: a/run/best.pth" in _page(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- bad input


def test_pictures_that_cannot_be_read_are_left_out_and_counted(checkpoint, photos, tmp_path):
    folder = photos("a.jpg", "b.jpg", "c.jpg", "d.png", size=(200, 150))
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:3000])
    (folder / "d.png").write_text("<html>not found</html>")
    summary = predict(checkpoint(), [folder], tmp_path / "out", compare=checkpoint("other.pth"), batch_size=2)
    assert summary.images == 2
    assert len(summary.left_out) == 2
    assert "2 images left out" in summary.text()
    assert "b.jpg" in summary.text()
    assert "2 images left out" in _page(tmp_path / "out")
    assert [each["file_name"] for each in _load(tmp_path / "out")[0]["images"]] == ["a.jpg", "c.jpg"]
    assert _files(tmp_path / "out" / "compare" / "pictures") == ["a.jpg", "c.jpg"]


def test_no_readable_picture_at_all_is_an_error(checkpoint, photos, tmp_path):
    folder = photos("a.jpg")
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the images can be read; the first: .*a\.jpg"):
        predict(checkpoint(), [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_sources_are_errors(checkpoint, photos, tmp_path):
    with pytest.raises(UserError, match=r"absent\.jpg: no such file or folder"):
        predict(checkpoint(), [photos("a.jpg"), tmp_path / "absent.jpg"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .*empty"):
        predict(checkpoint(), [tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="no images"):
        predict(checkpoint(), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"threshold": 1.5}, "threshold: 1.5"), ({"threshold": float("nan")}, "threshold: nan"), ({"batch_size": 0}, "batch_size: 0")],
)
def test_arguments_out_of_bounds_are_errors(checkpoint, photos, tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        predict(checkpoint(), [photos("a.jpg")], tmp_path / "out", **arguments)


def test_an_output_folder_that_cannot_be_is_an_error(checkpoint, photos, tmp_path):
    folder = photos("a.jpg")
    for out in (folder / "a.jpg", folder / "a.jpg" / "below"):
        with pytest.raises(UserError, match=r"because .*a\.jpg is a file"):
            predict(checkpoint(), [folder], out)


def test_a_full_disk_is_one_line_and_loses_nothing(checkpoint, photos, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder, out = photos("a.jpg"), tmp_path / "out"
    predict(checkpoint(), [folder], out)
    page = _page(out)
    (out / "pictures" / "a.jpg").unlink()
    (out / "pictures" / "a.jpg").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        predict(checkpoint(), [folder], out)
    assert _page(out) == page


def test_broken_weights_are_an_error(checkpoint, photos, tmp_path):
    path = checkpoint()
    content = torch.load(path, weights_only=True)
    content["model"]["class_embed.bias"][:] = float("nan")
    torch.save(content, path)
    with pytest.raises(UserError, match="not finite"):
        predict(path, [photos("a.jpg")], tmp_path / "out")


def test_a_file_that_is_no_checkpoint_is_an_error_of_one_line(photos, tmp_path):
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"garbage\.pth") as error:
        predict(tmp_path / "garbage.pth", [photos("a.jpg")], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_in_the_results_as_pycocotools_reads_them(checkpoint, photos, tmp_path):
    folder, path = photos("a.jpg", "b.jpg", size=(96, 64)), checkpoint(masks=True)
    model = load(path)
    (one, other), *_ = find_images([folder], None, tmp_path / "seen")
    by_image, _ = detect(model, path, [one, other], read_image, 2, "cpu", "it")
    prediction = by_image[one.image_id]
    threshold = sorted(prediction.scores)[-4]
    masks = prediction.masks([threshold] * len(CATEGORIES))
    assert masks.dtype == bool
    assert masks.shape == (4, 64, 96)
    assert len(prediction.boxes(CATEGORIES, [threshold] * len(CATEGORIES))) == 4
    assert prediction.masks([1.1] * len(CATEGORIES)).shape == (0, 64, 96)
    # They are those of the network's outputs, in the order of the scores.
    image = val_transforms(load_config({"model.preset": "detr_tiny"}).data)(tv_tensors.Image(read_image(one.path)))[None]
    with torch.inference_mode():
        outputs = model(image)
    size, original = torch.tensor(image.shape[-2:])[None], torch.tensor([[64, 96]])
    (every,) = postprocess_masks(outputs["pred_masks"], tuple(image.shape[-2:]), size, original)
    best = outputs["pred_logits"][0].softmax(-1)[:, :-1].amax(-1).argsort(descending=True, stable=True)[:4]
    assert (masks != every[best].numpy()).mean() < 1e-3

    predict(path, [folder], tmp_path / "seen", threshold=threshold)
    _, results = _load(tmp_path / "seen")
    assert len(results) == 50
    coco = COCO(str(tmp_path / "seen" / "images.json")).loadRes(str(tmp_path / "seen" / "predictions.json"))
    shown = [each for each in coco.loadAnns(coco.getAnnIds(one.image_id)) if each["score"] >= threshold - 1e-6]
    assert [coco.annToMask(each).sum() for each in shown] == masks.sum((1, 2)).tolist()


def test_without_masks_there_are_none(checkpoint, photos, tmp_path):
    (one,), *_ = find_images([photos("a.jpg")], None, tmp_path / "seen")
    path = checkpoint()
    by_image, _ = detect(load(path), path, [one], read_image, 1, "cpu", "it")
    assert by_image[one.image_id].masks([0.0]) is None


def test_true_masks_are_read_where_a_model_has_masks(coco_folder, tmp_path):
    folder = coco_folder(val=1, boxes=2)
    file = folder / "annotations" / "custom_val.json"
    content = json.loads(file.read_text())
    x, y, width, height = content["annotations"][0]["bbox"]
    content["annotations"][0]["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    file.write_text(json.dumps(content))
    (without,), *_ = find_images([folder], None, tmp_path / "seen")
    assert without.true_masks((96, 64)) is None
    (one,), *_ = find_images([folder], None, tmp_path / "seen", masks=True)
    mask, none = one.true_masks((96, 64))
    assert none is None
    assert mask.sum() == width * height
    assert mask[y : y + height, x : x + width].all()
