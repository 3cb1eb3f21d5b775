"""The official weights and their URLs, and the tensor names of the official DETR, detectron2's, and torchvision's ResNets."""

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
from raydetr.weights.checkpoint import HUGGING_FACE_ADVICE
from raydetr.weights.files import download

BUNDLED = Path(__file__).with_name("detr_tiny.pth")
BUNDLED_MASKS = Path(__file__).with_name("detr_tiny_masks.pth")  # the same boxes, with a segmentation head
IMAGENET = {"resnet50": ResNet50_Weights.IMAGENET1K_V1.url, "resnet101": ResNet101_Weights.IMAGENET1K_V1.url}
OFFICIAL_FOLDER = "https://dl.fbaipublicfiles.com/detr/"
OFFICIAL = {  # backbone, dilation
    ("resnet50", False): "detr-r50-e632da11.pth",
    ("resnet50", True): "detr-r50-dc5-f0fb7ef5.pth",
    ("resnet101", False): "detr-r101-2c7b67e5.pth",
    ("resnet101", True): "detr-r101-dc5-a2e86def.pth",
}
OFFICIAL_PANOPTIC = {  # with a segmentation head
    ("resnet50", False): "detr-r50-panoptic-00ce5173.pth",
    ("resnet50", True): "detr-r50-dc5-panoptic-da08f1b1.pth",
    ("resnet101", False): "detr-r101-panoptic-40021d53.pth",
}

# The classes of the official head are COCO's category ids 0 to 90. Of these 80 are in use, the others have no name.
_COCO_NAMES = ["N/A" if name.startswith("__") else name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]]
COCO_CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(_COCO_NAMES)]
# Those of the panoptic head are category ids 0 to 249: objects as above, and stuff, which no labeled object is.
COCO_PANOPTIC_CATEGORIES = [*COCO_CATEGORIES, *({"id": i, "name": "N/A"} for i in range(len(COCO_CATEGORIES), 250))]
COCO_CATEGORIES_IN_USE = [category for category in COCO_CATEGORIES if category["name"] != "N/A"]

BODY = "backbone.0.body."
HEAD = ("class_embed.weight", "class_embed.bias")
QUERIES = "query_embed.weight"
# Settings that must agree, because otherwise the tensors do not fit or compute something else.
NETWORK = ("backbone", "hidden_dim", "nheads", "dim_feedforward", "pre_norm")


def source_of(weights: str, model: dict[str, Any]) -> str | Path:
    """Return the path or URL that a value of the setting ``model.weights`` stands for.

    Args:
        weights: ``"coco"``, ``"coco-panoptic"``, ``"imagenet"``, ``"bundled"``, a path, or a URL.
        model: Settings of the ``model`` section by their last name.

    Returns:
        A local path, an http or https URL, or a URI in an object store.

    Raises:
        UserError: There are no such weights for this model, or no such file.
    """
    if weights in ("coco", "coco-panoptic"):
        return OFFICIAL_FOLDER + _official_file(weights, model)
    if weights == "imagenet":
        if model["backbone"] not in IMAGENET:
            raise UserError(f"model.weights: there are no imagenet weights for the {model['backbone']} backbone; use bundled or none")
        return IMAGENET[model["backbone"]]
    if weights == "bundled":
        if model["preset"] != "detr_tiny":
            raise UserError(f"model.weights: only detr_tiny's weights are bundled; for {model['preset']} use coco, imagenet or none")
        return BUNDLED_MASKS if model["masks"] else BUNDLED
    if not _is_url(weights) and not is_uri(weights) and not Path(weights).expanduser().exists():
        raise UserError(f"model.weights: {weights}: no such file; it takes coco, coco-panoptic, imagenet, bundled, none, a path or a URL")
    return weights


def _official_file(weights: str, model: dict[str, Any]) -> str:
    files, key = OFFICIAL if weights == "coco" else OFFICIAL_PANOPTIC, (model["backbone"], model["dilation"])
    if key not in files and key in OFFICIAL:
        raise UserError(f"model.weights: there are no {weights} weights for {model['backbone']} with model.dilation; use coco")
    if key not in files:
        raise UserError(f"model.weights: there are no {weights} weights for the {model['backbone']} backbone; use bundled or none")
    official = config.preset_settings("detr_resnet50")
    for name in (*NETWORK[1:], "enc_layers", "dec_layers", "position_embedding"):
        if model[name] != official[f"model.{name}"]:
            raise UserError(
                f"model.{name}: the official {weights} weights are of a network with {official[f'model.{name}']}, not {model[name]}; "
                "use that value, or start from imagenet or none (model.weights)"
            )
    return files[key]


def _is_url(source: str | Path) -> bool:
    return str(source).lower().startswith(("http://", "https://"))


