"""Files that are spelled in another way in the annotations than on disk: taken where there is one candidate, else named."""

import unicodedata

import pytest

from raydetr.data.file_names import locate_files


@pytest.fixture
def folder(tmp_path):
    def make(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("")
        return tmp_path

    return make


COMPOSED = "Äpfel_é.jpg"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.jpg", "a.jpg"),
        ("./a.jpg", "./a.jpg"),
        ("sub\\a.jpg", "sub/a.jpg"),
        ("sub\\deeper\\a.jpg", "sub/deeper/a.jpg"),
        ("images\\a.jpg", "a.jpg"),
        ("train2017/a.jpg", "a.jpg"),
        ("data/train2017/a.jpg", "a.jpg"),
        ("a.jpg", "sub/a.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("a b.jpg", "a%20b.jpg"),
        ("%C3%A4.jpg", "ä.jpg"),
        (COMPOSED, unicodedata.normalize("NFD", COMPOSED)),
        (unicodedata.normalize("NFD", COMPOSED), COMPOSED),
        ("a.jpg ", "a.jpg"),
        (" a.jpg", "a.jpg"),
        ("sub /a.jpg", "sub/a.jpg"),
        ("a.JPG", "a.jpg"),
        ("Sub/A.jpg", "sub/a.JPG"),
        ("https://host.example/upload/a.jpg?d=1", "a.jpg"),
    ],
)
def test_a_file_is_taken_where_only_its_spelling_differs(folder, name, file):
    located = locate_files(folder(file.removeprefix("./"), "other.jpg"), [name])
    assert located.found == {name: file}
    assert not located.missing
    assert located.respelled == ({} if name == file else {name: file})


def test_the_file_as_written_comes_before_any_other(folder):
    root = folder("per%20cent.jpg", "per cent.jpg")
    assert locate_files(root, ["per%20cent.jpg", "per cent.jpg"]).respelled == {}


def test_the_longest_common_path_decides(folder):
    root = folder("a/img.jpg", "b/img.jpg")
    assert locate_files(root, ["photos\\b\\img.jpg"]).found == {"photos\\b\\img.jpg": "b/img.jpg"}


@pytest.mark.parametrize(
    ("files", "names", "missing"),
    [
        (("a/img.jpg", "b/img.jpg"), ["img.jpg"], {"img.jpg": "both a/img.jpg and b/img.jpg could be meant"}),
        (("b/img.jpg",), ["a/img.jpg"], {"a/img.jpg": "the nearest name there is b/img.jpg"}),
        (("img_01.jpg", "other.jpg"), ["img_1.jpg"], {"img_1.jpg": "the nearest name there is img_01.jpg"}),
        (("other.jpg",), ["img.png"], {"img.png": ""}),
        ((), ["img.png"], {"img.png": ""}),
        # A file belongs to one image only.
        (("a.jpg",), ["a.jpg", "A.jpg"], {"A.jpg": "the nearest name there is a.jpg"}),
        (("a.jpg",), ["x/a.jpg", "y/a.jpg"], {"x/a.jpg": "the nearest name there is a.jpg", "y/a.jpg": "the nearest name there is a.jpg"}),
    ],
)
def test_what_is_ambiguous_or_absent_is_not_taken(folder, files, names, missing):
    located = locate_files(folder(*files), names)
    assert located.missing == missing
    assert not located.respelled


def test_hints_are_looked_for_the_first_names_only(folder):
    located = locate_files(folder("img.jpg"), [f"img{number}.jpg" for number in range(5)])
    assert list(map(bool, located.missing.values())) == [True, True, True, False, False]


def test_no_file_outside_of_the_folder_is_taken(folder, tmp_path):
    root = folder("images/b.jpg", "a.jpg") / "images"
    assert not locate_files(root, ["sub\\a.jpg", "a.jpg"]).found


def test_a_folder_is_no_image(folder, tmp_path):
    root = folder("a.jpg/inside.txt")
    assert list(locate_files(root, ["a.jpg"]).missing) == ["a.jpg"]
