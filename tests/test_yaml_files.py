import pytest

from raydetr.errors import UserError
from raydetr.yaml_files import yaml_leaves


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n", "expected settings by name, found a sequence"),
        ("optim: {lr: 1\n", "not a YAML file"),
        ("optim.lr: !!python/object/apply:os.system ['true']\n", "not a YAML file"),
        ("optim: &o\n  lr: *o\n", "line 1: refers to itself"),
        ("optim.lr: 1\ndata.train_sizes: &s [1, *s]\n", "line 2: refers to itself"),
        ("optim: " + "{a: " * 100_000, "is nested too deeply"),
        ("optim.lr: " + "[" * 100_000, "is nested too deeply"),
        ("optim.lr: " + "[" * 30 + "1" + "]" * 30, "line 1: is nested too deeply"),
        ("run.name: 2026-13-45\n", "line 1: not a YAML file (month must be in 1..12)"),
        ("optim.epochs: " + "9" * 5000, "line 1: not a YAML file"),
        ("optim.lr: 1\noptim:\n  lr: 2\n", "line 3: optim.lr stands twice (first on line 1)"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        list(yaml_leaves(file))
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        list(yaml_leaves(tmp_path / "absent.yaml"))


def test_leaves_have_their_dotted_names_and_lines(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("optim:\n  lr:\n    loguniform: [1e-5, 1e-3]\nloss.eos_coef: {uniform: [0, 1]}\n")
    assert list(yaml_leaves(file, depth=1)) == [
        ("optim.lr", {"loguniform": ["1e-5", "1e-3"]}, 2),
        ("loss.eos_coef", {"uniform": [0, 1]}, 4),
    ]
    assert [name for name, _, _ in yaml_leaves(file)] == ["optim.lr.loguniform", "loss.eos_coef.uniform"]
