"""Models from checkpoints, and weights fitted to a model of other categories or queries."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydetr import config
from raydetr.errors import UserError
from raydetr.model.backbone import RESNET_BLOCKS
from raydetr.model.detr import DETR, build_model
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.official import (
    BODY,
    COCO_CATEGORIES,
    COCO_CATEGORIES_IN_USE,
    HEAD,
    MASK_HEAD,
    NETWORK,
    QUERIES,
    located,
    official_state,
    source_of,
)


def load(path: str | Path) -> DETR:
    """The model of a checkpoint (a path or a URL), ready to use: in eval mode, on the CPU, in float32.

    Its ``categories`` (``[{"id", "name"}, ...]`` in label order) and ``settings`` come from the file; where it has none (the official
    ones) they are told from the tensors and, DC5, from the file's name. Raises UserError where the file is no whole DETR.
    """
    path = located(path)
    content = read_checkpoint(path)
    state = official_state(content, path)
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
    path = located(source_of(weights, model.settings))
    content = read_checkpoint(path)
    state = official_state(content, path)
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
    unexpected = [name for name in state.keys() - model.state_dict().keys() if not name.startswith(MASK_HEAD)]
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
