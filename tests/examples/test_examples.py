"""The examples, executed as a reader would, on generated images and for one short epoch or two."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from raydetr.demo import balloons

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"EPOCHS": 2, "TRIALS": 2, "TRIAL_EPOCHS": 1, "TRAIN_IMAGES": 8, "VAL_IMAGES": 4}


def outputs(notebook):
    """The text and the figures that the cells show. The progress of a run comes as one output for each line."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "") for output in shown]
    figures = [output.data["image/png"] for output in shown if "image/png" in output.get("data", {})]
    return "".join(texts).replace("\r\n", "\n"), figures  # commands have a terminal, which ends lines in that way


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(EXAMPLES / "finetune_balloon.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += "".join(f"\n{name} = {value}" for name, value in SMALL.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text, figures = outputs(notebook)
    assert len(figures) == 2
    assert "epoch 2/2" in text
    assert "\r" not in text
    assert "\x1b" not in text
    assert "defaults: AP" in text
    assert (tmp_path / "runs" / "balloons" / "best.pth").exists()
    assert (tmp_path / "runs" / "search" / "best.yaml").exists()


@pytest.mark.slow
def test_the_script_lists_what_it_finds(tmp_path):
    balloons.generate(tmp_path / "photographs", train=8, val=4)
    flags = ["--epochs", "1", "--threshold", "0", "--", "--preset", "detr_tiny", "--data.num_workers", "0"]
    command = [sys.executable, EXAMPLES / "own_photographs.py", "photographs", "photographs/val", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, *rows = (tmp_path / "detections.csv").read_text().splitlines()
    assert first == "image,category,score,x,y,width,height"
    assert {row.split(",")[0] for row in rows} == {f"balloons_val_{number:04d}.jpg" for number in range(4)}
    assert "balloons_val_0003.jpg" in done.stdout
