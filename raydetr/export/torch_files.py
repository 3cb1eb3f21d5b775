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
    """Write a checkpoint for the official DETR (``torch.hub``'s models, ``main.py --resume``); with masks, for its ``DETRsegm``.

    The official head has a row for every category id from 0 to the highest, and one for no-object. The rows of ids that no category has get
    a logit so low that they are never the best class. Score thresholds, if the checkpoint has any, are stored under ``thresholds`` by
    category id; the official code ignores them.

    Args:
        model: The model, in eval mode on the CPU.
        file: File to write.

    Raises:
        UserError: The official code has no such network, or category ids are too large to have rows of their own.
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
    """Load a file of :func:`write_official`.

    Args:
        file: The file.
        model: The model that was written, whose settings and categories the new model gets.

    Returns:
        A new model in eval mode, with a head for these categories only.

    Raises:
        UserError: The file cannot be read.
    """
    state = read_checkpoint(file)["model"]
    rows = [*(category["id"] for category in model.categories), -1]
    own = {name: value for name, value in model.settings.items() if name not in ("preset", "num_classes")}
    loaded = build_model(model.settings["preset"], len(model.categories), **own)
    loaded.load_state_dict({**state, **{name: state[name][rows] for name in _head_names(model)}})
    return loaded.eval()


def _head_by_id(model: DETR, ids: list[int]) -> dict[str, Tensor]:
    weight, bias = (model.state_dict()[name] for name in _head_names(model))
    rows = torch.tensor([*ids, max(ids) + 1])
    wide_weight, wide_bias = weight.new_zeros(max(ids) + 2, weight.shape[1]), bias.new_full((max(ids) + 2,), NEVER)
    wide_weight[rows], wide_bias[rows] = weight, bias
    return dict(zip(_head_names(model), (wide_weight, wide_bias), strict=True))


def _head_names(model: DETR) -> list[str]:
    return [f"detr.{name}" if model.settings["masks"] else name for name in HEAD]


def write_safetensors(model: DETR, file: Path, data: Data) -> None:
    """Write the state dict of a model, under the official names, as safetensors.

    The metadata are those of :func:`raydetr.export.onnx.metadata` and ``settings`` (JSON).

    Args:
        model: The model.
        file: File to write.
        data: Settings of the image size.

    Raises:
        UserError: The package safetensors is missing.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _safetensors().save_file(tensors, str(file), {**metadata(model, data), "settings": json.dumps(model.settings)})


def read_safetensors(file: Path, model: DETR) -> DETR:
    """Load a file of :func:`write_safetensors`.

    Args:
        file: The file.
        model: The model that was written, whose settings and number of categories the new model gets.

    Returns:
        A new model in eval mode.

    Raises:
        UserError: The package safetensors is missing.
    """
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
    """Write a TorchScript program that maps images and a padding mask to logits, boxes and, for a model with masks, masks.

    Its arguments are images, float [B, 3, H, W], normalized, and a padding mask, bool [B, H, W], True where padded. Its results are those
    of :class:`raydetr.export.onnx.TensorsOnly`. Its extra files are the entries of :func:`raydetr.export.onnx.metadata`, which say how to
    prepare images and read the results.

    Args:
        model: The model, in eval mode on the CPU.
        file: File to write.
        data: Settings of the image size.
    """
    images, mask = torch.zeros(2, 3, *TRACED_SIZE), torch.zeros(2, *TRACED_SIZE, dtype=torch.bool)
    mask[1, :, TRACED_SIZE[1] // 2 :] = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(TensorsOnly(model).eval(), (images, mask), check_trace=False)
        torch.jit.save(program, str(file), _extra_files={name: text.encode() for name, text in metadata(model, data).items()})
