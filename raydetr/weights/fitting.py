"""Models from checkpoints, and weights fitted to a model with other categories or another number of queries."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydetr import config
from raydetr.data.categories import match_categories
from raydetr.errors import UserError
from raydetr.model.backbone import RESNET_BLOCKS
from raydetr.model.detr import DETR, MASK_PARTS, build_model
from raydetr.values import is_finite
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.official import (
    BODY,
    COCO_CATEGORIES,
    COCO_CATEGORIES_IN_USE,
    COCO_PANOPTIC_CATEGORIES,
    HEAD,
    NETWORK,
    QUERIES,
    located,
    official_state,
    source_of,
)

Categories = list[dict[str, Any]]


def load(path: str | Path, masks: bool = True) -> DETR:
    """Load the model of a checkpoint, ready for inference: in evaluation mode, on the CPU, in float32.

    A checkpoint of raydetr contains its settings and categories. For any other file, the settings are inferred from its tensors (and DC5
    from its name), and the categories are COCO's if the head has their number.

    Args:
        path: Path, URL or URI of a checkpoint: raydetr's own, the official DETR's, detectron2's DETR, or a bare state dict of one.
        masks: Whether to load the segmentation head, if the file has one; without it the model predicts boxes alone.

    Returns:
        The model. Besides ``settings`` it has ``categories`` (``[{"id", "name"}, ...]`` in label order), ``category_names`` (where their
        names are from: ``"file"``, ``"coco"``, or ``"unknown"``, in which case they are called ``class 0``, ``class 1``, ...),
        ``thresholds`` (the score threshold of each category in label order, or None; empty if none is stored), and ``notes``, a list of
        lines for the user about how the file was read.

    Raises:
        UserError: The file cannot be read, or does not contain a complete DETR.
    """
    path = located(path)
    content = read_checkpoint(path)
    state, note = official_state(content, path)
    if _is_backbone(state):
        raise UserError(f"{path}: holds a backbone only; training can start from it (model.weights), but it detects nothing")
    rows = _head_rows(state)
    if rows is None:
        raise UserError(f"{path}: has no class_embed.weight and class_embed.bias that fit together: no DETR, or one without its head")
    if _no_object_is_a_copy(state):
        raise UserError(
            f"{path}: its no-object row is a copy of the first category's, as an early detectron2 converter wrote it; convert it anew"
        )
    known = _known_settings(content, state, path)
    has_masks = known.get("masks", False)
    model = _build(known | {"masks": masks and has_masks}, rows - 1, path)
    _check_complete(model, state, path)
    _copy_into(model, {name: state[name] for name in _tensors(model)}, path)
    categories, coco = _known_categories(content, rows, path), (COCO_CATEGORIES, COCO_CATEGORIES_IN_USE, COCO_PANOPTIC_CATEGORIES)
    model.category_names = "unknown" if categories is None else "coco" if categories in coco else "file"
    model.categories = [dict(each) for each in categories or [{"id": i, "name": f"class {i}"} for i in range(rows - 1)]]
    model.thresholds = _known_thresholds(content, rows, path)
    notes = [note, "its segmentation head is left out" if has_masks and not masks else None]
    model.notes = [f"{path}: {each}" for each in notes if each]
    return model.eval()


def load_weights(model: DETR, weights: str, categories: Categories | None = None) -> str:
    """Initialize a model from weights that may have other categories and another number of queries.

    The classification head is copied unchanged if the file's categories are the model's, or are unknown and have their number. Otherwise
    the no-object row and the rows of categories of the same name are copied, and the other rows stay as they were initialized. If the
    number of queries differs, the file's first queries are copied. A segmentation head that the file or the model does not
    have is left out, or stays as it was initialized.

    Args:
        model: The model. If an exception is raised, it is unchanged.
        weights: ``"coco"``, ``"coco-panoptic"``, ``"imagenet"``, ``"bundled"``, ``"none"``, a path, a URL, or a URI.
        categories: The model's categories in label order, ``[{"id", "name"}, ...]``.

    Returns:
        One line that describes what was loaded.

    Raises:
        UserError: The weights cannot be read, belong to another network, or match almost nothing of the model.
        ValueError: The number of categories is not that of the model's classes.
    """
    if categories is not None and len(categories) != model.settings["num_classes"]:
        raise ValueError(f"{len(categories)} categories for a model of {model.settings['num_classes']} classes")
    if weights == "none":
        return "weights: none; everything is initialized at random"
    path = located(source_of(weights, model.settings))
    content = read_checkpoint(path)
    state, note = official_state(content, path)
    _check_same_network(_known_settings(content, state, path), model.settings, path)
    backbone_only = _is_backbone(state)
    has_masks = any(name.startswith(MASK_PARTS) for name in state)
    names = [name for name in _tensors(model) if has_masks or not name.startswith(MASK_PARTS)]
    wanted = [name for name in names if not backbone_only or name.startswith(BODY)]
    _check_matches(wanted, state, path, 1.0 if backbone_only else 0.5)
    loaded = {name: state[name] for name in wanted if name in state}
    queries, about_queries = _fitted_queries(model, loaded)
    head, about_head = _fitted_head(model, loaded, content, categories, path)
    _copy_into(model, loaded | queries | head, path)
    counts = [
        f"{len(loaded) - len(queries) - len(head)} tensors loaded",
        f"{len(queries) + len(head)} replaced",
        _count_and_list("missing", [name for name in wanted if name not in state]),
        _count_and_list("unexpected", sorted(name for name in state.keys() - set(wanted) if not name.startswith(MASK_PARTS))),
    ]
    about = [*about_head, *about_queries, *_about_masks(model.settings["masks"], has_masks)]
    if backbone_only:
        about = ["a backbone only, transformer and heads are initialized at random"]
    return "; ".join([f"weights: {path.name}: {', '.join(counts)}", *about, *([note] if note else [])])


def _about_masks(ours: bool, theirs: bool) -> list[str]:
    if ours and not theirs:
        return ["masks: the file has boxes only, the segmentation head is initialized at random"]
    if ours:
        return ["masks: the file's segmentation head kept"]
    return ["masks: the file's segmentation head left out, model.masks is false"] if theirs else []


def _tensors(model: DETR) -> dict[str, Tensor]:
    """Return the state dict of a model under the names that :func:`raydetr.weights.official.official_state` gives."""
    return {name.removeprefix("detr."): tensor for name, tensor in model.state_dict().items()}


def _count_and_list(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


# ------------------------------------------------------------------------------------- what is known about a file


def _known_thresholds(content: dict[str, Any], rows: int, path: Path) -> list[float | None]:
    """Return the score thresholds of a file in label order, None for categories without one; nothing where it has none."""
    entries = (content.get("thresholds") if "settings" in content else None) or []
    scores = [each.get("score") if isinstance(each, dict) else each for each in entries] if isinstance(entries, list) else [-1.0]
    if entries and (len(scores) != rows - 1 or not all(each is None or (is_finite(each) and 0 <= each <= 1) for each in scores)):
        raise UserError(f"{path}: damaged: its thresholds are not a score from 0 to 1 for each of its {rows - 1} categories")
    return scores


def _is_backbone(state: dict[str, Tensor]) -> bool:
    return all(name.startswith(BODY) for name in state)


def _head_rows(state: dict[str, Tensor]) -> int | None:
    """Return the number of rows of the classification head, no-object included; None if there is no valid head."""
    weight, bias = state.get(HEAD[0]), state.get(HEAD[1])
    if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1] or len(weight) < 2:
        return None
    return len(weight)


def _no_object_is_a_copy(state: dict[str, Tensor]) -> bool:
    # The first version of the official d2/converter.py took row 1 (person) instead of row 91 (no-object).
    return _head_rows(state) == 81 and all(torch.equal(state[name][-1], state[name][0]) for name in HEAD)


def _known_categories(content: dict[str, Any], rows: int, path: Path) -> Categories | None:
    """Return the categories of a file in label order: its own, or COCO's by the size of the head; None if they are unknown."""
    if "settings" not in content or "categories" not in content:
        return {92: COCO_CATEGORIES, 81: COCO_CATEGORIES_IN_USE, 251: COCO_PANOPTIC_CATEGORIES}.get(rows)
    categories = content["categories"]
    sound = isinstance(categories, list) and all(
        isinstance(each, dict) and isinstance(each.get("id"), int) and isinstance(each.get("name"), str) for each in categories
    )
    if not sound or len(categories) != rows - 1:
        raise UserError(f"{path}: damaged: its categories are not the {rows - 1} of its head")
    return categories


