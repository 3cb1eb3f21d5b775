import argparse
import contextlib
import functools
import itertools
import os
import pickle
import re
import resource
import subprocess
import sys
import textwrap
import threading
import zipfile
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from raydetr.config import load_config, to_dict
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.weights import checkpoint, files
from raydetr.weights import official as official_files
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.fitting import load, load_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
COCO_IDS = [each["id"] for each in official_files.COCO_CATEGORIES_IN_USE]


def official_values(shapes):
    """The numbers that the fixtures were made with: every tensor drawn from its own name."""
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("running_var"):
            drawn = 1 + 0.1 * drawn.abs()
        elif name.endswith("running_mean"):
            drawn = 0.05 * drawn
        elif drawn.dim() > 1 and name != "query_embed.weight":
            drawn = drawn / drawn[0].numel() ** 0.5
        elif name != "query_embed.weight":
            drawn = 1 + 0.05 * drawn if name.endswith("weight") else 0.02 * drawn
        state[name] = drawn
    return state


def state_of(preset="detr_resnet50", num_classes=91, **settings):
    return official_values({name: value.shape for name, value in build_model(preset, num_classes, **settings).state_dict().items()})


@pytest.fixture(scope="module")
def official():
    return state_of()


def small_state(num_classes=91, **settings):
    """The official head and names, outside the backbone, in a network that is built at once."""
    return state_of("detr_tiny", num_classes, num_queries=100, **settings)


@pytest.fixture(scope="module")
def small():
    return small_state()


def small_model(num_classes, **settings):
    return build_model("detr_tiny", num_classes, **{"num_queries": 100, **settings})


SMALL_RESNET = {"backbone": "resnet50", "num_queries": 5, "enc_layers": 1}


@pytest.fixture(scope="module")
def small_resnet():
    return state_of("detr_tiny", **SMALL_RESNET)


def saved(path, content):
    torch.save(content, path)
    return str(path)


def categories(*names):
    return [{"id": 10 * i + 7, "name": name} for i, name in enumerate(names)]


def official_inputs():
    """The two padded images of the fixtures."""
    generator = torch.Generator().manual_seed(7)
    images, mask = torch.zeros(2, 3, 224, 256), torch.ones(2, 224, 256, dtype=torch.bool)
    for i, (height, width) in enumerate(((192, 256), (224, 160))):
        images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[i, :height, :width] = False
    return images, mask


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


# ------------------------------------------------------------------------------------------------------------------ load