def located(source: str | Path) -> Path:
    """Return the local file of weights, downloading it if necessary.

    An http or https URL is downloaded once. An object of an object store is fetched again if it has changed.

    Args:
        source: A local path, an http or https URL, or a URI in an object store.

    Returns:
        The local path, whose existence is checked only for URLs and URIs.

    Raises:
        UserError: The download fails, or the object does not exist or cannot be fetched.
        OSError: The local disk fails.
    """
    return download(str(source)) if _is_url(source) else fetched(source)


# Prefixes of wrappers: DistributedDataParallel, torch.compile, common trainers, the official DETRsegm and detectron2's wrapper.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|detr|net|network)\.)+")
# Any other prefix of the first part of a DETR, such as the name of an attribute of a LightningModule.
_OTHER_WRAPPERS = re.compile(
    r"^(?:\w+\.)*?(?=(?:transformer|class_embed|bbox_embed|query_embed|input_proj|backbone|bbox_attention|mask_head)\.)"
)
# detectron2's names of a ResNet's parts (official d2/converter.py), in the order of replacement.
_DETECTRON2_BACKBONE = "backbone.0.backbone."
_DETECTRON2_PARTS = [
    (re.compile(r"^stem\."), ""),
    (re.compile(r"^res([2-5])\."), lambda match: f"layer{int(match[1]) - 1}."),
    (re.compile(r"\bconv(\d)\.norm\."), r"bn\1."),
    (re.compile(r"\bshortcut\.norm\."), "downsample.1."),
    (re.compile(r"\bshortcut\."), "downsample.0."),
]
# Buffers of the criterion and of batch normalization that is not frozen; they are not part of the network.
_NO_WEIGHTS = re.compile(r"(^|\.)(empty_weight|num_batches_tracked)$")
_HUGGING_FACE = re.compile(r"(^|\.)(class_labels_classifier|bbox_predictor|query_position_embeddings|conv_encoder)\.")
# Keys under which training programs save the weights, and a moving average of the weights.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "model_state", "network", "net", "weights", "params")
_AVERAGES = ("model_ema", "ema_model", "ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_state", "params_ema")


def official_state(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Find the weights in a checkpoint.

    If the file has a complete moving average (EMA) of the weights, it is used, because training programs that keep one evaluate it and not
    the last weights.

    Args:
        content: What :func:`raydetr.weights.checkpoint.read_checkpoint` returns.
        path: The file, for messages.

    Returns:
        The tensors under the names of the official DETR (those of a plain ResNet under the names of its backbone), and a note on whether
        the moving average is used, or None if the file has none.

    Raises:
        UserError: The file contains no weights, or those of a DETR of Hugging Face transformers.
    """
    weights, weights_key = _first_state(content, _WEIGHTS)
    # Checkpoints of raydetr have the weights to use under "model", whatever else they keep for resuming.
    average, key = (None, None) if "settings" in content else _first_state(content, _AVERAGES)
    note = None
    if average is not None:
        note = f"the file holds a moving average (EMA) of the weights, under {key!r}: "
        if weights is None or _official_names(weights) <= _official_names(average):
            note += "it is used" if weights is None else f"it is used, not the weights under {weights_key!r}"
            weights = average
        else:
            note += f"it is incomplete, and the weights under {weights_key!r} are used"
    tensors = _named_tensors(content if weights is None else weights)
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if _HUGGING_FACE.search(name):
            raise UserError(f"{path}: weights of Hugging Face transformers, with a tensor {name}; {HUGGING_FACE_ADVICE}")
        if not _NO_WEIGHTS.search(name):
            state.setdefault(_official_name(name), value)
    if {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():
        state = {BODY + name: value for name, value in state.items() if not name.startswith("fc.")}
    if not state:
        raise UserError(f"{path}: holds no weights: no tensors by name, neither at its top nor under 'model', 'state_dict' or 'model_ema'")
    return state, note


def _first_state(content: dict[str, Any], keys: tuple[str, ...]) -> tuple[dict[str, Any] | None, str | None]:
    for key in keys:
        held = content.get(key)
        while isinstance(held, dict):
            if _named_tensors(held):
                return held, key
            held = next((held[inner] for inner in ("module", *_WEIGHTS) if isinstance(held.get(inner), dict)), None)
    return None, None


def _named_tensors(held: dict[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in held.items() if isinstance(name, str) and _is_dense(value)}


def _official_names(held: dict[Any, Any]) -> set[str]:
    return {_official_name(name) for name in _named_tensors(held) if not _NO_WEIGHTS.search(name)}


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _official_name(name: str) -> str:
    name = _OTHER_WRAPPERS.sub("", _WRAPPERS.sub("", name), count=1)
    if not name.startswith(_DETECTRON2_BACKBONE):
        return name
    name = name.removeprefix(_DETECTRON2_BACKBONE)
    for pattern, ours in _DETECTRON2_PARTS:
        name = pattern.sub(ours, name)
    return BODY + name
