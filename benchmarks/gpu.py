"""Check and measure training on a GPU within ten minutes: ``python -m benchmarks.gpu``.

The sections run in order of worth, each in a process of its own with a limit in seconds, so that one that fails or takes too long costs
nothing but itself. Every number is written to ``gpu.json`` in the output folder as soon as it is known; at the end a table shows the
ratios to transformers' DETR and their targets. The checkout and torch, torchvision, scipy and PyYAML are enough, without network and
without Ray. Sections that use more are skipped where that is missing: transformers for the peer, hotcoco or pycocotools for the AP of
whole runs.
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bare
from benchmarks.measure import machine, options, table, wait
from benchmarks.step import CLASSES, make_batch, our_inference, our_step, peer_inference, peer_step
from raydetr.config import Speed, load_config
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model
from raydetr.training import engine
from raydetr.training.engine import choose_device, choose_dtype, configure_cuda, take_step
from raydetr.training.graphs import SEEN_BEFORE_RECORDING, GraphedNetwork
from raydetr.training.run import compile_blocks

ROOT = Path(__file__).parents[1]
STEP, MASKED, PEER, SAME_DROPOUT, COMPILED = "step", "step, padded", "peer step", "peer step, same dropout", "peer step, compiled"
# What is divided by what, and the target of the ratio: more is better for raydetr, except for memory.
RATIOS = (
    ("step, batch 4", f"{SAME_DROPOUT}, batch 4, ms", f"{STEP}, batch 4, ms", 2.0),
    ("step, batch 16", f"{SAME_DROPOUT}, batch 16, ms", f"{STEP}, batch 16, ms", 2.0),
    ("step, batch 4, peer compiled", f"{COMPILED}, batch 4, ms", f"{STEP}, batch 4, ms", 1.3),
    ("padded step, batch 4", f"{SAME_DROPOUT}, batch 4, ms", f"{MASKED}, batch 4, ms", None),
    ("padded step, batch 16", f"{SAME_DROPOUT}, batch 16, ms", f"{MASKED}, batch 16, ms", None),
    ("inference, batch 1", "peer inference, batch 1, ms", "inference, batch 1, ms", 2.0),
    ("memory of the step, batch 4 (raydetr / peer)", f"{STEP}, batch 4, GiB", f"{SAME_DROPOUT}, batch 4, GiB", 0.6),
    ("memory of the step, batch 16 (raydetr / peer)", f"{STEP}, batch 16, GiB", f"{SAME_DROPOUT}, batch 16, GiB", 0.6),
    ("step, batch 4, with CUDA graphs", f"{MASKED}, batch 4, ms", "variant graphs, batch 4, ms", None),
    ("step, batch 4, with cudnn.benchmark", f"{MASKED}, batch 4, ms", "variant cudnn.benchmark, batch 4, ms", None),
    ("step, batch 4, compiled", f"{MASKED}, batch 4, ms", "variant compiled, batch 4, ms", None),
    ("busy share of the GPU, batch 4", "busy ms, batch 4", "profiled ms, batch 4", 0.85),
    ("busy share of the GPU, batch 16", "busy ms, batch 16", "profiled ms, batch 16", 0.95),
)


class Results:
    """Numbers of one section by name, printed and written to its file as soon as they are known."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}

    def add(self, name: str, value: Any) -> None:
        """Keep a number or text; floats are rounded to four significant digits."""
        self.values[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        self.path.write_text(json.dumps(self.values))
        print(f"   {name}: {self.values[name]}", flush=True)


@dataclasses.dataclass
class Setup:
    """What a section measures with."""

    results: Results
    out: Path  # folder for files
    quick: bool

    def __post_init__(self):
        self.device = choose_device(Speed())
        self.dtype = choose_dtype(Speed(), self.device)
        self.on_gpu = self.device.type == "cuda"
        self.size = (64, 96) if self.quick else (800, 1066)

    def batches(self, *sizes: int) -> tuple[int, ...]:
        """Return batch sizes; a quick run has the first one only, and that is 1."""
        return (1,) if self.quick else sizes

    def named(self, what: str, batch: int) -> str:
        """Return the name of a number, with the batch size that stands for it in :data:`RATIOS`."""
        return f"{what}, batch {batch}"


def environment(setup: Setup) -> None:
    """Versions, defaults, and the attention kernel of each combination of dtype, dropout and mask with the time of its first call."""
    add, backends = setup.results.add, torch.backends
    add("machine", machine())
    add("CUDA and cuDNN", f"{torch.version.cuda}, {backends.cudnn.version()}")
    add("TF32 in products and convolutions", f"{backends.cuda.matmul.allow_tf32}, {backends.cudnn.allow_tf32}")
    shape = (1, 8, 20, 32) if setup.quick else (4, 8, 850, 32)
    for dtype, dropout, masked in itertools.product((torch.bfloat16, torch.float32), (0.0, 0.1), (False, True)):
        q = torch.randn(shape, device=setup.device, dtype=dtype, requires_grad=True)
        mask = torch.rand(shape[0], 1, 1, shape[2], device=setup.device) > 0.2 if masked else None

        def attend(q: Tensor = q, mask: Tensor | None = mask, dropout: float = dropout) -> None:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=dropout).sum().backward()

        seconds = _timed(attend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            attend()
        keys = (event.key for event in profiled.key_averages())
        kernels = [key for key in keys if key.startswith("aten::_scaled_dot_product") and "backward" not in key]
        name = f"attention {_short(dtype)}, dropout {dropout}, {'padded' if masked else 'whole'}"
        add(name, f"{', '.join(kernels) or 'separate operators'}, first call {1000 * seconds:.0f} ms")


def oracle(setup: Setup) -> None:
    """How far outputs, losses and gradients are from the official model's."""
    for speed in ("fp32", "tf32", "bf16") if setup.on_gpu else ("fp32",):
        for name, value in distance_from_official(setup.device, speed).items():
            setup.results.add(f"oracle {speed}, {name}", value)
    configure_cuda(Speed())


def distance_from_official(device: torch.device, precision: str, gradients: bool = True) -> dict[str, float]:
    """Return the largest error of logits and boxes, and the largest relative errors of losses and, if asked for, gradient norms."""
    from tests.helpers import official_numbers
    from tests.networks import filled, padded

    configure_cuda(Speed(precision=precision))
    dtype = choose_dtype(Speed(precision=precision), device)
    numbers, targets = official_numbers("detr_resnet50")
    targets = [{name: each.to(device) for name, each in target.items()} for target in targets]
    model, criterion = filled(build_model(dropout=0.0)).train().to(device), build_criterion(CLASSES)
    images, mask = padded([(192, 256), (224, 160)])
    outputs = engine._forward(model, images, mask, device, dtype)
    losses = criterion(outputs, targets)
    relative = {name: abs(each.item() / float(numbers[f"loss/{name}"]) - 1) for name, each in losses.items() if name.startswith("loss_")}
    errors = {
        name.removeprefix("pred_"): (outputs[name].detach().float().cpu() - torch.from_numpy(numbers[name])).abs().max().item()
        for name in ("pred_logits", "pred_boxes")
    }
    errors["losses"] = max(relative.values())
    if not gradients:
        return errors
    criterion.weighted_sum(losses).backward()
    norms = [
        abs(each.grad.norm().item() - float(numbers[f"grad_norm/{name}"])) / max(float(numbers[f"grad_norm/{name}"]), 1e-2)
        for name, each in model.named_parameters()
        if each.grad is not None
    ]
    return errors | {"gradient norms": max(norms), "median gradient norm": statistics.median(norms)}


def waits(setup: Setup) -> None:
    """Where the host waits for the GPU in a step: only the matching, once, is meant to."""
    step = padded_step(setup, setup.batches(4)[0])
    step()
    seen: dict[str, int] = {}

    def note(*_: Any, **__: Any) -> None:
        frames = [
            each for each in traceback.extract_stack() if f"{os.sep}raydetr{os.sep}" in each.filename or "torch/optim" in each.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
        seen[where] = seen.get(where, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    setup.results.add("waits of a step", ", ".join(f"{where} {count}x" for where, count in seen.items()) or "none")
    others = [where for where in seen if not where.startswith("matcher.py:")]
    setup.results.add("waits beside the matching's", ", ".join(others) or "none")


def steps(setup: Setup) -> None:
    """Our training step with and without padding, and inference: time in a row, time alone, memory."""
    for batch in setup.batches(4, 16, 2):
        measure(setup, setup.named(STEP, batch), lambda batch=batch: plain_step(setup, batch), batch)
        measure(setup, setup.named(MASKED, batch), lambda batch=batch: padded_step(setup, batch), batch)
    for batch in setup.batches(1, 8):
        images = make_batch(batch, *setup.size, setup.device)[0]
        measure(setup, setup.named("inference", batch), lambda images=images: our_inference(images, setup.dtype), batch)


def peer(setup: Setup) -> None:
    """The training step and inference of transformers, run eagerly."""
    for batch, (name, dropout) in itertools.product(setup.batches(4, 16), ((SAME_DROPOUT, 0.1), (PEER, 0.0))):
        images, targets = make_batch(batch, *setup.size, setup.device)
        make = functools.partial(peer_step, images, targets, setup.dtype, dropout)
        measure(setup, setup.named(name, batch), make, batch)
    images = make_batch(1, *setup.size, setup.device)[0]
    measure(setup, setup.named("peer inference", 1), lambda: peer_inference(images, setup.dtype), 1)


def compiled(setup: Setup) -> None:
    """The training step of transformers with a compiled network; compilation is timed apart."""
    (batch,) = setup.batches(4)
    images, targets = make_batch(batch, *setup.size, setup.device)
    step = peer_step(images, targets, setup.dtype, 0.1, compiled=True)
    setup.results.add("compilation of the peer, s", _timed(step))
    measure(setup, setup.named(COMPILED, batch), lambda: step, batch)


def profile(setup: Setup) -> None:
    """How busy the GPU is in a step, with how many launches, and which kernels take the longest."""
    activity = torch.profiler.ProfilerActivity
    for batch in setup.batches(4, 16):
        step, number = padded_step(setup, batch), 1 if setup.quick else 5
        for _ in range(number):
            step()
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if setup.on_gpu else [])]) as profiled:
            seconds = _timed(lambda step=step, number=number: [step() for _ in range(number)])
        events = profiled.key_averages()
        kernels = [each for each in events if str(each.device_type).endswith("CUDA")] if setup.on_gpu else list(events)
        busy = {each.key: (each.self_device_time_total if setup.on_gpu else each.self_cpu_time_total) / number / 1000 for each in kernels}
        setup.results.add(setup.named("profiled ms", batch), 1000 * seconds / number)
        setup.results.add(setup.named("busy ms", batch), sum(busy.values()))
        setup.results.add(setup.named("kernel launches", batch), sum(each.count for each in kernels) / number)
        for key in sorted(busy, key=lambda key: busy[key], reverse=True)[:15]:
            print(f"   {busy[key]:8.3f} ms {key[:100]}")


