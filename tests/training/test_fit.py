import functools
import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.distributed as dist

import raydetr
from raydetr.config import load_config, read_yaml
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS, coco_metrics, stats
from raydetr.evaluate.diagnosis import diagnose
from raydetr.launch.train import check_data
from raydetr.loss.criterion import build_criterion
from raydetr.training.engine import evaluate
from raydetr.training.fit import fit
from raydetr.training.metrics import LAST_EPOCH
from raydetr.training.tracking import read_history
from raydetr.weights.checkpoint import read_checkpoint
from tests.helpers import break_test_set
from tests.training.runs import STATEFUL, Watcher, folder_of, interrupted, last_of, log_of, run, same, settings

# --- one run ---


@pytest.fixture(scope="module")
def finished(module_coco_folder):
    """The settings of a finished run, its metrics and what its reporter was told."""
    data = module_coco_folder(train=6, val=3)
    break_test_set(data)
    config = settings(data, "whole", **STATEFUL)
    return config, *run(config)


def diagnosis_of(config):
    """What the curves of a finished run say."""
    history = read_history(folder_of(config) / "log.txt")
    return diagnose(history, num_queries=9, images=3, clip_max_norm=config.optim.clip_max_norm)


def test_the_end_of_a_run_says_what_its_curves_say(finished, module_coco_folder):
    config, metrics, watcher = finished
    end = next(row for row, event in enumerate(watcher.events) if event["kind"] == "end")
    assert [event["text"] for event in watcher.events[end + 1 :]] == diagnosis_of(config)
    assert len(read_history(folder_of(config) / "log.txt")) == 3
    for name in (
        "AP",
        "AP75",
        "AP_low",
        "AP_high",
        "train_loss",
        "train_grad_norm",
        "val_loss",
        "val_class_error",
        "val_cardinality_error",
    ):
        assert read_history(folder_of(config) / "log.txt")[-1][name] == pytest.approx(metrics[name]), name
    crowded = settings(module_coco_folder(train=1, val=1, boxes=12, folder="crowded"), "crowded", **{"optim.epochs": 1})
    _, watcher = run(crowded)
    assert watcher.events[-1]["text"].startswith("An image has 12 objects, but the network detects at most 9: raise model.num_queries")


def test_a_training_never_reads_the_test_set(finished):
    config, metrics, _ = finished
    check_data(config)
    assert metrics["epoch"] == 3
    with pytest.raises(UserError, match="no test images"):
        find_split(config.data, "test")


def test_the_run_folder(finished):
    config, metrics, watcher = finished
    assert {path.name for path in folder_of(config).iterdir()} == {"config.yaml", "log.txt", "tb", "best.pth", "last.pth"}
    last, best = last_of(config), read_checkpoint(folder_of(config) / "best.pth")
    assert last["epoch"] == metrics["epoch"] == 3
    assert last["step"] == 6  # three batches of two images, two batches to a step
    assert last["categories"] == best["categories"] == [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]
    assert last["settings"]["optim"]["ema_decay"] == 0.9
    assert last["metrics"] == metrics
    assert best["epoch"] == metrics["best_epoch"]
    assert best["metrics"]["AP"] == metrics["best_AP"]
    assert not best.keys() & {"optimizer", "ema", "random"}
    assert last.keys() >= {"optimizer", "lr_scheduler", "scaler", "ema", "random"}
    assert len(last["random"]) == 1
    same(last["model"], last["ema"])
    assert not torch.equal(last["model"]["class_embed.weight"], last["trained"]["class_embed.weight"])
    twice, once = (os.path.getsize(folder_of(config) / name) for name in ("last.pth", "best.pth"))
    assert twice < 4.3 * once  # weights, their average, and two moments of the optimizer
    assert [event["kind"] for event in watcher.events if event["kind"] != "step"] == [
        *("message", "start"),
        *("evaluate", "report", "epoch") * 3,
        "end",
        *["message"] * len(diagnosis_of(config)),
    ]
    assert [(event["epoch"], event["step"]) for event in watcher.of_kind("step")] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


