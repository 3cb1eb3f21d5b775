"""``optim.batch_size auto:N``: the steps of N images per batch, taken in batches as large as the GPU's memory holds."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from raydetr.config import Config, asked_batch_size, with_settings
from raydetr.data.coco import CocoImages
from raydetr.data.loader import largest_side
from raydetr.errors import UserError
from raydetr.memory import clear_frames, release_gpu_memory
from raydetr.text import count
from raydetr.training.engine import Batch, Training, gathered, take_step
from raydetr.training.failures import is_out_of_memory

MARGIN = 0.1  # of the GPU's memory, left for fragments (batches have many shapes) and for NCCL
WITH_OWN_MEMORY = ("cuda",)  # types of devices that refuse what does not fit; a CPU shares the machine's memory with everything else


def with_batch_size(
    config: Config, device: torch.device, saved: dict[str, Any] | None, build: Callable[[], Training], images: CocoImages, pad_to: int
) -> tuple[Config, list[str]]:
    """Return the settings with a number in ``optim.batch_size``, and what to tell the user.

    An optimizer step keeps the images that were asked for, batch size times ``optim.accumulate``: a smaller batch is accumulated more
    often. All workers must call this function together, and get the same.

    Args:
        config: The settings of the run.
        device: Where the run trains.
        saved: The settings in the checkpoint that the run resumes from, whose batch size it keeps; None at its start.
        build: Makes a network with its optimizer, which takes the steps that are tried.
        images: The training set.
        pad_to: What the sides of batches are rounded up to, in pixels.

    Raises:
        UserError: Not even one image fits.
    """
    if isinstance(config.optim.batch_size, int):
        return config, []
    if saved and isinstance(saved["optim"]["batch_size"], int):
        return with_settings(config, {f"optim.{name}": saved["optim"][name] for name in ("batch_size", "accumulate")}), []
    asked, name = asked_batch_size(config), f"optim.batch_size {config.optim.batch_size}"
    if device.type not in WITH_OWN_MEMORY:
        text = f"{name}: a CPU has no memory of its own to ask, so batches have {count(asked, 'image')}"
        return with_settings(config, {"optim.batch_size": asked}), [text]
    step, side = asked * config.optim.accumulate, largest_side(images, pad_to)
    size = _largest_that_fits(step, build, images, side, device)
    if not size:
        raise UserError(
            f"{name}: not even one image of {side} x {side} pixels fits the GPU's memory; lower data.max_size and data.train_sizes, "
            "or use speed.precision bf16"
        )
    chosen = {"optim.batch_size": size, "optim.accumulate": step // size}
    batches = count(step // size, "batch", "batches")
    text = f"{name}: {count(size, 'image')} of {side} x {side} pixels fit; a step of {count(step, 'image')} is {batches}"
    return with_settings(config, chosen), [text]


def _largest_that_fits(step: int, build: Callable[[], Training], images: CocoImages, side: int, device: torch.device) -> int:
    largest, training = 0, build()
    with _margin(device):
        for size in (each for each in range(1, step + 1) if step % each == 0):
            # The workers try the same size together, because a step counts the boxes of all of them.
            if not all(gathered(_fits(training, _largest_batch(images, size, side)))):
                break
            largest = size
    return largest


def _fits(training: Training, batch: Batch) -> bool:
    try:
        take_step(training, [batch])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error)
        training.optimizer.zero_grad()
        return False
    finally:
        release_gpu_memory()
    return True


@contextlib.contextmanager
def _margin(device: torch.device) -> Iterator[None]:
    """Let PyTorch's allocator have all of the GPU's memory but ``MARGIN`` within the ``with`` block."""
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(before * (1 - MARGIN), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _largest_batch(images: CocoImages, size: int, side: int) -> Batch:
    objects = Counter(each["image_id"] for each in images.coco["annotations"])
    boxes = max(objects.values(), default=0)
    target = {
        "boxes": torch.full((boxes, 4), 0.5),
        "labels": torch.zeros(boxes, dtype=torch.int64),
        "image_id": torch.zeros(1, dtype=torch.int64),
    }
    mask = torch.zeros(size, side, side, dtype=torch.bool)
    return torch.zeros(size, 3, side, side, dtype=torch.uint8), mask, [target] * size
