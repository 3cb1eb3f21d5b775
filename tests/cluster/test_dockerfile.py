"""The image, as far as it can be told without building it: linted, and its package made of exactly what is copied into it."""

import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def instructions(name):
    """The words of every instruction of that name, in order."""
    lines = [line for line in DOCKERFILE.read_text().replace("\\\n", " ").splitlines() if not line.startswith("#")]
    return [shlex.split(line)[1:] for line in lines if line.split(maxsplit=1)[:1] == [name]]


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_is_not_root():
    made = instructions("RUN")[0]
    assert instructions("USER") == [[made[made.index("--uid") + 1]]]
    assert instructions("WORKDIR")[-1] == [f"/home/{made[-1]}"]
    assert f"HOME=/home/{made[-1]}" in instructions("ENV")[0]


@pytest.mark.slow
def test_what_is_copied_makes_the_whole_package(tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    for *sources, target in instructions("COPY"):
        for source in sources:
            copied = context / target / Path(source).name if target.endswith("/") else context / target
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, copied)
    install = next(words for words in instructions("RUN") if words[:2] == ["pip", "install"])
    constraints = install[install.index("-c") + 1]
    assert (context / constraints).read_text() == (ROOT / "constraints.txt").read_text()
    packages = install[install.index("-c") + 2 :]
    assert packages[0] == ".[serve]"  # for cluster/kuberay/rayservice.yaml
    assert all(Requirement(package) for package in packages[1:])

    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(wheel, cwd=context, check=True, capture_output=True, timeout=120)
    (made,) = tmp_path.glob("raydetr-*.whl")
    inside = set(zipfile.ZipFile(made).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "raydetr").rglob("*") if path.suffix in (".py", ".html")}
    wanted |= {f"raydetr/search_spaces/{path.name}" for path in (ROOT / "search_spaces").glob("*.yaml")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "raydetr" / "weights").glob("*.pth")}
    assert wanted <= inside
