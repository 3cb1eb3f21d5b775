"""A training step and an inference of raydetr against transformers' DETR, in time and memory: ``python -m benchmarks.step``.

Both have random weights, the same images and boxes, the same layers frozen, the same groups of learning rates, losses at all
decoder layers, and gradients clipped at 0.1. The peer is measured as its configuration comes, without drop-out on the attention
weights, and once more with the drop-out of the official DETR, which is what raydetr computes. Each lives in a process of its own.
On a CPU raydetr keeps freed memory (:mod:`raydetr.memory`), which any program can: what the peer gains by it is shown, too.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Child, interleaved, machine, options, ratio, serve, spread, table
from raydetr.config import Optim, Speed
from raydetr.loss.criterion import build_criterion
from raydetr.memory import kept_memory
from raydetr.model.detr import build_model
from raydetr.training.engine import Training, choose_device, choose_dtype, take_step
from raydetr.training.schedule import build_optimizer, build_scheduler

OURS, PEER = "raydetr", "transformers"
SAME_DROPOUT, KEPT, COMPILED = (f"transformers, {how}" for how in ("same drop-out", "freed memory kept", "compiled"))
CLASSES, BOXES, LR, LR_BACKBONE, CLIP = 91, 7, 1e-4, 1e-5, 0.1
TARGETS = {
    "cpu": {"step": {PEER: 1.7}, "inference": {PEER: 1.3}, "memory": 0.8},
    "cuda": {"step": {PEER: 2.0, COMPILED: 1.3}, "inference": {}, "memory": ""},
}


def make_batch(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images [batch, 3, height, width] of noise and ``BOXES`` true boxes for each of them, as the criterion takes them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator)
    targets = []
    for number in range(batch):
        center, size = (torch.rand(BOXES, 2, generator=generator) for _ in range(2))
        boxes_cxcywh = torch.cat((0.25 + 0.5 * center, 0.05 + 0.3 * size), 1)
        labels = torch.randint(0, CLASSES, (BOXES,), generator=generator)
        targets.append({"boxes": boxes_cxcywh.to(device), "labels": labels.to(device), "image_id": number})
    return images.to(device), targets


def our_step(images: Tensor, targets: list[dict[str, Tensor]], dtype: torch.dtype) -> Callable[[], object]:
    """A training step of raydetr on this batch, to be called again and again."""
    torch.manual_seed(0)
    optim = Optim(lr=LR, lr_backbone=LR_BACKBONE)
    model = build_model("detr_resnet50", CLASSES).to(images.device).train()
    criterion, optimizer = build_criterion(CLASSES), build_optimizer(model, optim)
    scaler = torch.amp.GradScaler(images.device.type, enabled=False)
    scheduler = build_scheduler(optimizer, optim, 1000)
    training = Training(model, criterion, optimizer, scheduler, scaler, None, images.device, dtype, clip_max_norm=CLIP)
    return functools.partial(take_step, training, [(images, None, targets)])


def peer_step(
    images: Tensor, targets: list[dict[str, Tensor]], dtype: torch.dtype, dropout: float = 0.0, compiled: bool = False
) -> Callable[[], object]:
    """The same of transformers; ``dropout`` is that of the attention weights and inside the feed-forward networks."""
    model = peer_model(dropout).to(images.device).train()
    backbone = [each for name, each in model.named_parameters() if "backbone" in name and each.requires_grad]
    others = [each for name, each in model.named_parameters() if "backbone" not in name and each.requires_grad]
    optimizer = torch.optim.AdamW([{"params": others, "lr": LR}, {"params": backbone, "lr": LR_BACKBONE}], weight_decay=1e-4)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    if compiled:
        model.model.compile()  # the network; the matching in its loss cannot be

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_model(dropout: float = 0.0) -> nn.Module:
    """transformers' DETR-ResNet-50 with random weights, which trains what the official DETR trains."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"], downsample_in_bottleneck=False)  # the stride of "v1.5", as torchvision's
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        num_labels=CLASSES,
        auxiliary_loss=True,
        attention_dropout=dropout,
        activation_dropout=dropout,
    )
    torch.manual_seed(0)
    model = DetrForObjectDetection(config)
    assert model.config._attn_implementation == "sdpa"
    # It freezes the whole of this backbone; stages 1 to 3 are layer2 to layer4.
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_("stages.0." not in name and "embedder" not in name)
    return model


