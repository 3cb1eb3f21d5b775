import copy
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from raydetr.config import Optim, Speed, load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader, collate
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model
from raydetr.training import engine
from raydetr.training.engine import Means, Training, choose_device, choose_dtype, evaluate, loss_names, train_one_epoch
from raydetr.training.schedule import MovingAverage, build_optimizer, build_scheduler

NUM_CLASSES = 2
CPU = torch.device("cpu")


def make_training(accumulate=1, clip=0.1, ema=0.0, dtype=torch.float32, steps=10, wrap=lambda model: model, **settings):
    torch.manual_seed(0)
    model = build_model("detr_tiny", NUM_CLASSES, num_queries=9, dec_layers=2)
    optim = Optim(epochs=1, schedule="constant", lr=1e-3, lr_backbone=1e-3, **settings)
    optimizer = build_optimizer(model, optim)
    average = MovingAverage(model, ema) if ema else None
    criterion = build_criterion(NUM_CLASSES, dec_layers=2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    scheduler = build_scheduler(optimizer, optim, steps)
    return Training(wrap(model), criterion, optimizer, scheduler, scaler, average, CPU, dtype, accumulate, clip)


def images_of(folder, split="train"):
    data = load_config({"model.preset": "detr_tiny", "data.path": str(folder), "data.val_size": 64}).data
    return CocoImages(find_split(data, split), val_transforms(data))


def batches_of(folder, *sizes):
    images = images_of(folder)
    indices = iter(range(len(images)))
    return [collate([images[next(indices)] for _ in range(size)]) for size in sizes]


def test_a_step_is_the_one_of_plain_pytorch(coco_folder):
    (batch,) = batches_of(coco_folder(train=3), 3)
    training = make_training(clip=0.5)
    model = copy.deepcopy(training.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False, fused=False)
    losses = training.criterion(model(batch[0], batch[1]), batch[2])
    loss = sum(losses[name] * weight for name, weight in training.criterion.weight_dict.items())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()

    shown = []
    means = train_one_epoch(training, [batch], 1, shown.append)
    assert shown[0]["step"] == training.step == 1
    for name, value in {**losses, "loss": loss, "grad_norm": norm}.items():
        assert means[name] == shown[0][name] == pytest.approx(value.item(), rel=1e-5), name
    assert shown[0]["lr_transformer"] == shown[0]["lr_backbone"] == 1e-3
    assert shown[0]["images_per_second"] > 0
    for (name, weight), expected in zip(training.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_accumulated_batches_are_one_big_batch(coco_folder):
    folder = coco_folder(train=6)
    big, small = make_training(), make_training(accumulate=3)
    shown_big, shown_small = [], []
    train_one_epoch(big, batches_of(folder, 6), 1, shown_big.append)
    train_one_epoch(small, batches_of(folder, 1, 3, 2), 1, shown_small.append)
    assert big.step == small.step == 1
    for name in loss_names(big.criterion):
        assert shown_small[0][name] == pytest.approx(shown_big[0][name], rel=1e-4), name
    for weight, expected in zip(small.model.parameters(), big.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


def test_a_remainder_is_a_step_of_its_own(coco_folder):
    training = make_training(accumulate=2)
    shown = []
    means = train_one_epoch(training, batches_of(coco_folder(train=5), 1, 1, 1, 1, 1), 1, shown.append)
    assert [row["step"] for row in shown] == [1, 2, 3]
    assert means["loss"] == pytest.approx(sum(row["loss"] for row in shown) / 3)


def test_gradients_do_not_carry_over_and_rates_follow_the_schedule(coco_folder):
    batches = batches_of(coco_folder(train=4), 2, 2)
    together, apart = make_training(), make_training()
    train_one_epoch(together, batches, 1, lambda _: None)
    for batch in batches:
        train_one_epoch(apart, [batch], 1, lambda _: None)
        apart.optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(together.model.parameters(), apart.model.parameters(), strict=True))
    warming = make_training()
    warming.scheduler = build_scheduler(warming.optimizer, Optim(lr=1e-3, lr_backbone=1e-4, epochs=10, warmup=1.0), 2)
    shown = []
    train_one_epoch(warming, batches, 1, shown.append)
    assert [row["lr_transformer"] for row in shown] == pytest.approx([5e-4, 1e-3])
    assert [row["lr_backbone"] for row in shown] == pytest.approx([5e-5, 1e-4])


def test_clipping_can_be_off(coco_folder):
    batches = batches_of(coco_folder(train=2), 2)
    losses = []
    off = make_training(clip=0.0)
    train_one_epoch(off, batches, 1, losses.append)
    on = make_training(clip=1e9)
    train_one_epoch(on, batches, 1, losses.append)
    assert losses[0]["grad_norm"] == losses[1]["grad_norm"] > 0
    assert all(torch.equal(*pair) for pair in zip(off.model.parameters(), on.model.parameters(), strict=True))


def test_training_learns(coco_folder):
    training = make_training(ema=0.9, clip=1.0)
    batches = batches_of(coco_folder(train=2, boxes=2), 2) * 30
    shown = []
    train_one_epoch(training, batches, 1, shown.append)
    assert shown[-1]["loss"] < 0.8 * shown[0]["loss"]
    losses, _ = evaluate(training.evaluated, training.criterion, batches[:1], CPU)
    assert losses["loss"] < 0.9 * shown[0]["loss"]
    assert training.evaluated is training.average.module is not training.detr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_near_fp32(coco_folder, dtype):
    batches = batches_of(coco_folder(train=2), 2) * 12
    exact, mixed = [], []
    train_one_epoch(make_training(), batches, 1, exact.append)
    training = make_training(dtype=dtype)
    before = copy.deepcopy(training.model.state_dict())
    train_one_epoch(training, batches, 1, mixed.append)
    assert mixed[0]["loss"] != exact[0]["loss"]
    assert mixed[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in training.model.parameters())
    assert any(not torch.equal(before[name], value) for name, value in training.model.state_dict().items())


def test_an_overflow_in_fp16_skips_the_step_and_goes_on(coco_folder):
    batches = batches_of(coco_folder(train=2), 2)
    training = make_training(dtype=torch.float16)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(training.model.state_dict())
    shown = []
    train_one_epoch(training, batches, 1, shown.append)
    assert not math.isfinite(shown[0]["grad_norm"])
    assert training.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], value) for name, value in training.model.state_dict().items())