def test_official_training_checkpoint_gives_the_official_outputs(tmp_path, official):
    args = argparse.Namespace(
        lr=1e-4, backbone="resnet50", dilation=False, dropout=0.1, nheads=8, pre_norm=False, output_dir="", masks=False
    )
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 200)
    content = {"model": official, "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 299, "args": args}
    model = load(saved(tmp_path / "checkpoint0299.pth", content))
    assert not model.training
    assert model.settings["preset"] == "detr_resnet50"
    assert len(model.categories) == 91
    assert model.categories[17] == {"id": 17, "name": "cat"}
    assert model.categories[12] == {"id": 12, "name": "N/A"}
    with np.load(FIXTURES / "detr_resnet50.npz") as numbers, torch.inference_mode():
        outputs = model(*official_inputs())
        for name in ("pred_logits", "pred_boxes"):
            assert np.abs(outputs[name].numpy() - numbers[name]).max() < 1e-4


def test_detectron2_weights_give_the_official_outputs_of_cocos_80_categories(tmp_path, official):
    converted = as_detectron2(official)
    assert (
        converted["detr.backbone.0.backbone.res2.0.shortcut.norm.running_var"]
        is official["backbone.0.body.layer1.0.downsample.1.running_var"]
    )
    assert "detr.backbone.0.backbone.stem.conv1.norm.weight" in converted
    model = load(saved(tmp_path / "converted.pth", {"model": converted}))
    assert [each["id"] for each in model.categories] == COCO_IDS
    with np.load(FIXTURES / "detr_resnet50.npz") as numbers, torch.inference_mode():
        outputs = model(*official_inputs())
        assert np.abs(outputs["pred_logits"].numpy() - numbers["pred_logits"][:, :, [*COCO_IDS, 91]]).max() < 1e-4
        assert np.abs(outputs["pred_boxes"].numpy() - numbers["pred_boxes"]).max() < 1e-4


def test_detectron2_weights_without_no_object_are_not_loaded(tmp_path, small_resnet):
    path = saved(tmp_path / "converted.pth", {"model": as_detectron2(small_resnet, (*COCO_IDS, 1))})
    with pytest.raises(UserError, match="no-object row is a copy"):
        load(path)
    model = build_model("detr_tiny", 2, **SMALL_RESNET)
    fresh = model.class_embed.weight.detach().clone()
    report = load_weights(model, path, categories("cat", "balloon"))
    assert "the file's is a copy" in report
    assert torch.equal(model.class_embed.weight[0], small_resnet["class_embed.weight"][17])
    assert torch.equal(model.class_embed.weight[1:], fresh[1:])


@pytest.mark.parametrize(
    ("settings", "preset"),
    [
        ({"backbone": "resnet50", "hidden_dim": 64}, "detr_resnet50"),
        ({"backbone": "resnet101", "enc_layers": 1, "dec_layers": 2, "num_queries": 7}, "detr_resnet101"),
        ({"pre_norm": True, "position_embedding": "learned", "enc_layers": 0, "dim_feedforward": 40}, "detr_tiny"),
    ],
)
def test_settings_are_told_from_the_tensors(tmp_path, settings, preset):
    state = state_of("detr_tiny", 5, **settings)
    model = load(saved(tmp_path / "bare.pth", state))
    assert model.settings["preset"] == preset
    assert settings.items() <= model.settings.items()
    assert [each["name"] for each in model.categories] == [f"class {i}" for i in range(5)]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_dilation_comes_from_args_or_the_files_name(tmp_path, small_resnet):
    assert load(saved(tmp_path / "detr-r50-dc5-f0fb7ef5.pth", {"model": small_resnet})).settings["preset"] == "detr_resnet50_dc5"
    args = argparse.Namespace(dilation=True, nheads=4, dropout=0.25)
    model = load(saved(tmp_path / "checkpoint.pth", {"model": small_resnet, "args": args}))
    assert model.settings["preset"] == "detr_resnet50_dc5"
    assert (model.settings["nheads"], model.settings["dropout"]) == (4, 0.25)


def own_content(preset="detr_tiny", names=("dog", "balloon"), **settings):
    tree = load_config({"model.preset": preset, **{f"model.{name}": value for name, value in settings.items()}})
    state = state_of(preset, len(names), **settings)
    return {"model": state, "settings": to_dict(tree), "categories": categories(*names), "epoch": 3, "metrics": {"AP": 0.5}, "ema": state}


def test_own_checkpoint_comes_back(tmp_path):
    content = own_content(num_queries=9, nheads=4)
    save_checkpoint(tmp_path / "best.pth", content)
    model = load(tmp_path / "best.pth")
    assert model.categories == content["categories"]
    assert (model.settings["preset"], model.settings["num_queries"], model.settings["nheads"]) == ("detr_tiny", 9, 4)
    assert all(torch.equal(value, content["model"][name]) for name, value in model.state_dict().items())
    assert not model.training


def test_bare_state_dict_of_tiny_is_recognised(tmp_path):
    model = load(saved(tmp_path / "bare.pth", build_model("detr_tiny", 2).state_dict()))
    assert model.settings["preset"] == "detr_tiny"


def test_half_precision_is_loaded_as_float32(tmp_path):
    content = own_content()
    content["model"] = {name: value.half() for name, value in content["model"].items()}
    assert {value.dtype for value in load(saved(tmp_path / "half.pth", content)).parameters()} == {torch.float32}


def test_masks_of_a_segmentation_checkpoint_are_left_out(tmp_path, small):
    state = {f"detr.{name}": value for name, value in small.items()} | {
        "mask_head.lay1.weight": torch.zeros(3),
        "bbox_attention.q_linear.bias": torch.zeros(3),
    }
    assert len(load(saved(tmp_path / "detr-r50-panoptic.pth", {"model": state})).categories) == 91


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].pop("class_embed.bias"), "its head|without its head"),
        (lambda content: content["model"].pop("input_proj.bias"), r"not a whole DETR: 1 missing \(input_proj.bias\)"),
        (lambda content: content["model"].update({"extra.weight": torch.ones(1)}), r"1 unexpected \(extra.weight\)"),
        (lambda content: content["model"]["input_proj.bias"].fill_(float("nan")), "input_proj.bias holds numbers that are not finite"),
        (lambda content: content["model"].update({"input_proj.bias": torch.ones(7)}), r"input_proj.bias is \[7\] in the file"),
        (lambda content: content["categories"].pop(), "categories are not the 2 of its head"),
        (lambda content: content["categories"][0].pop("id"), "categories are not the 2 of its head"),
        (lambda content: content["settings"]["model"].update(heads=3), "unknown setting 'model.heads'; did you mean 'model.nheads'"),
        (lambda content: content["settings"]["model"].update(nheads=7), "not a multiple of model.nheads"),
        (lambda content: content.update(model={}), "holds no weights"),
        (lambda content: content.update(model={"a": {"b": torch.ones(1)}, 3: torch.ones(1), "c": "text"}), "holds no weights"),
    ],
)
def test_damaged_checkpoint(tmp_path, change, message):
    content = own_content()
    change(content)
    path = saved(tmp_path / "best.pth", content)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- load_weights


