"""The arithmetic of GPUs, autocast to bf16 and fp16, for real on the CPU: how far it is from float32."""

from collections.abc import Iterator

import pytest
import torch
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import resize

from benchmarks.gpu import distance_from_official
from raydetr import load
from raydetr.demo.pretrain_tiny import HEIGHT, NAMES, PHASES, WIDTH, Pool, normalized
from raydetr.evaluate.coco import coco_metrics
from raydetr.loss.criterion import build_criterion
from raydetr.training.engine import Batch, evaluate
from raydetr.weights.official import BUNDLED

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BOUNDS = {
    "bf16": {"logits": 5e-2, "boxes": 5e-3, "losses": 6e-3, "gradient norms": 7e-2, "median gradient norm": 8e-3},
    "fp16": {"logits": 7e-3, "boxes": 7e-4, "losses": 8e-4},  # its backward pass takes a CPU half a minute
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_official_models_numbers(precision):
    found = distance_from_official(CPU, precision, gradients=precision == "bf16")
    assert found.keys() == BOUNDS[precision].keys()
    for name, bound in BOUNDS[precision].items():
        assert bound / 100 < found[name] < bound, name


IMAGES = 96
SIZE = PHASES[-1].size  # of the bundled model's pre-training


@pytest.fixture(scope="module")
def drawn():
    """Images of the kind that the bundled model was trained on, and their COCO data set."""
    pool = Pool(seed=1, size=IMAGES)  # training drew from seed 0
    pixels = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    annotations = []
    for number, (boxes_xyxy, labels) in enumerate(pool.truth):
        for box, label in zip(box_convert(boxes_xyxy * pixels, "xyxy", "xywh").tolist(), labels.tolist(), strict=True):
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            annotations.append(known | {"iscrowd": 0})
    coco = {
        "images": [{"id": number, "width": WIDTH, "height": HEIGHT} for number in range(IMAGES)],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(NAMES)],
    }
    return pool, coco


def batches_of(pool: Pool) -> Iterator[Batch]:
    images = normalized(resize(pool.images, list(SIZE), antialias=True).float())
    for start in range(0, IMAGES, 16):
        numbers = range(start, start + 16)
        targets = [
            {
                "boxes": box_convert(pool.truth[number][0], "xyxy", "cxcywh"),
                "labels": pool.truth[number][1],
                "image_id": torch.tensor([number]),
                "orig_size": torch.tensor([HEIGHT, WIDTH]),
            }
            for number in numbers
        ]
        yield images[start : start + 16], None, targets


@pytest.fixture(scope="module")
def average_precision(drawn):
    """``average_precision(dtype)`` of the bundled model, evaluated as a run evaluates it."""
    pool, coco = drawn
    model, criterion = load(BUNDLED), build_criterion(len(NAMES), dec_layers=3)

    def of(dtype: torch.dtype) -> float:
        _, detections = evaluate(model, criterion, batches_of(pool), CPU, dtype)
        return coco_metrics(coco, detections.results(coco["categories"]))["AP"]

    return of


def test_the_demos_model_finds_as_much_in_half_precision(average_precision):
    exact = average_precision(torch.float32)
    assert exact > 0.1
    for dtype in (torch.bfloat16, torch.float16):
        assert average_precision(dtype) == pytest.approx(exact, abs=0.002), dtype