def test_metrics_are_flat_and_valid_json(finished):
    _, metrics, watcher = finished
    *others, last = (event["metrics"] for event in watcher.of_kind("report"))
    assert last == metrics | {LAST_EPOCH: True}
    assert not any(LAST_EPOCH in each for each in others)
    assert metrics.keys() >= {*METRICS, "epoch", "train_loss", "val_loss", "val_loss_ce", "val_loss_bbox", "val_loss_giou", "best_AP"}
    assert all(value is None or isinstance(value, (int, float)) for value in metrics.values())
    json.dumps(metrics, allow_nan=False)


def test_reports_carry_the_whole_epoch(finished):
    config, _, watcher = finished
    reports = watcher.of_kind("report")
    assert [report["metrics"]["epoch"] for report in reports] == [1, 2, 3]
    assert {report["checkpoint"] for report in reports} == {folder_of(config) / "last.pth"}


def test_the_best_checkpoint_holds_the_evaluated_weights(finished):
    config, metrics, watcher = finished
    best = watcher.of_kind("report")[metrics["best_epoch"] - 1]["metrics"]
    model = raydetr.load(folder_of(config) / "best.pth")
    images = CocoImages(find_split(config.data, "val"), val_transforms(config.data), categories=model.categories)
    criterion = build_criterion(2, dec_layers=2, eos_coef=config.loss.eos_coef)
    losses, detections = evaluate(model, criterion, build_loader(images, 2), torch.device("cpu"))
    again = coco_metrics(images.coco, detections.results(model.categories))
    assert losses["loss"] == best["val_loss"]
    assert stats(again) == stats(best)


def test_the_log_is_the_official_one(finished):
    config, _, watcher = finished
    lines = log_of(config)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    losses = ["loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"]
    errors = ["class_error", "cardinality_error"]
    expected = {"train_lr", "epoch", "n_parameters", "test_coco_eval_bbox"}
    for split in ("train", "test"):
        expected |= {f"{split}_loss", f"{split}_class_error", *(f"{split}_{name}" for name in losses)}
        expected |= {f"{split}_{name}_unscaled" for name in (*losses, *errors)}
    assert expected <= lines[0].keys()
    for line, report in zip(lines, watcher.of_kind("report"), strict=True):
        metrics = report["metrics"]
        assert line["train_loss"] == pytest.approx(sum(line[f"train_{name}"] for name in losses), rel=1e-5)
        assert line["train_loss_giou"] == pytest.approx(2 * line["train_loss_giou_unscaled"])
        assert line["test_loss_bbox"] == pytest.approx(5 * metrics["val_loss_bbox"])
        assert line["test_coco_eval_bbox"] == stats(metrics)
    model = raydetr.load(folder_of(config) / "last.pth")
    assert lines[0]["n_parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_official_plot_logs_can_read_the_log(finished):
    # What util/plot_utils.py does with the file, for each of its default fields and others.
    config, _, _ = finished
    frame = pandas.read_json(folder_of(config) / "log.txt", lines=True)
    average_precision = pandas.DataFrame(np.stack(frame.test_coco_eval_bbox.dropna().values)[:, 1]).ewm(com=0).mean()
    assert average_precision.shape == (3, 1)
    smooth = frame.drop(columns="test_coco_eval_bbox").interpolate().ewm(com=0).mean()
    for field in ("class_error", "loss_bbox_unscaled", "loss", "loss_ce", "loss_bbox", "loss_giou", "cardinality_error_unscaled"):
        assert np.isfinite(smooth[[f"train_{field}", f"test_{field}"]].to_numpy()).all()


def test_a_finished_run_returns_at_once(finished):
    config, metrics, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder_of(config).rglob("*")}
    again, watcher = run(config)
    assert again == metrics
    assert [event["kind"] for event in watcher.events] == ["message", "message", "report"]
    assert watcher.events[1]["text"] == f"{folder_of(config)} is finished after 3 epochs; a larger --epochs trains on"
    assert watcher.events[2]["metrics"] == metrics | {LAST_EPOCH: True}
    assert {path: path.stat().st_mtime_ns for path in folder_of(config).rglob("*")} == before


def test_config_yaml_repeats_the_run(finished):
    config, metrics, _ = finished
    again = load_config(read_yaml(folder_of(config) / "config.yaml"), {"run.name": "again"})
    run(again)
    same(last_of(config), last_of(again))
    other = load_config(read_yaml(folder_of(config) / "config.yaml"), {"run.name": "other", "run.seed": 1, "optim.epochs": 1})
    assert run(other)[0]["train_loss"] != metrics["train_loss"]


