"""The whole network against numbers of the official model, and against the one in ``transformers`` with the same weights."""

import json
import re

import pytest
import torch
from torch import Tensor, nn

from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import DETR, build_model, postprocess
from tests.helpers import fill, padded

COEFS = {"eos_coef": 0.3, "bbox_loss_coef": 3, "giou_loss_coef": 4, "set_cost_class": 2}
FILES = [("detr_resnet50", {}, {}), ("detr_resnet50_coefs", {"aux_loss": False}, COEFS)]


@pytest.mark.parametrize(("file", "model_settings", "loss_settings"), FILES)
def test_the_official_models_numbers(oracle, file, model_settings, loss_settings):
    """Names and shapes, outputs, losses, gradients, post-processing."""
    numbers, targets = oracle(file)
    model = fill(build_model(dropout=0.0, **model_settings))
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected_names = json.loads(str(numbers["state_keys"]))
    assert names == expected_names
    assert list(names) == list(expected_names), "the optimizer's state goes by this order"

    images, mask = padded([(192, 256), (224, 160)])
    outputs = model.train()(images, mask)
    assert (outputs["pred_logits"] - torch.from_numpy(numbers["pred_logits"])).abs().max() < 1e-4
    assert (outputs["pred_boxes"] - torch.from_numpy(numbers["pred_boxes"])).abs().max() < 1e-4
    for i, layer in enumerate(outputs.get("aux_outputs", [])):
        assert layer["pred_logits"].sum().item() == pytest.approx(float(numbers[f"aux{i}_logits_sum"]), abs=0.2)
        assert layer["pred_boxes"].sum().item() == pytest.approx(float(numbers[f"aux{i}_boxes_sum"]), abs=1e-2)

    criterion = build_criterion(91, **model_settings, **loss_settings)
    losses = criterion(outputs, targets)
    losses["total"] = criterion.weighted_sum(losses)
    expected = {name.removeprefix("loss/"): float(value) for name, value in numbers.items() if name.startswith("loss/")}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)

    losses["total"].backward()
    norms = {f"grad_norm/{name}": each.grad.norm().item() for name, each in model.named_parameters() if each.grad is not None}
    # Some gradients are zero in theory (the first decoder layer attends among equals) and of the order of 1e-8 here and there.
    assert norms == {name: pytest.approx(float(numbers[name]), rel=1e-3, abs=1e-5) for name in numbers if name.startswith("grad_norm/")}

    with torch.no_grad():
        results = postprocess(model.eval()(images, mask), torch.tensor([[384, 512], [448, 320]]))
    for i, result in enumerate(results):
        assert (result["scores"] - torch.from_numpy(numbers[f"post{i}_scores"])).abs().max() < 1e-4
        assert torch.equal(result["labels"], torch.from_numpy(numbers[f"post{i}_labels"]))
        assert (result["boxes"] - torch.from_numpy(numbers[f"post{i}_boxes"])).abs().max() < 0.05


# --- the second referee

LAYER_NAMES = [
    (r"^transformer\.", "model."),
    (r"multihead_attn", "encoder_attn"),
    (r"(encoder\.layers\.\d+\.)norm1", r"\1self_attn_layer_norm"),
    (r"(encoder\.layers\.\d+\.)norm2", r"\1final_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm1", r"\1self_attn_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm2", r"\1encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d+\.)norm3", r"\1final_layer_norm"),
    (r"out_proj", "o_proj"),
    (r"linear(\d)", r"mlp.fc\1"),
    (r"decoder\.norm", "decoder.layernorm"),
    (r"^class_embed", "class_labels_classifier"),
    (r"^bbox_embed", "bbox_predictor"),
    (r"^query_embed", "model.query_position_embeddings"),
    (r"^input_proj", "model.input_projection"),
    (r"^backbone\.1\.row_embed", "model.position_embedding.row_embeddings"),
    (r"^backbone\.1\.col_embed", "model.position_embedding.column_embeddings"),
]
STEM = "model.backbone.model.embedder.embedder"


def their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of ``DetrForObjectDetection``, the fused attention projections taken apart."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("backbone.0.body."):
            renamed[_their_backbone_name(name.removeprefix("backbone.0.body."))] = tensor
            continue
        for pattern, replacement in LAYER_NAMES:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed.update({name.replace("in_proj_", f"{which}_proj."): part for which, part in parts})
        else:
            renamed[name] = tensor
    return renamed


