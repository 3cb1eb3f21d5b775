"""The files around the package: workflow, templates, versions."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import raydetr
from raydetr import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def run(tool, *arguments):
    return subprocess.run([Path(sys.executable).parent / tool, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", [WORKFLOW]),
        ("github-issue-forms", [ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "feature")]),
        ("github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_github_takes_its_files(schema, files):
    done = run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    assert done.returncode == 0, done.stdout


def test_the_workflow_is_safe():
    done = run("zizmor", "--offline", "--persona", "pedantic", "--no-config", WORKFLOW)
    assert done.returncode == 0, done.stdout


def test_the_workflow_tests_every_python_that_the_package_names():
    named = {each.rpartition(" ")[2] for each in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", each)}
    (matrix,) = re.findall(r"python: \[(.*)\]", WORKFLOW.read_text())
    assert {each.strip(' "') for each in matrix.split(",")} == named


def test_shellcheck_has_nothing_to_say_about_ci():
    done = run("shellcheck", ROOT / ".ci" / "run")
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_command_of_the_readme():
    """`.ci/run` takes the line apart into installation and tests."""
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"python3 -m venv.*pytest", line))
    assert re.fullmatch(r"python3 -m venv \.venv && .*'\.\[test\]' && \.venv/bin/python -m pytest .*", line)


def test_the_lowest_versions_are_those_of_the_package():
    lowest = {}
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        lowest[requirement.name] = next(each.version for each in requirement.specifier if each.operator == ">=")
    lines = [line for line in (ROOT / "constraints-min.txt").read_text().splitlines() if line and not line.startswith("#")]
    tried = dict(line.split("==") for line in lines)
    assert tried.keys() == lowest.keys()
    for name, version in lowest.items():
        assert tried[name] == version or tried[name] == f"{version}.0", name


def closure(name, extras):
    """The names of all distributions that a requirement installs here, itself included."""
    found, open_ = set(), [(name, frozenset(extras))]
    while open_:
        name, extras = open_.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        try:
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:  # an extra that this environment has not
            continue
        for each in requirements:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                open_.append((canonicalize_name(each.name), frozenset(each.extras)))
    return {name for name, _ in found}


def test_everything_that_is_installed_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    needed = closure("raydetr", PROJECT["project"]["optional-dependencies"]) - {"raydetr"}
    assert needed <= pinned
    assert len(pinned) == len(lines) - 1


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == __version__


def test_every_public_name_is_found():
    assert set(raydetr.__all__) == {"UserError", *raydetr._HOME}
    assert all(getattr(raydetr, name).__name__ == name for name in raydetr.__all__)