def shapes(setup: Setup) -> None:
    """Every step another size, as multi-scale training has: a first pass over the sizes, which plans kernels, and a second."""
    draw = random.Random(0)
    sizes = [(64, 90)] if setup.quick else [(draw.randrange(480, 801), draw.randrange(640, 1334)) for _ in range(24)]
    training = plain_step(setup, 1).args[0]
    for multiple in (1, 64):
        batches = [_padded_batch(2, tuple(-(-side // multiple) * multiple for side in size), setup.device) for size in sizes]
        for number in (1, 2):
            milliseconds = [1000 * _timed(lambda batch=batch: take_step(training, [batch])) for batch in batches]
            name = f"sides to multiples of {multiple}, pass {number}"
            setup.results.add(f"{name}, median ms", statistics.median(milliseconds))
            setup.results.add(f"{name}, sum ms", sum(milliseconds))
    if setup.on_gpu:
        setup.results.add("reserved after all sizes, GiB", torch.cuda.max_memory_reserved() / 2**30)


def runs(setup: Setup) -> None:
    """Whole runs: precisions, a run resumed against one that was not stopped, a checkpoint read without a GPU, memory given back."""
    for precision in ("auto", "fp16") if setup.on_gpu else ("auto",):
        _run(setup, f"straight-{precision}", **{"speed.precision": precision})
    constant = {"optim.schedule": "constant"}
    _run(setup, "whole", **constant)
    _run(setup, "stopped", **constant, **{"optim.epochs": 1})
    _run(setup, "stopped", **constant)
    weights = [torch.load(setup.out / "runs" / name / "last.pth", weights_only=True)["model"] for name in ("whole", "stopped")]
    largest = max((weights[0][name].float() - weights[1][name].float()).abs().max().item() for name in weights[0])
    setup.results.add("resumed against straight, largest difference of a weight", largest)
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    command = [sys.executable, "-c", code, str(setup.out / "runs" / "whole" / "best.pth")]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    setup.results.add("checkpoint reads without a GPU", done.returncode == 0)
    if setup.on_gpu:
        setup.results.add("left allocated after the runs, MiB", torch.cuda.memory_allocated() / 2**20)
        setup.results.add("left reserved after the runs, MiB", torch.cuda.memory_reserved() / 2**20)


def out_of_memory(setup: Setup) -> None:
    """What a run that needs too much memory says, and whether the next one works."""
    huge = {"model.preset": "detr_resnet50", "model.weights": "none", "data.train_sizes": [3000], "data.max_size": 4000}
    try:
        _run(setup, "huge", **({} if setup.quick else huge), **{"optim.batch_size": 2 if setup.quick else 32, "optim.epochs": 1})
    except UserError as error:
        setup.results.add("message", str(error))
    else:
        setup.results.add("message", "none: the memory sufficed")
    setup.results.add("left reserved, MiB", torch.cuda.memory_reserved() / 2**20)
    _run(setup, "after")


def variants(setup: Setup) -> None:
    """What else could help: CUDA graphs of the network, cuDNN's search for algorithms, compiled blocks."""
    for batch in setup.batches(4, 16):
        measure(setup, setup.named("variant graphs", batch), lambda batch=batch: _graphed_step(setup, batch), batch)
        torch.backends.cudnn.benchmark = True
        measure(setup, setup.named("variant cudnn.benchmark", batch), lambda batch=batch: padded_step(setup, batch), batch)
        torch.backends.cudnn.benchmark = False
        step = padded_step(setup, batch)
        compile_blocks(step.args[0].detr, dynamic=False)
        setup.results.add(setup.named("compilation of raydetr, s", batch), _timed(step))
        measure(setup, setup.named("variant compiled", batch), lambda step=step: step, batch)


def shared(setup: Setup) -> None:
    """Two processes on one GPU, as trials with half a GPU each have it, against one: steps per second of both together."""
    for count in (1, 2):
        command = [sys.executable, "-m", "benchmarks.gpu", "--section", "one_of_two", "--out", str(setup.out)]
        command += ["--quick"] if setup.quick else []
        processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        answers = [process.communicate()[0] for process in processes]
        rates = [float(answer.rsplit("steps per second:", 1)[1].split()[0]) for answer in answers]
        setup.results.add(f"processes {count}, steps per second together", sum(rates))


def one_of_two(setup: Setup) -> None:
    """Train for a few seconds and print the steps per second; :func:`shared` runs this in its processes."""
    step, until = padded_step(setup, setup.batches(2)[0]), 0.2 if setup.quick else 8.0
    step()
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + until:
        step()
        count += 1
    wait()
    print(f"steps per second: {count / (time.perf_counter() - began)}")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the benchmark, its limit in seconds and what it needs."""

    run: Callable[[Setup], None]
    limit_s: int
    gpu: bool = False
    modules: tuple[str, ...] = ()
    evaluates: bool = False  # computes AP


SECTIONS = {  # in order of worth: what the budget cuts is at the end
    "environment": Section(environment, 40),
    "oracle": Section(oracle, 50),
    "waits": Section(waits, 30, gpu=True),
    "steps": Section(steps, 70),
    "peer": Section(peer, 60, modules=("transformers",)),
    "profile": Section(profile, 40),
    "shapes": Section(shapes, 60),
    "runs": Section(runs, 70, evaluates=True),
    "out_of_memory": Section(out_of_memory, 40, gpu=True, evaluates=True),
    "compiled": Section(compiled, 110, gpu=True, modules=("transformers",)),
    "variants": Section(variants, 80, gpu=True),
    "shared": Section(shared, 50, gpu=True),
}
HIDDEN = {"one_of_two": Section(one_of_two, 40)}


def plain_step(setup: Setup, batch: int) -> functools.partial:
    """Return our training step on a batch without padding."""
    step = our_step(*make_batch(batch, *setup.size, setup.device), setup.dtype)
    assert isinstance(step, functools.partial)
    return step


def padded_step(setup: Setup, batch: int) -> functools.partial:
    """Return our training step on a batch whose first image is padded, as nearly all batches of real images are."""
    step = plain_step(setup, batch)
    step.args[1][0] = _padded_batch(batch, setup.size, setup.device)
    return step


def _padded_batch(batch: int, size: tuple[int, ...], device: torch.device) -> engine.Batch:
    height, width = size
    images, targets = make_batch(batch, height, width, device)
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    mask[0, :, -(width // 10) :] = True
    return images, mask, targets


def _graphed_step(setup: Setup, batch: int) -> functools.partial:
    step = padded_step(setup, batch)
    step.args[0].graphs = GraphedNetwork(step.args[0].detr)
    for _ in range(SEEN_BEFORE_RECORDING):
        step()
    return step


def measure(setup: Setup, name: str, make: Callable[[], Callable[[], object]], batch: int) -> None:
    """Measure a step in a row of steps, where the host may run ahead of the GPU, and alone, and the peak memory."""
    if setup.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, number = make(), 1 if setup.quick else 20 if batch < 16 else 10
    for _ in range(1 if setup.quick else 3):
        step()
    wait()
    in_a_row = _timed(lambda: [step() for _ in range(number)]) / number
    setup.results.add(f"{name}, ms", 1000 * in_a_row)
    setup.results.add(f"{name}, alone ms", 1000 * statistics.median(_timed(step) for _ in range(min(number, 8))))
    setup.results.add(f"{name}, images per second", batch / in_a_row)
    if setup.on_gpu:
        setup.results.add(f"{name}, GiB", torch.cuda.max_memory_allocated() / 2**30)


def _timed(call: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(setup: Setup, name: str, **changes: Any) -> None:
    from raydetr.data.formats.convert import convert
    from raydetr.demo.balloons import generate
    from raydetr.training.fit import fit

    data, number = setup.out / "balloons", 4 if setup.quick else 32
    if not data.exists():
        generate(setup.out / "via", train=number, val=2 if setup.quick else 8)
        convert(setup.out / "via", data, "via")
    small = {"model.preset": "detr_tiny", "data.path": str(data), "optim.epochs": 2 if setup.quick else 4, "run.pictures": 0}
    stored = {"run.storage": str(setup.out / "runs"), "run.name": name, "data.num_workers": 0 if setup.quick else 2}
    began = time.perf_counter()
    with bare.runs_work():
        metrics = fit(load_config({**small, **stored, **changes}), bare.SilentReporter())
    setup.results.add(f"run {name}, AP", metrics["AP"])
    setup.results.add(f"run {name}, s", time.perf_counter() - began)


def missing(section: Section) -> str:
    """Return why a section cannot run here; empty if it can."""
    if section.gpu and not torch.cuda.is_available():
        return "needs a GPU"
    absent = [name for name in section.modules if not bare.is_there(name)]
    if section.evaluates and not any(map(bare.is_there, bare.EVALUATORS)):
        absent.append(" or ".join(bare.EVALUATORS))
    return f"needs {', '.join(absent)}" if absent else ""


def run_section(name: str, out: Path, quick: bool) -> None:
    """Run a section in this process; its numbers are in ``out``/NAME.json afterwards, also of one that fails half way."""
    {**SECTIONS, **HIDDEN}[name].run(Setup(Results(out / f"{name}.json"), out, quick))


def run_in_process(name: str, out: Path, quick: bool, limit_s: float) -> str:
    """Run a section in a process of its own.

    Returns:
        What went wrong; empty if nothing did.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu",
        "--section",
        name,
        "--out",
        str(out),
        *(["--quick"] if quick else []),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=limit_s, stderr=subprocess.PIPE, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]


def ratios(numbers: Mapping[str, Any]) -> list[list[Any]]:
    """Return the rows of the table of ratios, for those whose two numbers are known."""
    return [
        [what, numbers[above], numbers[below], numbers[above] / numbers[below], "" if target is None else target]
        for what, above, below, target in RATIOS
        if above in numbers and below in numbers
    ]


def main() -> None:
    """Run all sections that the budget allows and print the table of ratios."""
    parser = options(__doc__, repeats=1)
    parser.add_argument("--section", choices=[*SECTIONS, *HIDDEN], metavar="NAME", help=f"run one alone: {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and other files (default: $OUT, else a temporary folder)")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all sections (default 540)")
    chosen = parser.parse_args()
    out = Path(chosen.out or os.environ.get("OUT") or tempfile.mkdtemp(prefix="raydetr-gpu-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if chosen.section:
        run_section(chosen.section, out, chosen.quick)
        return
    began, report = time.monotonic(), {"machine": machine(), "quick": chosen.quick, "numbers": {}, "problems": {}}
    for name, section in SECTIONS.items():
        left = chosen.budget - (time.monotonic() - began)
        print(f"{name}: {(section.run.__doc__ or '').strip()}", flush=True)
        problem = missing(section) or ("no time left" if left < 10 else run_in_process(name, out, chosen.quick, min(section.limit_s, left)))
        written = out / f"{name}.json"
        report["numbers"] |= json.loads(written.read_text()) if written.exists() else {}
        if problem:
            report["problems"][name] = problem
            print(f"   {problem}", flush=True)
        (out / "gpu.json").write_text(json.dumps(report, indent=1))
    rows = ratios(report["numbers"])
    print(
        "\n" + table(rows, ["what", "peer (or before)", "raydetr (or after)", "ratio", "target"])
        if rows
        else "\nno ratios: too little was measured"
    )
    print(f"\nall numbers: {out / 'gpu.json'}")


if __name__ == "__main__":
    main()
