import contextlib
import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks import gpu, step
from raydetr.model.detr import build_model
from tests.recorded_graphs import record_with_stand_in

# Packages that a machine with a GPU may lack.
ABSENT = (
    "ray",
    "optuna",
    "cmaes",
    "hotcoco",  # pycocotools serves instead
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
def test_sections_for_a_gpu_do_not_rot(in_this_process, monkeypatch, tmp_path):
    """They run on the CPU on small networks, with stand-ins for what only CUDA has and for the compiler, which takes minutes."""
    for name, small in (("DetrConfig", {"encoder_layers": 1, "decoder_layers": 1}), ("ResNetConfig", {"depths": [1, 1, 1, 1]})):
        monkeypatch.setattr(transformers, name, functools.partial(getattr(transformers, name), **small))
    monkeypatch.setattr(step, "build_model", lambda _preset, classes: build_model("detr_tiny", classes, dec_layers=6))
    compiled, modes = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(type(module).__name__))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    recorder = record_with_stand_in(monkeypatch)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **_: SimpleNamespace(communicate=lambda: (in_process(command), None)))

    def in_process(command):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            gpu.run_section(command[command.index("--section") + 1], tmp_path, "--quick" in command)
        return output.getvalue()

    names = [name for name, section in gpu.SECTIONS.items() if section.gpu]
    assert names == ["waits", "out_of_memory", "compiled", "variants", "shared"]
    numbers = {}
    for name in names:
        gpu.run_section(name, tmp_path, True)
        numbers |= json.loads((tmp_path / f"{name}.json").read_text())
    assert modes == ["warn", "default"]
    assert numbers["waits beside the matching's"] == "none"
    assert numbers["message"] == "none: the memory sufficed"
    assert {"DetrModel", "TinyBlock", "EncoderLayer", "DecoderLayer"} <= set(compiled)
    assert recorder.replayed
    for name in ("peer step, compiled", "variant graphs", "variant cudnn.benchmark", "variant compiled"):
        assert numbers[f"{name}, batch 1, ms"] > 0
    assert numbers["processes 2, steps per second together"] > 0


@pytest.mark.slow
def test_torch_alone_is_enough(tmp_path):
    """Sections that need more say what, and nothing else imports it; whole runs train, and are evaluated by pycocotools."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from benchmarks import gpu; "
    code += "gpu.run_in_process = lambda name, out, quick, limit_s: gpu.run_section(name, out, quick) or ''; "
    code += "[gpu.SECTIONS.pop(name) for name in ('oracle', 'profile', 'shapes')]; gpu.main()"
    command = [sys.executable, "-c", code, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["problems"]["peer"] == "needs transformers"
    assert "runs" not in report["problems"]
    assert report["numbers"]["run whole, AP"] >= 0
    assert report["numbers"]["resumed against straight, largest difference of a weight"] == 0


def test_without_an_evaluator_whole_runs_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert gpu.missing(gpu.SECTIONS["runs"]) == ""
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert gpu.missing(gpu.SECTIONS["runs"]) == "needs hotcoco or pycocotools"


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
