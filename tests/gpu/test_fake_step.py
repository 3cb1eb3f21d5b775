"""Training steps and evaluations as ``cuda`` tensors on a stub of the CUDA runtime: devices, gradients, waits and kernel launches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TINY = {"preset": "detr_tiny", "size": [4, 96, 128]}
CASES = {
    "bf16": {"dtype": "bfloat16"},
    "bf16 without a mask": {"dtype": "bfloat16", "masked": False},
    "fp32, accumulation, moving average": {"dtype": "float32", "accumulate": 2, "ema": True, **TINY},
    "fp16 with its scaler": {"dtype": "float16", **TINY},
    "no auxiliary losses": {"dtype": "bfloat16", "aux_loss": False, **TINY},
    "learned positions, normalization first": {"dtype": "bfloat16", "position_embedding": "learned", "pre_norm": True, **TINY},
    "detr_tiny": {"dtype": "bfloat16", **TINY},
}
FORWARD = 766  # kernel launches of the forward pass of detr_resnet50 in bf16, with a padding mask; they bound the speed of small batches
MARGIN = 5


@pytest.fixture(scope="module")
def results(fake_cuda):
    command = [sys.executable, str(Path(__file__).with_name("fake_step.py")), json.dumps(CASES)]
    done = subprocess.run(command, env=fake_cuda, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_stub_is_seen_as_a_gpu(fake_cuda):
    code = "import torch; from raydetr.config import Speed; from raydetr.training.engine import choose_device, choose_dtype;"
    code += "device = choose_device(Speed()); print(torch.cuda.get_device_name(), device, choose_dtype(Speed(), device))"
    done = subprocess.run([sys.executable, "-c", code], env=fake_cuda, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "Fake H100 cuda:0 torch.bfloat16"


def test_batches_are_sent_on_a_stream_of_their_own(fake_cuda):
    """The stub copies for real: the batches arrive as they were, and only the copies run beside the computation."""
    code = """
import torch
from raydetr.training.engine import sent_ahead
batches = [(torch.full((1, 3, 2, 2), n, dtype=torch.uint8), None if n else torch.ones(1, 2, 2, dtype=torch.bool), [n]) for n in range(3)]
streams, to = [], torch.Tensor.to
def copying(self, *args, **options):
    streams.append(torch.cuda.current_stream())
    return to(self, *args, **options)
torch.Tensor.to = copying
for (images, mask, targets), (pixels, padding, numbers) in zip(batches, sent_ahead(batches, torch.device("cuda", 0)), strict=True):
    assert pixels.is_cuda and pixels.cpu().equal(images) and numbers is targets
    assert padding is None if mask is None else padding.cpu().equal(mask)
assert torch.cuda.default_stream() not in streams and len(set(streams)) == 1, streams
print("sent", len(streams))
"""
    done = subprocess.run([sys.executable, "-c", code], env=fake_cuda, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sent 4\n"


@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_gpu(results, case):
    """Operators on tensors of two devices raise, so that a result on the GPU says that all inputs were there."""
    found = results[case]
    assert found["trained"] > 50
    assert found["no_gradient"] == []
    assert found["losses"] == ["cuda:0", "torch.float32", found["names"]]
    assert found["optimizer_state"] == ["cuda:0"]
    assert found["detections"] == [25 if "preset" in CASES[case] else 100]
    assert {"loss", "loss_ce", "loss_bbox", "loss_giou"} <= set(found["metrics"])


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_the_matching_alone(results, case):
    batches = CASES[case].get("accumulate", 1)
    assert results[case]["step_waits"] == {"aten::_to_copy": batches}
    # Two batches; then the sums and the three columns of detections are read once.
    assert results[case]["evaluation_waits"] == {"aten::_to_copy": 2 + 4}


@pytest.mark.parametrize("case", ["bf16", "bf16 without a mask"])
def test_kernel_launches_of_the_forward_pass(results, case):
    assert results[case]["kernels"]["forward"] <= FORWARD + MARGIN


def test_later_forward_passes_reuse_the_constants_of_the_first(results):
    kernels = results["bf16"]["kernels"]
    assert kernels["first forward"] - kernels["forward"] >= 4 * 53, "four kernels for each batch normalization"


def test_trying_batch_sizes_leaves_a_margin_of_the_memory(fake_cuda):
    """PyTorch's own allocator refuses what goes beyond its share."""
    code = """
import torch
from raydetr.training.batch_size import _margin
device = torch.device("cuda", 0)
shares = [torch.cuda.get_per_process_memory_fraction(device)]
with _margin(device):
    shares.append(torch.cuda.get_per_process_memory_fraction(device))
print(*shares, torch.cuda.get_per_process_memory_fraction(device))
"""
    done = subprocess.run([sys.executable, "-c", code], env=fake_cuda, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.0 0.9 1.0\n"
