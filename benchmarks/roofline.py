"""Compare the time of a training step with what it must take on this machine: ``python -m benchmarks.roofline``.

The step's arithmetic is counted by PyTorch's FlopCounterMode (of products and convolutions, backward too), its bytes as what every
operator reads and writes. The machine's matrix peak is the best of a large product and a large convolution, its bandwidth that of
adding two large tensors, all measured here.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved, machine, options, table
from benchmarks.step import make_batch, our_step
from raydetr.config import Speed
from raydetr.memory import kept_memory
from raydetr.training.engine import choose_device, choose_dtype


class Traffic(TorchDispatchMode):
    """Count the bytes that operators read and write. Views move none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, results)) if isinstance(each, Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return results


def count(step: Callable[[], object]) -> tuple[int, dict[str, int], int]:
    """Return the FLOP of a step, its FLOP by operator, and the bytes that it moves."""
    with FlopCounterMode(display=False) as flops:
        step()
    by_operator = {str(operator).removeprefix("aten."): number for operator, number in flops.get_flop_counts()["Global"].items()}
    with Traffic() as traffic:
        step()
    return flops.get_total_flops(), by_operator, traffic.bytes


def main() -> None:
    """Measure and print the tables."""
    chosen = options(__doc__, repeats=7).parse_args()
    device = choose_device(Speed())
    dtype = choose_dtype(Speed(), device)
    size = (1, 64, 96) if chosen.quick else (4, 800, 1066) if device.type == "cuda" else (2, 480, 640)
    side = 256 if chosen.quick else 2048 if device.type == "cpu" else 8192
    print(machine(), f", {str(dtype).removeprefix('torch.')}, step of {size[0]} x {size[1]} x {size[2]}\n", sep="")
    step = our_step(*make_batch(*size, device), dtype)
    step()
    flop, by_operator, moved = count(step)

    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    features = torch.randn(2, 256, side // 32, side // 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    long_a, long_b, long_c = (torch.ones(side * side * 4, device=device) for _ in range(3))
    contenders = {
        "step": step,
        "product": lambda: a @ b,
        "convolution": lambda: F.conv2d(features, kernel, padding=1),
        "addition": lambda: torch.add(long_a, long_b, out=long_c),
    }
    with kept_memory(device.type):
        seconds = interleaved(contenders, 1 if chosen.quick else chosen.repeats, warmup=2)
    product = 2 * side**3 / min(seconds["product"])
    convolution = 2 * kernel.numel() * features.numel() / 256 / min(seconds["convolution"])
    peak, bandwidth = max(product, convolution), 12 * long_a.numel() / min(seconds["addition"])
    taken = statistics.median(seconds["step"])
    rows = [
        ["arithmetic of the step", f"{flop / 1e9:.0f} GFLOP", ""],
        *([f"- {name}", f"{number / 1e9:.0f} GFLOP", ""] for name, number in by_operator.items()),
        ["traffic of the step", f"{moved / 1e9:.1f} GB", ""],
        ["peak, product", f"{product / 1e9:.0f} GFLOP/s", ""],
        ["peak, convolution", f"{convolution / 1e9:.0f} GFLOP/s", ""],
        ["bandwidth", f"{bandwidth / 1e9:.0f} GB/s", ""],
        ["the arithmetic takes at the peak", f"{flop / peak:.3g} s", flop / peak / taken],
        ["the traffic takes, were nothing cached", f"{moved / bandwidth:.3g} s", moved / bandwidth / taken],
        ["the step takes (median)", f"{taken:.3g} s", 1.0],
    ]
    print(table(rows, ["what", "how much", "share of the step"]))


if __name__ == "__main__":
    main()
