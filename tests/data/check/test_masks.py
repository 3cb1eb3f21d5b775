"""What a check says of masks."""

import pytest

from raydetr.cli import main
from raydetr.data.check.check import check
from raydetr.data.coco import load_coco
from tests.data.test_masks import SQUARE, write


def found(folder, **options):
    report = check(folder, quick=True, **options)
    return {each.what: each for each in (*report.errors, *report.warnings) if each.split == "train"}, report


def test_a_sound_set_and_one_of_boxes_alone_have_nothing_to_complain_of(tmp_path):
    for name, segmentation in (("masks", [SQUARE]), ("boxes", None)):
        _, report = found(write(tmp_path / name, [(0, [10, 5, 10, 10], segmentation), (1, [10, 5, 10, 10], segmentation)]))
        assert report.verdict() == "Ready to train, nothing to complain of (quick check: no image was decoded)"


def test_boxes_without_a_mask_are_counted_where_others_have_one(tmp_path):
    objects = [(0, [10, 5, 10, 10], [SQUARE]), (0, [50, 5, 10, 10], None), (1, [10, 5, 10, 10], [])]
    findings, report = found(write(tmp_path, objects))
    assert len(findings["box has no mask"].occurrences) == 2
    assert "annotation id 2 in 0.png" in findings["box has no mask"].occurrences[0]
    assert report.ok


@pytest.mark.parametrize(
    ("segmentation", "what"),
    [
        ([SQUARE, [1, 2, 3, 4]], "polygon has fewer than three points"),
        ([[10, 5, 20, 15, 20, 5, 10, 15]], "polygon crosses itself"),
        ([[200, 200, 220, 200, 220, 220]], "mask has no pixel inside the image"),
        ([[10, 5, 40, 5, 40, 15, 10, 15]], "mask reaches beyond its box"),
    ],
)
def test_odd_masks_are_warnings(tmp_path, segmentation, what):
    """Each is said alone, and training can start."""
    findings, report = found(write(tmp_path, [(0, [10, 5, 10, 10], segmentation), (1, [10, 5, 10, 10], [SQUARE])]), masks=True)
    assert set(findings) == {what}
    assert findings[what].occurrences[0].startswith("annotation id 1 in 0.png")
    assert report.ok
    load_coco(tmp_path / "annotations" / "custom_train.json", masks=True)


def test_how_far_a_mask_reaches_beyond_its_box_is_said(tmp_path):
    findings, _ = found(write(tmp_path, [(0, [10, 5, 10, 10], [[10, 5, 40, 5, 40, 15, 10, 15]])]))
    assert findings["mask reaches beyond its box"].occurrences[0].endswith("by 20 pixels")
    findings, _ = found(write(tmp_path / "rounded", [(0, [10.6, 5.4, 9.1, 9.3], [SQUARE])]))
    assert not findings


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4, 5]], {"size": [5, 5], "counts": [25]}, "text"])
def test_a_mask_that_cannot_be_read_is_an_error_where_masks_are_trained(tmp_path, segmentation):
    folder = write(tmp_path, [(0, [10, 5, 10, 10], segmentation), (1, [10, 5, 10, 10], [SQUARE])])
    findings, report = found(folder)
    assert set(findings) == {"mask cannot be read"}
    assert report.ok
    assert not found(folder, masks=True)[1].ok


def test_a_set_without_masks_is_an_error_where_they_are_trained(tmp_path, capsys):
    folder = write(tmp_path, [(0, [10, 5, 10, 10], None)])
    assert main(["data", "check", str(folder), "--quick"]) == 0
    assert main(["data", "check", str(folder), "--quick", "--model.masks", "true"]) == 1
    assert "no box has a mask" in capsys.readouterr().out


@pytest.mark.parametrize("points", [[0, 0, 10, 0, 10, 10, 0, 10], [0, 0, 10, 0, 10, 0, 10, 10, 0, 10], [0, 0, 20, 0, 10, 1, 20, 20, 0, 20]])
def test_polygons_that_do_not_cross_themselves(tmp_path, points):
    """Also one with a point given twice, and one that is not convex."""
    assert not found(write(tmp_path, [(0, [0, 0, 20, 20], [points])]))[0].keys() & {"polygon crosses itself"}
