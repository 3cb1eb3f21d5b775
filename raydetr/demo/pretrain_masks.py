"""Train the segmentation head of ``detr_tiny`` on drawn things that are not balloons. The head in the package was made by this module.

``python -m raydetr.demo.pretrain_masks`` repeats the training, in about five minutes on one CPU core. The boxes are those that
:mod:`raydetr.demo.pretrain_tiny` has trained, and stay as they are: this is the second stage of the official recipe.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from raydetr.demo.pretrain_tiny import NAMES, PHASES, Pool, save
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import DETR, MASK_PARTS, build_model
from raydetr.training.engine import MatchedQueries
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.official import BUNDLED, BUNDLED_MASKS

STEPS = 800
SIZE = PHASES[-1].size  # height and width of the training images in pixels
LOSSES = ("loss_mask", "loss_dice")
SHARPNESS, ATTENTION_GAIN = 1.5, 30.0  # of the initial attention, and of the convolution's weights for it


def jump_start(model: DETR) -> None:
    """Set initial weights of the segmentation head that speed up the training, in place.

    With random ones the head learns one mask for all objects of an image first, and the attention of the queries, whose numbers are small,
    plays no part for long. In ``detr_tiny`` the heads read queries and positions of the memory alike, so that both describe an object in
    the same way: compared by the same orthogonal matrix, a query attends to the positions of its object from the start.

    Args:
        model: a model with masks.
    """
    attention, first = model.bbox_attention, model.mask_head.lay1
    with torch.no_grad():
        turn = SHARPNESS * torch.nn.init.orthogonal_(torch.empty_like(attention.q_linear.weight))
        attention.q_linear.weight.copy_(turn)
        attention.k_linear.weight.copy_(turn)
        first.weight[:, -attention.nheads :] *= ATTENTION_GAIN


def train(model: DETR, pool: Pool, held_out: Pool, out: Path, steps: int, batch_size: int = 16, lr: float = 2e-3) -> dict[str, float]:
    """Train the segmentation head of a model, and save the model every 250 steps and at the end. Losses are printed.

    Args:
        model: the model, whose head is trained in place.
        pool: training images with masks; one of them is replaced at every fourth step.
        held_out: images with masks for evaluation.
        out: checkpoint to write.
        steps: number of optimizer steps.
        batch_size: number of images in a step.
        lr: learning rate after the warm-up of 200 steps, from which it falls to 0 along a cosine.

    Returns:
        The losses of masks on ``held_out``.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(MASK_PARTS))
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=1e-4, fused=True)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    start, validation = time.process_time(), [held_out.batch(32, *SIZE) for _ in range(4)]
    losses: dict[str, float] = {}
    for step in range(1, steps + 1):
        terms = mask_losses(model, *pool.batch(batch_size, *SIZE))
        optimizer.zero_grad()
        (terms["loss_mask"] + terms["loss_dice"]).backward()
        torch.nn.utils.clip_grad_norm_(head, 1.0)
        optimizer.step()
        schedule.step()
        pool.renew(step % 4 == 0)
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                found = [mask_losses(model, *batch) for batch in validation]
            losses = {name: sum(each[name].item() for each in found) / len(found) for name in LOSSES}
            rate = step * batch_size / (time.process_time() - start)
            print(
                f"step {step}  {rate:.0f} images/s of CPU time  " + "  ".join(f"{name} {losses[name]:.4f}" for name in LOSSES), flush=True
            )
            save(model, out, step, losses)
    return losses


def mask_losses(model: DETR, images: torch.Tensor, targets: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return ``loss_mask`` and ``loss_dice`` of a batch, from the masks of the matched queries.

    Args:
        model: the model.
        images: normalized images, float32 [B, 3, h, w].
        targets: ``boxes``, ``labels`` and ``masks`` of each image, as :meth:`Pool.batch` returns them.
    """
    criterion = build_criterion(len(NAMES), aux_loss=False, masks=True)
    matched = MatchedQueries(criterion, targets)
    outputs = model(images, None, matched)
    losses = criterion({**outputs, "aux_outputs": []}, targets, pairs=matched.pairs)
    return {name: losses[name] for name in LOSSES}


def main() -> None:
    """Run the command line. The head in the package was made with its defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--boxes", type=Path, default=BUNDLED, help="checkpoint of the boxes")
    parser.add_argument("--out", type=Path, default=BUNDLED_MASKS, help="checkpoint to write, every 250 steps")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pool-size", type=int, default=600, help="images in memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build_model("detr_tiny", len(NAMES), masks=True, aux_loss=False)
    boxes = {f"detr.{name}": tensor for name, tensor in read_checkpoint(options.boxes)["model"].items()}
    model.load_state_dict({**model.state_dict(), **boxes})
    jump_start(model)
    pool, held_out = Pool(options.seed, options.pool_size, masks=True), Pool(options.seed + 1, 128, masks=True)
    train(model, pool, held_out, options.out, options.steps)


if __name__ == "__main__":
    main()
