"""The script that made detr_tiny's weights still makes such weights."""

import numpy as np
import pytest
import torch

from raydetr import load
from raydetr.demo.pretrain_tiny import NAMES, PHASES, Phase, Pool, dense_loss, draw, forward, jump_start, train
from raydetr.model.detr import build_model


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(seed=0, size=12)


def test_pictures_are_drawn_from_the_generator_alone():
    (image, boxes, labels, visible), again = draw(np.random.default_rng(3)), draw(np.random.default_rng(3))
    assert (image == again[0]).all()
    assert (boxes == again[1]).all()
    assert (labels == again[2]).all()
    assert (visible == again[3]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_batches_are_normalized_crops_with_boxes_inside(pool):
    images, targets = pool.batch(8, 64, 80)
    assert images.shape == (8, 3, 64, 80)
    assert images.abs().max() < 4
    for target in targets:
        center, size = target["boxes"][:, :2], target["boxes"][:, 2:]
        assert (center - size / 2).min() > -1e-6 if len(size) else True
        assert (center + size / 2).max() < 1 + 1e-6 if len(size) else True
        assert len(target["labels"]) == len(size)


def test_the_dense_loss_is_nothing_where_every_place_is_right():
    box = torch.tensor([[0.5, 0.5, 0.6, 0.6]])
    targets = [{"boxes": box, "labels": torch.tensor([2])}]
    logits = torch.full((1, 16, 4), -20.0)
    middle = torch.zeros(4, 4, dtype=torch.bool)
    middle[1:3, 1:3] = True  # the centers of these places lie in the middle of the box
    logits[0, ~middle.flatten(), 3] = 20
    logits[0, middle.flatten(), 2] = 20
    right = {"pred_logits": logits, "pred_boxes": box.expand(1, 16, 4), "shape": (4, 4)}
    assert dense_loss(right, targets, 3, 0.1).item() == pytest.approx(0, abs=1e-5)
    shifted = {**right, "pred_boxes": right["pred_boxes"] + torch.tensor([0.1, 0, 0, 0])}
    # L1 5 * 0.1, and 2 * (1 - IoU), the shifted box overlapping by 5/6 of its width
    assert dense_loss(shifted, targets, 3, 0.1).item() == pytest.approx(0.5 + 2 * (1 - 5 / 7), abs=1e-4)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert dense_loss(right, nothing, 3, 0.1).item() == pytest.approx(40 * 4 / 16, abs=1e-3)


def test_its_forward_pass_is_the_models_own():
    model = build_model("detr_tiny", len(NAMES)).eval()
    jump_start(model)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        outputs, dense = forward(model, images)
        own = model(images)
    assert torch.allclose(outputs["pred_boxes"], own["pred_boxes"], atol=0.03)  # its convolutions are bf16
    assert len(outputs["aux_outputs"]) == len(own["aux_outputs"])
    assert dense["pred_boxes"].shape == (2, 6 * 8, 4)


def test_a_few_steps_write_a_checkpoint_that_loads(pool, tmp_path):
    torch.manual_seed(0)
    model = build_model("detr_tiny", len(NAMES))
    jump_start(model)
    before = model.class_embed.weight.detach().clone()
    train(Phase(steps=3, size=(64, 80), lr=1e-3, decoder=True), model, pool, Pool(1, 2), 4, tmp_path / "tiny.pth")
    loaded = load(tmp_path / "tiny.pth")
    assert [category["name"] for category in loaded.categories] == NAMES
    assert loaded.class_embed.weight.dtype == torch.float32
    assert not torch.equal(loaded.class_embed.weight, before)
    assert PHASES[-1].decoder  # what ships was trained as a whole
