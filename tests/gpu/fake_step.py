"""Push training steps and an evaluation as ``cuda`` tensors through FakeTensorMode, on a machine without a GPU; prints one JSON object.

Run it with the stub of the CUDA runtime that ``conftest.py`` builds. Operators check shapes, dtypes and devices and compute nothing.
Where the code under test reads values from the device, it gets ones.

    python tests/gpu/fake_step.py '{"bf16": {"dtype": "bfloat16"}}'
"""

import collections
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from raydetr.config import Optim
from raydetr.loss.criterion import build_criterion
from raydetr.model import caching
from raydetr.model.detr import build_model
from raydetr.training import engine
from raydetr.training.schedule import MovingAverage, build_optimizer, build_scheduler

CLASSES, BOXES = 91, 7
WITHOUT_KERNEL = (
    "prim::",
    "aten::sym_",
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift_fresh",
    "aten::detach",
)
WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Operators(TorchDispatchMode):
    """Counts the operators that launch kernels on the GPU, and those that make the host wait for it."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and not name.startswith(WITHOUT_KERNEL):
            self.kernels[name] += 1
        to_host = name in ("aten::_to_copy", "aten::copy_") and args[-1 if name == "aten::copy_" else 0].is_cuda and not out.is_cuda
        if name in WAITING or to_host:
            self.waits[name] += 1
        return out


def make_batch(images: int, height: int, width: int, masked: bool) -> engine.Batch:
    """Return a batch on the CPU, as ``raydetr.data.loader.collate`` returns it."""
    mask = torch.zeros(images, height, width, dtype=torch.bool) if masked else None
    targets: list[dict[str, Any]] = [
        {
            "boxes": torch.full((BOXES, 4), 0.5),
            "labels": torch.zeros(BOXES, dtype=torch.int64),
            "image_id": number,
            "orig_size": torch.tensor([height, width]),
        }
        for number in range(images)
    ]
    return torch.zeros(images, 3, height, width, dtype=torch.uint8), mask, targets


def run(
    dtype: str,
    masked: bool = True,
    size: tuple[int, int, int] = (4, 800, 1066),
    preset: str = "detr_resnet50",
    accumulate: int = 1,
    ema: bool = False,
    device: str = "cuda",
    **settings: Any,
) -> dict[str, Any]:
    """Run a forward pass, a backward pass, an optimizer step and an evaluation; return what was counted and found wrong."""
    precision = getattr(torch, dtype)
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    model = build_model(preset, CLASSES, **settings)
    with FakeTensorMode(allow_non_fake_inputs=True), Operators() as operators:
        for module in model.modules():
            for name, each in list(module.named_parameters(recurse=False)):
                moved = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=target)
                setattr(module, name, torch.nn.Parameter(moved, each.requires_grad))
            for name, each in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=target))
        model.train()
        optimizer = build_optimizer(model, Optim())
        criterion = build_criterion(CLASSES, aux_loss=settings.get("aux_loss", True), dec_layers=model.settings["dec_layers"])
        scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
        average = MovingAverage(model, 0.99) if ema else None
        scheduler = build_scheduler(optimizer, Optim(), 100)
        training = engine.Training(model, criterion, optimizer, scheduler, scaler, average, target, precision, accumulate, 0.1)

        images, mask, targets = make_batch(*size, masked)
        on_device = [engine._boxes_and_labels(each, target) for each in targets]
        normalizers = criterion.normalizers([on_device], model.query_embed.num_embeddings)
        operators.kernels.clear()
        kernels = {}
        for part in ("first forward", "forward"):  # the first one makes what later ones keep
            outputs = engine._forward(model, images, mask, target, precision)
            kernels[part] = operators.kernels.total()
            operators.kernels.clear()
        losses = engine._losses(criterion, outputs, on_device, normalizers, None)
        kernels["losses"] = operators.kernels.total()
        operators.kernels.clear()
        losses["loss"].backward()
        kernels["backward"] = operators.kernels.total()
        trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        no_gradient = [name for name, each in trained if each.grad is None or each.grad.device != target]
        optimizer.zero_grad()

        operators.waits.clear()
        record = engine.take_step(training, [make_batch(*size, masked) for _ in range(accumulate)])
        step_waits = dict(operators.waits)
        operators.waits.clear()
        batches = [make_batch(*size, masked) for _ in range(2)]
        engine.sent_ahead = lambda batches, device: batches  # streams are none of FakeTensorMode's business
        metrics, detections = engine.evaluate(training.evaluated, criterion, batches, target, precision)
        state = [each for values in optimizer.state.values() for each in values.values()]
        return {
            "kernels": kernels,
            "no_gradient": no_gradient,
            "trained": len(trained),
            "step_waits": step_waits,
            "evaluation_waits": dict(operators.waits),
            "losses": [str(record.losses.device), str(record.losses.dtype), len(record.losses)],
            "names": len(engine.loss_names(criterion)),
            "optimizer_state": sorted({str(each.device) for each in state}),
            "detections": list(detections.scores.shape[1:]),
            "metrics": sorted(metrics),
        }


def _ones(tensor: torch.Tensor) -> np.ndarray:
    assert not tensor.is_cuda
    return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def main() -> None:
    """Run the cases of the first argument, a JSON object from names to arguments of :func:`run`."""
    warnings.filterwarnings("ignore")
    FakeTensor.tolist = lambda self: _ones(self.cpu()).tolist()
    caching.is_traced = lambda *tensors: False  # a fake tensor is cached as the real one would be
    FakeTensor.numpy = _ones
    torch.Tensor.pin_memory = lambda self: self  # which FakeTensorMode does not have
    print(json.dumps({name: run(**arguments) for name, arguments in json.loads(sys.argv[1]).items()}))


if __name__ == "__main__":
    main()
