"""The arithmetic of GPUs, bf16 autocast, on the CPU: how far it is from float32."""

import pytest
import torch

from benchmarks.gpu import distance_from_official

pytestmark = pytest.mark.slow

BOUNDS = {"logits": 5e-2, "boxes": 5e-3, "losses": 6e-3, "gradient norms": 7e-2, "median gradient norm": 8e-3}


def test_the_official_models_numbers_in_bf16():
    found = distance_from_official(torch.device("cpu"), "bf16")
    for name, bound in BOUNDS.items():
        assert bound / 100 < found[name] < bound, name