def _their_backbone_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if "." not in module:
        return f"{STEM}.{'convolution' if module == 'conv1' else 'normalization'}.{kind}"
    stage, block, part, *rest = module.split(".")
    layer = f"model.backbone.model.encoder.stages.{int(stage[-1]) - 1}.layers.{block}"
    if part == "downsample":
        return f"{layer}.shortcut.{('convolution', 'normalization')[int(rest[0])]}.{kind}"
    return f"{layer}.layer.{int(part[-1]) - 1}.{'convolution' if part.startswith('conv') else 'normalization'}.{kind}"


def referee(model: DETR, loss_settings: dict) -> nn.Module:
    """``transformers``' DETR with the settings and weights of ours.

    Its DC5 is made here, as it has that from timm only. Its auxiliary losses stay off: with them it hands the normalized state
    of a decoder layer to the next one, which the official model (and its numbers above) does not.
    """
    transformers = pytest.importorskip("transformers")
    settings = model.settings
    depths = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}[settings["backbone"]]
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(depths=depths, layer_type="bottleneck", out_features=["stage4"]),
        use_timm_backbone=False,
        num_labels=settings["num_classes"],
        num_queries=settings["num_queries"],
        d_model=settings["hidden_dim"],
        encoder_layers=settings["enc_layers"],
        decoder_layers=settings["dec_layers"],
        encoder_attention_heads=settings["nheads"],
        decoder_attention_heads=settings["nheads"],
        encoder_ffn_dim=settings["dim_feedforward"],
        decoder_ffn_dim=settings["dim_feedforward"],
        position_embedding_type=settings["position_embedding"],
        dropout=0.0,
        **loss_settings,
    )
    theirs = transformers.DetrForObjectDetection(config).requires_grad_(True)
    if settings["dilation"]:
        first, *others = theirs.model.backbone.model.encoder.stages[3].layers
        first.layer[1].convolution.stride = first.shortcut.convolution.stride = (1, 1)
        for block in others:
            block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)
    theirs.load_state_dict(their_names(model.state_dict()))
    return theirs


@pytest.fixture
def in_float64():
    """So that rounding cannot push an element over ReLU's edge, and a gradient with it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SMALL = {"hidden_dim": 64, "nheads": 4, "dim_feedforward": 96, "enc_layers": 1, "dec_layers": 2, "num_queries": 20}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("detr_resnet50", {**SMALL, "position_embedding": "learned", "enc_layers": 3, "num_queries": 7}),
        ("detr_resnet50_dc5", {**SMALL, "nheads": 2, "dec_layers": 1}),
        ("detr_resnet101", SMALL),
        ("detr_resnet101_dc5", {"dec_layers": 3, "enc_layers": 2}),
    ],
)
def test_outputs_losses_and_gradients_of_the_other_settings(preset, settings):
    torch.manual_seed(0)
    model = fill(build_model(preset, 5, dropout=0.0, aux_loss=False, **settings))
    theirs = referee(model, {"eos_coefficient": 0.2, "bbox_loss_coefficient": 3})
    images, mask = padded([(64, 96), (80, 64)])
    targets = [{"labels": torch.randint(0, 5, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in (3, 9)]

    outputs = model(images, mask)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    expected = theirs(images, (~mask).long(), labels=labels)
    torch.testing.assert_close(outputs["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=0)

    criterion = build_criterion(5, eos_coef=0.2, bbox_loss_coef=3, aux_loss=False)
    losses = criterion(outputs, targets)
    loss = criterion.weighted_sum(losses)
    for name, value in expected.loss_dict.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    loss.backward()
    expected.loss.backward()
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    gradients = their_names({name: each.grad for name, each in parameters.items()})
    reference = dict(theirs.named_parameters())
    assert len(gradients) > 90
    for name, gradient in gradients.items():
        assert (gradient - reference[name].grad).norm() <= 1e-3 * reference[name].grad.norm() + 1e-6, name


# --- what holds for every network

TINY = {"num_classes": 3, "preset": "detr_tiny"}


def test_pre_norm_has_the_official_names():
    names = build_model("detr_tiny", pre_norm=True, position_embedding="learned").state_dict()
    extra = set(names) - set(build_model("detr_tiny").state_dict())
    assert extra == {f"transformer.encoder.norm.{kind}" for kind in ("weight", "bias")} | {
        f"backbone.1.{n}_embed.weight" for n in ("row", "col")
    }
    assert names["backbone.1.row_embed.weight"].shape == (50, 64)


def test_the_heads_start_as_the_official_ones():
    """nn.Linear's and nn.Embedding's own start; Xavier's is for the transformer only."""
    torch.manual_seed(0)
    model = build_model("detr_resnet50", 20)
    assert model.query_embed.weight.std().item() == pytest.approx(1, abs=0.02)
    assert 0.95 / 16 < model.class_embed.weight.abs().max() <= 1 / 16
    assert model.class_embed.bias.abs().max() > 0
    assert 0.95 / 16 < model.bbox_embed.layers[2].weight.abs().max() <= 1 / 16


