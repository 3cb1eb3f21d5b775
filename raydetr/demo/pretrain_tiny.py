"""Pre-train ``detr_tiny`` on drawn things that are not balloons. The weights in the package were made by this module.

``python -m raydetr.demo.pretrain_tiny`` repeats the training, in about an hour on one CPU core. Images are drawn during the training, so
that the network never sees the whole set twice. DETR learns slowly from scratch. Three things speed it up without changing the
architecture:

- Every position of the encoder's memory learns the class and box of the thing at it, with the heads that also read the queries. The
  decoder then only has to choose among positions.
- The object queries start as the encodings of positions on a grid.
- The decoder's attention to the image compares positions from the start.

The first phase trains everything up to the encoder's memory, on smaller images. The second phase trains all of it.
"""

import argparse
import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torchvision.ops import box_convert, generalized_box_iou_loss
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from raydetr.config import load_config, to_dict
from raydetr.data.transforms import MEAN, STD
from raydetr.demo.scenes import SUPERSAMPLE, Scene, place
from raydetr.demo.things import KINDS
from raydetr.evaluate.coco import coco_metrics
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import DETR, build_model, postprocess
from raydetr.model.transformer import Attention
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.official import BUNDLED

WIDTH, HEIGHT = 192, 144  # of the drawn images; training uses crops of them
NAMES = sorted(KINDS)
ROUND = [NAMES.index(name) for name in ("apple", "ball", "bulb", "button", "egg", "lemon", "pear", "pebble")]
EMA_DECAY = 0.999


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw an image of up to nine things, none of which is a balloon.

    Things of which little is visible are in the image, but have no box.

    Args:
        rng: random generator; the image depends only on its state.

    Returns:
        The image, uint8 [HEIGHT, WIDTH, 3] (RGB); the boxes of the visible parts of its things, float32 [n, 4] (xyxy, as fractions of the
        image's width and height); their labels, indices of ``NAMES``, int64 [n]; and which thing is visible at each pixel, uint8 [HEIGHT,
        WIDTH]: its position in the boxes, counted from 1, and 0 elsewhere.
    """
    scene = Scene(rng, WIDTH, HEIGHT)
    count = int(rng.integers(1, 10))
    # Round things are drawn more often, because their boxes are the hardest to learn.
    labels = np.where(rng.random(count) < 0.3, rng.choice(ROUND, count), rng.integers(len(NAMES), size=count))
    areas = []
    largest = rng.uniform(0.15, 0.38)
    for i in range(count):
        parts = KINDS[NAMES[labels[i]]](rng)
        size = HEIGHT * np.exp(rng.uniform(np.log(0.05), np.log(largest)))
        parts = place(parts, rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), size, rng.normal() * 0.35, rng.uniform(0.8, 1.25))
        scene.add(parts, i + 1)
        areas.append((scene.numbers == i + 1).sum())
    boxes, kept, position = [], [], np.zeros(256, dtype=np.uint8)
    for i in range(count):
        rows, columns = np.nonzero(scene.numbers == i + 1)
        if len(rows) > 0.35 * areas[i] and len(rows) > 60:
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            kept.append(labels[i])
            position[i + 1] = len(kept)
    height, width = scene.numbers.shape
    boxes_xyxy = np.array(boxes, dtype=np.float32).reshape(-1, 4) / np.array([width, height, width, height], np.float32)
    visible = position[scene.numbers[::SUPERSAMPLE, ::SUPERSAMPLE]]
    return scene.finish(), boxes_xyxy, np.array(kept, dtype=np.int64), visible


class Pool:
    """Keeps drawn images in memory, as training or validation data. New images replace the oldest.

    Args:
        seed: seed of all images and of the random crops.
        size: number of images.
        masks: whether the targets have masks.
    """

    def __init__(self, seed: int, size: int, masks: bool = False):
        self.rng, self.oldest, self.masks = np.random.default_rng(seed), 0, masks
        self.images = torch.empty(size, 3, HEIGHT, WIDTH, dtype=torch.uint8)
        self.visible = torch.empty(size, HEIGHT, WIDTH, dtype=torch.uint8)
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        self.truth = [nothing] * size  # boxes xyxy (fractions of the image) and labels
        self.renew(size)

    def renew(self, count: int) -> None:
        """Replace the oldest images with new ones.

        Args:
            count: number of images to replace.
        """
        for _ in range(count):
            image, boxes_xyxy, labels, visible = draw(self.rng)
            self.images[self.oldest] = torch.from_numpy(image).permute(2, 0, 1)
            self.visible[self.oldest] = torch.from_numpy(visible)
            self.truth[self.oldest] = torch.from_numpy(boxes_xyxy), torch.from_numpy(labels)
            self.oldest = (self.oldest + 1) % len(self.truth)

    def batch(self, count: int, height: int, width: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return random crops of random images, flipped and tinted at random.

        Args:
            count: number of crops.
            height: height of the crops after resizing, in pixels.
            width: width of the crops after resizing, in pixels.

        Returns:
            Normalized images, float32 [count, 3, height, width], and their targets: ``boxes`` (cxcywh, as fractions of the crop, float32
            [n, 4]), ``labels`` (int64 [n]) and, with masks, ``masks`` (bool [n, height, width]) of each.
        """
        rng = self.rng
        chosen = rng.integers(len(self.truth), size=count)
        whole = np.array([WIDTH, HEIGHT])
        extent = np.minimum(rng.uniform(0.55, 1.0, (count, 1)) * np.exp(rng.uniform(-0.12, 0.12, (count, 2))), 1.0)
        extent = np.round(extent * whole).astype(int)
        origin = rng.integers(whole - extent + 1)
        flip = rng.random(count) < 0.5
        flipped = torch.from_numpy(flip)
        windows = [(i, slice(y, y + h), slice(x, x + w)) for i, (x, y), (w, h) in zip(chosen, origin, extent, strict=True)]
        crops = [self.images[i, :, rows, columns] for i, rows, columns in windows]
        images = torch.stack([resize(crop, [height, width], antialias=True) for crop in crops])
        images[flipped] = images[flipped].flip(-1)
        contrast = torch.from_numpy(rng.uniform(0.7, 1.3, (count, 1, 1, 1)).astype(np.float32))
        tint = torch.from_numpy(rng.uniform(-25, 25, (count, 3, 1, 1)).astype(np.float32))
        images = ((images - 128.0) * contrast + (128 + tint)).clamp_(0, 255)
        shares = zip(chosen, (origin / whole).astype(np.float32), (extent / whole).astype(np.float32), flip, strict=True)
        targets = [_cropped(*self.truth[i], *crop) for i, *crop in shares]
        for target, (i, rows, columns), mirrored in zip(targets, windows, flip, strict=True):
            kept = target.pop("kept")
            if self.masks:
                visible = resize(self.visible[i, rows, columns][None], [height, width], InterpolationMode.NEAREST)
                target["masks"] = (visible.flip(-1) if mirrored else visible) == kept[:, None, None] + 1
        return normalized(images), targets


