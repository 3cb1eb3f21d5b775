import pytest

from raydetr.data.formats.detect import Found, conversion_hint, detect_format, find_formats
from raydetr.errors import UserError

COCO = {"images": [], "annotations": [], "categories": []}
XML = "<annotation><object></object></annotation>"
VIA_CSV = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"


@pytest.mark.parametrize(
    ("source", "file", "content"),
    [
        ("via", "train/via_region_data.json", {"a.jpg1": {"filename": "a.jpg", "regions": []}}),
        ("via", "project.json", {"_via_settings": {}, "_via_img_metadata": {"a": {"filename": "a.jpg", "regions": {}}}}),
        ("via", "via_export.json", {}),
        ("via", "via_export_csv.csv", VIA_CSV),
        ("voc", "Annotations/sub/a.xml", XML),
        ("voc", "a.XML", f'<?xml version="1.0"?>\n<!-- made by hand -->\n{XML}'),
        ("yolo", "data.yaml", "train: images/train\nval: images/val\nnc: 1\n"),
        ("yolo", "set.yml", "names:\n  0: cat\n"),
        ("yolo", "labels/a.txt", "\n0 0.5 0.5 0.1 0.1\n"),
        ("yolo", "labels/a.txt", "0 0.1 0.1 0.2 0.2 0.3 0.1\n"),
        ("coco", "train/_annotations.coco.json", COCO),
        ("coco", "annotations/instances_default.json", COCO),
        ("labelme", "a.json", {"version": "5", "shapes": [], "imagePath": "a.jpg"}),
        ("createml", "_annotations.createml.json", [{"image": "a.jpg", "annotations": []}]),
        ("labelstudio", "project.json", [{"data": {"image": "a.jpg"}, "annotations": []}]),
        ("labelstudio", "min.json", [{"image": "a.jpg", "label": [{"original_width": 1}]}]),
        ("csv", "labels.csv", "filename,class,xmin,ymin,xmax,ymax\n"),
    ],
)
def test_each_format_is_known_by_its_content(write, source, file, content):
    root = write({"images/a.jpg": None, file: content, "README.txt": "0 1 2 3 4", "package.json": {"name": "x"}, "other.csv": "a,b\n"})
    assert detect_format(root) == Found(source, file)
    if file.endswith((".json", ".csv")):
        assert detect_format(root / file).source == source
    assert f"raydetr data convert {root} NEW_FOLDER --from {source}" in conversion_hint(root)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]),
        ("a.xml", "<annotations><image/></annotations>"),
        ("a.txt", "a photograph of a cat on a mat"),
        ("hyp.yaml", "lr0: 0.01\n"),
        ("latin.csv", "x"),
    ],
)
def test_other_files_are_no_format(write, file, content):
    root = write({"a.jpg": None, file: content})
    with pytest.raises(UserError, match=r"no known annotation format, only files .*; choose one with --from"):
        detect_format(root)
    assert conversion_hint(root) is None


def test_several_formats_and_none(write, tmp_path):
    with pytest.raises(UserError, match="no known annotation format, no files"):
        detect_format(tmp_path)
    root = write({"a.jpg": None, "a.xml": XML, "a.txt": "0 0.5 0.5 0.1 0.1"})
    assert [each.source for each in find_formats(root)] == ["voc", "yolo"]
    with pytest.raises(UserError, match=r"several formats: voc \(a\.xml\), yolo \(a\.txt\)"):
        detect_format(root)
    assert conversion_hint(root) is None
    assert conversion_hint(root / "gone") is None


@pytest.mark.parametrize("content", ["{", "[" * 10000])
def test_a_broken_file_is_named(write, content):
    with pytest.raises(UserError, match=r"broken\.json.*: not a JSON file"):
        detect_format(write({"a.jpg": None, "broken.json": content}))
