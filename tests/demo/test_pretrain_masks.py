"""The script that made the segmentation head of detr_tiny still makes such heads."""

import pytest
import torch
from torchvision.ops import box_convert, masks_to_boxes

from raydetr import load
from raydetr.demo.pretrain_masks import SIZE, jump_start, mask_losses, train
from raydetr.demo.pretrain_tiny import NAMES, Pool
from raydetr.model.detr import DETR, MASK_PARTS, build_model
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.official import BUNDLED, BUNDLED_MASKS


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(seed=3, size=8, masks=True)


@pytest.fixture
def model() -> DETR:
    torch.manual_seed(0)
    model = build_model("detr_tiny", len(NAMES), masks=True, aux_loss=False)
    boxes = {f"detr.{name}": tensor for name, tensor in read_checkpoint(BUNDLED)["model"].items()}
    model.load_state_dict({**model.state_dict(), **boxes})
    return model


def test_the_masks_of_a_batch_fill_their_boxes(pool):
    _, targets = pool.batch(12, *SIZE)
    assert all(target["masks"].shape == (len(target["boxes"]), *SIZE) for target in targets)
    height, width = SIZE
    masks = torch.cat([target["masks"] for target in targets])
    boxes = box_convert(torch.cat([target["boxes"] for target in targets]), "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    found = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    assert len(masks) > 20
    assert (found[:, :2] - boxes[:, :2]).min() > -2.5  # two pixels of the drawn image at most
    assert (found[:, 2:] - boxes[:, 2:]).max() < 2.5
    # Of a thing that is partly hidden, a crop may leave less than the box that it leaves.
    assert ((found - boxes).abs().max(1).values < 2.5).float().mean() > 0.8
    assert masks.flatten(1).float().mean() > 0.01


def test_a_query_attends_to_its_object_from_the_start(model, pool):
    jump_start(model)
    images, targets = pool.batch(12, *SIZE)
    with torch.no_grad():
        outputs, features = model.forward_features(images)
    attention = features.attention.sum(2)  # over the heads: the cells of an image sum to 1
    inside, shares = [], []
    for image, target in enumerate(targets):
        distance = torch.cdist(outputs["pred_boxes"][image], target["boxes"], p=1)
        for box, mask in enumerate(target["masks"]):
            cells = torch.nn.functional.adaptive_avg_pool2d(mask[None].float(), attention.shape[-2:])[0] > 0.3
            inside.append(attention[image, distance[:, box].argmin()][cells].sum())
            shares.append(cells.float().mean())
    assert sum(inside) > 4 * sum(shares)


def test_a_few_steps_train_the_head_alone_and_write_a_checkpoint_that_loads(model, pool, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, pool, pool, tmp_path / "masks.pth", 2, 4)
    assert losses.keys() == {"loss_mask", "loss_dice"}
    loaded = load(tmp_path / "masks.pth")
    assert loaded.settings["masks"]
    changed = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, before[name].half().float())}
    assert changed
    assert all(name.startswith(MASK_PARTS) for name in changed)


def test_the_head_in_the_package_has_learned(pool):
    bundled, boxes = load(BUNDLED_MASKS), load(BUNDLED).state_dict()
    state = bundled.state_dict()
    assert all(torch.equal(state[f"detr.{name}"], tensor) for name, tensor in boxes.items())
    with torch.no_grad():
        assert mask_losses(bundled, *pool.batch(24, *SIZE))["loss_dice"] < 0.3
