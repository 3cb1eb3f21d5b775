"""State dicts and checkpoints that the tests of the weights share."""

import re

import torch

from raydetr.config import load_config, to_dict
from raydetr.model.detr import build_model
from raydetr.weights import official
from tests.networks import official_values

COCO_IDS = [each["id"] for each in official.COCO_CATEGORIES_IN_USE]
SMALL_RESNET = {"backbone": "resnet50", "num_queries": 5, "enc_layers": 1}


def state_of(preset="detr_resnet50", num_classes=91, **settings):
    return official_values({name: value.shape for name, value in build_model(preset, num_classes, **settings).state_dict().items()})


def small_state(num_classes=91, **settings):
    """The official head and names, outside the backbone, in a network that is built at once."""
    return state_of("detr_tiny", num_classes, num_queries=100, **settings)


def small_model(num_classes, **settings):
    return build_model("detr_tiny", num_classes, **{"num_queries": 100, **settings})


def saved(path, content):
    torch.save(content, path)
    return str(path)


def categories(*names):
    return [{"id": 10 * i + 7, "name": name} for i, name in enumerate(names)]


def as_detectron2(state, rows=(*COCO_IDS, 91)):
    """The names that the official d2/converter.py gives: a ResNet's parts as detectron2 calls them, COCO's 80 categories in a row."""
    renamed = {}
    for name, value in state.items():
        body = re.fullmatch(r"backbone\.0\.body\.(?:layer(\d)\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(\w+)", name)
        if body:
            stage, block, kind, number, leaf = body.groups()
            place = f"res{int(stage) + 1}.{block}." if stage else "stem."
            part = {"conv": f"conv{number}", "bn": f"conv{number}.norm", "downsample.": f"shortcut{'.norm' * int(number == '1')}"}[kind]
            name = f"backbone.0.backbone.{place}{part}.{leaf}"
        renamed[f"detr.{name}"] = value[list(rows)] if "class_embed" in name else value
    return renamed | {"criterion.empty_weight": torch.ones(81)}


def own_content(preset="detr_tiny", names=("dog", "balloon"), **settings):
    tree = load_config({"model.preset": preset, **{f"model.{name}": value for name, value in settings.items()}})
    state = state_of(preset, len(names), **settings)
    return {"model": state, "settings": to_dict(tree), "categories": categories(*names), "epoch": 3, "metrics": {"AP": 0.5}, "ema": state}
