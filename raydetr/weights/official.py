"""Names and addresses of the official weights, and of the other files that hold a DETR."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights, ResNet101_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from raydetr import config
from raydetr.errors import UserError
from raydetr.storage import fetched, is_uri
from raydetr.weights.files import download

BUNDLED = Path(__file__).with_name("detr_tiny.pth")
IMAGENET = {"resnet50": ResNet50_Weights.IMAGENET1K_V1.url, "resnet101": ResNet101_Weights.IMAGENET1K_V1.url}
OFFICIAL_FOLDER = "https://dl.fbaipublicfiles.com/detr/"
OFFICIAL = {  # backbone, dilation
    ("resnet50", False): "detr-r50-e632da11.pth",
    ("resnet50", True): "detr-r50-dc5-f0fb7ef5.pth",
    ("resnet101", False): "detr-r101-2c7b67e5.pth",
    ("resnet101", True): "detr-r101-dc5-a2e86def.pth",
}

# The rows of the official head are COCO's category ids 0 to 90, of which 80 are in use; the others have no name.
_COCO_NAMES = ["N/A" if name.startswith("__") else name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]]
COCO_CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(_COCO_NAMES)]
COCO_CATEGORIES_IN_USE = [category for category in COCO_CATEGORIES if category["name"] != "N/A"]

BODY = "backbone.0.body."
HEAD = ("class_embed.weight", "class_embed.bias")
QUERIES = "query_embed.weight"
# With another value of one of these, the same tensors compute something else, or do not fit.
NETWORK = ("backbone", "hidden_dim", "nheads", "dim_feedforward", "pre_norm")


def source_of(weights: str, model: dict[str, Any]) -> str | Path:
    """The path or URL that a value of ``model.weights`` stands for."""
    if weights == "coco":
        return OFFICIAL_FOLDER + _official_name_of_file(model)
    if weights == "imagenet":
        if model["backbone"] not in IMAGENET:
            raise UserError(f"model.weights: there are no imagenet weights for the {model['backbone']} backbone; take bundled or none")
        return IMAGENET[model["backbone"]]
    if weights == "bundled":
        if model["preset"] != "detr_tiny":
            raise UserError(f"model.weights: only detr_tiny's weights are bundled; for {model['preset']} take coco, imagenet or none")
        return BUNDLED
    if not _is_url(weights) and not is_uri(weights) and not Path(weights).expanduser().exists():
        raise UserError(f"model.weights: {weights}: no such file; it takes coco, imagenet, bundled, none, a path or a URL")
    return weights


def _official_name_of_file(model: dict[str, Any]) -> str:
    key = (model["backbone"], model["dilation"])
    if key not in OFFICIAL:
        raise UserError(f"model.weights: there are no coco weights for the {model['backbone']} backbone; take bundled or none")
    official = config.preset_settings("detr_resnet50")
    for name in (*NETWORK[1:], "enc_layers", "dec_layers", "position_embedding"):
        if model[name] != official[f"model.{name}"]:
            raise UserError(
                f"model.{name}: the official coco weights are of a network with {official[f'model.{name}']}, not {model[name]}; "
                "go back to that, or start from imagenet or none (model.weights)"
            )
    return OFFICIAL[key]


def _is_url(source: str | Path) -> bool:
    return str(source).lower().startswith(("http://", "https://"))


def located(source: str | Path) -> Path:
    """The file of a path or URL; an URL's is downloaded once and kept, one in an object store fetched where it changed."""
    return download(str(source)) if _is_url(source) else fetched(source)


# Around the network: DistributedDataParallel, torch.compile, common trainers, and the official DETRsegm and detectron2 wrapper.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|detr)\.)+")
# detectron2's names of a ResNet's parts (official d2/converter.py), in the order of replacement.
_DETECTRON2_BACKBONE = "backbone.0.backbone."
_DETECTRON2_PARTS = [
    (re.compile(r"^stem\."), ""),
    (re.compile(r"^res([2-5])\."), lambda match: f"layer{int(match[1]) - 1}."),
    (re.compile(r"\bconv(\d)\.norm\."), r"bn\1."),
    (re.compile(r"\bshortcut\.norm\."), "downsample.1."),
    (re.compile(r"\bshortcut\."), "downsample.0."),
]
# Of the criterion, and of batch normalization that is not frozen: no part of the network.
_NO_WEIGHTS = re.compile(r"(^|\.)(empty_weight|num_batches_tracked)$")
# The official DETRsegm adds these; boxes and classes do not depend on them.
MASK_HEAD = ("bbox_attention.", "mask_head.")


def official_state(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of the official DETR; of a plain ResNet those of its backbone."""
    held = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {_official_name(name): value for name, value in held.items() if isinstance(name, str) and _is_dense(value)}
    state = {name: value for name, value in state.items() if not _NO_WEIGHTS.search(name)}
    if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():
        state = {BODY + name: value for name, value in state.items() if not name.startswith("fc.")}
    if not state:
        raise UserError(f"{path}: holds no weights: no tensors by name, neither at its top nor under 'model' or 'state_dict'")
    return state


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _official_name(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    if not name.startswith(_DETECTRON2_BACKBONE):
        return name
    name = name.removeprefix(_DETECTRON2_BACKBONE)
    for pattern, ours in _DETECTRON2_PARTS:
        name = pattern.sub(ours, name)
    return BODY + name