def test_every_parameter_that_trains_gets_a_gradient():
    model = build_model(**TINY)
    outputs = model(torch.randn(2, 3, 64, 96))
    criterion = build_criterion(3, dec_layers=3)
    nothing = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    criterion.weighted_sum(criterion(outputs, nothing)).backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()]


def test_no_mask_means_nothing_is_padded():
    for position in ("sine", "learned"):
        model = build_model(**TINY, position_embedding=position).eval()
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            without, with_mask = model(images), model(images, torch.zeros(2, 64, 96, dtype=torch.bool))
        torch.testing.assert_close(without["pred_logits"], with_mask["pred_logits"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(without["pred_boxes"], with_mask["pred_boxes"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_auxiliary_outputs_are_those_of_shorter_decoders(pre_norm):
    images = torch.randn(1, 3, 64, 64)
    model = build_model(**TINY, pre_norm=pre_norm).eval()
    with torch.no_grad():
        outputs = model(images)
        assert len(outputs["aux_outputs"]) == 2
        for layers, expected in enumerate((*outputs["aux_outputs"], outputs), start=1):
            shorter = build_model(**TINY, pre_norm=pre_norm, dec_layers=layers, aux_loss=False).eval()
            shorter.load_state_dict({name: model.state_dict()[name] for name in shorter.state_dict()})
            found = shorter(images)
            assert set(found) == {"pred_logits", "pred_boxes"}
            for name in found:
                torch.testing.assert_close(found[name], expected[name])


def test_the_exported_network_gives_the_same_and_leaves_this_one_as_it_was():
    model = build_model(**TINY, aux_loss=False).eval()
    images = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        for name, expected in model(images).items():
            torch.testing.assert_close(exported(images)[name], expected)


def test_outputs_are_float32_under_autocast():
    model = build_model(**TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images)
    assert rounded["pred_logits"].dtype == rounded["pred_boxes"].dtype == torch.float32
    torch.testing.assert_close(rounded["pred_boxes"], exact["pred_boxes"], atol=0.05, rtol=0)


def test_the_settings_build_the_same_network_again():
    model = build_model("detr_tiny", 4, num_queries=9, pre_norm=True)
    again = build_model(**model.settings)
    assert again.settings == model.settings
    again.load_state_dict(model.state_dict())
    assert model.settings["preset"] == "detr_tiny"
    assert "weights" not in model.settings


def test_tiny_is_tiny():
    assert sum(each.numel() for each in build_model(**TINY).parameters()) < 1.5e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_querys": 5}, "unknown setting 'model.num_querys'; did you mean 'model.num_queries'"),
        ({"preset": "detr_resnet18"}, "model.preset: 'detr_resnet18' is out of bounds"),
        ({"dropout": 2}, "model.dropout: 2 is out of bounds; it takes 0.0 to 0.9"),
        ({"hidden_dim": 100}, "model.hidden_dim: 100 is not a multiple of model.nheads"),
        ({"num_classes": 0}, "num_classes: 0 is out of bounds"),
        ({"weights": "coco"}, "model.weights: build_model starts from random weights"),
        ({"preset": "detr_tiny", "dilation": True}, "model.dilation: the tiny backbone has no stage to dilate"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_model(**settings)


def test_postprocess_takes_the_best_class_that_is_an_object():
    logits = torch.tensor([[[1.0, 3.0, 9.0], [2.0, 1.0, 0.0]]])  # the first query is most of all no object
    boxes_cxcywh = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]]])
    (result,) = postprocess({"pred_logits": logits, "pred_boxes": boxes_cxcywh}, torch.tensor([[100, 200]]))
    assert result["labels"].tolist() == [1, 0]
    torch.testing.assert_close(result["scores"], logits.softmax(-1)[0, [0, 1], [1, 0]])
    assert result["boxes"].tolist() == [[50.0, 25.0, 150.0, 75.0], [0.0, 0.0, 100.0, 100.0]]
