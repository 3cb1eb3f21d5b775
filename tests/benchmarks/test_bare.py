import sys

import hotcoco
import numpy as np
import pytest

from benchmarks import bare
from raydetr.evaluate.coco import coco_metrics, precision_recall, run_coco_eval
from tests.evaluate.sets import noisy, random_set


@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_gives_what_hotcoco_gives(monkeypatch, seed):
    coco = random_set(seed)
    results = noisy(coco, seed)
    expected, curve = coco_metrics(coco, results), precision_recall(run_coco_eval(coco, results))
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with bare.runs_work():
        evaluation = run_coco_eval(coco, results)
        found, other = coco_metrics(coco, results), precision_recall(evaluation)
    assert type(evaluation.numbers).__module__ == "types", "hotcoco did not compute it"
    per_category, expected_per_category = found.pop("per_category"), expected.pop("per_category")
    assert found == pytest.approx(expected, abs=1e-9)
    for name, numbers in per_category.items():
        assert numbers == pytest.approx(expected_per_category[name], abs=1e-9), name
    for name, values in curve.items():
        np.testing.assert_allclose(other[name], values, err_msg=name)


def test_nothing_detected_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with bare.runs_work():
        assert coco_metrics(random_set(), [])["AP"] == 0


def test_what_is_there_is_used():
    with bare.runs_work():
        assert type(run_coco_eval(random_set(), []).numbers) is hotcoco.COCOeval


def test_a_package_that_may_not_be_imported_is_not_there(monkeypatch):
    assert bare.is_there("json")
    assert not bare.is_there("no_such_package")
    monkeypatch.setitem(sys.modules, "json", None)
    assert not bare.is_there("json")
