"""What holds for every file of cluster/: versions, placeholders, tokens, and the raydetr commands in them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from raydetr import config
from raydetr.cli import check_submitted, cli, given_settings

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
COMMAND = re.compile(r"(?:raydetr|slurm\.sbatch) ((?:train|tune|submit|tensorboard|report|evaluate|predict|data) [^`;&|#]*)")


def texts(value):
    """Every string in a YAML document."""
    if isinstance(value, str):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in nested for text in texts(each)]


def commands(path):
    """The raydetr commands in a file, its comments included, as lists of words."""
    text = path.read_text()
    parts = [text.replace("\\\n", " ")]
    if path.suffix == ".yaml":
        parts += [text for document in yaml.safe_load_all(text) for text in texts(document)]
    return [shlex.split(found) for part in parts for line in part.splitlines() for found in COMMAND.findall(line)]


COMMANDS = [(path.name, words) for path in FILES for words in commands(path)]


def test_commands_are_found_in_every_file_that_starts_one():
    where = {name for name, _ in COMMANDS}
    assert where == {
        "README.md",
        "aws.yaml",
        "gcp.yaml",
        "slurm.sbatch",
        "raycluster.yaml",
        "rayjob-train.yaml",
        "rayjob-tune.yaml",
        "shared.yaml",
    }
    assert {words[0] for _, words in COMMANDS} == {"train", "tune", "submit", "tensorboard"}


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(COMMANDS)])
def test_every_command_is_one_that_raydetr_takes(name, words, tmp_path):
    (tmp_path / "runs").mkdir()
    words = [word.replace("/shared", str(tmp_path)) for word in words]
    options = cli.commands[words[0]].make_context(words[0], words[1:]).params
    if words[0] == "submit":
        check_submitted(options["command"])
        words = list(options["command"])
        options = cli.commands[words[0]].make_context(words[0], words[1:]).params
    if words[0] in ("train", "tune") and not options["resume"]:
        settings = config.load_config(*given_settings(dict(options)))
        assert settings.data.path == str(tmp_path / "photographs")
        assert settings.run.storage == str(tmp_path / "runs")


def test_ray_and_python_are_those_of_the_constraints_everywhere():
    ray = re.search(r"^ray==(.*)$", (FOLDER.parent / "constraints.txt").read_text(), re.MULTILINE)[1]
    python = re.search(r"^FROM python:(\d+\.\d+)-", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)[1]
    text = "".join(path.read_text() for path in FILES)
    assert set(re.findall(r"YOUR_REGISTRY/raydetr:(\S+)", text)) == {f"ray{ray}-py{python}"}
    assert set(re.findall(r"rayVersion: (\S+)", text)) == {ray}
    lowest = re.search(r'requires-python = ">=(\d+\.\d+)"', (FOLDER.parent / "pyproject.toml").read_text())[1]
    assert [int(part) for part in python.split(".")] >= [int(part) for part in lowest.split(".")]


def test_the_readme_says_what_every_placeholder_is():
    placeholder = re.compile(r"YOUR_[A-Z_]+")
    rows = [line.split("|")[1] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `YOUR_")]
    used = {word for path in FILES if path.name != "README.md" for word in placeholder.findall(path.read_text())}
    assert {word for row in rows for word in placeholder.findall(row)} == used
