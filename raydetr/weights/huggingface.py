"""Model folders of the DETR in Hugging Face's transformers: its tensor names, and their translation to and from the official names.

transformers keeps queries, keys and values in one matrix each, and the official model keeps all three in ``in_proj_weight``.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydetr.errors import UserError
from raydetr.text import one_line

CONFIG, TENSORS, IMAGES = "config.json", "model.safetensors", "preprocessor_config.json"  # files of a model folder

# Official name, name in transformers; "{}" stands for a layer's number. The rest of a name (".weight", ".bias") is the same.
_ATTENTION = {
    "transformer.encoder.layers.{}.self_attn": "model.encoder.layers.{}.self_attn",
    "transformer.decoder.layers.{}.self_attn": "model.decoder.layers.{}.self_attn",
    "transformer.decoder.layers.{}.multihead_attn": "model.decoder.layers.{}.encoder_attn",
}
_MODULES = {
    **{f"{ours}.out_proj": f"{theirs}.o_proj" for ours, theirs in _ATTENTION.items()},
    "transformer.encoder.layers.{}.linear1": "model.encoder.layers.{}.mlp.fc1",
    "transformer.encoder.layers.{}.linear2": "model.encoder.layers.{}.mlp.fc2",
    "transformer.encoder.layers.{}.norm1": "model.encoder.layers.{}.self_attn_layer_norm",
    "transformer.encoder.layers.{}.norm2": "model.encoder.layers.{}.final_layer_norm",
    "transformer.decoder.layers.{}.linear1": "model.decoder.layers.{}.mlp.fc1",
    "transformer.decoder.layers.{}.linear2": "model.decoder.layers.{}.mlp.fc2",
    "transformer.decoder.layers.{}.norm1": "model.decoder.layers.{}.self_attn_layer_norm",
    "transformer.decoder.layers.{}.norm2": "model.decoder.layers.{}.encoder_attn_layer_norm",
    "transformer.decoder.layers.{}.norm3": "model.decoder.layers.{}.final_layer_norm",
    "transformer.decoder.norm": "model.decoder.layernorm",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_projection",
    "class_embed": "class_labels_classifier",
    "bbox_embed.layers.{}": "bbox_predictor.layers.{}",
    "backbone.1.row_embed": "model.position_embedding.row_embeddings",
    "backbone.1.col_embed": "model.position_embedding.column_embeddings",
}
# The segmentation head; beside it both name everything else with the prefix "detr.".
_MASKS = {
    "bbox_attention.q_linear": "bbox_attention.q_proj",
    "bbox_attention.k_linear": "bbox_attention.k_proj",
    **{f"mask_head.lay{i}": f"mask_head.conv{i}.conv" for i in (1, 2)},
    **{f"mask_head.gn{i}": f"mask_head.conv{i}.norm" for i in (1, 2)},
    **{f"mask_head.lay{i + 3}": f"mask_head.fpn_stages.{i}.refine.conv" for i in range(3)},
    **{f"mask_head.gn{i + 3}": f"mask_head.fpn_stages.{i}.refine.norm" for i in range(3)},
    **{f"mask_head.adapter{i + 1}": f"mask_head.fpn_stages.{i}.fpn_adapter" for i in range(3)},
    "mask_head.out_lay": "mask_head.output_conv",
}
_PREFIX = "detr."
_BODY, _THEIR_BODY = "backbone.0.body.", "model.backbone.model."
_STEM = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
_BLOCK = {
    **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
    **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
    "downsample.0": "shortcut.convolution",
    "downsample.1": "shortcut.normalization",
}
_OUR_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv\d|bn\d|downsample\.\d)")
_THEIR_BLOCK = re.compile(r"encoder\.stages\.(\d)\.layers\.(\d+)\.((?:layer\.\d|shortcut)\.\w+)")


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the official DETR to the names of ``transformers.DetrForObjectDetection``, or ``DetrForSegmentation``.

    Args:
        state: Tensors by official name, of a network with a ResNet backbone.

    Returns:
        Tensors by transformers' name, for a model with transformers' own ResNet backbone.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, module, leaf = _parts(name)
        if leaf.startswith("in_proj_"):
            theirs = _renamed(module, _ATTENTION)
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{prefix}{theirs}.{part}_proj.{leaf.removeprefix('in_proj_')}"] = piece.contiguous()
        elif module.startswith(_BODY):
            found[f"{prefix}{_THEIR_BODY}{_their_body(module.removeprefix(_BODY))}.{leaf}"] = tensor
        else:
            found[f"{prefix}{_renamed(module, _MODULES | _MASKS)}.{leaf}"] = tensor
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """Return the prefix of a tensor's name (``"detr."`` or nothing), its module, and the last part."""
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    module, _, leaf = name.removeprefix(prefix).rpartition(".")
    return prefix, module, leaf


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of ``transformers.DetrForObjectDetection``, or ``DetrForSegmentation``, to the names of the official DETR.

    Args:
        state: Tensors by transformers' name; its backbone is transformers' own ResNet or timm's.

    Returns:
        Tensors by official name. A name without an official counterpart is kept as it is.
    """
    attention = {theirs: ours for ours, theirs in _ATTENTION.items()}
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    masks = {theirs: ours for ours, theirs in _MASKS.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, module, leaf = _parts(name)
        if module in masks:
            found[f"{masks[module]}.{leaf}"] = tensor
        elif module.endswith(".q_proj"):
            parts = [state[f"{prefix}{module.removesuffix('q_proj')}{part}_proj.{leaf}"] for part in "qkv"]
            found[f"{prefix}{_renamed(module.removesuffix('.q_proj'), attention)}.in_proj_{leaf}"] = torch.cat(parts)
        elif module.startswith(_THEIR_BODY):
            found[f"{prefix}{_BODY}{_our_body(module.removeprefix(_THEIR_BODY))}.{leaf}"] = tensor
        elif not module.endswith((".k_proj", ".v_proj")):
            found[f"{prefix}{_renamed(module, modules)}.{leaf}"] = tensor
    return found


def is_huggingface_folder(path: Path) -> bool:
    """Return whether a path is a model folder of transformers with safetensors in one file.

    Args:
        path: The path.
    """
    return (path / CONFIG).is_file() and (path / TENSORS).is_file()


def read_huggingface(folder: Path) -> dict[str, Any]:
    """Read a model folder of transformers' DETR, such as ``raydetr export --to transformers`` writes or the model hub has.

    Args:
        folder: The folder, with ``config.json`` and ``model.safetensors``.

    Returns:
        What a checkpoint of raydetr contains: ``model`` under the official names, ``categories``, and those of the ``settings`` that the
        folder tells.

    Raises:
        UserError: A file cannot be read, or is not of a DETR with boxes; or the package safetensors is missing.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{folder}: is read by the package safetensors: pip install 'raydetr[export]'") from None
    try:
        state = {_current(name): tensor for name, tensor in load_file(folder / TENSORS).items()}
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = {int(label): str(name) for label, name in config.get("id2label", {}).items()}
        images = folder / IMAGES
        size = _size(json.loads(images.read_text(encoding="utf-8"))) if images.is_file() else {}
    except (OSError, ValueError, AttributeError, SafetensorError) as error:  # AttributeError: something is no JSON object
        raise UserError(f"{folder}: not a sound model folder of transformers ({one_line(error)})") from None
    if not {"class_labels_classifier.weight", f"{_PREFIX}class_labels_classifier.weight"} & state.keys():
        raise UserError(f"{folder}: a model of transformers, and no DETR that detects boxes")
    ids = config.get("category_ids") or sorted(names)  # else the labels are the ids, as those of COCO's DETR are
    known = {"model.nheads": "encoder_attention_heads", "model.dropout": "dropout", "model.dilation": "dilation"}
    sizes = {"data.val_size": "shortest_edge", "data.max_size": "longest_edge"}
    settings = {ours: config[theirs] for ours, theirs in known.items() if config.get(theirs) is not None}
    settings |= {ours: size[theirs] for ours, theirs in sizes.items() if theirs in size}
    categories = [{"id": number, "name": names[label]} for label, number in zip(sorted(names), ids, strict=False)]
    return {"model": from_huggingface(state), "categories": categories, "settings": settings}


