"""Tensor names of the DETR in Hugging Face's transformers, and their translation to and from the official names.

transformers keeps queries, keys and values in one matrix each, and the official model keeps all three in ``in_proj_weight``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """Translate a state dict of the official DETR to the names of ``transformers.DetrForObjectDetection``.

    Args:
        state: Tensors by official name, of a network with a ResNet backbone.

    Returns:
        Tensors by transformers' name, for a model with transformers' own ResNet backbone.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf.startswith("in_proj_"):
            theirs = _renamed(module, _ATTENTION)
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{theirs}.{part}_proj.{leaf.removeprefix('in_proj_')}"] = piece.contiguous()
        elif module.startswith(_BODY):
            found[f"{_THEIR_BODY}{_their_body(module.removeprefix(_BODY))}.{leaf}"] = tensor
        else:
            found[f"{_renamed(module, _MODULES)}.{leaf}"] = tensor
    return found


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of ``transformers.DetrForObjectDetection`` to the names of the official DETR.

    Args:
        state: Tensors by transformers' name; its backbone is transformers' own ResNet or timm's.

    Returns:
        Tensors by official name. A name without an official counterpart is kept as it is.
    """
    attention = {theirs: ours for ours, theirs in _ATTENTION.items()}
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(".q_proj"):
            parts = [state[f"{module.removesuffix('q_proj')}{part}_proj.{leaf}"] for part in "qkv"]
            found[f"{_renamed(module.removesuffix('.q_proj'), attention)}.in_proj_{leaf}"] = torch.cat(parts)
        elif module.startswith(_THEIR_BODY):
            found[f"{_BODY}{_our_body(module.removeprefix(_THEIR_BODY))}.{leaf}"] = tensor
        elif not module.endswith((".k_proj", ".v_proj")):
            found[f"{_renamed(module, modules)}.{leaf}"] = tensor
    return found


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have the names of transformers' DETR.

    Args:
        state: Tensors by name.
    """
    return {"class_labels_classifier.weight", "model.query_position_embeddings.weight"} <= state.keys()


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
