"""What a training does when something fails: it warns if it can do without it, and otherwise ends with one line for the user."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.text import one_line

# The CUDA libraries' messages about too little memory; PyTorch's own allocator raises OutOfMemoryError. cuDNN finds no engine, and
# cuBLAS does not start, if there is no memory for their workspace.
OUT_OF_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_\w*ALLOC\w*_FAILED|unable to find an engine"
    r"|Failed to CUDA (m|c)alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of PyTorch says that the GPU's memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


class BestEffort:
    """Runs the parts that a training can do without, such as pictures, TensorBoard events, log.txt and the terminal.

    Args:
        warn: Called with one line at the first failure of each kind; later failures of that kind are ignored.
    """

    def __init__(self, warn: Callable[[str], None]):
        self._warn = warn
        self._failed: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Turn an exception within the ``with`` block into a warning.

        Args:
            what: What the block does, for the warning; it also identifies the kind of failure.
        """
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                self._warn(f"warning: {what}: {one_line(error) or type(error).__name__}; left out, the training continues")


@contextlib.contextmanager
def failures_explained(folder: Path) -> Iterator[None]:
    """Turn exceptions that the user can do something about into a UserError of one line.

    Args:
        folder: The run folder, which the message about a full disk names.

    Raises:
        DiskFull: The disk is full.
        UserError: A file or folder may not be read or written, torch.compile fails, or the GPU is out of memory.
    """
    try:
        yield
    except (OSError, DiskFull) as error:
        if is_disk_full(error):
            raise DiskFull(f"the disk of {folder} is full; finished epochs are kept: make room and resume") from error
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
            raise UserError(f"{error.filename or folder}: {error.strerror}; correct its owner or permissions, or choose another") from error
        raise
    except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]  # torch loads it when needed
        said = one_line(str(error).split("\n\n")[0])  # advice on debugging the compiler follows
        raise UserError(f"speed.compile: torch.compile fails here, --speed.compile off trains without ({said})") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the GPU's memory does not suffice: lower optim.batch_size (optim.accumulate makes up for it; auto:N sets both), "
            f"data.max_size, data.train_sizes and loss.query_groups, or use speed.precision bf16 ({one_line(str(error).splitlines()[0])})"
        ) from error
