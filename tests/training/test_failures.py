import errno
import pickle

import pytest
import torch

from raydetr.errors import DiskFull, UserError
from raydetr.training.failures import BestEffort, failures_explained


def test_what_a_training_can_do_without_is_a_warning_once():
    warnings = []
    best_effort = BestEffort(warnings.append)
    for attempt in range(3):
        with best_effort("pictures"):
            raise ValueError(f"attempt {attempt}\n  of several lines")
    with best_effort("log.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    done = []
    with best_effort("pictures"):
        done.append(True)
    assert done
    assert warnings == [
        "warning: pictures: attempt 0 of several lines; left out, the training continues",
        "warning: log.txt: [Errno 28] No space left on device; left out, the training continues",
    ]


def test_ctrl_c_is_no_failure():
    with pytest.raises(KeyboardInterrupt), BestEffort(print)("pictures"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "Quota"), DiskFull("last.pth: not saved")])
def test_a_full_disk_is_one_line_with_its_folder(tmp_path, error):
    with (
        pytest.raises(DiskFull, match=f"the disk of {tmp_path} is full; finished epochs are kept: make room and resume"),
        failures_explained(tmp_path),
    ):
        raise error


@pytest.mark.parametrize("file", ["last.pth", None])
def test_a_file_without_permission_is_named(tmp_path, file):
    named = tmp_path / file if file else tmp_path
    with pytest.raises(UserError, match=f"^{named}: Permission denied; correct its owner or permissions"), failures_explained(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", *([str(named)] if file else []))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("NCCL error ...: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("NCCL error: Failed to CUDA malloc 4194304 bytes"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_running_out_of_gpu_memory_says_what_to_lower(tmp_path, error):
    with (
        pytest.raises(UserError, match=r"the GPU's memory does not suffice: lower optim\.batch_size") as raised,
        failures_explained(tmp_path),
    ):
        raise error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        OSError(errno.EIO, "Input/output error", "last.pth"),
        pickle.UnpicklingError("bad"),
    ],
)
def test_faults_of_the_machine_and_bugs_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, failures_explained(tmp_path):
        raise error
    assert raised.value is error
