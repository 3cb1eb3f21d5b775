import pytest

from raydetr.data.formats.files import ImageFinder, list_files
from raydetr.errors import UserError


def test_files_are_listed_once_without_hidden_ones(write, tmp_path):
    root = write({"set/b.jpg": None, "set/x/a.jpg": None, "set/.hidden/c.jpg": None, "set/.d.jpg": None, "set/__MACOSX/e.jpg": None})
    (root / "set" / "x" / "again").symlink_to(root / "set")  # a circle
    (root / "set" / "linked").symlink_to(write({"store/f.png": None}) / "store")
    assert list_files(root / "set") == ["b.jpg", "linked/f.png", "x/a.jpg"]


def test_a_link_to_an_image_elsewhere_is_found(write):
    root = write({"store/f.jpg": None, "set/b.jpg": None})
    (root / "set" / "a.jpg").symlink_to(root / "store" / "f.jpg")
    assert ImageFinder(root / "set").names == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x/a.jpg", ["x/a.jpg"]),
        ("x\\a.jpg", ["x/a.jpg"]),
        ("/data/y/a.jpg", ["y/a.jpg"]),
        ("z/a.jpg", ["x/a.jpg", "y/a.jpg"]),
        ("a", ["x/a.jpg", "y/a.jpg"]),
        ("b", ["b.PNG"]),
        ("b.tiff", ["b.PNG"]),
        ("b.png.old", []),
        ("notes.txt", []),
        ("first.name-0", ["first.name-0.jpg"]),
        ("first", []),
        ("", []),
        (None, []),
        ("..", []),
    ],
)
def test_candidates(write, name, found):
    finder = ImageFinder(write({"x/a.jpg": None, "y/a.jpg": None, "b.PNG": None, "first.name-0.jpg": None, "notes.txt": ""}))
    assert finder.candidates(name) == found


def test_an_exact_name_wins_over_one_of_other_case(write):
    finder = ImageFinder(write({"a.jpg": None, "A.jpg": None}))
    assert finder.find("A.jpg", "f") == "A.jpg"
    with pytest.raises(UserError, match=r"f: image 'a\.JPG' is ambiguous in .*: A\.jpg, a\.jpg; keep one"):
        finder.find("a.JPG", "f")


def test_nothing_outside_of_the_folder_is_ever_found(write, tmp_path):
    finder = ImageFinder(write({"set/a.jpg": None, "secret.jpg": None}) / "set")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg", "file://" + str(tmp_path / "secret.jpg")):
        assert finder.candidates(name) == []
        with pytest.raises(UserError, match=r"leads out|No such file"):
            finder.find(name, "f")