def test_means_leave_out_what_is_not_finite():
    means = Means()
    for loss, norm in ((1.0, math.inf), (2.0, 3.0), (6.0, math.nan), (3.0, 5.0)):
        means.add({"loss": loss, "grad_norm": norm, "overflowing": math.inf})
    assert means.values() == {"loss": 3.0, "grad_norm": 4.0, "overflowing": pytest.approx(math.nan, nan_ok=True)}


def test_gradients_that_overflow_at_every_scale_stop_the_run(coco_folder):
    training = make_training(dtype=torch.float16)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1e-4)
    with pytest.raises(UserError, match=r"overflow in fp16 .*epoch 4.*bf16"):
        train_one_epoch(training, batches_of(coco_folder(train=2), 2), 4, lambda _: None)


@pytest.mark.parametrize("read_every", [1, 3])
@pytest.mark.parametrize("boxes", [3, 0])
def test_a_loss_that_is_not_finite_names_the_images(coco_folder, monkeypatch, read_every, boxes):
    monkeypatch.setitem(engine.READ_EVERY, "cpu", read_every)
    batches = batches_of(coco_folder(train=10), *[2] * 5)
    for _, _, targets in batches:
        for target in targets:
            target |= {"boxes": target["boxes"][:boxes], "labels": target["labels"][:boxes]}
    batches[1][0][1, 0, 5, 5] = math.nan  # ids count from 10
    shown = []
    with pytest.raises(UserError, match=r"the loss became nan in epoch 7, step 2, on the images 12, 13;") as error:
        train_one_epoch(make_training(), batches, 7, shown.append)
    assert "\n" not in str(error.value)
    assert [row["step"] for row in shown] == [1]


def test_a_gradient_that_is_not_finite_stops_even_where_the_loss_is(coco_folder):
    training = make_training()
    training.model.class_embed.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"the gradient became (nan|inf) in epoch 1, step 1, on the images 10, 11"):
        train_one_epoch(training, batches_of(coco_folder(train=2), 2), 1, lambda _: None)


def test_losses_read_late_are_the_same(coco_folder, monkeypatch):
    batches = batches_of(coco_folder(train=10), *[2] * 5)
    rows = []
    for read_every in (1, 2, 20):
        monkeypatch.setitem(engine.READ_EVERY, "cpu", read_every)
        shown = []
        train_one_epoch(make_training(), batches, 1, shown.append)
        rows.append([{name: value for name, value in row.items() if name != "images_per_second"} for row in shown])
    assert rows[0] == rows[1] == rows[2]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5]


def clock_that_ticks():
    """Stands for the module ``time``: a second passes between any two looks at the clock."""
    ticks = itertools.count()
    return SimpleNamespace(perf_counter=lambda: float(next(ticks)))


