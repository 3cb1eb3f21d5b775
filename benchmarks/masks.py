"""Compare a training step with masks of matched queries with the official way, of all queries: ``python -m benchmarks.masks``.

The step of ``detr_resnet50`` without masks is measured as well: what a way costs is what its step takes more than that one. All have
random weights, the same images with ``OBJECTS`` objects each, losses at all decoder layers, AdamW, and clipped gradients. Each lives in
a process of its own.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Child, interleaved, machine, options, serve, spread, table
from raydetr.config import Optim, Speed
from raydetr.loss.criterion import build_criterion
from raydetr.memory import kept_memory
from raydetr.model.detr import build_model
from raydetr.training.engine import Training, choose_device, choose_dtype, take_step
from raydetr.training.schedule import build_optimizer, build_scheduler

BOXES, LEAN, OFFICIAL = "boxes only", "masks of matched queries", "masks of all queries"
CLASSES, OBJECTS, CLIP = 91, 4, 0.1
TARGET = 3.0  # times as much extra memory the official way takes


def make_batch(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return images of noise [batch, 3, height, width], and targets with ``OBJECTS`` boxes each, whose masks fill them."""
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(batch, 3, height, width, generator=generator), []
    for number in range(batch):
        center, size = (torch.rand(OBJECTS, 2, generator=generator) for _ in range(2))
        boxes_cxcywh = torch.cat((0.25 + 0.5 * center, 0.05 + 0.3 * size), 1)
        low, high = boxes_cxcywh[:, :2] - boxes_cxcywh[:, 2:] / 2, boxes_cxcywh[:, :2] + boxes_cxcywh[:, 2:] / 2
        x, y = torch.arange(width)[None, None] / width, torch.arange(height)[None, :, None] / height
        masks = (x >= low[:, :1, None]) & (x < high[:, :1, None]) & (y >= low[:, 1:, None]) & (y < high[:, 1:, None])
        labels = torch.randint(0, CLASSES, (OBJECTS,), generator=generator)
        target = {"boxes": boxes_cxcywh, "labels": labels, "masks": masks, "image_id": torch.tensor(number)}
        targets.append({name: each.to(device) for name, each in target.items()})
    return images.to(device), targets


def step(who: str, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, preset: str) -> Callable[[], object]:
    """Return a function that runs a training step of a contender on images of this size."""
    images, targets = make_batch(*size, device)
    torch.manual_seed(0)
    optim, masks = Optim(), who != BOXES
    model = build_model(preset, CLASSES, masks=masks).to(device).train()
    criterion = build_criterion(CLASSES, masks=masks, dec_layers=model.settings["dec_layers"])
    optimizer = build_optimizer(model, optim)
    if who != OFFICIAL:
        scaler, scheduler = torch.amp.GradScaler(device.type, enabled=False), build_scheduler(optimizer, optim, 1000)
        training = Training(model, criterion, optimizer, scheduler, scaler, None, device, dtype, clip_max_norm=CLIP)
        return lambda: take_step(training, [(images, None, targets)])

    def official() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(images)
        criterion.weighted_sum(criterion(outputs, targets)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return official


def main() -> None:
    """Measure and print the table."""
    parser = options(__doc__, repeats=5)
    parser.add_argument("--serve", metavar="WHO", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = choose_device(Speed())
    dtype = choose_dtype(Speed(), device)
    size, preset = ((1, 64, 96), "detr_tiny") if chosen.quick else ((1, 240, 320), "detr_resnet50")
    if chosen.serve:
        with kept_memory(device.type):
            serve(step(chosen.serve, size, device, dtype, preset), device.type == "cuda")
        return
    shown = f"{size[0]} x {size[1]} x {size[2]}, {OBJECTS} objects an image"
    print(f"{machine()}, {str(dtype).removeprefix('torch.')}; a step of {preset} with {shown}\n")
    repeats, quick = (1, ["--quick"]) if chosen.quick else (chosen.repeats, [])
    children = {who: Child("benchmarks.masks", "--serve", who, *quick) for who in (BOXES, LEAN, OFFICIAL)}
    seconds = interleaved(children, repeats, warmup=1)
    memory = {who: child.close() for who, child in children.items()}
    print(table(rows_of(seconds, memory), ["step", "time", "extra time", "peak memory", "extra memory", "times that of matched queries"]))
    print(f"\ntarget: the official way takes {TARGET:g} times as much extra memory, or more")


def rows_of(seconds: dict[str, list[float]], memory: dict[str, float]) -> list[list]:
    """Return a row of the table for each contender.

    Args:
        seconds: The times of each contender's steps.
        memory: Its peak memory in MiB.
    """
    fastest = {who: min(each) for who, each in seconds.items()}
    extra = {who: most - memory[BOXES] for who, most in memory.items()}
    rows = []
    for who, each in seconds.items():
        slower = f"{fastest[who] - fastest[BOXES]:.2f} s"
        times = extra[who] / extra[LEAN] if who != BOXES and extra[LEAN] > 0 else ""
        rows.append([who, spread(each), slower, f"{memory[who]:.0f} MiB", f"{extra[who]:.0f} MiB", times])
    return rows


if __name__ == "__main__":
    main()
