"""A stub of the CUDA runtime, which makes torch believe in one GPU; nothing is computed on it."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parent
HEADER = "cuda_runtime_api.h"
# torch looks for the driver and for NVML by name; the runtime's symbols are replaced before its libraries are loaded.
LIBRARIES = {"runtime.so": "runtime.c", "unused.so": "unused.c", "libcuda.so.1": "driver.c", "libnvidia-ml.so.1": "driver.c"}


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """The environment of a Python process that sees one GPU, or a skip that says what is missing to build the stub."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc), which builds the stub of the CUDA runtime")
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU, which the stub would hide")
    include = _cuda_headers()
    if include is None:
        pytest.skip(f"no {HEADER} among the installed packages (triton brings it)")
    folder = tmp_path_factory.mktemp("fake_cuda")
    for library, source in LIBRARIES.items():
        command = [compiler, "-w", "-shared", "-fPIC", f"-I{include}", str(SOURCES / source), "-o", str(folder / library)]
        subprocess.run(command, check=True)
    preload = f"{folder / 'runtime.so'} {folder / 'unused.so'}"
    environment = {**os.environ, "LD_PRELOAD": preload, "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


def _cuda_headers() -> Path | None:
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or [] if spec else []:
            for header in sorted(Path(root).rglob(HEADER)):
                if (header.parent / "crt" / "host_defines.h").exists():  # which torch's own package of headers leaves out
                    return header.parent
    return None
