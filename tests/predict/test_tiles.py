import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.config import load_config, to_dict
from raydetr.data.masks import decode_masks, encode_masks
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.predict import score, tiled_score
from raydetr.predict.predict import ImagePrediction, merge_views, predict
from raydetr.predict.tiles import Tiles, is_whole, merge_boxes, parse_tiles
from raydetr.weights.checkpoint import save_checkpoint

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]  # those of the coco_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=2)
    model.query_embed.weight.data *= 20  # else the queries of random weights all find the same
    model.class_embed.weight.data *= 2
    path, settings = tmp_path_factory.mktemp("model") / "best.pth", load_config({"model.preset": "detr_tiny", "data.val_size": 64})
    save_checkpoint(path, {"model": model.state_dict(), "settings": to_dict(settings), "categories": CATEGORIES, "epoch": 1, "metrics": {}})
    return path


def _results(out):
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.parametrize("size", [(320, 240), (101, 33), (7, 5), (1, 1)])
@pytest.mark.parametrize("tiles", [Tiles(2, 2), Tiles(3, 1, 0.0), Tiles(4, 5, 0.5), Tiles(16, 16, 0.9)])
def test_tiles_cover_the_image_and_share_what_the_overlap_says(size, tiles):
    whole, *parts = tiles.views(size)
    assert whole == (0, 0, *size)
    assert len(parts) == tiles.columns * tiles.rows
    covered = np.zeros(size[::-1], int)
    for left, top, right, bottom in parts:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1, "no pixel is left out"
    width = size[0] / (tiles.columns - (tiles.columns - 1) * tiles.overlap)
    for first, second in itertools.pairwise(parts[: tiles.columns]):
        assert first[2] - second[0] == pytest.approx(tiles.overlap * width, abs=1.5)


def test_one_tile_is_the_image_itself():
    assert Tiles(1, 1).views((30, 20)) == [(0, 0, 30, 20)]


def test_numbers_are_read():
    assert parse_tiles("2x3", None) == Tiles(2, 3, 0.2)
    assert parse_tiles(" 4X1 ", 0.0) == Tiles(4, 1, 0.0)
    assert parse_tiles(None, None) is None


@pytest.mark.parametrize(
    ("tiles", "overlap", "says"),
    [
        ("2", None, "is not COLUMNSxROWS"),
        ("", None, "is not COLUMNSxROWS"),
        ("2x2x2", None, "is not COLUMNSxROWS"),
        ("-1x2", None, "is not COLUMNSxROWS"),
        ("0x2", None, "it takes 1x1 to 16x16"),
        ("2x17", None, "it takes 1x1 to 16x16"),
        ("2x2", -0.1, "--overlap -0.1: is out of bounds; it takes 0 to 0.9"),
        ("2x2", 1.0, "--overlap 1: is out of bounds"),
        ("2x2", math.nan, "--overlap nan: is out of bounds"),
        (None, 0.2, "--overlap: is for tiles"),
    ],
)
def test_bad_values_are_one_line(tiles, overlap, says):
    with pytest.raises(UserError, match=says) as error:
        parse_tiles(tiles, overlap)
    assert "\n" not in str(error.value)


def test_boxes_that_a_tile_cuts_are_told_from_those_at_the_edge_of_the_image():
    boxes = torch.tensor([[10.0, 10, 40, 40], [0, 10, 40, 40], [10, 0, 40, 40], [10, 10, 100, 40], [10, 10, 40, 100], [0, 0, 100, 100]])
    assert is_whole(boxes, (0, 0, 100, 100), (100, 100)).all(), "nothing is cut in the whole image"
    assert is_whole(boxes, (0, 0, 100, 100), (180, 180)).tolist() == [True, True, True, False, False, False]
    assert is_whole(boxes, (80, 80, 180, 180), (180, 180)).tolist() == [True, False, False, True, True, False]


def test_of_boxes_of_one_object_and_category_the_surest_is_kept():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    kept = merge_boxes(boxes, torch.tensor([1, 1, 2, 1]), torch.tensor([0.6, 0.9, 0.7, 0.1]))
    assert kept.tolist() == [1, 2, 3]


