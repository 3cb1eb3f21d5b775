"""Checkpoints: written whole, read without running what they contain, and fitted to a model with other categories.

A checkpoint of raydetr is a dict: ``model`` (state dict under the official DETR's names: the weights to use), ``settings`` (the
whole tree as nested dicts), ``categories`` (``[{"id", "name"}, ...]`` in label order), ``epoch``, ``metrics``; and, to go on
from, ``optimizer``, ``lr_scheduler``, ``scaler``, ``ema``, ``random``. Read as well: the official weights and training
checkpoints, those of its detectron2 wrapper (``d2/`` there), bare state dicts, and torchvision's ResNets.
"""

import argparse
import dataclasses
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights, ResNet101_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from raydetr import config
from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.model.backbone import RESNET_BLOCKS
from raydetr.model.detr import DETR, build_model
from raydetr.model.files import download, written_whole
from raydetr.storage import fetched, is_uri

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


# -------------------------------------------------------------------------------------------------------- writing, reading


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain data) to ``path``, whole or not at all.

    Raises UserError where it cannot be written (a full disk): what was at ``path`` is then untouched, nothing else is left.
    Raises TypeError for an object that :func:`read_checkpoint` would refuse.
    """
    path = Path(path)
    _check_plain(content, "content")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch's writer covers what stopped it, the disk's error or Ctrl-C, with its own about a file that ends too early.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        kept = "; the file that was there is untouched" if path.exists() else ""
        kind = DiskFull if is_disk_full(cause) else UserError
        raise kind(f"{path}: not saved ({cause.strerror or cause}){kept}") from None


_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.Size, torch.device, torch.dtype)


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict, Counter):
        for key, each in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(each, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, each in enumerate(value):
            _check_plain(each, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors and plain data")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a file of ``torch.save`` holds, on the CPU; code in it is never run (``weights_only``).

    ``argparse.Namespace`` (in official training checkpoints) and numpy's numbers, which become Python's, are allowed by name. Raises
    UserError for a file that is missing, damaged, no checkpoint, or contains anything else.
    """
    path = Path(path).expanduser()
    start = _first_bytes(path)
    try:
        _check_not_blown_up(path, start)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged bytes lead the unpickler anywhere: KeyError, struct.error, MemoryError, ...
        raise UserError(f"{path}: {_what_it_is(start, error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        hint = next((f"; did you mean {path / name}?" for name in ("best.pth", "last.pth") if (path / name).is_file()), "")
        raise UserError(f"{path}: a folder, not a checkpoint{hint}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_not_blown_up(path: Path, start: bytes) -> None:
    # torch.save stores, it does not compress; torch.load would fill the memory with what a small file expands to.
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > path.stat().st_size:
            raise UserError(f"{path}: a compressed archive that expands to {expanded} bytes; torch.save does not write such files")


def _what_it_is(start: bytes, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"contains code ({code[1]}), which raydetr does not run; a checkpoint holds tensors and plain data only"
    if isinstance(error, MemoryError):
        return "asks for more memory than there is"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint"
    if start.startswith(b"PK") or b"\xfc\x9cF\xf9 j\xa8P\x19" in start:  # zip; the magic number of torch before 1.6
        return "a damaged checkpoint, perhaps cut short by a broken copy; get it again"
    if start.startswith(b"\x80"):
        return "a pickle that may contain code, which raydetr does not run; it reads what torch.save writes"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for; run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not a checkpoint"
    return "not a checkpoint" if start else "empty"


class _NumpyDtype:
    """Stands in for ``numpy.dtype`` while a file is read."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(dtype: _NumpyDtype, raw: bytes) -> bool | int | float:
    """Stands in for numpy's own constructor, which trusts its arguments."""
    if not isinstance(dtype, _NumpyDtype) or not re.fullmatch("[<>|=](b1|[iu][1248]|f[248])", dtype.order + dtype.code):
        raise pickle.UnpicklingError("not a number")
    (number,) = np.frombuffer(raw, dtype.order + dtype.code)
    return number.item()


_ALLOWED = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


# ------------------------------------------------------------------------------------------------------- from file to model


def load(path: str | Path) -> DETR:
    """The model of a checkpoint (a path or a URL), ready to use: in eval mode, on the CPU, in float32.

    Its ``categories`` (``[{"id", "name"}, ...]`` in label order) and ``settings`` come from the file; where it has none (the official
    ones) they are told from the tensors and, DC5, from the file's name. Raises UserError where the file is no whole DETR.
    """
    path = located(path)
    content = read_checkpoint(path)
    state = _official_state(content, path)
    if _is_backbone(state):
        raise UserError(f"{path}: holds a backbone only; it can start a training (model.weights), it detects nothing")
    rows = _head_rows(state)
    if rows is None:
        raise UserError(f"{path}: has no class_embed.weight and class_embed.bias that fit together: no DETR, or one without its head")
    if _no_object_is_a_copy(state):
        raise UserError(
            f"{path}: its no-object row is a copy of the first category's, as an early detectron2 converter wrote it; convert anew"
        )
    model = _built(_known_settings(content, state, path), rows - 1, path)
    _check_complete(model, state, path)
    _take(model, {name: state[name] for name in model.state_dict()}, path)
    unnamed = [{"id": i, "name": f"class {i}"} for i in range(rows - 1)]
    model.categories = [dict(each) for each in _known_categories(content, rows, path) or unnamed]
    return model.eval()


def load_weights(model: DETR, weights: str, categories: list[dict[str, Any]] | None = None) -> str:
    """Start ``model`` from ``weights``: coco, imagenet, bundled, none, a path or a URL. Returns what was done, in one line.

    ``categories`` (``[{"id", "name"}, ...]``) are the model's, in label order. The head is taken as it is where the file's categories are
    the same or not known and as many; else it keeps the no-object row and the rows of categories of the same name, the others stay
    as they were initialised. With another ``num_queries`` the first queries are kept. Raises UserError where the weights cannot
    be had, are of another network, or match almost nothing.
    """
    if categories is not None and len(categories) != model.settings["num_classes"]:
        raise ValueError(f"{len(categories)} categories for a model of {model.settings['num_classes']} classes")
    if weights == "none":
        return "weights: none; everything starts at random"
    path = located(_source(weights, model.settings))
    content = read_checkpoint(path)
    state = _official_state(content, path)
    _check_same_network(_known_settings(content, state, path), model.settings, path)
    backbone_only = _is_backbone(state)
    wanted = [name for name in model.state_dict() if not backbone_only or name.startswith(BODY)]
    _check_matches(wanted, state, path, 1.0 if backbone_only else 0.5)
    taken = {name: state[name] for name in wanted if name in state}
    queries, about_queries = _fitted_queries(model, taken)
    head, about_head = _fitted_head(model, taken, content, categories, path)
    _take(model, taken | queries | head, path)
    counts = [
        f"{len(taken) - len(queries) - len(head)} tensors loaded",
        f"{len(queries) + len(head)} replaced",
        _listed("missing", [name for name in wanted if name not in state]),
        _listed("unexpected", sorted(state.keys() - set(wanted))),
    ]
    about = ["a backbone only, transformer and heads start at random"] if backbone_only else [*about_head, *about_queries]
    return "; ".join([f"weights: {path.name}: {', '.join(counts)}", *about])


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


# ------------------------------------------------------------------------------------------------------- where a file comes from


def _source(weights: str, model: dict[str, Any]) -> str | Path:
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


# ---------------------------------------------------------------------------------------------------------- what a file holds

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
_MASKS = ("bbox_attention.", "mask_head.")


def _official_state(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
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


def _is_backbone(state: dict[str, Tensor]) -> bool:
    return all(name.startswith(BODY) for name in state)


def _head_rows(state: dict[str, Tensor]) -> int | None:
    """Rows of the classification head, no-object included; None where there is no sound head."""
    weight, bias = state.get(HEAD[0]), state.get(HEAD[1])
    if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1] or len(weight) < 2:
        return None
    return len(weight)


def _no_object_is_a_copy(state: dict[str, Tensor]) -> bool:
    # The first version of the official d2/converter.py took row 1 (person) where row 91 (no-object) was meant.
    return _head_rows(state) == 81 and all(torch.equal(state[name][-1], state[name][0]) for name in HEAD)


def _known_categories(content: dict[str, Any], rows: int, path: Path) -> list[dict[str, Any]] | None:
    """The categories of a file's classes, in label order: its own, or COCO's by the size of the head; None where unknown."""
    if "settings" not in content or "categories" not in content:
        return {92: COCO_CATEGORIES, 81: COCO_CATEGORIES_IN_USE}.get(rows)
    categories = content["categories"]
    sound = isinstance(categories, list) and all(
        isinstance(each, dict) and isinstance(each.get("id"), int) and isinstance(each.get("name"), str) for each in categories
    )
    if not sound or len(categories) != rows - 1:
        raise UserError(f"{path}: damaged: its categories are not the {rows - 1} of its head")
    return categories


def _known_settings(content: dict[str, Any], state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """What is known of a file's network, by leaf names of the ``model`` settings: from its settings or args, and its tensors."""
    leaves = {field.name for field in dataclasses.fields(config.Model)} - {"weights"}
    args, settings = content.get("args"), content.get("settings")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    own = config.flatten(settings) if isinstance(settings, dict) else {}
    known = {name: value for name, value in args.items() if name in leaves - {"preset"}}
    known |= {name.removeprefix("model."): value for name, value in own.items() if name.startswith("model.") and name != "model.weights"}
    try:
        return {name: config.find_setting(f"model.{name}").parse(value) for name, value in (known | _seen_in(state)).items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _seen_in(state: dict[str, Tensor]) -> dict[str, Any]:
    """The settings that the tensors' names and shapes tell."""
    seen: dict[str, Any] = {}
    depths = {blocks[2]: name for name, blocks in RESNET_BLOCKS.items()}
    backbone = depths.get(_layers(state, f"{BODY}layer3."), "tiny" if f"{BODY}layers.0.norm1.weight" in state else None)
    if backbone:
        seen["backbone"] = backbone
    if QUERIES in state and state[QUERIES].dim() == 2:
        seen["num_queries"], seen["hidden_dim"] = state[QUERIES].shape
    decoder = "transformer.decoder.layers."
    if any(name.startswith(decoder) for name in state):
        seen["enc_layers"] = _layers(state, "transformer.encoder.layers.")
        seen["dec_layers"] = _layers(state, decoder)
        seen["pre_norm"] = "transformer.encoder.norm.weight" in state
        seen["position_embedding"] = "learned" if "backbone.1.row_embed.weight" in state else "sine"
    if f"{decoder}0.linear1.bias" in state:
        seen["dim_feedforward"] = state[f"{decoder}0.linear1.bias"].numel()
    return seen


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _built(known: dict[str, Any], num_classes: int, path: Path) -> DETR:
    known = dict(known)
    if "backbone" not in known:
        raise UserError(f"{path}: its backbone is none that raydetr has ({config.SETTINGS['model.backbone'].bounds()})")
    known.setdefault("dilation", known["backbone"] in RESNET_BLOCKS and "dc5" in path.name.lower())
    body = [(f"model.{name}", known[name]) for name in ("backbone", "dilation")]
    alike = [name for name in config.PRESETS if set(body) <= config.preset_settings(name).items()]
    preset = known.pop("preset", None) or next(iter(alike), "detr_resnet50")
    try:
        return build_model(preset, num_classes, **known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------- fitting file and model


def _check_same_network(its: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    differing = [
        f"model.{name} is {its[name]} in the file, {ours[name]} here" for name in NETWORK if name in its and its[name] != ours[name]
    ]
    if differing:
        raise UserError(
            f"{path}: weights of another network than preset {ours['preset']}: {'; '.join(differing)}; change these or model.weights"
        )


def _check_matches(wanted: list[str], state: dict[str, Tensor], path: Path, least: float) -> None:
    """Refuses a file with less than the fraction ``least`` of the backbone's tensors, or of the others without the head."""
    body = [name for name in wanted if name.startswith(BODY)]
    rest = [name for name in wanted if not name.startswith(BODY) and name not in HEAD]
    for part, names in (("backbone", body), ("transformer", rest)):
        found = sum(name in state for name in names)
        if found < least * len(names):
            raise UserError(
                f"{path}: not weights of this network: it has {found} of the {len(names)} tensors of the {part} "
                f"(its first ones: {', '.join(list(state)[:3])})"
            )


def _check_complete(model: DETR, state: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in model.state_dict() if name not in state]
    unexpected = [name for name in state.keys() - model.state_dict().keys() if not name.startswith(_MASKS)]
    if missing or unexpected:
        raise UserError(f"{path}: not a whole DETR: {_listed('missing', missing)}, {_listed('unexpected', sorted(unexpected))} tensors")


def _take(model: DETR, taken: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors into the model, all or none of them."""
    ours = model.state_dict()
    for name, tensor in taken.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{path}: {name} is {list(tensor.shape)} in the file, {list(ours[name].shape)} in the model of these settings")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; the weights are broken")
    model.load_state_dict(taken, strict=False)


def _fitted_queries(model: DETR, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The queries where their number differs, and a note: the file's first ones, then the model's own."""
    ours, its = model.query_embed.weight.detach(), state.get(QUERIES)
    if its is None or its.shape == ours.shape or its.shape[1:] != ours.shape[1:]:
        return {}, []
    kept = min(len(its), len(ours))
    note = f"queries: the first {kept} of the file's {len(its)} kept, {len(ours) - kept} new"
    return {QUERIES: torch.cat((its[:kept].to(ours), ours[kept:]))}, [note]


def _fitted_head(
    model: DETR, state: dict[str, Tensor], content: dict[str, Any], categories: list[dict[str, Any]] | None, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The head where its categories differ, and a note: rows of the file for what still means the same, else the model's own."""
    rows, num_classes = _head_rows(state), model.settings["num_classes"]
    if rows is None or state[HEAD[0]].shape[1:] != model.class_embed.weight.shape[1:]:
        return {}, []
    known = _known_categories(content, rows, path)
    its, ours = _names(known), _names(categories)
    sound = not _no_object_is_a_copy(state)
    if rows == num_classes + 1 and (not its or not ours or its == ours) and sound:
        return {}, [] if its else ["head: taken as it is, the file does not name its categories"]
    kept = [(label, its.index(name)) for label, name in enumerate(ours) if name in its and name != "n/a"]
    rows_kept = [*kept, (num_classes, rows - 1)] if sound else kept
    to, taken = torch.tensor(rows_kept, dtype=torch.long).view(-1, 2).unbind(1)
    head = {}
    for name, own in zip(HEAD, (model.class_embed.weight, model.class_embed.bias), strict=True):
        head[name] = own.detach().clone()
        head[name][to] = state[name][taken].to(own)
    names = f" ({', '.join(ours[label] for label, _ in kept[:3])}{', ...' * (len(kept) > 3)})" if kept else ""
    no_object = "no-object" if sound else "no no-object row (the file's is a copy of another)"
    new = ", the others new" if len(kept) < num_classes else ""
    return head, [f"head: {no_object} and {len(kept)} of {num_classes} categories kept{names}{new}"]


def _names(categories: list[dict[str, Any]] | None) -> list[str]:
    return [category["name"].strip().casefold() for category in categories or []]