def test_head_keeps_no_object_and_cocos_categories(tmp_path, small):
    path = saved(tmp_path / "official.pth", {"model": small})
    model = small_model(3)
    fresh = model.class_embed.weight.detach().clone()
    report = load_weights(model, path, categories(" Cat ", "balloon", "PERSON"))
    weight, bias = model.class_embed.weight, model.class_embed.bias
    assert torch.equal(weight[[0, 2, 3]], small["class_embed.weight"][[17, 1, 91]])
    assert torch.equal(bias[[0, 2, 3]], small["class_embed.bias"][[17, 1, 91]])
    assert torch.equal(weight[1], fresh[1])
    others = [name for name in small if "class_embed" not in name]
    assert all(torch.equal(model.state_dict()[name], small[name]) for name in others)
    assert report == (
        f"weights: official.pth: {len(others)} tensors loaded, 2 replaced, 0 missing, 0 unexpected; "
        "head: no-object and 2 of 3 categories kept (cat, person), the others new"
    )


def test_head_of_detectron2_has_cocos_80_rows(tmp_path, small_resnet):
    model = build_model("detr_tiny", 2, **SMALL_RESNET)
    load_weights(model, saved(tmp_path / "converted.pth", {"model": as_detectron2(small_resnet)}), categories("toothbrush", "balloon"))
    assert torch.equal(model.class_embed.weight[[0, 2]], small_resnet["class_embed.weight"][[90, 91]])


def test_unused_coco_ids_are_nobodys_category(tmp_path, small):
    model = small_model(1)
    report = load_weights(model, saved(tmp_path / "official.pth", {"model": small}), categories("N/A"))
    assert "0 of 1 categories" in report


def test_head_of_the_same_categories_is_unchanged(tmp_path, small):
    path = saved(tmp_path / "official.pth", {"model": small})
    model = small_model(91)
    assert f"{len(small)} tensors loaded, 0 replaced" in load_weights(model, path, official_files.COCO_CATEGORIES)
    assert torch.equal(model.class_embed.weight, small["class_embed.weight"])


