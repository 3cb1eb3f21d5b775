import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.cli import main
from raydetr.config import load_config, to_dict
from raydetr.data.masks import decode_masks, read_segmentation
from raydetr.errors import UserError
from raydetr.export.checks import compare
from raydetr.export.export import export
from raydetr.export.onnx import OnnxModel
from raydetr.model.detr import DETR, build_model
from raydetr.predict.predict import predict
from raydetr.predict.score import trained_with
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.fitting import load, load_weights
from raydetr.weights.huggingface import from_huggingface, to_huggingface

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
CATEGORIES = [{"id": 7, "name": "oblong"}, {"id": 3, "name": "square"}]
SMALL_RESNET = {"enc_layers": 1, "dec_layers": 2, "num_queries": 5, "dim_feedforward": 64}


def write_checkpoint(path, preset, data, categories=CATEGORIES, **model):
    """A checkpoint with random weights, trained, as its settings say, on ``data`` at 64 pixels."""
    torch.manual_seed(0)
    network = build_model(preset, len(categories), **model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    names = {"model.preset": preset, "data.path": str(data), "data.val_size": 64, "data.max_size": 128}
    config = load_config(names | {f"model.{name}": value for name, value in model.items()})
    save_checkpoint(path, {"model": network.state_dict(), "settings": to_dict(config), "categories": categories, "epoch": 1, "metrics": {}})
    return path


@pytest.fixture
def tiny(tmp_path, coco_folder):
    return write_checkpoint(tmp_path / "tiny.pth", "detr_tiny", coco_folder(val=3, size=(96, 64)), enc_layers=1, dec_layers=1)


@pytest.fixture
def resnet(tmp_path, coco_folder):
    return write_checkpoint(tmp_path / "resnet.pth", "detr_resnet50", coco_folder(val=3), **SMALL_RESNET)


@pytest.mark.slow
def test_onnx_computes_the_same_at_every_size_and_the_example_finds_the_same_boxes(tiny, tmp_path, capsys):
    assert main(["export", str(tiny), str(tmp_path / "model.onnx"), "--to", "onnx"]) == 0
    assert "the same outputs" in capsys.readouterr().out
    image = tmp_path / "large.png"  # 64 pixels on the short side already: resizing has no part in the comparison
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 120, 3), dtype=np.uint8)).save(image)
    command = [sys.executable, "-I", EXAMPLE, tmp_path / "model.onnx", image, "--threshold", "0"]
    found = [json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()]
    predict(tiny, [image], tmp_path / "seen", threshold=0.0)
    expected = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert len(found) == len(load(tiny).query_embed.weight)
    np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in expected], atol=1e-4)
    assert {each["category_id"] for each in found} <= {3, 7}


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "size"), [({"precision": "fp16"}, 0.7), ({"quantize": True}, 1.2)])
def test_reduced_precision_says_what_it_costs_boxes_and_masks(tiny_masks, tmp_path, caplog, reduction, size):
    annotations = tmp_path / "data" / "annotations" / "custom_val.json"
    coco = json.loads(annotations.read_text())
    for each in coco["annotations"]:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotations.write_text(json.dumps(coco))
    reduced = export(tiny_masks, tmp_path / "reduced.onnx", "onnx", **reduction)
    assert "pre-processing" not in caplog.text, "advice of onnxruntime's"
    assert set(reduced.AP) == {"boxes", "masks"}
    assert all(score is not None for pair in reduced.AP.values() for score in pair)
    assert re.search(r"AP on the validation set of boxes \S+ \(\S+ before\), of masks \S+ \(\S+ before\)$", reduced.text())
    model = load(tiny_masks)
    full = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert (tmp_path / "reduced.onnx").stat().st_size < size * full, "convolutions whose weights are computed stay float32"
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = model(images)["pred_masks"].sigmoid(), OnnxModel(tmp_path / "reduced.onnx")(images)["pred_masks"].sigmoid()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_transformers_loads_the_folder_and_finds_the_same(resnet, tmp_path):
    from transformers import AutoImageProcessor, DetrForObjectDetection, pipeline

    folder = tmp_path / "folder"
    assert export(resnet, folder, "transformers").difference < 1e-5
    model = DetrForObjectDetection.from_pretrained(folder)
    assert model.config.id2label == {0: "oblong", 1: "square"}
    assert model.config.category_ids == [7, 3]
    assert dict(AutoImageProcessor.from_pretrained(folder).size) | {} == {"shortest_edge": 64, "longest_edge": 128}
    image = Image.new("RGB", (90, 64), (200, 30, 30))
    assert pipeline("object-detection", model=str(folder), threshold=0.0)(image)[0]["label"] in ("oblong", "square")


