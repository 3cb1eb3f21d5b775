"""Training and evaluation with masks: what is reported and kept, memory bounds, freezing, resuming, several workers."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader, collate
from raydetr.data.masks import decode_masks
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import MASK_PARTS, build_model
from raydetr.model.masks import postprocess_masks
from raydetr.predict.score import score_checkpoint
from raydetr.training import engine, masks
from raydetr.training.masks import chunk_size, counted_queries
from raydetr.training.schedule import build_optimizer, build_scheduler
from raydetr.training.tracking import custom_scalars
from raydetr.weights.checkpoint import read_checkpoint
from tests.helpers import add_outlines
from tests.training.runs import STATEFUL, folder_of, interrupted, last_of, log_of, run, same, settings

CPU = torch.device("cpu")
MASKS = {"model__masks": True}


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return add_outlines(module_coco_folder(train=5, val=3))


@pytest.fixture(scope="module")
def finished(data):
    config = settings(data, "masks", **MASKS, **STATEFUL, optim__epochs=2)
    metrics, watcher = run(config)
    return config, metrics, watcher


def test_a_run_reports_the_numbers_of_masks(finished):
    config, metrics, _ = finished
    assert {f"segm_{name}" for name in METRICS} <= metrics.keys()
    assert 0 <= metrics["segm_AP"] <= 1
    for split in ("train", "val"):
        assert metrics[f"{split}_loss_mask"] > 0
        assert metrics[f"{split}_loss_dice"] > 0
    last = log_of(config)[-1]
    numbers = [-1.0 if metrics[f"segm_{name}"] is None else metrics[f"segm_{name}"] for name in METRICS]
    assert last["test_coco_eval_masks"] == numbers
    assert len(last["test_coco_eval_bbox"]) == 12
    assert last["test_loss_mask"] == last["test_loss_mask_unscaled"] == metrics["val_loss_mask"]


def test_tensorboard_shows_them(finished):
    config, metrics, _ = finished
    events = EventAccumulator(str(folder_of(config) / "tb")).Reload()
    shown = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert shown["val/segm/AP"] == pytest.approx(metrics["segm_AP"])
    assert {"val/segm/AP50", "val/segm/AR100", "val/segm/AP/square", "val/segm/AP/oblong"} <= shown.keys()
    interval = score_checkpoint(folder_of(config) / "last.pth", {"data.path": config.data.path})["segm"]["AP_interval"]
    assert [shown["val/segm/AP_low"], shown["val/segm/AP_high"]] == pytest.approx(interval, abs=1e-6)
    assert set(custom_scalars(masks=True)["AP"]["AP of masks with 95 % interval"][1]) <= shown.keys()
    for split in ("train", "train_epoch", "val"):
        assert {f"{split}/loss_mask", f"{split}/loss_dice"} <= shown.keys()


def test_the_checkpoint_has_the_official_names_and_scores_what_the_run_did(finished):
    config, metrics, _ = finished
    content = read_checkpoint(folder_of(config) / "last.pth")
    names = list(content["model"])
    assert {name.split(".")[0] for name in names} == {"detr", "bbox_attention", "mask_head"}
    assert len(content["optimizer"]["param_groups"]) == 2
    scored = score_checkpoint(folder_of(config) / "last.pth", {"data.path": config.data.path})
    assert scored["segm"]["AP"] == metrics["segm_AP"]
    assert scored["AP"] == metrics["AP"]


def test_a_run_interrupted_ends_in_the_same_bits(finished):
    whole, *_ = finished
    stopped = settings(whole.data.path, "masks stopped", **MASKS, **STATEFUL, optim__epochs=2)
    interrupted(stopped, lambda event: event["kind"] == "report")
    run(stopped)
    same(last_of(whole), last_of(stopped))
    assert log_of(whole) == log_of(stopped)


def test_edited_masks_are_not_resumed(module_coco_folder):
    data = add_outlines(module_coco_folder(train=2, val=1, folder="edited"))
    masks, boxes = settings(data, "outlined", **MASKS, optim__epochs=1), settings(data, "boxed", optim__epochs=1)
    run(masks)
    run(boxes)
    file = data / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    del coco["annotations"][0]["segmentation"][0][:2]
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=r"the train set is not the one that .* was trained on: masks of image \d+ changed; undo that"):
        run(settings(data, "outlined", **MASKS, optim__epochs=2))
    metrics, _ = run(settings(data, "boxed", optim__epochs=2))
    assert metrics["epoch"] == 2, "without masks the outlines do not matter"


def test_freezing_boxes_trains_the_head_alone(data, finished):
    whole, *_ = finished
    start = folder_of(whole) / "best.pth"
    frozen = settings(data, "frozen", **MASKS, optim__freeze_detr=True, optim__epochs=2, model__weights=str(start))
    metrics, _ = run(frozen)
    before, after = read_checkpoint(start)["model"], last_of(frozen)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(MASK_PARTS)}
    # The AP of boxes stands still: the best epoch is that of the masks.
    assert metrics["best_AP"] == max(line["test_coco_eval_masks"][0] for line in log_of(frozen))
    with pytest.raises(UserError, match=r"optim\.freeze_detr, .* may not change"):
        run(settings(data, "frozen", **MASKS, optim__epochs=3))


def test_freezing_without_masks_is_refused():
    with pytest.raises(UserError, match=r"optim\.freeze_detr: without model\.masks nothing is left to train"):
        load_config({"optim.freeze_detr": True})


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_without_masks_names_the_setting(coco_folder, split):
    folder = add_outlines(coco_folder(), splits=tuple({"train", "val"} - {split}))
    with pytest.raises(UserError, match=rf"model\.masks: .*custom_{split}\.json has no mask, neither polygons nor RLE; annotate"):
        run(settings(folder, "none", **MASKS))


def test_a_run_of_an_earlier_version_resumes_without_masks(data):
    config = settings(data, "earlier", optim__epochs=1)
    run(config)
    path = folder_of(config) / "last.pth"
    content = torch.load(path, weights_only=True)
    for section, name in (("model", "masks"), ("loss", "mask_loss_coef"), ("optim", "freeze_detr")):
        del content["settings"][section][name]
    torch.save(content, path)
    metrics, _ = run(settings(data, "earlier", optim__epochs=2))
    assert metrics["epoch"] == 2
    with pytest.raises(UserError, match=r"model\.masks False, not True"):
        run(settings(data, "earlier", optim__epochs=3, **MASKS))


# ------------------------------------------------------------------------------------------------------- steps and evaluation


def make_training(masks=True, **network):
    torch.manual_seed(0)
    model = build_model("detr_tiny", 2, num_queries=9, dec_layers=2, masks=masks, **network)
    config = load_config({"optim.lr": 1e-3})
    optimizer, criterion = build_optimizer(model, config.optim), build_criterion(2, dec_layers=2, masks=masks)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return engine.Training(
        model, criterion, optimizer, build_scheduler(optimizer, config.optim, 10), scaler, None, CPU, torch.float32, clip_max_norm=0.1
    )


def images_of(folder, split="train"):
    data = load_config({"model.preset": "detr_tiny", "data.path": str(folder), "data.val_size": 64}).data
    return CocoImages(find_split(data, split), val_transforms(data), masks=True)


def test_a_step_computes_the_masks_of_matched_queries_alone(data, monkeypatch):
    training, images = make_training(), images_of(data)
    seen = []
    forward = type(training.model).predict_masks
    monkeypatch.setattr(type(training.model), "predict_masks", lambda *given: seen.append(given[3].numel()) or forward(*given))
    engine.take_step(training, [collate([images[0], images[1]])])
    assert seen == [6]  # three boxes in each image, of nine queries


def test_outputs_that_are_not_finite_stop_a_step_with_its_images(data):
    training, images = make_training(), images_of(data)
    pixels, mask, targets = collate([images[0], images[1]])
    for part in (training.model, None):
        if part is None:  # all that trains is the head, which must get a gradient nevertheless
            training = make_training()
            for name, each in training.model.named_parameters():
                each.requires_grad_(name.startswith(MASK_PARTS))
        with pytest.raises(UserError, match=r"the loss became nan in epoch 1, step 1, on the images 10, 11"):
            engine.train_one_epoch(training, [(pixels * math.nan, mask, targets)], 1, lambda _: None)


def evaluated(training, folder, batch_size=2):
    return engine.evaluate(training.model, training.criterion, build_loader(images_of(folder, "val"), batch_size), CPU)


def test_masks_of_the_evaluation_are_the_official_ones(data):
    """Those of all queries, from one forward pass."""
    training = make_training()
    _, detections = evaluated(training, data)
    images = images_of(data, "val")
    for index in range(3):
        image, target = images[index]
        with torch.no_grad():
            outputs = training.model.eval()(image[None])
        size = torch.tensor(image.shape[1:])[None]
        (expected,) = postprocess_masks(outputs["pred_masks"], tuple(image.shape[1:]), size, target["orig_size"][None])
        found = decode_masks(detections.rles[index], tuple(target["orig_size"].tolist()))
        assert (found != expected.numpy()).mean() < 1e-4  # logits near zero may fall on either side


def test_masks_are_computed_in_chunks_under_a_bound(data, monkeypatch):
    training = make_training()
    whole = evaluated(training, data)
    monkeypatch.setattr(masks, "MOST_BYTES", 1)
    seen = []
    forward = type(training.model).predict_masks
    monkeypatch.setattr(type(training.model), "predict_masks", lambda *given: seen.append(given[3].numel()) or forward(*given))
    losses, detections = evaluated(training, data)
    assert set(seen) == {1}
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert detections.rles == whole[1].rles


def test_a_chunk_has_less_than_the_bound():
    assert chunk_size((800, 1333), (3000, 4000)) * 9 * 3000 * 4000 < masks.MOST_BYTES
    assert chunk_size((64, 64)) > chunk_size((640, 640)) > chunk_size((640, 640), (1000, 1000))
    assert chunk_size((100_000, 100_000)) == 1


def test_only_the_best_of_a_category_count():
    scores, labels = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.7]]), torch.tensor([[0, 0, 1, 0, 0]])
    assert counted_queries(scores, labels, 2) == [[1, 2, 4]]
    assert counted_queries(scores, labels, 5) == [[0, 1, 2, 3, 4]]


def test_an_evaluation_of_boxes_computes_no_masks(data, monkeypatch):
    training = make_training()
    monkeypatch.setattr(type(training.model), "predict_masks", None)
    _, detections = engine.evaluate(training.model, build_criterion(2, dec_layers=2), build_loader(images_of(data, "val"), 2), CPU)
    assert detections.rles is None
    assert "segmentation" not in detections.results([{"id": 3}, {"id": 7}])[0]


# ------------------------------------------------------------------------------------------------------------- two workers


def work(folder, out):
    training = make_training()
    images, rank = images_of(folder), int(os.environ["RANK"])
    training.model = torch.nn.parallel.DistributedDataParallel(training.model)
    share = [collate([images[rank]]), collate([images[2 + rank]])]
    means = engine.train_one_epoch(training, share, 1, lambda _: None)
    loader = build_loader(images_of(folder, "val"), 1, rank=rank, world_size=2)
    losses, detections = engine.evaluate(training.detr, training.criterion, loader, CPU)
    outcome = {"means": means, "losses": losses, "results": detections.results([{"id": 3}, {"id": 7}])}
    torch.save(outcome | {"model": training.detr.state_dict()}, Path(out) / f"{rank}.pth")


@pytest.mark.slow
def test_two_workers_train_and_score_as_one(data, run_workers, tmp_path):
    for ended in run_workers(__file__, "work", 2, data, tmp_path):
        assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert json.dumps([first["losses"], first["results"]]) == json.dumps([second["losses"], second["results"]])
    alone, images = make_training(), images_of(data)
    means = engine.train_one_epoch(alone, [collate([images[0], images[1]]), collate([images[2], images[3]])], 1, lambda _: None)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(first["model"][name], second["model"][name])
    assert first["means"]["loss_mask"] == pytest.approx(means["loss_mask"], rel=1e-3)
    alone.model.load_state_dict(first["model"])
    losses, detections = evaluated(alone, data, 1)
    assert first["losses"] == losses
    assert first["results"] == detections.results([{"id": 3}, {"id": 7}])


if __name__ == "__main__":
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=count)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
