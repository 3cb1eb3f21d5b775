"""slurm.sbatch: as shellcheck sees it, and run with commands of Slurm's names that start everything on this machine."""

import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN $*" >> "$STARTED"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] && printf 'localhost\\n127.0.0.1\\n'
"""


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def free_job():
    """A job id whose ports (the script's: 20000, 30000 and 40000 and the id's last four digits) are free."""
    while True:
        job = 10000 + secrets.randbelow(10000)
        if all(socket.socket().connect_ex(("127.0.0.1", first + job % 10000)) for first in (20000, 30000, 40000)):
            return job


@pytest.mark.slow
def test_two_nodes_train_together(coco_folder, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    script = tmp_path / "slurm.sbatch"
    script.write_text(SCRIPT.read_text().replace("YOUR_VENV/bin", str(Path(sys.executable).parent)))
    example = re.search(r"sbatch cluster/slurm\.sbatch (train .*)", SCRIPT.read_text())[1]
    example = example.replace("/shared/photographs", str(coco_folder())).replace("/shared/runs", str(tmp_path / "runs"))
    small = ["--workers", "2", "--epochs", "1", "--preset", "detr_tiny", "--data.num_workers", "0", "--batch-size", "1"]
    job = str(free_job())
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "STARTED": str(tmp_path / "started"),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the end there is nothing to drain
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run(
            ["bash", script, *shlex.split(example), *small], env=environment, capture_output=True, text=True, timeout=400, check=False
        )
    finally:
        subprocess.run(["rm", "-rf", f"/tmp/ray-{job}"], check=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 epoch finished" in done.stdout
    assert (tmp_path / "runs" / "first" / "best.pth").exists()
    head, worker = (line.split(maxsplit=2) for line in (tmp_path / "started").read_text().splitlines())
    assert head[0] == worker[0] == "token"
    assert head[1] == worker[1]
    assert len(head[1]) == 64
    assert head[1] not in SCRIPT.read_text() + done.stdout + done.stderr
    assert "--head" in head[2]
    assert "--address" in worker[2]
