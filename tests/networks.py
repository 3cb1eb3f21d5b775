"""Weights and images that the numbers of the official model in ``tests/fixtures`` were computed from."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def official_values(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the weights of the fixtures: every tensor of a state dict, by name and shape, drawn from its own name."""
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("running_var"):
            drawn = 1 + 0.1 * drawn.abs()
        elif name.endswith("running_mean"):
            drawn = 0.05 * drawn
        elif drawn.dim() == 1:
            drawn = 1 + 0.05 * drawn if name.endswith("weight") else 0.02 * drawn
        elif not name.endswith("query_embed.weight"):
            drawn = drawn / drawn[0].numel() ** 0.5
        state[name] = drawn
    return state


def filled(model: nn.Module) -> nn.Module:
    """Return the model with the weights of the fixtures."""
    model.load_state_dict(official_values({name: value.shape for name, value in model.state_dict().items()}))
    return model


def padded(sizes: Sequence[tuple[int, int]], seed: int = 7) -> tuple[Tensor, Tensor]:
    """Return images of noise of these (height, width), padded to one size, and their padding mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(extent) for extent in zip(*sizes, strict=True))
    images, mask = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images, mask