# --- stopped and gone on with ---


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("boundary", lambda event: event["kind"] == "report" and event["metrics"]["epoch"] == 2),
        ("middle", lambda event: event["kind"] == "step" and (event["epoch"], event["step"]) == (2, 1)),
        ("evaluation", lambda event: event["kind"] == "evaluate" and event["epoch"] == 3),
        ("first", lambda event: event["kind"] == "step" and event["epoch"] == 1),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bits(finished, name, stop):
    whole, metrics, _ = finished
    config = settings(whole.data.path, name, **STATEFUL)
    interrupted(config, stop)
    again, watcher = run(config)
    same(last_of(whole), last_of(config))
    same(read_checkpoint(folder_of(whole) / "best.pth"), read_checkpoint(folder_of(config) / "best.pth"))
    same(metrics, again)
    assert log_of(whole) == log_of(config)
    assert watcher.of_kind("start")[0]["done"] == {"boundary": 2, "middle": 1, "evaluation": 2, "first": 0}[name]


def test_loading_processes_change_nothing(finished):
    whole, _, _ = finished
    config = settings(whole.data.path, "processes", **STATEFUL, data__num_workers=1)
    interrupted(config, lambda event: event["kind"] == "step" and event["epoch"] == 3)
    run(config)
    same(last_of(whole)["model"], last_of(config)["model"])


def test_more_epochs_than_before(finished):
    whole, _, _ = finished
    short = settings(whole.data.path, "short", optim__epochs=2)
    run(short)
    longer = settings(whole.data.path, "short", optim__epochs=3)
    metrics, watcher = run(longer)
    assert metrics["epoch"] == 3
    assert watcher.of_kind("start")[0]["done"] == 2
    assert [line["epoch"] for line in log_of(longer)] == [0, 1, 2]
    # lr_drop 0.667 of three epochs: the whole rate for two, and a third of steps of the last epoch is below it
    at_once = settings(whole.data.path, "at once", optim__epochs=3)
    run(at_once)
    assert [line["train_lr"] for line in log_of(longer)][2] == pytest.approx(log_of(at_once)[2]["train_lr"])
    assert load_config(read_yaml(folder_of(longer) / "config.yaml")).optim.epochs == 3


def test_an_epoch_of_other_steps_keeps_the_schedule_and_counts_on(coco_folder):
    # As where a run goes on with another number of workers.
    folder = coco_folder(train=8, val=2)
    before = settings(folder, "changed", optim__schedule="cosine", optim__epochs=3, optim__batch_size=1)
    interrupted(before, lambda event: event["kind"] == "step" and event["epoch"] == 3)
    changed = settings(folder, "changed", optim__schedule="cosine", optim__epochs=3)
    run(changed)
    at_once = settings(folder, "at once", optim__schedule="cosine", optim__epochs=3)
    run(at_once)
    assert log_of(changed)[2]["train_lr"] == log_of(at_once)[2]["train_lr"]
    assert last_of(changed)["step"] == 8 + 8 + 4