def test_detections_of_tiles_are_those_of_the_parts_as_images_of_their_own(checkpoint, tmp_path):
    """Against predictions on the image and on its cut parts, put together here."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels[::20, ::20]).resize((120, 80)))
    tiles = Tiles(2, 1, 0.25)
    views = tiles.views((120, 80))
    (tmp_path / "parts").mkdir()
    for number, (left, top, right, bottom) in enumerate(views):
        Image.fromarray(pixels[top:bottom, left:right]).save(tmp_path / "parts" / f"{number}.png")
    predict(checkpoint, [tmp_path / "parts"], tmp_path / "apart", batch_size=1)
    predict(checkpoint, [tmp_path / "parts" / "0.png"], tmp_path / "tiled", batch_size=2, tiles=tiles)
    kept = []
    for each in sorted(_results(tmp_path / "apart"), key=lambda each: -each["score"]):
        left, _, right, _ = views[each["image_id"] - 1]
        x, y, w, h = each["bbox"]
        if (left > 0 and x <= 0.02 * (right - left)) or (right < 120 and x + w >= 0.98 * (right - left)):
            continue
        box = (x + left, y, x + left + w, y + h)
        if all(each["category_id"] != other or _iou(box, taken) <= 0.5 for taken, other, *_ in kept):
            kept.append((box, each["category_id"], each["score"], each["image_id"]))
    found = _results(tmp_path / "tiled")
    assert len({view for *_, view in kept}) > 1, "the image and a tile have a part in it"
    assert [each["category_id"] for each in found] == [category for _, category, *_ in kept]
    np.testing.assert_allclose([each["score"] for each in found], [score for *_, score, _ in kept], atol=1e-5)
    boxes = np.array([each["bbox"] for each in found])
    np.testing.assert_allclose(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), [box for box, *_ in kept], atol=5e-3)


def _iou(a, b):
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in range(2))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / max(sum(area) - width * height, 1e-9)


def test_masks_of_tiles_are_put_where_the_tile_is():
    views = Tiles(2, 1, 0.2).views((90, 40))
    small = np.zeros((1, 40, views[2][2] - views[2][0]), bool)
    small[0, 10:20, 10:20] = True
    empty = [encode_masks(np.zeros((1, 40, view[2] - view[0]), bool)) for view in views]
    parts = [([[0, 0, 1, 1]], [0.1], empty[0]), ([[2, 2, 3, 3]], [0.2], empty[1]), ([[10, 10, 20, 20]], [0.9], encode_masks(small))]
    predictions = [
        (ImagePrediction((view[2] - view[0], 40), xyxy, [0], scores, [0], rles=rles), view)
        for (xyxy, scores, rles), view in zip(parts, views, strict=True)
    ]
    merged = merge_views(predictions[::-1])
    assert merged.size == (90, 40)
    left = views[2][0]
    assert merged.xyxy == [[left + 10, 10, left + 20, 20], [2, 2, 3, 3], [0, 0, 1, 1]]
    rows, columns = np.nonzero(decode_masks(merged.rles[:1], (40, 90))[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, left + 10, left + 19)


def test_an_evaluation_scores_what_tiles_find_under_the_ids_of_the_data(checkpoint, coco_folder, monkeypatch):
    seen = {}
    for module in (score, tiled_score):
        monkeypatch.setattr(module, "interval_metrics", lambda coco, results, name=module: seen.update({name: results}) or {})
    layers = {"data.path": str(coco_folder(val=3)), "data.num_workers": 0}
    plain = score.score_checkpoint(checkpoint, layers)
    tiled = tiled_score.score_with_tiles(checkpoint, Tiles(1, 1), layers)
    assert tiled == plain
    mine, theirs = (sorted(seen[name], key=lambda each: (each["image_id"], -each["score"])) for name in (tiled_score, score))
    assert len(mine) == 75
    assert [(each["image_id"], each["category_id"]) for each in mine] == [(each["image_id"], each["category_id"]) for each in theirs]
    np.testing.assert_allclose([each["score"] for each in mine], [each["score"] for each in theirs], atol=1e-5)
    scores = {each["score"] for each in seen[tiled_score]}
    tiled_score.score_with_tiles(checkpoint, Tiles(1, 1), layers | {"data.val_size": 48})
    assert not scores & {each["score"] for each in seen[tiled_score]}, "settings of the evaluation count"
    tiled_score.score_with_tiles(checkpoint, Tiles(2, 2), layers)
    assert {each["score"] for each in seen[tiled_score]} - scores, "tiles have a part in it"


def test_attention_of_tiles_is_an_error(checkpoint, tmp_path):
    with pytest.raises(UserError, match="give one of the two"):
        predict(checkpoint, [tmp_path], tmp_path / "out", attention=True, tiles=Tiles(2, 2))