def test_images_per_second_are_counted_by_the_step_and_over_the_epoch(coco_folder, monkeypatch):
    monkeypatch.setattr(engine, "time", clock_that_ticks())
    shown = []
    means = train_one_epoch(make_training(), batches_of(coco_folder(train=6), 4, 2), 1, shown.append)
    assert [row["images_per_second"] for row in shown] == [4.0, 2.0]
    assert means["images_per_second"] == 6 / 3


def test_a_training_set_without_a_batch():
    with pytest.raises(UserError, match="no batch"):
        train_one_epoch(make_training(), [], 1, lambda _: None)


def test_evaluation_does_not_depend_on_the_batches(coco_folder):
    folder = coco_folder(train=7)
    training = make_training()
    one, found_one = evaluate(training.model, training.criterion, build_loader(images_of(folder), 1), CPU)
    four, found_four = evaluate(training.model, training.criterion, build_loader(images_of(folder), 4), CPU)
    assert four == pytest.approx(one, rel=1e-5)
    assert found_one.image_ids.tolist() == found_four.image_ids.tolist() == list(range(10, 17))
    torch.testing.assert_close(torch.from_numpy(found_one.boxes_xywh), torch.from_numpy(found_four.boxes_xywh), atol=1e-3, rtol=1e-4)


def test_evaluation_losses_are_the_criterions_own_on_the_whole_set(coco_folder):
    folder = coco_folder(train=4)
    training = make_training()
    losses, _ = evaluate(training.model, training.criterion, build_loader(images_of(folder), 3), CPU)
    (images, mask, targets) = batches_of(folder, 4)[0]
    with torch.no_grad():
        expected = training.criterion(training.model.eval()(images, mask), targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "class_error", "cardinality_error"):
        assert losses[name] == pytest.approx(float(expected[name]), rel=1e-4), name
    assert losses["loss"] == pytest.approx(float(training.criterion.weighted_sum(expected)), rel=1e-4)


def test_results_are_coco_results_of_original_categories_in_original_pixels(coco_folder):
    images = images_of(coco_folder(train=2, size=(96, 64)))

    class Oracle(torch.nn.Module):
        """Says of every image that its centre holds the second category."""

        def forward(self, images, mask):
            logits = torch.tensor([0.0, 5.0, 0.0]).expand(len(images), 4, 3)
            return {"pred_logits": logits, "pred_boxes": torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(len(images), 4, 4)}

    criterion = build_criterion(NUM_CLASSES, aux_loss=False)
    _, detections = evaluate(Oracle(), criterion, build_loader(images, 2), CPU)
    results = detections.results(images.categories)
    assert len(results) == 8
    assert {result["category_id"] for result in results} == {7}
    assert {result["image_id"] for result in results} == {10, 11}
    assert results[0]["bbox"] == pytest.approx([24, 24, 48, 16])
    assert results[0]["score"] == pytest.approx(float(torch.tensor([0.0, 5.0, 0.0]).softmax(0)[1]))
    json.dumps(results)


def test_evaluation_names_the_images_whose_outputs_are_not_finite(coco_folder):
    batches = batches_of(coco_folder(train=3), 1, 1, 1)
    batches[1][0][0, 0, 0, 0] = math.nan
    training = make_training()
    with pytest.raises(UserError, match="on the images 11;"):
        evaluate(training.model, training.criterion, batches, CPU)