def test_a_run_that_another_process_goes_on_with_stops_and_leaves_its_folder_alone(coco_folder):
    config = settings(coco_folder(), "twice")
    theirs = []

    def meanwhile(event):
        if event["kind"] == "evaluate" and event["epoch"] == 2:
            theirs.append(run(config))  # it takes this process for lost

    with pytest.raises(UserError, match="another process has taken over"):
        fit(config, Watcher(meanwhile))
    assert theirs[0][0]["epoch"] == 3
    assert [line["epoch"] for line in log_of(config)] == [0, 1, 2]
    assert last_of(config)["epoch"] == 3


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on(finished, run_workers):
    whole, _, _ = finished
    config = settings(whole.data.path, "killed", **STATEFUL)
    (ended,) = run_workers(__file__, "kill_yourself", 1, whole.data.path, "killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert last_of(config)["epoch"] == 1
    run(config)
    same(last_of(whole), last_of(config))
    assert log_of(whole) == log_of(config)


def kill_yourself(path, name):
    def stop(event):
        if event["kind"] == "step" and event["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    dist.destroy_process_group()
    fit(settings(path, name, **STATEFUL), Watcher(stop))


def test_another_runs_checkpoint_is_gone_on_with_where_the_reporter_gives_one(finished):
    whole, _, _ = finished
    config = settings(whole.data.path, "exploiting", **STATEFUL, optim__epochs=4, optim__lr=1e-5, optim__weight_decay=0.5)
    metrics, watcher = run(config, checkpoint=folder_of(whole) / "last.pth")
    assert metrics["epoch"] == 4
    assert watcher.of_kind("start")[0]["done"] == 3
    group = last_of(config)["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (1e-5, 0.5)


def test_a_checkpoint_of_another_network_is_refused(finished):
    whole, _, _ = finished
    other = settings(whole.data.path, "whole", **STATEFUL, model__num_queries=5)
    with pytest.raises(UserError, match=r"last\.pth is of a network with model\.num_queries 9, not 5"):
        run(other)
    frozen = settings(whole.data.path, "whole", **{**STATEFUL, "optim.epochs": 9}, optim__freeze_backbone=True)
    with pytest.raises(UserError, match=r"optim\.freeze_backbone"):
        run(frozen)


def test_weights_alone_cannot_be_gone_on_with(finished):
    whole, _, _ = finished
    with pytest.raises(UserError, match=r"best\.pth holds weights only"):
        run(settings(whole.data.path, "new", **STATEFUL), checkpoint=folder_of(whole) / "best.pth")


# --- bad ends ---


def test_broken_weights_never_reach_a_checkpoint(coco_folder):
    config = settings(coco_folder(), "broken", optim__epochs=1)
    run(config)
    content = last_of(config)
    content["model"]["class_embed.bias"][0] = float("nan")
    torch.save(content, folder_of(config) / "last.pth")
    before = {name: (folder_of(config) / name).read_bytes() for name in ("best.pth", "last.pth", "log.txt")}
    with pytest.raises(UserError, match=r"the loss became nan in epoch 2, step 3, on the images \d+, \d+;"):
        run(settings(config.data.path, "broken", optim__epochs=2))
    assert {name: (folder_of(config) / name).read_bytes() for name in before} == before


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_earlier_one(coco_folder):
    config = settings(coco_folder(), "full", optim__epochs=1)
    run(config)
    before = {name: (folder_of(config) / name).read_bytes() for name in ("best.pth", "last.pth")}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # no file may be larger than a MiB: the disk refuses the checkpoint
    try:
        with pytest.raises(UserError, match=r"\.pth: not saved") as error:
            run(settings(config.data.path, "full", optim__epochs=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(error.value)
    assert {name: (folder_of(config) / name).read_bytes() for name in before} == before
    assert {path.name for path in folder_of(config).iterdir()} == {".owner", "config.yaml", "log.txt", "tb", "best.pth", "last.pth"}
    (folder_of(config) / ".last.pth.0.partial").touch()  # as a process leaves it that is killed while it writes
    assert run(settings(config.data.path, "full", optim__epochs=2))[0]["epoch"] == 2
    assert {path.name for path in folder_of(config).iterdir()} == {"config.yaml", "log.txt", "tb", "best.pth", "last.pth"}
    assert [line["epoch"] for line in log_of(config)] == [0, 1]


def test_a_run_folder_that_cannot_be_made(coco_folder):
    config = settings(coco_folder(), "a")
    Path(config.run.storage).write_text("a file")
    with pytest.raises(UserError, match=r"run\.storage: cannot write to"):
        run(config)


def test_a_run_without_a_name(coco_folder):
    with pytest.raises(UserError, match=r"run\.name is not set"):
        run(settings(coco_folder(), None))


def test_warnings_of_the_data_are_shown(coco_folder):
    folder = coco_folder()
    file = folder / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["bbox"] = [10, 10, -5, 0]
    file.write_text(json.dumps(coco))
    _, watcher = run(settings(folder, "warned", optim__epochs=1))
    texts = [event["text"] for event in watcher.of_kind("message")]
    assert sum("custom_train.json: 1 annotation" in text for text in texts) == 1
    assert texts[-1].startswith("weights: none")


# --- settings ---


def test_early_stopping(coco_folder):
    config = settings(coco_folder(), "patient", optim__lr=0.0, optim__lr_backbone=0.0, optim__patience=2, optim__epochs=9)
    metrics, watcher = run(config)
    assert metrics["epoch"] == 3
    assert metrics["best_epoch"] == 1
    assert [LAST_EPOCH in event["metrics"] for event in watcher.of_kind("report")] == [False, False, True]
    again, watcher = run(config)
    assert again == metrics
    assert not watcher.of_kind("step")
    assert [LAST_EPOCH in event["metrics"] for event in watcher.of_kind("report")] == [True]


def test_frozen_backbone_stays_as_it_was(coco_folder):
    config = settings(coco_folder(), "start", optim__epochs=1, optim__freeze_backbone=True)
    interrupted(config, lambda event: event["kind"] == "report")
    before = last_of(config)["model"]
    run(settings(config.data.path, "start", optim__epochs=2, optim__freeze_backbone=True))
    after = last_of(config)["model"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "backbone" not in changed
    assert {"transformer", "class_embed", "bbox_embed"} <= changed


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_goes_on_as_it_was(coco_folder, precision):
    folder = coco_folder()
    whole = settings(folder, "whole", optim__epochs=2, speed__precision=precision)
    run(whole)
    assert bool(last_of(whole)["scaler"]) == (precision == "fp16")
    stopped = settings(folder, "stopped", optim__epochs=2, speed__precision=precision)
    interrupted(stopped, lambda event: event["kind"] == "step" and event["epoch"] == 2)
    run(stopped)
    same(last_of(whole), last_of(stopped))


# --- two workers ---


def work_together(path):
    fit(settings(path, "two", **STATEFUL), Watcher())
    try:
        fit(settings(path, "two stopped", **STATEFUL), Watcher(lambda event: event["kind"] == "step" and event["epoch"] == 2))
    except KeyboardInterrupt:
        torch.manual_seed(99)
    fit(settings(path, "two stopped", **STATEFUL), Watcher())
    try:
        fit(settings(path, "two", **STATEFUL, model__num_queries=5), Watcher())
    except UserError as error:
        print(error)


@pytest.mark.slow
def test_two_workers_interrupted_end_in_the_same_bits(coco_folder, run_workers):
    folder = coco_folder(train=6, val=3)
    ended = run_workers(__file__, "work_together", 2, folder)
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    whole, stopped = settings(folder, "two", **STATEFUL), settings(folder, "two stopped", **STATEFUL)
    same(last_of(whole), last_of(stopped))
    assert log_of(whole) == log_of(stopped)
    random = last_of(whole)["random"]
    assert len(random) == 2
    assert not torch.equal(random[0]["torch"], random[1]["torch"])
    assert last_of(whole)["step"] == 3  # one batch of two images for each worker and epoch: nothing to accumulate
    assert all("model.num_queries 9, not 5" in process.stdout for process in ended)
    # One worker goes on with what two began.
    metrics, _ = run(settings(folder, "two", **STATEFUL, optim__epochs=4))
    assert metrics["epoch"] == 4
    assert last_of(whole)["step"] == 5


if __name__ == "__main__":
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    globals()[sys.argv[1]](*sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()


def test_compiled_blocks_learn_the_same_under_the_same_names(coco_folder, monkeypatch):
    # All of torch.compile but what the compiler makes of the graph, which takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    known = {"folder": coco_folder(train=4, val=2), "model__dropout": 0.0, "optim__epochs": 1}
    plain, _ = run(settings(name="plain", **known))
    compiled, _ = run(settings(name="compiled", speed__compile="on", **known))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    weights = [read_checkpoint(folder_of(settings(name=name, **known)) / "last.pth")["model"] for name in ("plain", "compiled")]
    assert list(weights[0]) == list(weights[1])


def test_a_compiler_that_fails_is_one_line_with_the_way_round_it(coco_folder, monkeypatch):
    def broken(_graph, _inputs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=broken))
    with pytest.raises(UserError, match=r"speed\.compile: .* --speed\.compile off .*no working C\+\+ compiler"):
        run(settings(coco_folder(), "run", speed__compile="on"))
