import json
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.loss.matcher import NonFiniteCost, match

CLASSES, QUERIES = 5, 8


def make_outputs(images: int, layers: int = 3, seed: int = 0, dtype=torch.float32) -> dict:
    """Leaves, so that gradients can be read off them; ``aux_outputs`` for all layers but the last."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        logits = 2 * torch.randn(images, QUERIES, CLASSES + 1, generator=generator)
        boxes_cxcywh = 0.1 + 0.4 * torch.rand(images, QUERIES, 4, generator=generator)
        made.append({"pred_logits": logits.to(dtype).requires_grad_(), "pred_boxes": boxes_cxcywh.to(dtype).requires_grad_()})
    return {**made[-1], "aux_outputs": made[:-1]}


def make_targets(*counts: int, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"labels": torch.randint(0, CLASSES, (n,), generator=generator), "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator)}
        for n in counts
    ]


def part_of(outputs: dict, images: slice) -> dict:
    """The outputs of some images of the batch, in the same graph."""
    cut = lambda layer: {name: layer[name][images] for name in ("pred_logits", "pred_boxes")}  # noqa: E731
    return {**cut(outputs), "aux_outputs": [cut(layer) for layer in outputs["aux_outputs"]]}


def leaves(outputs: dict) -> list[torch.Tensor]:
    return [layer[name] for layer in (*outputs["aux_outputs"], outputs) for name in ("pred_logits", "pred_boxes")]


def one_layer_by_the_book(layer: dict, targets: list[dict], eos_coef: float) -> dict[str, float]:
    """The official criterion for one decoder layer, image by image."""
    logits, boxes_cxcywh = layer["pred_logits"].detach(), layer["pred_boxes"].detach()
    num_boxes = max(1, sum(len(target["labels"]) for target in targets))
    classes = torch.full(logits.shape[:2], CLASSES)
    l1 = giou = right = matched = 0.0
    for i, target in enumerate(targets):
        pairs = match(logits[None, i : i + 1], boxes_cxcywh[None, i : i + 1], [target], (1, 5, 2))
        query, chosen = pairs.query[0], pairs.target[0]
        classes[i, query] = target["labels"][chosen]
        predicted, true = boxes_cxcywh[i, query], target["boxes"][chosen]
        l1 += (predicted - true).abs().sum().item()
        overlap = generalized_box_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
        giou += (1 - overlap.diagonal()).sum().item()
        right += (logits[i, query].argmax(-1) == target["labels"][chosen]).sum().item()
        matched += len(query)
    weight = torch.ones(CLASSES + 1)
    weight[CLASSES] = eos_coef
    counts = torch.tensor([len(target["labels"]) for target in targets], dtype=torch.float32)
    objects = (logits.argmax(-1) != CLASSES).sum(1).float()
    return {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, weight).item(),
        "loss_bbox": l1 / num_boxes,
        "loss_giou": giou / num_boxes,
        "class_error": 100 - 100 * right / matched if matched else 100.0,
        "cardinality_error": F.l1_loss(objects, counts).item(),
    }


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_coefs"])
def test_the_official_numbers(oracle, name):
    """Of the last decoder layer, from the stored outputs; the whole network with all layers is in tests/model."""
    numbers, targets = oracle(name)
    settings = {"eos_coef": 0.3, "bbox_loss_coef": 3, "giou_loss_coef": 4, "set_cost_class": 2, "aux_loss": False}
    criterion = build_criterion(91, **(settings if name.endswith("coefs") else {}))
    assert criterion.weight_dict == json.loads(str(numbers["weight_dict"]))
    losses = criterion({key: torch.from_numpy(numbers[key]) for key in ("pred_logits", "pred_boxes")}, targets)
    assert len(losses) == 5
    for key, value in losses.items():
        assert value.item() == pytest.approx(float(numbers[f"loss/{key}"]), rel=1e-5)


@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (0, 0), (11, 2, 0), (8,)])
def test_all_layers_at_once_are_each_alone(counts):
    """Also with images without boxes, and with more boxes than queries."""
    outputs, targets = make_outputs(len(counts)), make_targets(*counts)
    losses = build_criterion(CLASSES, eos_coef=0.2)(outputs, targets)
    expected = one_layer_by_the_book(outputs, targets, 0.2)
    for i, layer in enumerate(outputs["aux_outputs"]):
        auxiliary = one_layer_by_the_book(layer, targets, 0.2)
        del auxiliary["class_error"]
        expected.update({f"{key}_{i}": value for key, value in auxiliary.items()})
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (20, 1)])
def test_gradients_are_defined_whatever_the_boxes(counts):
    outputs = make_outputs(2)
    criterion = build_criterion(CLASSES)
    criterion.weighted_sum(criterion(outputs, make_targets(*counts))).backward()
    for leaf in leaves(outputs):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_no_weight_for_no_object_and_no_box():
    outputs = make_outputs(2)
    criterion = build_criterion(CLASSES, eos_coef=0)
    losses = criterion(outputs, make_targets(0, 0))
    assert losses["loss_ce"].item() == losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    assert losses["class_error"].item() == 100


@pytest.mark.parametrize("counts", [(3, 0, 11, 1, 2), (0, 0, 0, 0, 5), (0, 0, 0, 0, 0)])
def test_micro_batches_add_up_to_the_big_batch(counts):
    """Losses, errors and gradients, with box counts that differ from micro-batch to micro-batch."""
    criterion, targets = build_criterion(CLASSES, dec_layers=3), make_targets(*counts)
    whole = make_outputs(5)
    expected = criterion(whole, targets)
    criterion.weighted_sum(expected).backward()

    parted = make_outputs(5)
    pieces = [slice(0, 2), slice(2, 3), slice(3, 5)]
    normalizers = criterion.normalizers([targets[piece] for piece in pieces], QUERIES)
    sums = dict.fromkeys(expected, 0.0)
    for piece in pieces:
        losses = criterion(part_of(parted, piece), targets[piece], normalizers)
        criterion.weighted_sum(losses).backward()
        sums = {name: sums[name] + losses[name].item() for name in expected}
    assert sums == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-6)
    for one, other in zip(leaves(parted), leaves(whole), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_sums_do_not_depend_on_the_batches():
    criterion, targets, outputs = build_criterion(CLASSES, dec_layers=3), make_targets(3, 0, 11, 1, 2), make_outputs(5)
    expected = {name: value.item() for name, value in criterion(outputs, targets).items()}
    for pieces in ([slice(0, 5)], [slice(0, 1), slice(1, 2), slice(2, 5)], [slice(0, 4), slice(4, 5)]):
        parts = [criterion.sums(part_of(outputs, piece), targets[piece]) for piece in pieces]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        means = criterion.means(total)
        assert means == pytest.approx({name: expected[name] for name in means}, rel=1e-5)
        assert set(expected) - set(means) == {"cardinality_error_0", "cardinality_error_1"}
        counts = {name: total[name].item() for name in ("num_boxes", "matched", "images")}
        assert counts == {"num_boxes": 17, "matched": 3 + 8 + 1 + 2, "images": 5}
        assert all(value.dtype == torch.float64 and value.dim() == 0 and not value.requires_grad for value in total.values())


def test_sums_of_images_without_boxes():
    criterion = build_criterion(CLASSES, dec_layers=3)
    means = criterion.means(criterion.sums(make_outputs(2), make_targets(0, 0)))
    assert means["class_error"] == 100
    assert means["loss_bbox"] == means["loss_giou_1"] == 0
    assert means["loss_ce"] > 0


def test_the_weighted_sum_takes_what_has_a_weight():
    criterion = build_criterion(CLASSES, dec_layers=2, cls_loss_coef=3, bbox_loss_coef=7, giou_loss_coef=0.5)
    assert criterion.weight_dict == {f"loss_{n}{s}": w for s in ("", "_0") for n, w in (("ce", 3), ("bbox", 7), ("giou", 0.5))}
    losses = {name: torch.tensor(1.0) for name in (*criterion.weight_dict, "class_error", "cardinality_error", "cardinality_error_0")}
    assert criterion.weighted_sum(losses).item() == 2 * (3 + 7 + 0.5)
    assert set(build_criterion(CLASSES, aux_loss=False).weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    """Half-precision outputs are computed with as if they had come in float32, whether or not autocast is on."""
    outputs, targets = make_outputs(2, dtype=dtype), make_targets(3, 1)
    exact = {name: [{k: v.detach().float() for k, v in layer.items()} for layer in outputs[name]] for name in ("aux_outputs",)}
    exact |= {name: outputs[name].detach().float() for name in ("pred_logits", "pred_boxes")}
    criterion = build_criterion(CLASSES, dec_layers=3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(outputs, targets)
        criterion.weighted_sum(losses).backward()
    for name, expected in criterion(exact, targets).items():
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], expected), name
    assert outputs["pred_logits"].grad.dtype == dtype


def test_outputs_that_are_not_finite():
    outputs = make_outputs(2)
    with torch.no_grad():
        outputs["aux_outputs"][0]["pred_logits"][1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteCost) as caught:
        build_criterion(CLASSES)(outputs, make_targets(2, 2))
    assert caught.value.images == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_coeff": 0.1}, "unknown setting 'loss.eos_coeff'; did you mean 'loss.eos_coef'"),
        ({"eos_coef": 2}, "loss.eos_coef: 2 is out of bounds; it takes 0.0 to 1.0"),
        ({"set_cost_clas": 1}, "did you mean 'matcher.set_cost_class'"),
        ({"set_cost_class": 0, "set_cost_bbox": 0, "set_cost_giou": 0}, "matcher: all three costs are 0"),
        ({"num_queries": 5}, "num_queries"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_criterion(CLASSES, **settings)


# --- two workers

COUNTS = ((5, 0), (0, 0))  # the second worker has no box at all


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        criterion, outputs = build_criterion(CLASSES, dec_layers=3), make_outputs(2, seed=rank)
        targets = make_targets(*COUNTS[rank])
        losses = criterion(outputs, targets)
        criterion.weighted_sum(losses).backward()
        accumulated = criterion.normalizers([targets, targets, targets], QUERIES)
        sums = criterion.sums(outputs, targets)
        torch.save(
            {
                "losses": {name: value.item() for name, value in losses.items()},
                "accumulated": float(accumulated.num_boxes),
                "own": sums["num_boxes"].item(),
                "gradient": outputs["pred_boxes"].grad,
            },
            f"{folder}/{rank}.pt",
        )
    finally:
        dist.destroy_process_group()


def test_two_workers_share_the_number_of_boxes(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = build_criterion(CLASSES, dec_layers=3)(make_outputs(2, seed=0), make_targets(*COUNTS[0]))
    # Alone it is divided by 5 boxes, together by 5 / 2.
    for name in ("loss_bbox", "loss_giou", "loss_bbox_1", "loss_giou_0"):
        assert first["losses"][name] == pytest.approx(2 * alone[name].item())
        assert second["losses"][name] == 0
    assert first["losses"]["loss_ce"] == pytest.approx(alone["loss_ce"].item()), "classification is each worker's own mean"
    assert second["gradient"].eq(0).all()
    assert first["accumulated"] == second["accumulated"] == 15 / 2
    assert (first["own"], second["own"]) == (5, 0)