def test_the_folder_of_transformers_is_read_back(resnet, tmp_path):
    export(resnet, tmp_path / "folder", "transformers")
    one, other = load(resnet), load(tmp_path / "folder")
    assert other.categories == one.categories
    assert other.category_names == "file"
    assert other.settings == one.settings | {"preset": other.settings["preset"]}
    state = other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())
    known = trained_with(tmp_path / "folder", other)
    assert (known["data.val_size"], known["data.max_size"]) == (64, 128)
    fresh = DETR(load_config({f"model.{name}": value for name, value in one.settings.items() if name != "num_classes"}).model, 2)
    said = load_weights(fresh, str(tmp_path / "folder"), one.categories)
    assert "0 missing, 0 unexpected" in said
    assert torch.equal(fresh.class_embed.weight, one.class_embed.weight)


def test_earlier_names_of_transformers_are_known(resnet, tmp_path):
    from safetensors.torch import load_file, save_file

    export(resnet, tmp_path / "folder", "transformers")
    file = tmp_path / "folder" / "model.safetensors"
    state = {name.replace("_attn.o_proj.", "_attn.out_proj.").replace(".mlp.", "."): tensor for name, tensor in load_file(file).items()}
    save_file(state, file)
    (tmp_path / "folder" / "preprocessor_config.json").write_text('{"size": 96, "max_size": 160}')
    known = trained_with(tmp_path / "folder", load(tmp_path / "folder"))
    assert (known["data.val_size"], known["data.max_size"]) == (96, 160)
    one, other = load(resnet).state_dict(), load(tmp_path / "folder").state_dict()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "not a sound model folder of transformers"),
        ("config.json", b"[]", "not a sound model folder of transformers"),
        ("config.json", b'{"id2label": {"a": "b"}}', "not a sound model folder of transformers"),
        ("preprocessor_config.json", b"7", "not a sound model folder of transformers"),
        ("model.safetensors", b"no tensors", "not a sound model folder of transformers"),
        ("model.safetensors", None, "and no DETR that detects boxes"),
    ],
)
def test_other_folders_of_transformers_are_named(resnet, tmp_path, name, content, said):
    from safetensors.torch import save_file

    export(resnet, tmp_path / "folder", "transformers")
    if content is None:
        save_file({"model.a": torch.ones(1)}, tmp_path / "folder" / name)
    else:
        (tmp_path / "folder" / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path / "folder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("masks", [False, True])
def test_names_of_transformers_lead_back_to_the_official_ones(masks):
    state = build_model("detr_resnet101", 2, position_embedding="learned", masks=masks, **SMALL_RESNET).state_dict()
    back = from_huggingface(to_huggingface(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.fixture
def resnet_masks(tmp_path, coco_folder):
    return write_checkpoint(tmp_path / "masks.pth", "detr_resnet50", coco_folder(val=2), masks=True, **SMALL_RESNET)


@pytest.fixture
def tiny_masks(tmp_path, coco_folder):
    return write_checkpoint(tmp_path / "masks.pth", "detr_tiny", coco_folder(val=3, size=(96, 64)), masks=True, enc_layers=1, dec_layers=1)


def test_transformers_computes_the_same_masks_and_its_folder_is_read_back(resnet_masks, tmp_path):
    from safetensors.torch import load_file
    from transformers import DetrForSegmentation

    assert export(resnet_masks, tmp_path / "folder", "transformers").difference < 1e-5
    theirs, ours = DetrForSegmentation.from_pretrained(tmp_path / "folder"), load(resnet_masks)
    images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = mask[1, :, 96:] = True
    with torch.no_grad():
        outputs, expected = ours(images, mask), theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(outputs[name], expected[name.replace("pred_logits", "logits")], atol=1e-4, rtol=1e-4)
    assert outputs["pred_masks"].std() > 0.1
    # The file has the names of transformers 4, and of DETR's own head: whoever has either reads it.
    names = load_file(tmp_path / "folder" / "model.safetensors").keys()
    for other in (load(tmp_path / "folder"), _renamed_by_version_5(tmp_path / "folder")):
        assert other.settings["masks"]
        state = other.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())
    assert any("mask_head" in name for name in names)


def _renamed_by_version_5(folder):
    """The model of a folder whose tensors have the names that transformers 5 has in memory."""
    from safetensors.torch import save_file
    from transformers import DetrForSegmentation

    state = DetrForSegmentation.from_pretrained(folder).state_dict()
    assert "mask_head.fpn_stages.0.refine.conv.weight" in state
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return load(folder)


@pytest.mark.slow
def test_onnx_computes_the_same_masks_at_every_size_and_the_example_finds_them(tiny_masks, tmp_path):
    assert export(tiny_masks, tmp_path / "model.onnx", "onnx").difference < 1e-4
    theirs, ours = OnnxModel(tmp_path / "model.onnx"), load(tiny_masks)
    for batch, height, width in ((1, 64, 96), (3, 80, 112)):
        images, mask = torch.randn(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)
        mask[-1, :, width // 2 :] = batch > 1
        with torch.no_grad():
            expected, found = ours(images, mask)["pred_masks"], theirs(images, mask)["pred_masks"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    image = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 120, 3), dtype=np.uint8)).save(image)
    command = [sys.executable, "-I", EXAMPLE, tmp_path / "model.onnx", image, "--threshold", "0"]
    found = [json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()]
    predict(tiny_masks, [image], tmp_path / "seen", threshold=0.0)
    expected = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    theirs, ours = (
        decode_masks([read_segmentation(each["segmentation"], (64, 120)) for each in part], (64, 120)) for part in (found, expected)
    )
    assert 0.01 < ours.mean() < 0.99
    assert (theirs != ours).mean() < 1e-3  # pixels whose logit is near 0


@pytest.mark.parametrize("to", ["safetensors", "torchscript"])
def test_masks_are_in_every_other_format_as_well(tiny_masks, tmp_path, to):
    done = export(tiny_masks, tmp_path / "model", to)
    assert done.difference < 1e-5
    assert not done.notes
    if to == "torchscript":
        images, mask = torch.randn(2, 3, 80, 112), torch.zeros(2, 80, 112, dtype=torch.bool)
        with torch.no_grad():
            _, _, masks = torch.jit.load(tmp_path / "model")(images, mask)
            torch.testing.assert_close(masks, load(tiny_masks)(images, mask)["pred_masks"], atol=1e-4, rtol=1e-4)


def test_an_export_whose_masks_differ_is_an_error(tiny_masks, tmp_path, monkeypatch):
    from raydetr.export import torch_files

    def broken(file, model):
        other = load(tiny_masks)
        with torch.no_grad():
            other.mask_head.out_lay.bias += 1e-2
        return other

    monkeypatch.setattr(torch_files, "read_safetensors", broken)
    with pytest.raises(UserError, match="its outputs differ from the checkpoint's by"):
        export(tiny_masks, tmp_path / "model.safetensors", "safetensors")


def test_the_official_file_of_a_masks_model_has_the_official_names(resnet_masks, tmp_path):
    export(resnet_masks, tmp_path / "official.pth", "official")
    state, ours = (read_checkpoint(path)["model"] for path in (tmp_path / "official.pth", resnet_masks))
    assert state.keys() == ours.keys()
    assert len(state["detr.class_embed.weight"]) == 9  # ids 0 to 7 and no-object
    assert load(tmp_path / "official.pth").settings["masks"]


def test_official_head_has_a_row_for_each_id(resnet, tmp_path):
    export(resnet, tmp_path / "official.pth", "official")
    state = read_checkpoint(tmp_path / "official.pth")["model"]
    ours = read_checkpoint(resnet)["model"]
    assert state.keys() == ours.keys()
    assert len(state["class_embed.weight"]) == 9  # ids 0 to 7 and no-object
    assert torch.equal(state["class_embed.weight"][[7, 3, 8]], ours["class_embed.weight"])
    assert (state["class_embed.bias"][[0, 1, 2, 4, 5, 6]] < -1000).all()


def test_safetensors_carry_names_and_categories(tiny, tmp_path):
    from safetensors import safe_open

    export(tiny, tmp_path / "model.safetensors", "safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["categories"]) == CATEGORIES
        assert set(file.keys()) == read_checkpoint(tiny)["model"].keys()


def test_torchscript_runs_at_other_sizes_without_raydetr(tiny, tmp_path):
    assert export(tiny, tmp_path / "model.ts", "torchscript").difference < 1e-5
    images = torch.randn(1, 3, 80, 112)
    torch.save(images, tmp_path / "images.pt")
    code = "import sys, torch; m = torch.jit.load(sys.argv[1]); x = torch.load(sys.argv[2]); "
    code += "torch.save(m(x, torch.zeros(1, 80, 112, dtype=torch.bool)), sys.argv[3]); assert 'raydetr' not in sys.modules"
    command = [sys.executable, "-W", "ignore", "-I", "-c", code, *(tmp_path / name for name in ("model.ts", "images.pt", "out.pt"))]
    subprocess.run(command, check=True)
    logits, _ = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        torch.testing.assert_close(logits, load(tiny)(images)["pred_logits"], atol=1e-5, rtol=0)


def test_an_export_that_differs_is_an_error_and_leaves_no_file(tiny, tmp_path, monkeypatch):
    from raydetr.export import torch_files

    def broken(file, model):
        other = load(tiny)
        with torch.no_grad():
            other.class_embed.bias[0] += 1e-3
        return other

    monkeypatch.setattr(torch_files, "read_safetensors", broken)
    with pytest.raises(UserError, match="its outputs differ from the checkpoint's by"):
        export(tiny, tmp_path / "out" / "model.safetensors", "safetensors")
    assert not list((tmp_path / "out").iterdir())


def test_not_a_number_differs():
    model = build_model("detr_tiny", 1, aux_loss=False).eval()
    batch = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    queries = model.settings["num_queries"]
    nothing = torch.full((1, queries, 2), torch.nan), torch.full((1, queries, 4), torch.nan)
    with pytest.raises(UserError, match="differ"):
        compare(model, lambda *_: nothing, [batch], 1.0, "it")


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("transformers", {}, "no DETR with model.backbone tiny"),
        ("official", {}, "no tiny backbone"),
        ("safetensors", {"precision": "fp16"}, "are for --to onnx"),
        ("caffe", {}, "not one of"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tiny, tmp_path, to, options, said):
    with pytest.raises(UserError, match=said):
        export(tiny, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_ids_too_large_for_the_official_head(tmp_path, coco_folder):
    categories = [{"id": 123456789, "name": "square"}]
    path = write_checkpoint(tmp_path / "ids.pth", "detr_resnet50", coco_folder(), categories, **SMALL_RESNET)
    with pytest.raises(UserError, match="category id 123456789"):
        export(path, tmp_path / "out.pth", "official")


def test_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        export(tiny, tmp_path / "mine", "safetensors")
    assert (tmp_path / "mine").read_text() == "kept"


def test_without_images_there_is_nothing_to_compare(tmp_path, coco_folder):
    path = write_checkpoint(tmp_path / "tiny.pth", "detr_tiny", coco_folder())
    content = read_checkpoint(path)
    content["settings"]["data"]["path"] = None
    save_checkpoint(path, content)
    with pytest.raises(UserError, match="--images"):
        export(path, tmp_path / "out", "safetensors")