def normalized(images: Tensor) -> Tensor:
    """Normalize images in place with the mean and standard deviation of ImageNet.

    Args:
        images: float [B, 3, h, w], RGB from 0 to 255.

    Returns:
        The same tensor.
    """
    return images.sub_(255 * torch.tensor(MEAN)[:, None, None]).div_(255 * torch.tensor(STD)[:, None, None])


def _cropped(boxes_xyxy: Tensor, labels: Tensor, origin: np.ndarray, extent: np.ndarray, flip: bool) -> dict[str, Tensor]:
    """Return the target of a crop, without things of which less than a third, or almost nothing, is inside it; ``kept`` are the others."""
    whole = (boxes_xyxy.view(-1, 2, 2) - torch.from_numpy(origin)) / torch.from_numpy(extent)
    inside = whole.clamp(0, 1)
    size = inside[:, 1] - inside[:, 0]
    keep = (size.prod(1) > 0.33 * (whole[:, 1] - whole[:, 0]).prod(1)) & (size.min(1).values > 0.03)
    center = inside.mean(1)
    if flip:
        center[:, 0] = 1 - center[:, 0]
    return {"boxes": torch.cat((center, size), 1)[keep], "labels": labels[keep], "kept": keep.nonzero()[:, 0]}


def jump_start(model: DETR) -> None:
    """Set initial weights that speed up the training, in place.

    The object queries become the encodings of positions on a grid. The cross-attention of every decoder layer gets the same orthogonal
    matrix for queries and keys, so that from the start a query attends to positions near its own.

    Args:
        model: a model whose number of queries is a square.
    """
    width, side = model.query_embed.weight.shape[1], math.isqrt(model.query_embed.weight.shape[0])
    _, position = model.backbone
    with torch.no_grad():
        model.query_embed.weight.copy_(position(torch.zeros(1, 1, side, side), None)[0])
        for layer in model.transformer.decoder.layers:
            turn = 2 * torch.nn.init.orthogonal_(torch.empty(width, width))
            attention = cast(Attention, layer.multihead_attn)
            attention.in_proj_weight[:width] = turn
            attention.in_proj_weight[width : 2 * width] = turn


