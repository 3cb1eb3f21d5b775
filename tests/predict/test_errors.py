import json
import re

import pytest

from raydetr.cli import main
from raydetr.data.formats.convert import convert
from raydetr.evaluate.coco import coco_metrics
from raydetr.predict.errors import MOST_CATEGORIES, explain_errors


@pytest.fixture(scope="module")
def explained(module_coco_folder, tmp_path_factory):
    """The output folder and the terminal's lines for results with one object missing, one of the wrong category and an unlabeled one."""
    data = module_coco_folder(train=1, val=4, boxes=3)
    file = data / "annotations" / "custom_val.json"
    coco = json.loads(file.read_text())
    coco["images"][0]["file_name"] = "<b>&.jpg"
    (data / "val2017" / "val_000.jpg").rename(data / "val2017" / "<b>&.jpg")
    file.write_text(json.dumps(coco))
    results = [{name: each[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for each in coco["annotations"]]
    results[0]["category_id"] = 10 - results[0]["category_id"]  # 3 and 7 swapped
    results[4]["bbox"] = [0, 0, 1, 1]
    source = tmp_path_factory.mktemp("errors") / "results.json"
    source.write_text(json.dumps(results))
    out = source.parent / "out"
    return out, explain_errors(source, out, {"data.path": str(data)}), coco, results


def test_the_numbers_are_those_of_the_evaluation(explained):
    out, _, coco, results = explained
    numbers = json.loads((out / "errors.json").read_text())
    for name, value in coco_metrics(coco, results).items():
        if name != "per_category":
            assert numbers["metrics"][name] == value, name
    assert numbers["lost_AP50"]["classification"]["count"] == 1
    assert numbers["images"] == 4
    assert {each["kind"] for each in numbers["suspects"]} == {"wrong category", "missing"}
    assert sum(map(sum, numbers["confusion"]["counts"])) >= len(results)


def test_the_first_line_says_what_costs_most(explained):
    _, lines, _, _ = explained
    assert re.match(r"AP \d+\.\d \(95 % interval \d+\.\d to \d+\.\d\) on 4 validation images; \w+ errors cost most", lines)
    assert "suspects_via.json" in lines


def test_the_page_needs_nothing_but_itself_and_escapes_names(explained):
    out, lines, _, _ = explained
    page = (out / "index.html").read_text()
    assert lines.splitlines()[0] in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "<b>&.jpg" not in page
    assert "&lt;b&gt;&amp;.jpg" in page
    assert len(page) < 500_000


def test_suspected_labels_go_back_into_a_labeling_tool(explained, tmp_path):
    out, _, coco, _ = explained
    suspects = json.loads((out / "suspects_coco.json").read_text())
    wrong = next(each for each in suspects["annotations"] if each["attributes"]["kind"] == "wrong category")
    assert wrong["bbox"] == coco["annotations"][0]["bbox"]
    assert wrong["category_id"] != coco["annotations"][0]["category_id"]
    # The VIA file is read back by the project's own converter, beside the images it names.
    source = tmp_path / "via"
    source.mkdir()
    (source / "via_region_data.json").write_text((out / "suspects_via.json").read_text())
    data = json.loads((out / "errors.json").read_text())
    for each in {suspect["image_id"] for suspect in data["suspects"]}:
        name = next(image["file_name"] for image in coco["images"] if image["id"] == each)
        (source / name).write_bytes(next(out.parent.parent.rglob(f"val2017/{name}")).read_bytes())
    converted = convert(source, tmp_path / "coco", attribute="name", val_fraction=0.5)
    assert converted.text()


def test_the_command_and_many_categories(module_coco_folder, tmp_path, capsys):
    categories = [{"id": number, "name": f"kind {number}"} for number in range(1, MOST_CATEGORIES + 4)]
    data = module_coco_folder(train=1, val=8, boxes=9, folder="many", categories=categories)
    (tmp_path / "none.json").write_text("[]")
    out = tmp_path / "out"
    assert main(["errors", str(tmp_path / "none.json"), "--data", str(data), "--out", str(out)]) == 0
    assert "on 8 validation images; no object is found." in capsys.readouterr().out
    assert f"The {MOST_CATEGORIES} categories with the most errors" in (out / "index.html").read_text()
    assert main(["errors", str(tmp_path / "none.json"), "--data", str(data), "--out", str(tmp_path / "none.json")]) == 2
    assert main(["errors", str(tmp_path / "none.json"), "--data", str(data), "--out", str(out), "--split", "test"]) == 2
    assert "no test annotations" in capsys.readouterr().err
