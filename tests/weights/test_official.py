"""The official weights, and the names under which other programs keep a DETR."""

import re

import pytest
import torch
import torchvision

from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.weights import official
from raydetr.weights.checkpoint import save_checkpoint
from raydetr.weights.fitting import load, load_weights
from tests.weights.states import COCO_IDS, SMALL_RESNET, as_detectron2, categories, own_content, saved, small_model


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


def test_head_of_detectron2_has_cocos_80_rows(tmp_path, small_resnet):
    model = build_model("detr_tiny", 2, **SMALL_RESNET)
    load_weights(model, saved(tmp_path / "converted.pth", {"model": as_detectron2(small_resnet)}), categories("toothbrush", "balloon"))
    assert torch.equal(model.class_embed.weight[[0, 2]], small_resnet["class_embed.weight"][[90, 91]])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.detr.", "model."])
def test_wrapped_and_bare_state_dicts(tmp_path, small, prefix):
    wrapped = {prefix + name: value for name, value in small.items()} | {
        prefix + "backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)
    }
    for content in (wrapped, {"state_dict": wrapped}, {"model": wrapped}):
        report = load_weights(small_model(91), saved(tmp_path / "wrapped.pth", content), official.COCO_CATEGORIES)
        assert f"{len(small)} tensors loaded, 0 replaced, 0 missing, 0 unexpected" in report


def test_bundled_is_for_tiny_alone(tmp_path, monkeypatch):
    content = own_content()
    save_checkpoint(tmp_path / "detr_tiny.pth", content)
    monkeypatch.setattr(official, "BUNDLED", tmp_path / "detr_tiny.pth")
    model = build_model("detr_tiny", 1)
    assert "1 of 1 categories kept (balloon)" in load_weights(model, "bundled", categories("balloon"))
    assert torch.equal(model.class_embed.weight, content["model"]["class_embed.weight"][1:])
    with pytest.raises(UserError, match="only detr_tiny's weights are bundled; for detr_resnet50"):
        load_weights(build_model("detr_resnet50", 1), "bundled", categories("balloon"))


def test_bundled_has_a_segmentation_head_for_masks():
    model = build_model("detr_tiny", 1, masks=True)
    assert "; masks: the file's segmentation head kept" in load_weights(model, "bundled", categories("balloon"))
    boxes = build_model("detr_tiny", 1)
    assert "masks" not in load_weights(boxes, "bundled", categories("balloon"))
    assert torch.equal(model.backbone[0].body.place.weight, boxes.backbone[0].body.place.weight)


def test_unknown_weights_name_the_choices():
    with pytest.raises(
        UserError, match=r"model.weights: coc0: no such file; it takes coco, coco-panoptic, imagenet, bundled, none, a path or a URL"
    ):
        load_weights(build_model("detr_tiny", 1), "coc0", categories("balloon"))


