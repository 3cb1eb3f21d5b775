import sys

from benchmarks import evaluation


def test_the_set_is_as_large_as_it_says():
    coco, results = evaluation.make_set(20)
    assert len(coco["images"]) == 20
    assert len(results) == 2000
    assert 70 < len(coco["annotations"]) < 220


def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.evaluation", "--quick"])
    evaluation.main()
    shown = capsys.readouterr().out
    assert "| pycocotools" in shown
    assert float(shown.split("twelve numbers: ")[1]) < 1e-11