def _size(images: dict[str, Any]) -> dict[str, int]:
    """Return the size of images that a folder tells; earlier versions of transformers write two numbers."""
    size = images.get("size", {})
    return size if isinstance(size, dict) else {"shortest_edge": size, "longest_edge": images.get("max_size", 1333)}


def _current(name: str) -> str:
    """Return a tensor's name as transformers 5 has it; checkpoints of earlier versions have other names of some parts."""
    name = name.replace("backbone.conv_encoder.model.", "backbone.model.").replace("_attn.out_proj.", "_attn.o_proj.")
    return re.sub(r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2.", name)


def _renamed(module: str, names: Mapping[str, str]) -> str:
    numbers = re.findall(r"(?<=layers\.)\d+", module)
    return names.get(re.sub(r"(?<=layers\.)\d+", "{}", module), module).format(*numbers)


def _their_body(module: str) -> str:
    block = _OUR_BLOCK.fullmatch(module)
    return f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}.{_BLOCK[block[3]]}" if block else _STEM[module]


def _our_body(module: str) -> str:
    block = _THEIR_BLOCK.fullmatch(module)
    if block:
        return f"layer{int(block[1]) + 1}.{block[2]}.{ {theirs: ours for ours, theirs in _BLOCK.items()}[block[3]] }".replace(" ", "")
    return {theirs: ours for ours, theirs in _STEM.items()}.get(module, module)  # timm's names are torchvision's