def _known_settings(content: dict[str, Any], state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Return what a file tells about its network in its settings or args and its tensors: ``model`` settings by their last name."""
    leaves = {field.name for field in dataclasses.fields(config.Model)} - {"weights"}
    args, settings = content.get("args"), content.get("settings")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    own = config.flatten(settings) if isinstance(settings, dict) else {}
    known = {name: value for name, value in args.items() if name in leaves - {"preset"}}
    known |= {name.removeprefix("model."): value for name, value in own.items() if name.startswith("model.") and name != "model.weights"}
    try:
        return {name: config.find_setting(f"model.{name}").parse(value) for name, value in (known | _inferred_settings(state)).items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _inferred_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the settings that can be inferred from the names and shapes of the tensors."""
    inferred: dict[str, Any] = {"masks": "mask_head.out_lay.weight" in state}
    depths = {blocks[2]: name for name, blocks in RESNET_BLOCKS.items()}
    backbone = depths.get(_count_layers(state, f"{BODY}layer3."), "tiny" if f"{BODY}layers.0.norm1.weight" in state else None)
    if backbone:
        inferred["backbone"] = backbone
    if QUERIES in state and state[QUERIES].dim() == 2:
        inferred["num_queries"], inferred["hidden_dim"] = state[QUERIES].shape
    decoder = "transformer.decoder.layers."
    if any(name.startswith(decoder) for name in state):
        inferred["enc_layers"] = _count_layers(state, "transformer.encoder.layers.")
        inferred["dec_layers"] = _count_layers(state, decoder)
        inferred["pre_norm"] = "transformer.encoder.norm.weight" in state
        inferred["position_embedding"] = "learned" if "backbone.1.row_embed.weight" in state else "sine"
    if f"{decoder}0.linear1.bias" in state:
        inferred["dim_feedforward"] = state[f"{decoder}0.linear1.bias"].numel()
    return inferred


def _count_layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _build(known: dict[str, Any], num_classes: int, path: Path) -> DETR:
    known = dict(known)
    if "backbone" not in known:
        raise UserError(f"{path}: its backbone is none of raydetr's ({config.SETTINGS['model.backbone'].bounds()})")
    known.setdefault("dilation", known["backbone"] in RESNET_BLOCKS and "dc5" in path.name.lower())
    body = [(f"model.{name}", known[name]) for name in ("backbone", "dilation")]
    alike = [name for name in config.PRESETS if set(body) <= config.preset_settings(name).items()]
    preset = known.pop("preset", None) or next(iter(alike), "detr_resnet50")
    try:
        return build_model(preset, num_classes, **known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------- whether it fits the model


def _check_same_network(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    differing = [
        f"model.{name} is {theirs[name]} in the file, {ours[name]} here"
        for name in NETWORK
        if name in theirs and theirs[name] != ours[name]
    ]
    if differing:
        raise UserError(
            f"{path}: weights of another network than preset {ours['preset']}: {'; '.join(differing)}; change these or model.weights"
        )


def _check_matches(wanted: list[str], state: dict[str, Tensor], path: Path, least: float) -> None:
    """Refuse a file with less than the fraction ``least`` of the backbone's tensors, or of the others without the head."""
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
    ours = _tensors(model)
    missing = [name for name in ours if name not in state]
    unexpected = [name for name in state.keys() - ours.keys() if not name.startswith(MASK_PARTS)]
    if missing or unexpected:
        counts = f"{_count_and_list('missing', missing)}, {_count_and_list('unexpected', sorted(unexpected))}"
        raise UserError(f"{path}: not a complete DETR: {counts} tensors")


def _copy_into(model: DETR, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors into the model, all or none of them."""
    ours = _tensors(model)
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{path}: {name} is {list(tensor.shape)} in the file, {list(ours[name].shape)} in the model of these settings")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; the weights are broken")
    model.load_state_dict(tensors, strict=False)


# ------------------------------------------------------------------------------------------------ head and queries


def _fitted_queries(model: DETR, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the queries if their number differs (the file's first ones, then the model's own), and a note."""
    ours, theirs = model.query_embed.weight.detach(), state.get(QUERIES)
    if theirs is None or theirs.shape == ours.shape or theirs.shape[1:] != ours.shape[1:]:
        return {}, []
    kept = min(len(theirs), len(ours))
    note = f"queries: the first {kept} of the file's {len(theirs)} kept, {len(ours) - kept} new"
    return {QUERIES: torch.cat((theirs[:kept].to(ours), ours[kept:]))}, [note]


def _fitted_head(
    model: DETR, state: dict[str, Tensor], content: dict[str, Any], categories: Categories | None, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the head if its categories differ (the file's rows for categories of the same name, else the model's own), and a note."""
    rows, num_classes = _head_rows(state), model.settings["num_classes"]
    if rows is None or state[HEAD[0]].shape[1:] != model.class_embed.weight.shape[1:]:
        return {}, []
    theirs, ours = _known_categories(content, rows, path) or [], categories or []
    found = match_categories(ours, theirs)
    sound = not _no_object_is_a_copy(state)
    if rows == num_classes + 1 and (not theirs or not ours or found == list(range(num_classes))) and sound:
        return {}, [] if theirs else ["head: taken as it is, the file does not name its categories"]
    kept = [(label, row) for label, row in enumerate(found) if row is not None and not _is_unused(theirs[row])]
    rows_kept = [*kept, (num_classes, rows - 1)] if sound else kept
    to, taken = torch.tensor(rows_kept, dtype=torch.long).view(-1, 2).unbind(1)
    head = {}
    for name, own in zip(HEAD, (model.class_embed.weight, model.class_embed.bias), strict=True):
        head[name] = own.detach().clone()
        head[name][to] = state[name][taken].to(own)
    names = f" ({', '.join(theirs[row]['name'] for _, row in kept[:3])}{', ...' * (len(kept) > 3)})" if kept else ""
    no_object = "no-object" if sound else "no no-object row (the file's is a copy of another)"
    new = ", the others new" if len(kept) < num_classes else ""
    return head, [f"head: {no_object} and {len(kept)} of {num_classes} categories kept{names}{new}"]


def _is_unused(category: Mapping[str, Any]) -> bool:
    # COCO's ids that no category has are classes of the official head nevertheless.
    return category["name"] == "N/A"