def test_own_checkpoint_keeps_categories_by_name_in_any_order(tmp_path):
    content = own_content(names=("dog", "balloon", "kite"))
    save_checkpoint(tmp_path / "best.pth", content)
    its = content["model"]["class_embed.weight"]
    same, other = build_model("detr_tiny", 3), build_model("detr_tiny", 2)
    assert "0 replaced" in load_weights(same, str(tmp_path / "best.pth"), categories("dog", "balloon", "kite"))
    assert torch.equal(same.class_embed.weight, its)
    assert load_weights(other, str(tmp_path / "best.pth"), categories("kite", "dog")).endswith("2 of 2 categories kept (kite, dog)")
    assert torch.equal(other.class_embed.weight, its[[2, 0, 3]])


def test_head_of_unnamed_categories(tmp_path):
    state = small_state(4)
    path = saved(tmp_path / "custom.pth", {"model": state})
    model = small_model(4)
    assert "does not name its categories" in load_weights(model, path, categories("a", "b", "c", "d"))
    assert torch.equal(model.class_embed.weight, state["class_embed.weight"])
    model = small_model(2)
    fresh = model.class_embed.weight.detach().clone()
    assert "no-object and 0 of 2 categories" in load_weights(model, path, categories("a", "b"))
    assert torch.equal(model.class_embed.weight, torch.cat((fresh[:2], state["class_embed.weight"][4:])))


def test_head_taken_off_is_reported_missing(tmp_path, small):
    state = {name: value for name, value in small.items() if "class_embed" not in name}
    report = load_weights(small_model(1), saved(tmp_path / "headless.pth", {"model": state}), categories("balloon"))
    assert "2 missing (class_embed.weight, class_embed.bias)" in report


@pytest.mark.parametrize("number", [3, 130])
def test_num_queries_keeps_the_first_rows(tmp_path, small, number):
    model = small_model(91, num_queries=number)
    fresh = model.query_embed.weight.detach().clone()
    report = load_weights(model, saved(tmp_path / "official.pth", {"model": small}), official_files.COCO_CATEGORIES)
    kept = min(number, 100)
    assert torch.equal(model.query_embed.weight[:kept], small["query_embed.weight"][:kept])
    assert torch.equal(model.query_embed.weight[kept:], fresh[kept:])
    assert f"queries: the first {kept} of the file's 100 kept, {number - kept} new" in report


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.detr.", "model."])
def test_wrapped_and_bare_state_dicts(tmp_path, small, prefix):
    wrapped = {prefix + name: value for name, value in small.items()} | {
        prefix + "backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)
    }
    for content in (wrapped, {"state_dict": wrapped}, {"model": wrapped}):
        report = load_weights(small_model(91), saved(tmp_path / "wrapped.pth", content), official_files.COCO_CATEGORIES)
        assert f"{len(small)} tensors loaded, 0 replaced, 0 missing, 0 unexpected" in report


