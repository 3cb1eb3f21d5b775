import json

import pytest

from raydetr.predict.predict import predict
from raydetr.predict.tiles import parse_tiles
from raydetr.serving.options import Options
from raydetr.serving.predictor import Predictor
from raydetr.serving.uploads import Upload


def answers(predictor, uploads, threshold=None):
    """The answers to images that can be read, predicted together."""
    views = [predictor.views(each) for each in uploads]
    predictions = iter(predictor.predict([view for some in views for view in some]))
    return [
        predictor.answer(upload, some, [next(predictions) for _ in some], threshold) for upload, some in zip(uploads, views, strict=True)
    ]


@pytest.mark.parametrize("tiles", [None, "2x1"])
def test_answers_are_those_of_predict(checkpoint, picture, tmp_path, tiles):
    sizes = [(96, 64), (64, 96), (96, 64), (50, 50)]
    uploads = [Upload(f"{number}.png", picture(number, size)) for number, size in enumerate(sizes)]
    (tmp_path / "images").mkdir()
    for upload in uploads:
        (tmp_path / "images" / upload.name).write_bytes(upload.content)
    predict(checkpoint, [tmp_path / "images"], tmp_path / "out", tiles=parse_tiles(tiles, None))
    expected = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = answers(Predictor(Options(checkpoint=str(checkpoint), tiles=tiles)), uploads, 0)
    assert [each.size for each in found] == sizes
    served = [{"image_id": image_id, **result} for image_id, each in enumerate(found, 1) for result in each.results]
    assert len(served) == len(expected)
    assert all(each["segmentation"]["size"] == [sizes[each["image_id"] - 1][1], sizes[each["image_id"] - 1][0]] for each in served)
    for mine, other in zip(served, expected, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (other["image_id"], other["category_id"])
        assert mine["bbox"] == pytest.approx(other["bbox"], abs=0.01)
        assert mine["score"] == pytest.approx(other["score"], abs=1e-4)


def test_the_thresholds_are_the_requests_the_servers_or_the_checkpoints(checkpoint, picture):
    upload = Upload("a.png", picture())
    (every,) = answers(Predictor(Options(checkpoint=str(checkpoint))), [upload], 0)
    own = {3: 0.35, 7: 0.5}
    kept = [each for each in every.results if each["score"] >= own[each["category_id"]]]
    assert 0 < len(kept) < len(every.results)
    assert answers(Predictor(Options(checkpoint=str(checkpoint))), [upload])[0].results == kept
    started = Predictor(Options(checkpoint=str(checkpoint), threshold=0.4))
    assert answers(started, [upload])[0].results == [each for each in every.results if each["score"] >= 0.4]
    assert started.describe()["thresholds"] == [0.4, 0.4]


def test_an_image_that_cannot_be_read_is_answered_in_one_line_under_its_own_name(checkpoint, picture):
    predictor = Predictor(Options(checkpoint=str(checkpoint), max_megapixels=1))
    cut = predictor.views(Upload("cut.jpg", picture(kind="JPEG")[:300]))
    assert cut.status == 415
    assert cut.error.startswith("cut.jpg: broken or truncated image")
    assert predictor.views(Upload("a.txt", b"text")).error == "a.txt: not an image file that can be read"
    large = predictor.views(Upload("large.png", picture(size=(1001, 1000))))
    assert (large.status, large.error) == (413, "large.png: too large, more than the 1 megapixels that this server takes")
