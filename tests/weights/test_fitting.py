"""Models from checkpoints, and weights fitted to other categories and queries."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.weights import official
from raydetr.weights.checkpoint import save_checkpoint
from raydetr.weights.fitting import load, load_weights
from tests.weights.states import COCO_IDS, SMALL_RESNET, as_detectron2, categories, own_content, saved, small_model, small_state, state_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def official_state_dict():
    return state_of()


def official_inputs():
    """The two padded images of the fixtures."""
    generator = torch.Generator().manual_seed(7)
    images, mask = torch.zeros(2, 3, 224, 256), torch.ones(2, 224, 256, dtype=torch.bool)
    for i, (height, width) in enumerate(((192, 256), (224, 160))):
        images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[i, :height, :width] = False
    return images, mask


def test_detectron2_weights_give_the_official_outputs_of_cocos_80_categories(tmp_path, official_state_dict):
    converted = as_detectron2(official_state_dict)
    assert (
        converted["detr.backbone.0.backbone.res2.0.shortcut.norm.running_var"]
        is official_state_dict["backbone.0.body.layer1.0.downsample.1.running_var"]
    )
    assert "detr.backbone.0.backbone.stem.conv1.norm.weight" in converted
    model = load(saved(tmp_path / "converted.pth", {"model": converted}))
    assert [each["id"] for each in model.categories] == COCO_IDS
    with np.load(FIXTURES / "detr_resnet50.npz") as numbers, torch.inference_mode():
        outputs = model(*official_inputs())
        assert np.abs(outputs["pred_logits"].numpy() - numbers["pred_logits"][:, :, [*COCO_IDS, 91]]).max() < 1e-4
        assert np.abs(outputs["pred_boxes"].numpy() - numbers["pred_boxes"]).max() < 1e-4


def test_official_training_checkpoint_gives_the_official_outputs(tmp_path, official_state_dict):
    args = argparse.Namespace(
        lr=1e-4, backbone="resnet50", dilation=False, dropout=0.1, nheads=8, pre_norm=False, output_dir="", masks=False
    )
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 200)
    content = {
        "model": official_state_dict,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 299,
        "args": args,
    }
    model = load(saved(tmp_path / "checkpoint0299.pth", content | {"args": args}))
    assert not model.training
    assert model.settings["preset"] == "detr_resnet50"
    assert len(model.categories) == 91
    assert model.categories[17] == {"id": 17, "name": "cat"}
    assert model.categories[12] == {"id": 12, "name": "N/A"}
    with np.load(FIXTURES / "detr_resnet50.npz") as numbers, torch.inference_mode():
        outputs = model(*official_inputs())
        for name in ("pred_logits", "pred_boxes"):
            assert np.abs(outputs[name].numpy() - numbers[name]).max() < 1e-4


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
        (lambda content: content["model"].pop("input_proj.bias"), r"not a complete DETR: 1 missing \(input_proj.bias\)"),
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


def test_unused_coco_ids_are_nobodys_category(tmp_path, small):
    model = small_model(1)
    report = load_weights(model, saved(tmp_path / "official.pth", {"model": small}), categories("N/A"))
    assert "0 of 1 categories" in report


def test_head_of_the_same_categories_is_unchanged(tmp_path, small):
    path = saved(tmp_path / "official.pth", {"model": small})
    model = small_model(91)
    assert f"{len(small)} tensors loaded, 0 replaced" in load_weights(model, path, official.COCO_CATEGORIES)
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
    report = load_weights(model, saved(tmp_path / "official.pth", {"model": small}), official.COCO_CATEGORIES)
    kept = min(number, 100)
    assert torch.equal(model.query_embed.weight[:kept], small["query_embed.weight"][:kept])
    assert torch.equal(model.query_embed.weight[kept:], fresh[kept:])
    assert f"queries: the first {kept} of the file's 100 kept, {number - kept} new" in report


def test_fewer_and_more_layers_are_reported(tmp_path, small):
    path = saved(tmp_path / "official.pth", {"model": small})
    assert "18 unexpected (transformer.decoder.layers.2." in load_weights(small_model(91, dec_layers=2), path, official.COCO_CATEGORIES)
    assert "12 missing (transformer.encoder.layers.2." in load_weights(small_model(91, enc_layers=3), path, official.COCO_CATEGORIES)


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


def test_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "best.pth", own_content())
    assert "0 missing" in load_weights(build_model("detr_tiny", 1), "~/best.pth", categories("balloon"))
    assert load("~/best.pth").categories == categories("dog", "balloon")


def test_url(server):
    content = own_content()
    saved(server.folder / "best.pth", content)
    assert "1 of 1 categories" in load_weights(build_model("detr_tiny", 1), server.url + "best.pth", categories("balloon"))
    assert load(server.url + "best.pth").categories == content["categories"]


# ------------------------------------------------------------------------------------------------------------------- masks


@pytest.fixture
def panoptic(tmp_path):
    """A file as the official panoptic ones are: a head of 250 classes, a segmentation head, and the names of DETRsegm."""
    state = state_of("detr_tiny", 250, num_queries=100, masks=True)
    assert all(name.startswith(("detr.", "bbox_attention.", "mask_head.")) for name in state)
    return saved(tmp_path / "detr-r50-panoptic-00ce5173.pth", {"model": state}), state


def test_a_panoptic_file_gives_its_segmentation_head_to_other_classes(panoptic):
    path, state = panoptic
    model = small_model(2, masks=True)
    report = load_weights(model, path, categories("cat", "balloon"))
    assert "\n" not in report
    assert report.endswith("; masks: the file's segmentation head kept")
    assert "no-object and 1 of 2 categories kept (cat), the others new" in report
    assert "0 missing, 0 unexpected" in report
    ours = model.state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in ours if "class_embed" not in name)
    assert torch.equal(ours["detr.class_embed.weight"][[0, 2]], state["detr.class_embed.weight"][[17, 250]])


def test_a_box_checkpoint_starts_the_box_part_of_a_model_with_masks(tmp_path, small):
    model = small_model(91, masks=True)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, saved(tmp_path / "boxes.pth", {"model": small}))
    assert report.endswith("; masks: the file has boxes only, the segmentation head is initialized at random")
    assert "0 missing, 0 unexpected" in report
    for name, value in model.state_dict().items():
        assert torch.equal(value, small[name.removeprefix("detr.")] if name.startswith("detr.") else fresh[name])


def test_a_checkpoint_with_masks_starts_a_box_model(panoptic):
    path, state = panoptic
    model = small_model(250)
    report = load_weights(model, path)
    assert report.endswith("; masks: the file's segmentation head left out, model.masks is false")
    assert "0 missing, 0 unexpected" in report
    assert all(torch.equal(value, state[f"detr.{name}"]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_masks_is_loaded_with_and_without_them(tmp_path, panoptic):
    path, state = panoptic
    model = load(path)
    assert model.settings["masks"]
    assert model.category_names == "coco"
    assert model.categories[17] == {"id": 17, "name": "cat"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    boxes = load(path, masks=False)
    assert not boxes.settings["masks"]
    assert boxes.notes == [f"{path}: its segmentation head is left out"]
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(boxes(images)["pred_boxes"], model(images)["pred_boxes"], atol=1e-5, rtol=1e-5)
    save_checkpoint(tmp_path / "own.pth", own_content(masks=True))
    assert load(tmp_path / "own.pth").settings["masks"]
