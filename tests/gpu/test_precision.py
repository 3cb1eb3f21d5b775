"""The arithmetic of GPUs, bf16 and fp16 autocast, on the CPU: how far it is from float32."""

import pytest
import torch

from benchmarks.gpu import distance_from_official
from raydetr.config import load_config
from raydetr.data.coco import CocoImages, build_loader, find_split
from raydetr.data.formats.convert import convert
from raydetr.data.transforms import val_transforms
from raydetr.demo.balloons import generate
from raydetr.evaluate.coco import run_coco_eval, summarize
from raydetr.loss.criterion import build_criterion
from raydetr.training.engine import evaluate
from raydetr.training.fit import fit
from raydetr.training.reporter import LocalReporter
from raydetr.weights.fitting import load

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BOUNDS = {
    "bf16": {"logits": 5e-2, "boxes": 4e-3, "losses": 4e-3, "gradient norms": 5e-2, "median gradient norm": 8e-3},
    "fp16": {"logits": 7e-3, "boxes": 6e-4, "losses": 6e-4},  # its gradients need the loss scaler
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_official_models_numbers_in_half_precision(precision):
    found = distance_from_official(CPU, precision)
    for name, bound in BOUNDS[precision].items():
        assert bound / 100 < found[name] < bound, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that is fine-tuned on balloons as the demo does it, and 96 images that it has not seen."""
    folder = tmp_path_factory.mktemp("balloons")
    generate(folder / "via", train=24, val=96)
    convert(folder / "via", folder / "data", "via")
    small = {"model.preset": "detr_tiny", "optim.epochs": 3, "data.num_workers": 0, "run.pictures": 0, "run.name": "run"}
    config = load_config(small, {"data.path": str(folder / "data"), "run.storage": str(folder)})
    fit(config, LocalReporter())
    images = CocoImages(find_split(config.data, "val"), val_transforms(config.data))
    return load(folder / "run" / "best.pth"), images


def ap(trained, dtype):
    model, images = trained
    _, detections = evaluate(model, build_criterion(1, dec_layers=3), build_loader(images, 8), CPU, dtype)
    return summarize(run_coco_eval(images.coco, detections.results(images.categories)), images.categories)["AP"]


def test_half_precision_finds_the_same(trained):
    exact = ap(trained, torch.float32)
    assert exact > 0.3, "a model that finds something"
    for dtype in (torch.bfloat16, torch.float16):
        assert ap(trained, dtype) == pytest.approx(exact, abs=0.002), dtype