def test_fewer_and_more_layers_are_reported(tmp_path, small):
    path = saved(tmp_path / "official.pth", {"model": small})
    assert "18 unexpected (transformer.decoder.layers.2." in load_weights(
        small_model(91, dec_layers=2), path, official_files.COCO_CATEGORIES
    )
    assert "12 missing (transformer.encoder.layers.2." in load_weights(small_model(91, enc_layers=3), path, official_files.COCO_CATEGORIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_dim": 64}, "model.hidden_dim is 128 in the file, 64 here"),
        ({"dim_feedforward": 16}, "model.dim_feedforward is 256 in the file, 16 here"),
        ({"pre_norm": True}, "model.pre_norm is False in the file, True here"),
        ({"backbone": "resnet50"}, "model.backbone is tiny in the file, resnet50 here"),
        ({"nheads": 4}, "model.nheads is 8 in the file, 4 here"),
        ({"nheads": 4, "hidden_dim": 64}, "model.hidden_dim is 128 in the file, 64 here; model.nheads is 8 in the file, 4 here"),
    ],
)
def test_another_network_is_refused_with_the_settings_that_differ(tmp_path, small, settings, message):
    path = saved(tmp_path / "official.pth", {"model": small, "args": argparse.Namespace(nheads=8)})
    model = small_model(1, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_weights(model, path, categories("balloon"))
    assert path in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_file_that_matches_almost_nothing_is_refused(tmp_path, small_resnet):
    foreign = {f"encoder.block.{i}.weight": torch.ones(3) for i in range(400)}
    body_only_alike = {name: value for name, value in small_resnet.items() if name.startswith("backbone.0.")} | foreign
    for content, reason in (
        ({"model": foreign}, "it has 0 of the 265 tensors of the backbone"),
        (torchvision.models.mobilenet_v2().state_dict(), "it has 0 of the 265 tensors of the backbone"),
        ({"model": body_only_alike}, r"it has 0 of the \d+ tensors of the transformer"),
    ):
        with pytest.raises(UserError, match=reason):
            load_weights(build_model("detr_tiny", 1, **SMALL_RESNET), saved(tmp_path / "foreign.pth", content), categories("balloon"))


def test_weights_that_are_not_finite_are_refused(tmp_path, small):
    broken = small | {"input_proj.bias": torch.full_like(small["input_proj.bias"], float("inf"))}
    with pytest.raises(UserError, match=r"input_proj.bias holds numbers that are not finite"):
        load_weights(small_model(1), saved(tmp_path / "broken.pth", {"model": broken}), categories("balloon"))


def test_backbone_file_is_recognised(tmp_path):
    resnet = torchvision.models.resnet50()
    path = saved(tmp_path / "resnet.pth", resnet.state_dict())
    model = build_model("detr_tiny", 1, **SMALL_RESNET)
    fresh = model.class_embed.weight.detach().clone()
    report = load_weights(model, path, categories("balloon"))
    assert report.startswith("weights: resnet.pth: 265 tensors loaded, 0 replaced, 0 missing, 0 unexpected; a backbone only")
    assert torch.equal(model.backbone[0].body.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
    assert torch.equal(model.backbone[0].body.bn1.running_var, resnet.bn1.running_var)
    assert torch.equal(model.class_embed.weight, fresh)
    with pytest.raises(UserError, match="holds a backbone only"):
        load(path)
    with pytest.raises(UserError, match=r"model.backbone is resnet50 in the file, resnet101 here"):
        load_weights(build_model("detr_tiny", 1, backbone="resnet101"), path, categories("balloon"))


def test_other_resnets_are_refused(tmp_path):
    for make, reason in (
        (torchvision.models.resnext50_32x4d, r"layer1.0.conv1.weight is \[128, 64, 1, 1\] in the file"),
        (torchvision.models.resnet18, "of the 265 tensors of the backbone"),
    ):
        with pytest.raises(UserError, match=reason):
            load_weights(
                build_model("detr_tiny", 1, **SMALL_RESNET), saved(tmp_path / "resnet.pth", make().state_dict()), categories("balloon")
            )


def test_none_changes_nothing():
    model = build_model("detr_tiny", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "random" in load_weights(model, "none", categories("balloon"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bundled_is_for_tiny_alone(tmp_path, monkeypatch):
    content = own_content()
    save_checkpoint(tmp_path / "detr_tiny.pth", content)
    monkeypatch.setattr(official_files, "BUNDLED", tmp_path / "detr_tiny.pth")
    model = build_model("detr_tiny", 1)
    assert "1 of 1 categories kept (balloon)" in load_weights(model, "bundled", categories("balloon"))
    assert torch.equal(model.class_embed.weight, content["model"]["class_embed.weight"][1:])
    with pytest.raises(UserError, match="only detr_tiny's weights are bundled; for detr_resnet50"):
        load_weights(build_model("detr_resnet50", 1), "bundled", categories("balloon"))


def test_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "best.pth", own_content())
    assert "0 missing" in load_weights(build_model("detr_tiny", 1), "~/best.pth", categories("balloon"))
    assert load("~/best.pth").categories == categories("dog", "balloon")


def test_unknown_weights_name_the_choices():
    with pytest.raises(UserError, match=r"model.weights: coc0: no such file; it takes coco, imagenet, bundled, none, a path or a URL"):
        load_weights(build_model("detr_tiny", 1), "coc0", categories("balloon"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server of the folder ``tmp_path / "web"``; torch.hub's folder is below ``tmp_path``."""
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_coco_is_chosen_by_backbone_and_dilation(server, monkeypatch):
    """With stand-ins of the official names: their sha256 is not the promised one, which must be noticed."""
    monkeypatch.setattr(official_files, "OFFICIAL_FOLDER", server.url)
    names = {
        "detr_resnet50": "detr-r50-e632da11.pth",
        "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
        "detr_resnet101": "detr-r101-2c7b67e5.pth",
        "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    }
    for preset, name in names.items():
        (server.folder / name).write_bytes(b"stand-in")
        with pytest.raises(UserError, match=f"{name}: not downloaded .*promises {name[-12:-4]}"):
            load_weights(build_model(preset, 1, num_queries=7), "coco", categories("balloon"))


@pytest.mark.parametrize(
    "settings",
    [{"enc_layers": 3}, {"dec_layers": 2}, {"pre_norm": True}, {"hidden_dim": 64}, {"nheads": 4}, {"position_embedding": "learned"}],
)
def test_coco_is_for_the_official_network_alone(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"model.{name}: the official coco weights are of a network with"):
        load_weights(build_model("detr_resnet50", 1, **settings), "coco", categories("balloon"))


def test_tiny_has_no_weights_of_others():
    for weights in ("coco", "imagenet"):
        with pytest.raises(UserError, match=f"no {weights} weights for the tiny backbone; take bundled"):
            load_weights(build_model("detr_tiny", 1), weights, categories("balloon"))


def test_imagenet_fills_the_backbone(server, monkeypatch):
    assert re.fullmatch(r"https://download.pytorch.org/models/resnet50-[0-9a-f]{8}.pth", official_files.IMAGENET["resnet50"])
    assert re.fullmatch(r"https://download.pytorch.org/models/resnet101-[0-9a-f]{8}.pth", official_files.IMAGENET["resnet101"])
    resnet = torchvision.models.resnet101()
    saved(server.folder / "resnet101.pth", resnet.state_dict())
    monkeypatch.setitem(official_files.IMAGENET, "resnet101", server.url + "resnet101.pth")
    model = build_model("detr_tiny", 1, backbone="resnet101")
    report = load_weights(model, "imagenet", categories("balloon"))
    assert "520 tensors loaded, 0 replaced, 0 missing, 0 unexpected; a backbone only" in report
    assert torch.equal(model.backbone[0].body.layer3[22].conv1.weight, resnet.layer3[22].conv1.weight)


def test_url(server):
    content = own_content()
    saved(server.folder / "best.pth", content)
    assert "1 of 1 categories" in load_weights(build_model("detr_tiny", 1), server.url + "best.pth", categories("balloon"))
    assert load(server.url + "best.pth").categories == content["categories"]


def test_cocos_categories():
    ids = {each["name"]: each["id"] for each in official_files.COCO_CATEGORIES_IN_USE}
    assert len(ids) == 80
    known = {"person": 1, "stop sign": 13, "wine glass": 46, "dining table": 67, "tv": 72, "book": 84, "hair drier": 89, "toothbrush": 90}
    assert known.items() <= ids.items()
    assert [each["id"] for each in official_files.COCO_CATEGORIES] == list(range(91))


# ---------------------------------------------------------------------------------------------------------------- reading


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [2, 4, None])
def test_pickle_bomb_is_not_run(tmp_path, protocol):
    """As a plain pickle, and inside what torch.save writes (None)."""
    target, path = tmp_path / "ran", tmp_path / "bomb.pth"
    if protocol is None:
        torch.save({"model": {"class_embed.weight": torch.ones(2, 2)}, "args": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Bomb(target)}, protocol=protocol))
    for reader in (read_checkpoint, load, lambda path: load_weights(build_model("detr_tiny", 1), str(path), categories("balloon"))):
        with pytest.raises(UserError, match=r"contain.* code( \(posix.system\))?, which raydetr does not run") as error:
            reader(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert not target.exists()


def test_whole_model_in_a_file_is_not_built(tmp_path):
    with pytest.raises(UserError, match=r"contains code \(torch.nn.modules.linear.Linear\)"):
        read_checkpoint(saved(tmp_path / "model.pth", torch.nn.Linear(2, 2)))


def test_zip_bomb_is_not_expanded(tmp_path):
    saved(tmp_path / "plain.pth", {"model": torch.zeros(1_000_000)})
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed archive that expands to 40"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_memory_bomb(tmp_path):
    class Memory:
        def __reduce__(self):
            return bytearray, (1 << 60,)

    with pytest.raises(UserError, match="asks for more memory than there is"):
        read_checkpoint(saved(tmp_path / "bomb.pth", {"model": Memory()}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello world" * 1000, "not a checkpoint"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not a checkpoint"),
        (b"PK\x03\x04" + bytes(1000), "damaged"),
    ],
)
def test_garbage(tmp_path, content, message):
    path = tmp_path / "best.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.99])
def test_truncated(tmp_path, zipped, fraction):
    path = tmp_path / "best.pth"
    torch.save(own_content(), path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)["epoch"] == 3
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match=r"best.pth: a damaged checkpoint, perhaps cut short"):
        read_checkpoint(path)


def test_random_damage_ends_in_one_line(tmp_path):
    """Whatever byte of the pickled part is wrong: the file is read, or refused in one line."""
    path = tmp_path / "best.pth"
    torch.save({"model": {"a": torch.ones(3)}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path, _use_new_zipfile_serialization=False)
    sound, random, messages = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(300):
        damaged = bytearray(sound)
        for place in random.integers(0, len(sound), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_missing_folder_and_others(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"a folder, not a checkpoint$"):
        read_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    with pytest.raises(UserError, match=r"a folder, not a checkpoint; did you mean .*last\.pth\?"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        read_checkpoint("/dev/zero")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(saved(tmp_path / "list.pth", [torch.ones(1)]))


def test_numbers_of_numpy_become_pythons(tmp_path):
    numbers = {
        "f": np.float64(3.5),
        "h": np.float32(0.25),
        "i": np.int64(-7),
        "u": np.uint8(200),
        "b": np.bool_(True),
        "big": np.dtype(">f8").type(1.5),
    }
    path = saved(tmp_path / "numbers.pth", {"model": {}, "args": argparse.Namespace(lr=np.float64(1e-4)), **numbers})
    content = read_checkpoint(path)
    assert content["args"].lr == 1e-4
    assert {name: content[name] for name in numbers} == {"f": 3.5, "h": 0.25, "i": -7, "u": 200, "b": True, "big": 1.5}
    assert {type(content[name]) for name in numbers} == {float, int, bool}
    # As numpy 1 named it, and in the other byte order.
    old = {"f": np.frombuffer(np.array([2.5], ">f8").tobytes(), ">f8")[0]}
    torch.save(old, path, _use_new_zipfile_serialization=False)
    file = Path(path)
    file.write_bytes(file.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(path) == {"f": 2.5}


def test_arrays_of_numpy_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"contains code \(numpy\._?core\.multiarray\._reconstruct\)"):
        read_checkpoint(saved(tmp_path / "arrays.pth", {"model": {"weight": np.ones(3)}}))


def test_reading_leaves_torch_as_strict_as_it_was(tmp_path):
    path = saved(tmp_path / "args.pth", {"args": argparse.Namespace(lr=1)})
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


# ----------------------------------------------------------------------------------------------------------------- saving


def test_save_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "last.pth"
    for epoch in range(2):
        save_checkpoint(path, {"epoch": epoch, "tensor": torch.ones(2), "more": [(None, True, "text", 1.5, b"bytes")]})
    assert read_checkpoint(path) == {"epoch": 1, "tensor": pytest.approx(torch.ones(2)), "more": [(None, True, "text", 1.5, b"bytes")]}
    assert os.listdir(path.parent) == ["last.pth"]


@pytest.mark.parametrize("value", [np.float64(1), np.ones(2), Path("a"), argparse.Namespace(), load_config(), print])
def test_save_refuses_what_could_not_be_read(tmp_path, value):
    with pytest.raises(TypeError, match=r"content\['metrics'\]\['AP'\]\[1\] is a "):
        save_checkpoint(tmp_path / "last.pth", {"metrics": {"AP": [1, value]}})
    assert not os.listdir(tmp_path)


SAVE = """
    import sys, torch
    from raydetr.errors import UserError
    from raydetr.weights.checkpoint import save_checkpoint
    for numbers in (1_000_000, 262_144 - 300, 262_144 - 50):
        try:
            save_checkpoint(sys.argv[1], {"model": {"a": torch.randn(numbers), "b": torch.ones(3)}})
        except UserError as error:
            print(error)
"""


def save_in_process(path, **options):
    command = [sys.executable, "-c", textwrap.dedent(SAVE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_disk_that_ends_while_saving_costs_nothing(tmp_path):
    """A limit on the size of files stands for the end of the disk; the third size passes it only with the archive's last bytes."""
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"epoch": 1})
    limit = 1 << 20
    lines = save_in_process(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert lines == [f"{path}: not saved (File too large); the file that was there is untouched"] * 3
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pth"]


def test_ctrl_c_while_saving_stays_ctrl_c_and_costs_nothing(tmp_path, monkeypatch):
    """Wherever between the first byte and the last it comes."""
    path, content, whole = tmp_path / "last.pth", {"model": {"a": torch.randn(70_000), "b": torch.ones(3)}}, files.written_whole
    save_checkpoint(path, {"epoch": 1})

    @contextlib.contextmanager
    def interrupted(path, after):
        with whole(path) as file:
            write, writes = file.write, itertools.count()

            def write_until(data):
                if next(writes) == after:
                    raise KeyboardInterrupt
                return write(data)

            yield SimpleNamespace(write=write_until, flush=file.flush, fileno=file.fileno)

    for after in itertools.count():
        monkeypatch.setattr(checkpoint, "written_whole", functools.partial(interrupted, after=after))
        try:
            save_checkpoint(path, content)
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == ["last.pth"]
            assert read_checkpoint(path) == {"epoch": 1}
        else:
            break
    assert after > 10
    assert read_checkpoint(path).keys() == {"model"}


@pytest.mark.slow
def test_full_disk_while_saving_costs_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        path = disk / "last.pth"
        save_checkpoint(path, {"epoch": 1})
        lines = save_in_process(path)
        assert lines == [f"{path}: not saved (No space left on device); the file that was there is untouched"] * 3
        assert read_checkpoint(path) == {"epoch": 1}
        assert os.listdir(disk) == ["last.pth"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder_in_the_way_of_saving(tmp_path):
    (tmp_path / "last.pth").mkdir()
    with pytest.raises(UserError, match="not saved"):
        save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/last\.pth: not saved"):
        save_checkpoint(tmp_path / "file" / "last.pth", {"epoch": 1})
    assert sorted(os.listdir(tmp_path)) == ["file", "last.pth"]