def forward(model: DETR, images: Tensor, decoder: bool = True) -> tuple[dict, dict]:
    """Run the model, and its heads also on every position of the encoder's memory.

    The first output is that of :meth:`DETR.forward`, but convolutions run in bfloat16, which is twice as fast on CPUs that support it.

    Args:
        model: the model.
        images: normalized images without padding, float32 [B, 3, h, w].
        decoder: whether to run the decoder.

    Returns:
        The outputs of the object queries: ``pred_logits``, ``pred_boxes`` and ``aux_outputs`` (an empty dict without ``decoder``). The
        outputs of the positions: ``pred_logits`` [B, S, K + 1], ``pred_boxes`` [B, S, 4] (cxcywh, normalized) and ``shape``, the height and
        width of the feature map, whose product is S.
    """
    body, position = model.backbone
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = body(images, None)
        source = model.input_proj(features)
    encoding = position(features, None)
    memory = model.transformer.encoder(source.float().flatten(2).transpose(1, 2), encoding, None)
    at_positions = model.transformer.decoder.norm(memory)
    dense = {
        "pred_logits": model.class_embed(at_positions),
        "pred_boxes": model.bbox_embed(at_positions).sigmoid(),
        "shape": features.shape[-2:],
    }
    if not decoder:
        return {}, dense
    states = model.transformer.decoder(model.query_embed.weight[None], memory, memory + encoding, None, True)
    layers = [{"pred_logits": model.class_embed(each), "pred_boxes": model.bbox_embed(each).sigmoid()} for each in states]
    return {**layers[-1], "aux_outputs": layers[:-1]}, dense