def test_coco_is_chosen_by_backbone_and_dilation(server, monkeypatch):
    """With stand-ins of the official names: their sha256 is not the promised one, which must be noticed."""
    monkeypatch.setattr(official, "OFFICIAL_FOLDER", server.url)
    names = {
        "detr_resnet50": "detr-r50-e632da11.pth",
        "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
        "detr_resnet101": "detr-r101-2c7b67e5.pth",
        "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    }
    for preset, name in names.items():
        (server.folder / name).write_bytes(b"stand-in")
        with pytest.raises(UserError, match=f"{name}: not downloaded .*{name[-12:-4]} was promised"):
            load_weights(build_model(preset, 1, num_queries=7), "coco", categories("balloon"))


def test_panoptic_weights_are_chosen_by_backbone_and_dilation(server, monkeypatch):
    monkeypatch.setattr(official, "OFFICIAL_FOLDER", server.url)
    names = {
        "detr_resnet50": "detr-r50-panoptic-00ce5173.pth",
        "detr_resnet50_dc5": "detr-r50-dc5-panoptic-da08f1b1.pth",
        "detr_resnet101": "detr-r101-panoptic-40021d53.pth",
    }
    settings = {preset: build_model(preset, 1, num_queries=7, enc_layers=6).settings for preset in names}
    for preset, name in names.items():
        (server.folder / name).write_bytes(b"stand-in")
        assert official.source_of("coco-panoptic", settings[preset]) == server.url + name
        with pytest.raises(UserError, match=f"{name}: not downloaded .*{name[-12:-4]} was promised"):
            official.located(server.url + name)
    with pytest.raises(UserError, match=r"no coco-panoptic weights for resnet101 with model\.dilation; use coco"):
        official.source_of("coco-panoptic", settings["detr_resnet101"] | {"dilation": True})
    with pytest.raises(UserError, match="no coco-panoptic weights for the tiny backbone"):
        official.source_of("coco-panoptic", settings["detr_resnet50"] | {"backbone": "tiny"})


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
        with pytest.raises(UserError, match=f"no {weights} weights for the tiny backbone; use bundled"):
            load_weights(build_model("detr_tiny", 1), weights, categories("balloon"))


def test_imagenet_fills_the_backbone(server, monkeypatch):
    assert re.fullmatch(r"https://download.pytorch.org/models/resnet50-[0-9a-f]{8}.pth", official.IMAGENET["resnet50"])
    assert re.fullmatch(r"https://download.pytorch.org/models/resnet101-[0-9a-f]{8}.pth", official.IMAGENET["resnet101"])
    resnet = torchvision.models.resnet101()
    saved(server.folder / "resnet101.pth", resnet.state_dict())
    monkeypatch.setitem(official.IMAGENET, "resnet101", server.url + "resnet101.pth")
    model = build_model("detr_tiny", 1, backbone="resnet101")
    report = load_weights(model, "imagenet", categories("balloon"))
    assert "520 tensors loaded, 0 replaced, 0 missing, 0 unexpected; a backbone only" in report
    assert torch.equal(model.backbone[0].body.layer3[22].conv1.weight, resnet.layer3[22].conv1.weight)


def test_cocos_categories():
    ids = {each["name"]: each["id"] for each in official.COCO_CATEGORIES_IN_USE}
    assert len(ids) == 80
    known = {"person": 1, "stop sign": 13, "wine glass": 46, "dining table": 67, "tv": 72, "book": 84, "hair drier": 89, "toothbrush": 90}
    assert known.items() <= ids.items()
    assert [each["id"] for each in official.COCO_CATEGORIES] == list(range(91))


@pytest.mark.parametrize("prefix", ["net.", "model.net.", "_orig_mod.module.", "student.detr."])
def test_the_name_of_any_attribute_may_stand_before_the_parts(tmp_path, small, prefix):
    content = {"state_dict": {prefix + name: value for name, value in small.items()}, "hyper_parameters": {"lr": 1e-4}}
    model = load(saved(tmp_path / "lightning.ckpt", content))
    assert all(torch.equal(value, small[name]) for name, value in model.state_dict().items())
    assert model.notes == []


def test_of_two_copies_of_the_network_the_first_is_used(tmp_path, small):
    """A LightningModule with a moving average beside the network."""
    both = {f"net.{name}": value for name, value in small.items()} | {f"average.module.{name}": value + 1 for name, value in small.items()}
    model = load(saved(tmp_path / "lightning.ckpt", {"state_dict": both}))
    assert torch.equal(model.query_embed.weight, small["query_embed.weight"])


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda state: {"model_ema": state}, "model_ema"),
        (lambda state: {"ema": state}, "ema"),
        (lambda state: {"ema": {"module": state, "updates": 7}}, "ema"),
        (lambda state: {"state_dict_ema": {f"module.{name}": value for name, value in state.items()}}, "state_dict_ema"),
        (lambda state: {"ema_state_dict": state, "model": None}, "ema_state_dict"),
        (lambda state: {"model_ema": {"state_dict": state}, "optimizer": {"state": {}}}, "model_ema"),
    ],
)
def test_a_moving_average_that_is_all_there_is_is_used_and_this_is_said(tmp_path, small, wrap, key):
    path = saved(tmp_path / "average.pth", wrap(small))
    said = f"the file holds a moving average (EMA) of the weights, under '{key}': it is used"
    model = load(path)
    assert model.notes == [f"{path}: {said}"]
    assert torch.equal(model.query_embed.weight, small["query_embed.weight"])
    assert load_weights(small_model(91), path, official.COCO_CATEGORIES).endswith(f"; {said}")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_moving_average_is_used_and_not_the_weights_beside_it_and_this_is_said(tmp_path, small, key):
    path = saved(tmp_path / "both.pth", {key: {name: value + 1 for name, value in small.items()}, "ema": {"module": small}})
    model = load(path)
    assert model.notes == [
        f"{path}: the file holds a moving average (EMA) of the weights, under 'ema': it is used, not the weights under '{key}'"
    ]
    assert torch.equal(model.query_embed.weight, small["query_embed.weight"])


@pytest.mark.parametrize("part", [{"decay": torch.tensor(0.99)}, {"query_embed.weight": torch.ones(4, 8)}])
def test_an_incomplete_moving_average_is_not_used_and_this_is_said(tmp_path, small, part):
    path = saved(tmp_path / "both.pth", {"model": small, "ema": part})
    model = load(path)
    assert model.notes == [
        f"{path}: the file holds a moving average (EMA) of the weights, under 'ema': "
        "it is incomplete, and the weights under 'model' are used"
    ]
    assert torch.equal(model.query_embed.weight, small["query_embed.weight"])


def test_weights_inside_of_a_module_entry(tmp_path, small):
    model = load(saved(tmp_path / "deep.pth", {"model": {"module": small}}))
    assert torch.equal(model.query_embed.weight, small["query_embed.weight"])


def test_own_checkpoint_is_read_without_a_word(tmp_path):
    """Its ``ema`` is for resuming; ``model`` is what to use."""
    save_checkpoint(tmp_path / "last.pth", own_content())
    assert load(tmp_path / "last.pth").notes == []


@pytest.mark.parametrize(
    "name", ["model.backbone.conv_encoder.model.conv1.weight", "class_labels_classifier.weight", "model.query_position_embeddings.weight"]
)
def test_weights_of_hugging_face_are_named(tmp_path, name):
    path = saved(tmp_path / "pytorch_model.bin", {name: torch.ones(2), "model.encoder.layers.0.fc1.weight": torch.ones(2)})
    for read in (load, lambda path: load_weights(small_model(1), path, categories("balloon"))):
        with pytest.raises(
            UserError, match=r"pytorch_model\.bin: weights of Hugging Face transformers, with a tensor .*model\.weights coco"
        ):
            read(path)