def test_evaluation_leaves_no_gradient_and_no_random_number(coco_folder):
    training = make_training()
    before = torch.get_rng_state()
    evaluate(training.model, training.criterion, build_loader(images_of(coco_folder(train=2)), 2), CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert not training.model.training


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_the_dtype_of_the_forward_pass(precision, dtype, device):
    assert choose_dtype(Speed(precision=precision), torch.device(device)) == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_precision_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert choose_dtype(Speed(precision="auto"), torch.device("cuda")) == dtype
    assert choose_dtype(Speed(precision="auto"), CPU) == torch.float32


def test_the_device_cpu_is_taken_whatever_there_is():
    assert choose_device(Speed(device="cpu")) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error():
    assert choose_device(Speed(device="auto")) == CPU
    with pytest.raises(UserError, match=r"speed\.device: cuda was asked for and PyTorch sees no GPU"):
        choose_device(Speed(device="cuda"))


@pytest.fixture
def three_gpus(monkeypatch):
    """PyTorch sees three GPUs, and its flags are as a new process has them. The devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield current
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[:2]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False), ("auto", False)])
def test_a_gpu_computes_in_tf32_only_where_that_is_asked_for(three_gpus, precision, tf32):
    assert choose_device(Speed(precision=precision), local_rank=4) == torch.device("cuda", 1)
    assert three_gpus == [torch.device("cuda", 1)]
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- several workers: one run of two processes for all tests ---


def train_share(folder, broken=None, accumulate=1):
    """Trains on this worker's half of the pictures; the worker numbered ``broken`` gets a NaN in its second batch."""
    images = images_of(folder)
    batches = [collate([images[index]]) for index in range(dist.get_rank(), len(images), 2)]
    if broken == dist.get_rank():
        batches[1][0][0, 0, 0, 0] = math.nan
    training = make_training(accumulate=accumulate, wrap=DistributedDataParallel)
    shown, engine.time = [], clock_that_ticks()
    try:
        means = train_one_epoch(training, batches, 1, shown.append)
    except UserError as error:
        return str(error)
    return {"model": training.detr.state_dict(), "shown": shown, "means": means}


def evaluate_share(folder, broken=None):
    training = make_training()
    loader = build_loader(images_of(folder), 2, dist.get_rank(), dist.get_world_size())
    if broken == dist.get_rank():
        loader = [(images * math.nan, mask, targets) for images, mask, targets in loader]
    try:
        losses, detections = evaluate(training.model, training.criterion, loader, CPU)
    except UserError as error:
        return str(error)
    return {"losses": losses, "results": detections.results([{"id": 3}, {"id": 7}])}


def work(four, five, one, out):
    outcomes = {
        "train": train_share(four),
        "accumulate": train_share(four, accumulate=2),
        "train broken": train_share(five, broken=1),
        "evaluate 5": evaluate_share(five),
        "evaluate 1": evaluate_share(one),
        "evaluate broken": evaluate_share(five, broken=1),
    }
    torch.save(outcomes, Path(out) / f"{dist.get_rank()}.pth")


@pytest.fixture(scope="module")
def two_workers(module_coco_folder, run_workers, tmp_path_factory):
    """The folders of four, five and one pictures, and by rank what each worker came to."""
    folders = [module_coco_folder(train=number, folder=str(number)) for number in (4, 5, 1)]
    out = tmp_path_factory.mktemp("out")
    for ended in run_workers(__file__, "work", 2, *folders, out):
        assert ended.returncode == 0, ended.stderr
    return folders, [torch.load(out / f"{rank}.pth") for rank in range(2)]


@pytest.mark.slow
def test_two_workers_train_as_one_with_both_batches(two_workers):
    (folder, _, _), (first, second) = two_workers
    assert all(torch.equal(value, second["train"]["model"][name]) for name, value in first["train"]["model"].items())
    assert first["train"]["shown"] == second["train"]["shown"]
    assert [row["images_per_second"] for row in first["train"]["shown"]] == [2.0, 2.0]  # of both workers, an image each
    assert first["train"]["means"]["images_per_second"] == 4 / 3
    alone, shown = make_training(), []
    images = images_of(folder)
    train_one_epoch(alone, [collate([images[0], images[1]]), collate([images[2], images[3]])], 1, shown.append)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["train"]["model"][name], value, atol=1e-4, rtol=1e-3)
    for name in loss_names(alone.criterion):
        assert first["train"]["shown"][0][name] == pytest.approx(shown[0][name], rel=1e-4), name


@pytest.mark.slow
def test_two_workers_accumulate_as_one(two_workers):
    (folder, _, _), (first, _) = two_workers
    alone = make_training()
    train_one_epoch(alone, batches_of(folder, 4), 1, lambda _: None)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["accumulate"]["model"][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_nan_on_one_worker_stops_both_with_its_images(two_workers):
    _, (first, second) = two_workers
    # Worker 1 has the pictures 11 and 13; the second is broken.
    assert "the loss became nan in epoch 1, step 2, on the images 13;" in first["train broken"]
    assert first["train broken"] == second["train broken"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 1])
def test_evaluation_of_two_workers_is_that_of_one(two_workers, number):
    folders, (first, second) = two_workers
    training = make_training()
    losses, detections = evaluate(training.model, training.criterion, build_loader(images_of(folders[1 if number == 5 else 2]), 2), CPU)
    alone = {"losses": losses, "results": detections.results([{"id": 3}, {"id": 7}])}
    assert first[f"evaluate {number}"] == second[f"evaluate {number}"] == alone
    assert len(alone["results"]) == 9 * number


@pytest.mark.slow
def test_evaluation_that_fails_on_one_worker_fails_on_both(two_workers):
    _, (first, second) = two_workers
    assert "on the images 12, 13;" in first["evaluate broken"]
    assert first["evaluate broken"] == second["evaluate broken"]


if __name__ == "__main__":
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