def dense_loss(dense: dict, targets: list[dict[str, Tensor]], num_classes: int, eos_coef: float) -> Tensor:
    """Return the weighted sum of DETR's losses with every position of the feature map as a query, matched by its position.

    A position is matched to the smallest thing in whose middle part (half its width and height) it is. Each thing is also matched to the
    position nearest to its center. Other positions inside a box are ignored; positions outside all boxes are no-object. The sum is
    cross-entropy + 5 * L1 distance + 2 * GIoU loss, with the weights of the official DETR.

    Args:
        dense: the positions' outputs from :func:`forward`.
        targets: ``boxes`` (cxcywh, normalized, float32 [n, 4]) and ``labels`` (int64 [n]) of each image.
        num_classes: K, which is also the index of no-object.
        eos_coef: weight of no-object in the cross-entropy.

    Returns:
        The loss, a scalar.
    """
    logits, (rows, columns) = dense["pred_logits"], dense["shape"]
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    positions = torch.stack((x, y), -1).view(1, -1, 1, 2)
    nothing = torch.zeros(1, 4)  # so that there is at least one box
    true_cxcywh = pad_sequence([torch.cat((target["boxes"], nothing)) for target in targets], batch_first=True)
    labels = pad_sequence([torch.cat((target["labels"], nothing[0, :1].long())) for target in targets], batch_first=True)
    real = torch.arange(labels.shape[1]) < torch.tensor([[len(target["labels"])] for target in targets])
    size = true_cxcywh[:, None, :, 2:]
    apart = (positions - true_cxcywh[:, None, :, :2]).abs()  # [B, S, n, 2]
    within = (apart <= size / 2).all(-1) & real[:, None]
    middle = (apart <= size / 4).all(-1)
    nearest = (apart * torch.tensor([columns, rows])).square().sum(-1).argmin(1, keepdim=True)
    middle = middle.scatter(1, nearest, True) & real[:, None]
    there = middle.any(-1)
    smallest = size.prod(-1).where(middle, torch.inf).argmin(-1)
    classes = labels.gather(1, smallest).where(there, num_classes)
    weight = torch.where(there, 1.0, torch.where(within.any(-1), 0.0, eos_coef))
    entropy = (F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none") * weight).sum() / weight.sum()
    predicted = box_convert(dense["pred_boxes"][there], "cxcywh", "xyxy")
    true = true_cxcywh.gather(1, smallest[..., None].expand(-1, -1, 4))[there]
    count = max(1, len(true))
    distance = F.l1_loss(dense["pred_boxes"][there], true, reduction="sum") / count
    giou = generalized_box_iou_loss(predicted, box_convert(true, "cxcywh", "xyxy"), reduction="sum") / count
    return entropy + 5 * distance + 2 * giou


@torch.no_grad()
def average_precision(model: DETR, pool: Pool, height: int, width: int, decoder: bool) -> dict:
    """Return COCO metrics on all images of a pool.

    Args:
        model: the model, in evaluation mode.
        pool: the images and their true boxes.
        height: height to which the images are resized, in pixels.
        width: width to which the images are resized, in pixels.
        decoder: whether the detections are those of the object queries. Otherwise they are those of the feature map's positions, many of
            which detect the same thing, so that AP is lower.

    Returns:
        The metrics of :func:`raydetr.evaluate.coco.coco_metrics`.
    """
    images = normalized(resize(pool.images, [height, width], antialias=True).float())
    pixels = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    annotations, results = [], []
    for i, (boxes_xyxy, labels) in enumerate(pool.truth):
        for box, label in zip(box_convert(boxes_xyxy * pixels, "xyxy", "xywh").tolist(), labels.tolist(), strict=True):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            annotations.append(annotation)
    for start in range(0, len(images), 32):
        part = images[start : start + 32]
        for i, found in enumerate(
            postprocess(forward(model, part, decoder)[not decoder], torch.tensor([[HEIGHT, WIDTH]] * len(part))), start
        ):
            boxes_xywh = box_convert(found["boxes"], "xyxy", "xywh").tolist()
            for box, label, score in zip(boxes_xywh, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                results.append({"image_id": i, "category_id": label, "bbox": box, "score": score})
    coco = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": str(i)} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    return coco_metrics(coco, results)


def save(model: DETR, path: Path, step: int, metrics: dict) -> None:
    """Save the weights as a checkpoint in half precision, which loading converts to float32.

    Args:
        model: the model.
        path: file to write.
        step: optimizer steps so far, saved as the checkpoint's epoch.
        metrics: metrics to save with the weights.
    """
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    settings = to_dict(load_config({"model.preset": "detr_tiny", "model.masks": model.settings["masks"]}))
    save_checkpoint(path, {"model": weights, "settings": settings, "categories": categories, "epoch": step, "metrics": metrics})


@dataclasses.dataclass
class Phase:
    """A part of the training with its own warm-up and cosine schedule.

    Attributes:
        steps: number of optimizer steps.
        size: height and width of the training images in pixels.
        lr: learning rate after the warm-up.
        decoder: whether the decoder is trained. Without it, only the layers up to the encoder's memory and the heads learn, which is twice
            as fast.
    """

    steps: int
    size: tuple[int, int]
    lr: float
    decoder: bool


PHASES = (
    Phase(steps=5000, size=(80, 112), lr=1e-3, decoder=False),
    Phase(steps=12000, size=(96, 128), lr=7e-4, decoder=True),
)


def train(phase: Phase, model: DETR, pool: Pool, held_out: Pool, batch_size: int, out: Path) -> None:
    """Train a model for one phase, and save the moving average of its weights every thousand steps and at the end.

    Losses and AP are printed.

    Args:
        phase: what to train, and for how long.
        model: the model, which is trained in place.
        pool: training images; one of them is replaced at every fourth step.
        held_out: images for evaluation.
        batch_size: number of images in a step.
        out: checkpoint to write.
    """
    criterion = build_criterion(len(NAMES), dec_layers=model.settings["dec_layers"])
    average = copy.deepcopy(model).requires_grad_(False).eval()
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}], lr=phase.lr, fused=True
    )
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / phase.steps)))
    start, seen = time.process_time(), {}
    for step in range(1, phase.steps + 1):
        images, targets = pool.batch(batch_size, *phase.size)
        outputs, dense = forward(model, images, phase.decoder)
        losses = {"dense": dense_loss(dense, targets, len(NAMES), criterion.eos_coef)}
        if phase.decoder:
            losses |= criterion(outputs, targets)
        optimizer.zero_grad()
        (losses["dense"] + criterion.weighted_sum(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        pool.renew(step % 4 == 0)
        for name, value in losses.items():
            seen.setdefault(name, []).append(value.item())
        if step % 250 == 0 or step == phase.steps:
            means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in seen.items() if not name[-1].isdigit())
            print(f"step {step}  {step * batch_size / (time.process_time() - start):.0f} images/s of CPU time  {means}", flush=True)
            seen.clear()
        if step % 1000 == 0 or step == phase.steps:
            metrics = average_precision(average, held_out, *phase.size, phase.decoder)
            print(f"step {step}  AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  AP75 {metrics['AP75']:.3f}", flush=True)
            save(average, out, step, {name: metrics[name] for name in ("AP", "AP50", "AP75")})


def main() -> None:
    """Run the command line. The weights in the package were made with its defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=BUNDLED, help="checkpoint to write, every thousand steps")
    parser.add_argument("--phase", type=int, default=0, help="phase to begin with; a later one begins with the weights in OUT")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pool-size", type=int, default=4000, help="images in memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, held_out = Pool(options.seed, options.pool_size), Pool(options.seed + 1, 256)
    for number, phase in enumerate(PHASES[options.phase :], options.phase):
        torch.manual_seed(options.seed + number)
        model = build_model("detr_tiny", len(NAMES))
        jump_start(model)
        if number:
            model.load_state_dict(read_checkpoint(options.out)["model"])
        print(f"phase {number}: {phase}", flush=True)
        train(phase, model, pool, held_out, options.batch_size, options.out)


if __name__ == "__main__":
    main()
