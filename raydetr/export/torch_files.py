"""Files that PyTorch programs read: the official DETR's checkpoint, safetensors and TorchScript."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydetr.config import Data
from raydetr.errors import UserError
from raydetr.export.onnx import TRACED_SIZE, TensorsOnly, metadata
from raydetr.model.backbone import RESNET_BLOCKS
from raydetr.model.detr import DETR, build_model
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.official import HEAD

NEVER = -1e4  # logit of a class that no category has: its probability is 0 in every precision
LARGEST_ID = 10_000  # category ids above it would make the head larger than the network


def write_official(model: DETR, file: Path) -> None:
    """Write a checkpoint for the official DETR (``torch.hub``'s models, ``main.py --resume``).

    Score thresholds, where the checkpoint has any, are under ``thresholds`` by category id; the official code passes them over. Its
    head has a row for every category id from 0 to the highest, then one for no-object; rows of ids that no category has
    never win.

    Args:
        model: The model, in eval mode on the CPU.
        file: File to write.

    Raises:
        UserError: If the official code has no such network, or category ids are too large for rows of their own.
    """
    if model.settings["backbone"] not in RESNET_BLOCKS:
        raise UserError(f"export --to official: the official DETR has no {model.settings['backbone']} backbone; take --to onnx")
    ids = [category["id"] for category in model.categories]
    if max(ids) > LARGEST_ID:
        raise UserError(
            f"export --to official: category id {max(ids)} is above {LARGEST_ID}, the head has a row for each; renumber the categories"
        )
    thresholds = {"thresholds": dict(zip(ids, model.thresholds, strict=True))} if model.thresholds else {}
    save_checkpoint(file, {"model": {**model.state_dict(), **_head_by_id(model, ids)}, **thresholds})


def read_official(file: Path, model: DETR) -> DETR:
    """Load what :func:`write_official` wrote into a model with the categories of ``model``."""
    state = read_checkpoint(file)["model"]
    rows = [*(category["id"] for category in model.categories), -1]
    own = {name: value for name, value in model.settings.items() if name not in ("preset", "num_classes")}
    loaded = build_model(model.settings["preset"], len(model.categories), **own)
    loaded.load_state_dict({**state, **{name: state[name][rows] for name in HEAD}})
    return loaded.eval()


def _head_by_id(model: DETR, ids: list[int]) -> dict[str, Tensor]:
    weight, bias = (model.state_dict()[name] for name in HEAD)
    rows = torch.tensor([*ids, max(ids) + 1])
    wide_weight, wide_bias = weight.new_zeros(max(ids) + 2, weight.shape[1]), bias.new_full((max(ids) + 2,), NEVER)
    wide_weight[rows], wide_bias[rows] = weight, bias
    return dict(zip(HEAD, (wide_weight, wide_bias), strict=True))


def write_safetensors(model: DETR, file: Path, data: Data) -> None:
    """Write the state dict, under the official names, as safetensors; categories, settings and normalization are its metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _safetensors().save_file(tensors, str(file), {**metadata(model, data), "settings": json.dumps(model.settings)})


def read_safetensors(file: Path, model: DETR) -> DETR:
    """Load what :func:`write_safetensors` wrote into a model with the settings of ``model``."""
    own = {name: value for name, value in model.settings.items() if name not in ("preset", "num_classes")}
    loaded = build_model(model.settings["preset"], len(model.categories), **own)
    loaded.load_state_dict(_safetensors().load_file(str(file)))
    return loaded.eval()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("export --to safetensors needs the package safetensors: pip install 'raydetr[export]'") from None
    return safetensors.torch


def write_torchscript(model: DETR, file: Path, data: Data) -> None:
    """Write a TorchScript program: images float [B, 3, H, W] and padding mask bool [B, H, W] to logits and boxes.

    Its extra files ``categories``, ``thresholds``, ``val_size``, ``max_size``, ``mean`` and ``std`` say how to prepare images and read
    the outputs.
    """
    images, mask = torch.zeros(2, 3, *TRACED_SIZE), torch.zeros(2, *TRACED_SIZE, dtype=torch.bool)
    mask[1, :, TRACED_SIZE[1] // 2 :] = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(TensorsOnly(model).eval(), (images, mask), check_trace=False)
        torch.jit.save(program, str(file), _extra_files={name: text.encode() for name, text in metadata(model, data).items()})
