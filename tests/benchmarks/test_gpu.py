import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

# Packages that a machine with a GPU may lack.
ABSENT = (
    "ray",
    "optuna",
    "cmaes",
    "hotcoco",
    "pycocotools",
    "rich",
    "tensorboard",
    "pyarrow",
    "filelock",
    "plotly",
    "click",
    "transformers",
)


@pytest.fixture
def in_this_process(monkeypatch):
    def run(name, out, quick, _limit_s):
        gpu.run_section(name, out, quick)
        return ""

    monkeypatch.setattr(gpu, "run_in_process", run)


@pytest.mark.slow
def test_all_sections_that_need_no_gpu_run(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--quick", "--out", str(tmp_path)])
    gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    if not torch.cuda.is_available():
        assert report["problems"] == {name: "needs a GPU" for name, section in gpu.SECTIONS.items() if section.gpu}
    numbers = report["numbers"]
    assert numbers["oracle fp32, logits"] < 1e-4
    assert numbers["oracle fp32, losses"] < 1e-5
    assert numbers["resumed against straight, largest difference of a weight"] == 0
    assert numbers["checkpoint reads without a GPU"] is True
    for name in ("step, batch 1, ms", "step, padded, batch 1, ms", "inference, batch 1, ms", "peer step, batch 1, ms", "busy ms, batch 1"):
        assert numbers[name] > 0
    shown = capsys.readouterr().out
    assert "| inference, batch 1" in shown, "the table of ratios"


@pytest.mark.slow
def test_torch_alone_is_enough(tmp_path):
    """Sections that need more say what, and nothing else imports it."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from benchmarks import gpu; "
    code += "gpu.run_in_process = lambda name, out, quick, limit_s: gpu.run_section(name, out, quick) or ''; "
    code += "[gpu.SECTIONS.pop(name) for name in ('oracle', 'profile', 'shapes')]; gpu.main()"
    command = [sys.executable, "-c", code, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    problems = json.loads((tmp_path / "gpu.json").read_text())["problems"]
    assert problems["peer"] == "needs transformers"
    assert problems["runs"] == "needs hotcoco, rich, tensorboard, pyarrow, filelock"


def test_a_section_that_fails_costs_only_itself(monkeypatch, tmp_path):
    code = "import sys; print('ValueError: no such kernel', file=sys.stderr); sys.exit(1)"
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
    assert gpu.run_in_process("steps", tmp_path, True, 60) == "ValueError: no such kernel"
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real(["sleep", "60"], **options))
    assert gpu.run_in_process("steps", tmp_path, True, 0.1) == "took longer than 0 s"


def test_numbers_are_kept_as_soon_as_they_are_known(tmp_path):
    results = gpu.Results(tmp_path / "steps.json")
    results.add("step, ms", 12.34567)
    assert json.loads((tmp_path / "steps.json").read_text()) == {"step, ms": 12.35}


def test_ratios_are_those_that_were_measured():
    numbers = {
        "peer step, same dropout, batch 4, ms": 60.0,
        "step, batch 4, ms": 30.0,
        "busy ms, batch 4": 9.0,
        "profiled ms, batch 4": 10.0,
    }
    assert gpu.ratios(numbers) == [["step, batch 4", 60.0, 30.0, 2.0, 2.0], ["busy share of the GPU, batch 4", 9.0, 10.0, 0.9, 0.85]]