def our_inference(images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The outputs of raydetr's network, without gradients."""
    return _inference(build_model("detr_resnet50", CLASSES).to(images.device), images, dtype)


def peer_inference(images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same of transformers."""
    return _inference(peer_model().to(images.device), images, dtype)


def _inference(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    model.eval()

    @torch.inference_mode()
    def infer() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            model(images)

    return infer


def peer_compiled_step(images: Tensor, targets: list[dict[str, Tensor]], dtype: torch.dtype) -> Callable[[], object]:
    """The peer's step, its network compiled."""
    return peer_step(images, targets, dtype, compiled=True)


STEPS = {
    OURS: our_step,
    PEER: peer_step,
    SAME_DROPOUT: functools.partial(peer_step, dropout=0.1),
    KEPT: peer_step,
    COMPILED: peer_compiled_step,
}
INFERENCES = {OURS: our_inference, PEER: peer_inference, KEPT: peer_inference}


def contender(what: str, who: str, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The ``step`` or ``inference`` of one of the contenders, on images of that size."""
    images, targets = make_batch(*size, device)
    return STEPS[who](images, targets, dtype) if what == "step" else INFERENCES[who](images, dtype)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.splitlines()[0], repeats=9)
    parser.add_argument("--serve", nargs=2, metavar=("WHAT", "WHO"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = choose_device(Speed())
    dtype = choose_dtype(Speed(), device)
    gpu = device.type == "cuda"
    sizes = {"step": (4, 800, 1066) if gpu else (2, 480, 640), "inference": (1, 800, 1066)}
    if chosen.quick:
        sizes = dict.fromkeys(sizes, (1, 64, 96))
    if chosen.serve:
        what, who = chosen.serve
        with kept_memory(device.type) if who in (OURS, KEPT) else contextlib.nullcontext():
            serve(contender(what, who, sizes[what], device, dtype), gpu)
        return
    print(machine(), f", {str(dtype).removeprefix('torch.')}\n", sep="")
    repeats, quick = (1, ["--quick"]) if chosen.quick else (chosen.repeats, [])
    who = {"step": [OURS, PEER], "inference": [OURS, PEER]}
    if gpu:
        who["step"] += [COMPILED]
    if not chosen.quick:
        who["step"] += [SAME_DROPOUT] if gpu else [SAME_DROPOUT, KEPT]
        who["inference"] += [] if gpu else [KEPT]
    rows, memory = [], {}
    for what, title in (("step", "training step"), ("inference", "inference")):
        children = {name: Child("benchmarks.step", "--serve", what, name, *quick) for name in who[what]}
        seconds = interleaved(children, repeats, warmup=3)
        rows += rows_of(f"{title}, {_shown(sizes[what])}", seconds, TARGETS[device.type][what])
        memory[what] = {name: child.close() for name, child in children.items()}
    print(table(rows, ["what", "who", "time", "times as long as raydetr", "target"]), "\n")
    target = {PEER: TARGETS[device.type]["memory"]}
    memory = memory["step"]
    rows = [[name, f"{most:.0f} MiB", memory[OURS] / most, target.get(name, "")] for name, most in memory.items()]
    print(table(rows, ["peak memory of the training step", "MiB", "raydetr's share of it", "target"]))


def rows_of(what: str, seconds: dict[str, list[float]], targets: dict[str, float]) -> list[list]:
    """A row of the table for each contender."""
    return [[what, name, spread(each), ratio(seconds, name, OURS), targets.get(name, "")] for name, each in seconds.items()]


def _shown(size: tuple[int, int, int]) -> str:
    return "{} x {} x {}".format(*size)


if __name__ == "__main__":
    main()
