"""A training step and an inference of raydetr against transformers' DETR, in time and memory: ``python -m benchmarks.step``.

Both have random weights, the same images and boxes, the same layers frozen, the same groups of learning rates, losses at all
decoder layers, and gradients clipped at 0.1. The peer is measured as its configuration comes, without drop-out on the attention
weights, and once more with the drop-out of the official DETR, which is what raydetr computes.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import in_a_child, interleaved, machine, options, peak_memory, ratio, spread, table
from raydetr.config import Optim, Speed
from raydetr.engine import Training, choose_device, choose_dtype, loss_names, take_step
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model
from raydetr.schedule import build_optimizer, build_scheduler

OURS, PEER, SAME_DROPOUT = "raydetr", "transformers", "transformers, same drop-out"
CLASSES, BOXES, LR, LR_BACKBONE, CLIP = 91, 7, 1e-4, 1e-5, 0.1
TARGETS = {"cpu": {"step": 1.7, "inference": 1.3, "memory": 0.8}, "cuda": {"step": 2.0, "compiled": 1.3}}


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
    return functools.partial(take_step, training, loss_names(criterion), [(images, None, targets)])


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


STEPS = {OURS: our_step, PEER: peer_step, SAME_DROPOUT: functools.partial(peer_step, dropout=0.1)}


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.splitlines()[0], repeats=9)
    parser.add_argument("--memory-of", choices=list(STEPS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = choose_device(Speed())
    dtype = choose_dtype(Speed(), device)
    gpu = device.type == "cuda"
    sizes = {"step": (4, 800, 1066) if gpu else (2, 480, 640), "inference": (1, 800, 1066)}
    if chosen.quick:
        sizes = dict.fromkeys(sizes, (1, 64, 96))
    if chosen.memory_of:
        print(memory_of(STEPS[chosen.memory_of], *make_batch(*sizes["step"], device), dtype))
        return
    repeats = 1 if chosen.quick else chosen.repeats
    print(machine(), f", {str(dtype).removeprefix('torch.')}\n", sep="")

    batch = make_batch(*sizes["step"], device)
    steps = {name: make(*batch, dtype) for name, make in STEPS.items()}
    if gpu:
        steps["transformers, compiled"] = peer_step(*batch, dtype, compiled=True)
    rows = rows_of(f"training step, {_shown(sizes['step'])}", interleaved(steps, repeats, warmup=3 if gpu else 1), TARGETS[device.type])
    del steps
    images, _ = make_batch(*sizes["inference"], device)
    inferences = {OURS: our_inference(images, dtype), PEER: peer_inference(images, dtype)}
    target = {"step": TARGETS[device.type].get("inference", "")}
    rows += rows_of(f"inference, {_shown(sizes['inference'])}", interleaved(inferences, repeats), target)
    print(table(rows, ["what", "who", "time", "times as long as raydetr", "target"]), "\n")

    quick = ["--quick"] if chosen.quick else []
    memory = {name: float(in_a_child("benchmarks.step", "--memory-of", name, *quick)) for name in STEPS}
    target = {PEER: TARGETS[device.type].get("memory", "")}
    rows = [[name, f"{most:.0f} MiB", memory[OURS] / most, target.get(name, "")] for name, most in memory.items()]
    print(table(rows, ["peak memory of the training step", "MiB", "raydetr's share of it", "target"]))


def memory_of(make: Callable, images: Tensor, targets: list[dict[str, Tensor]], dtype: torch.dtype) -> float:
    """MiB that a process which trains holds at the most: of the device on a GPU, of the whole process on a CPU."""
    step = make(images, targets, dtype)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if images.is_cuda else peak_memory()


def rows_of(what: str, seconds: dict[str, list[float]], targets: dict[str, object]) -> list[list]:
    """A row of the table for each contender."""
    target = {PEER: targets.get("step", ""), "transformers, compiled": targets.get("compiled", "")}
    return [[what, name, spread(each), ratio(seconds, name, OURS), target.get(name, "")] for name, each in seconds.items()]


def _shown(size: tuple[int, int, int]) -> str:
    return "{} x {} x {}".format(*size)


if __name__ == "__main__":
    main()
