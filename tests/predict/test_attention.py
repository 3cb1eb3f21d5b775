import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import raydetr
from raydetr.config import load_config, to_dict
from raydetr.data.transforms import val_transforms
from raydetr.draw import Box, category_colours
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.predict.attention import ImageAttention, heat_colours, heated, write_attention
from raydetr.predict.gallery import Card, Column, gallery_page
from raydetr.predict.predict import predict
from raydetr.weights.checkpoint import save_checkpoint
from raydetr.weights.fitting import load
from tests.predict.test_gallery import _Page

SIZES = {"high.png": (96, 128), "wide.png": (128, 96)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=2)
    model.query_embed.weight.data *= 20
    model.class_embed.weight.data *= 2
    path, settings = tmp_path_factory.mktemp("model") / "best.pth", load_config({"model.preset": "detr_tiny", "data.val_size": 96})
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "<oblong>"}]
    save_checkpoint(path, {"model": model.state_dict(), "settings": to_dict(settings), "categories": categories, "epoch": 1, "metrics": {}})
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def out(checkpoint, photos, tmp_path_factory):
    """A prediction with the attention of detections and of two places."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict(checkpoint, [photos], out, threshold=0.6, attention=True, attention_at=[(10, 20), (90.5, 90)])
    return out


def _arrays(out, stem):
    with np.load(out / "attention" / stem / "attention.npz") as file:
        return dict(file)


def test_arrays_are_what_the_model_attends_to(out, checkpoint, photos):
    results, model = json.loads((out / "predictions.json").read_text()), load(checkpoint)
    for image_id, (name, (width, height)) in enumerate(sorted(SIZES.items()), 1):
        arrays = _arrays(out, name.removesuffix(".png"))
        drawn = [each for each in results if each["image_id"] == image_id and each["score"] >= 0.6]
        assert 0 < len(drawn) < 25, "the threshold divides these results"
        np.testing.assert_allclose(arrays["scores"], [each["score"] for each in drawn], atol=1e-5)
        assert arrays["category_ids"].tolist() == [each["category_id"] for each in drawn]
        low, high = np.split(arrays["boxes"], 2, axis=1)
        np.testing.assert_allclose(np.hstack([low, high - low]), [each["bbox"] for each in drawn], atol=2e-3)
        with Image.open(photos / name) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        inputs = val_transforms(load_config({"data.val_size": 96}).data)(tv_tensors.Image(pixels)).as_subclass(torch.Tensor)
        expected = raydetr.attention(model, inputs[None], points=[(10, 20), (90.5, 90)])
        order = expected["pred_logits"].softmax(-1)[0, :, :-1].amax(-1).argsort(descending=True)[: len(drawn)]
        assert arrays["detections"].shape == (len(drawn), 4, height // 16, width // 16)
        np.testing.assert_allclose(arrays["detections"], expected["decoder_attention"][0, order], atol=1e-5)
        np.testing.assert_allclose(arrays["point_attention"], expected["encoder_attention"][0], atol=1e-5)
        assert arrays["points"].tolist() == [[10, 20], [90.5, 90]]


def test_there_is_a_picture_for_each_detection_and_place_and_a_sheet_of_maps(out):
    for stem, (width, height) in (("high", (96, 128)), ("wide", (128, 96))):
        arrays = _arrays(out, stem)
        n = len(arrays["scores"])
        names = {path.name for path in (out / "attention" / stem).iterdir()}
        pictures = {*(f"detection-{number}.jpg" for number in range(1, n + 1)), "point-1.jpg", "point-2.jpg"}
        assert names == {"attention.npz", "maps.png", *pictures}
        with Image.open(out / "attention" / stem / "maps.png") as sheet:
            assert (sheet.mode, sheet.size) == ("RGBA", (5 * width // 16, (n + 2) * height // 16))
            cells = np.asarray(sheet).reshape(n + 2, height // 16, 5, width // 16, 4)
        every = np.concatenate([arrays["detections"], arrays["point_attention"]])
        for row, weights in enumerate(every):
            for column, each in enumerate([weights.mean(0), *weights]):
                opaque = cells[row, :, column, :, 3]
                assert opaque.flat[each.argmax()] == opaque.max() == 235, "the cell with most attention is the brightest"
                assert opaque.flat[each.argmin()] == opaque.min()


def test_the_page_has_a_button_for_each_box_and_place_and_for_each_head(out):
    html = (out / "index.html").read_text()
    page = _Page(html)
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    boxes = [each for each in buttons if "data-row" in each]
    counts = {stem: len(_arrays(out, stem)["scores"]) for stem in ("high", "wide")}
    assert len(boxes) == sum(counts.values()) + 4
    assert [each["data-maps"] for _, each in page.tags if "data-maps" in each] == [f"attention/{s}/maps.png" for s in ("high", "wide")]
    assert [each["data-column"] for each in buttons if "data-column" in each] == ["0", "1", "2", "3", "4"] * 2
    (x0, y0, x1, y1), score = _arrays(out, "high")["boxes"][0], _arrays(out, "high")["scores"][0]
    first = next(each for each in boxes if each["data-row"] == "0")
    assert first["data-label"].endswith(f" {score:.2f}")
    sides = [float(part.split(":")[1].strip(" %")) for part in first["style"].split(";")]
    np.testing.assert_allclose(sides, [x0 / 0.96, y0 / 1.28, (x1 - x0) / 0.96, (y1 - y0) / 1.28], atol=1e-2)
    areas = [
        float(each["style"].split("width: ")[1].split("%")[0]) * float(each["style"].split("height: ")[1].split("%")[0])
        for each in boxes[: counts["high"]]
    ]
    assert areas == sorted(areas, reverse=True), "a box inside of another one lies above it"
    assert "place 90.5, 90" in html
    assert "<oblong>" not in html
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "https:" not in html


def test_places_alone_have_no_maps_of_detections_and_stale_pictures_go(checkpoint, photos, tmp_path):
    predict(checkpoint, [photos / "wide.png"], tmp_path / "out", threshold=0.6, attention=True)
    arrays = _arrays(tmp_path / "out", "wide")
    assert len(arrays["detections"])
    assert not len(arrays["points"])
    predict(checkpoint, [photos / "wide.png"], tmp_path / "out", threshold=0.6, attention_at=[(5, 5)])
    arrays = _arrays(tmp_path / "out", "wide")
    assert not len(arrays["detections"])
    assert not len(arrays["boxes"])
    assert arrays["point_attention"].shape == (1, 4, 6, 8)
    assert {path.name for path in (tmp_path / "out/attention/wide").iterdir()} == {"attention.npz", "maps.png", "point-1.jpg"}


def test_nothing_found_is_no_map_and_no_script(checkpoint, photos, tmp_path):
    predict(checkpoint, [photos / "wide.png"], tmp_path / "out", threshold=1, attention=True, compare=checkpoint)
    for folder in (tmp_path / "out", tmp_path / "out/compare"):
        assert {path.name for path in (folder / "attention/wide").iterdir()} == {"attention.npz"}
    assert "<script" not in (tmp_path / "out/index.html").read_text()


def test_without_attention_nothing_of_it_is_written(checkpoint, photos, tmp_path):
    predict(checkpoint, [photos / "wide.png"], tmp_path / "out", threshold=0.6)
    assert not (tmp_path / "out/attention").exists()
    assert "<script" not in (tmp_path / "out/index.html").read_text()


def test_a_place_outside_an_image_is_an_error_of_one_line_and_writes_nothing(checkpoint, photos, tmp_path):
    with pytest.raises(UserError, match=r"--attention-at 90,120: is outside of wide\.png, which is 128 x 96 pixels") as error:
        predict(checkpoint, [photos], tmp_path / "out", attention_at=[(3, 3), (90, 120)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_pictures_of_attention_are_no_input_of_the_next_prediction(checkpoint, photos, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(photos, folder)
    for _ in range(2):
        assert predict(checkpoint, [folder], folder, threshold=0.6, attention=True).images == 2


def test_a_heat_map_is_bright_where_the_attention_is():
    grey = Image.new("RGB", (80, 60), (100, 100, 100))
    weights = np.zeros((3, 4), np.float32)
    weights[:, 1:] = 0.5
    picture = np.asarray(heated(grey, weights)).astype(int)
    np.testing.assert_allclose(
        picture[30, 50], [252 * 235 / 255 + 60 * 20 / 255, 235 + 60 * 20 / 255, 164 * 235 / 255 + 60 * 20 / 255], atol=3
    )
    assert (picture[:, :10] == 60).all(), "where nothing is, the picture is only darker"
    assert np.asarray(grey).min() == 100, "the picture given is left as it was"
    assert np.diff(heat_colours(np.linspace(0, 1, 50))[:, 3].astype(int)).min() >= 0, "more attention is never less opaque"
    assert np.isfinite(np.asarray(heated(grey, np.zeros((3, 4), np.float32)))).all()


def test_detections_and_places_are_drawn_where_they_are(tmp_path):
    image, weights = Image.new("RGB", (200, 100), (100, 100, 100)), np.full((1, 2, 5, 10), 0.02, np.float32)
    found, box = ImageAttention(weights, weights), Box((20, 20, 200, 180), "cat", 0.9)
    colours = category_colours(["cat"])
    maps = write_attention(tmp_path / "a", tmp_path, image, (400, 200), found, [box], [1], [(300, 100)], colours, 1 / 20)
    assert [spot.xyxy for spot in maps.spots] == [(0.05, 0.1, 0.5, 0.9), (0.75, 0.5, 0.75, 0.5)]
    assert (maps.file, maps.nheads) == ("a/maps.png", 2)
    with Image.open(tmp_path / "a/detection-1.jpg") as drawn, Image.open(tmp_path / "a/point-1.jpg") as marked:
        assert drawn.size == marked.size == (200, 100)
        red, green, _ = drawn.getpixel((100, 60))  # the right edge of the box, as JPEG keeps its color
        assert green > red + 80
        assert min(marked.getpixel((150, 50))) > 200
    page = gallery_page({"found": "m"}, [Card("a", (400, 200), None, [Column("a", "b", [box], 0.9, maps)])], 0.5, colours)
    assert 'class="point"' in page
