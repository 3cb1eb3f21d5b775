import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from raydetr.config import PATH_SETTINGS, SETTINGS, load_config, preset_settings
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.masks import encode_masks
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.storage import split
from raydetr.training.engine import Detections
from raydetr.training.fit import LocalReporter, fit
from raydetr.training.tracking import LOSSES, Log, Pictures, Tracker, custom_scalars, logged_epochs
from tests import helpers
from tests.training import runs

TINY = runs.TINY | {"run.pictures": 2}
PER_STEP = {
    *("train/loss", "train/loss_ce", "train/loss_bbox", "train/loss_giou", "train/class_error", "train/cardinality_error"),
    *("train/grad_norm", "lr/transformer", "lr/backbone", "speed/images_per_second"),
}
PER_EPOCH = {
    *("val/loss", "val/loss_ce", "val/loss_bbox", "val/loss_giou", "val/class_error", "val/cardinality_error"),
    *("val/AP", "val/AP50", "val/AP75", "val/AP_small", "val/AR1", "val/AR10", "val/AR100", "val/AR_small"),
    *("val/AP_low", "val/AP_high", "val/AP/square", "val/AP/oblong", "epoch", "best/AP"),
    *(f"train_epoch/{name}" for name in (*LOSSES, "grad_norm")),
}


def settings(folder, name, **changes):
    return helpers.tiny_config(TINY, folder, Path(folder).parent / "runs", **{"run__name": name, **changes})


class Watcher(LocalReporter):
    """Keeps the metrics, and stops the run in the first step of epoch ``stop_in`` or when that epoch is reported."""

    def __init__(self, stop_in=None, at="step"):
        super().__init__()
        self.metrics, self.stop_in, self.at = [], stop_in, at

    def show(self, event):
        if event["kind"] == self.at == "step" and event["epoch"] == self.stop_in:
            raise KeyboardInterrupt

    def report(self, metrics, checkpoint=None):
        self.metrics.append(metrics)
        if self.at == "report" and metrics["epoch"] == self.stop_in:
            raise KeyboardInterrupt


def events_of(config):
    return read(Path(config.run.storage) / config.run.name / "tb")


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "images"), 0))
    accumulator.Reload()
    return accumulator


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def finished(module_coco_folder):
    config = settings(module_coco_folder(train=4, val=3), "whole")
    watcher = Watcher()
    fit(config, watcher)
    return config, events_of(config), watcher.metrics


def test_every_tag_is_there_and_no_other(finished):
    _, events, _ = finished
    assert set(events.Tags()["scalars"]) == PER_STEP | PER_EPOCH
    assert {tag.split("/")[0] for tag in events.Tags()["images"]} == {"pictures", "errors"}


def test_x_is_the_number_of_images_seen(finished):
    _, events, _ = finished
    for tag in PER_STEP:
        assert [step for step, _ in points(events, tag)] == [2, 4, 6, 8, 10, 12], tag
    for tag in PER_EPOCH:
        assert [step for step, _ in points(events, tag)] == [4, 8, 12], tag
    assert points(events, "epoch") == [(4, 1), (8, 2), (12, 3)]


@pytest.mark.parametrize(
    ("changes", "steps"), [({"optim__batch_size": 1}, [1, 2, 3, 4]), ({"optim__batch_size": 3}, [4]), ({"optim__accumulate": 2}, [4])]
)
def test_x_is_the_same_after_the_same_epoch_whatever_the_batch_size(finished, changes, steps):
    whole, _, _ = finished
    config = settings(whole.data.path, f"other-{next(iter(changes.values()))}", optim__epochs=1, **changes)
    fit(config, LocalReporter())
    events = events_of(config)
    assert [step for step, _ in points(events, "train/loss")] == steps
    assert {step for tag in PER_EPOCH for step, _ in points(events, tag)} == {4}


def test_the_best_ap_so_far_is_a_curve_of_its_own(finished):
    _, events, metrics = finished
    assert [value for _, value in points(events, "best/AP")] == pytest.approx([each["best_AP"] for each in metrics])


def test_the_errors_are_there_at_the_end(finished):
    _, events, metrics = finished
    (event,) = events.Tensors("errors/text_summary")
    (text,) = tensor_util.make_ndarray(event.tensor_proto)
    assert event.step == 12
    assert text.decode().startswith(f"Epoch {metrics[-1]['best_epoch']}, the best one. AP ")
    assert "| missed | " in text.decode()
    assert {tag.removeprefix("errors/") for tag in events.Tags()["images"] if tag.startswith("errors/")} <= {
        f"val_00{number}.jpg" for number in range(3)
    }


def test_trials_write_the_text_of_their_errors_and_no_images(coco_folder):
    config = settings(coco_folder(), "003_lr=1e-3", optim__epochs=1)
    reporter = LocalReporter()
    reporter.searched = {"optim.lr": (1e-5, 1e-2)}
    fit(config, reporter)
    tags = events_of(config).Tags()
    assert "errors/text_summary" in tags["tensors"]
    assert not [tag for tag in tags["images"] if tag.startswith("errors/")]


def test_values_are_those_of_the_run(finished):
    config, events, metrics = finished
    for name in ("AP", "AP50", "AR100"):
        assert [value for _, value in points(events, f"val/{name}")] == pytest.approx([each[name] for each in metrics])
    for name in LOSSES:
        assert [value for _, value in points(events, f"val/{name}")] == pytest.approx([each[f"val_{name}"] for each in metrics])
        assert [value for _, value in points(events, f"train_epoch/{name}")] == pytest.approx([each[f"train_{name}"] for each in metrics])
        per_step = [value for _, value in points(events, f"train/{name}")]
        assert np.reshape(per_step, (3, 2)).mean(1) == pytest.approx([each[f"train_{name}"] for each in metrics])
    # weighted and unweighted: 1 x classes, 5 x L1, 2 x GIoU of the last layer, and the auxiliary ones
    weighted = [points(events, f"train/{name}")[0][1] for name in ("loss", "loss_ce", "loss_bbox", "loss_giou")]
    assert weighted[0] > weighted[1] + 5 * weighted[2] + 2 * weighted[3]
    assert points(events, "lr/transformer")[0][1] == pytest.approx(config.optim.lr)
    assert all(value > 0 for _, value in points(events, "speed/images_per_second"))


def hparams_of(events):
    content = {tag: HParamsPluginData.FromString(data) for tag, data in events.PluginTagToContent(hparams_metadata.PLUGIN_NAME).items()}
    return [content[tag] for tag in (hparams_metadata.EXPERIMENT_TAG, hparams_metadata.SESSION_START_INFO_TAG) if tag in content], content


def test_hparams_have_every_setting_and_the_metrics(finished):
    config, events, _ = finished
    (experiment, start), content = hparams_of(events)
    assert {info.name for info in experiment.experiment.hparam_infos} == set(SETTINGS)
    values = start.session_start_info.hparams
    assert values["optim.lr"].number_value == config.optim.lr
    assert values["data.train_sizes"].string_value == "48, 64"
    assert values["model.pre_norm"].string_value == "false"
    assert values["data.train_images"].string_value == "null"
    metrics = {info.name.tag for info in experiment.experiment.metric_infos}
    assert metrics == {"best/AP", "val/AP", "val/AP50", "val/AP75", "val/loss_ce", "val/loss_bbox", "val/loss_giou"}
    assert metrics <= set(events.Tags()["scalars"])  # in the very run folder, so the page lists the run once
    assert content[hparams_metadata.SESSION_END_INFO_TAG].session_end_info.status


def test_the_objectives_of_a_search_are_among_the_metrics(tmp_path):
    objectives = ["AP", "AP_small", "segm_AP75", "latency"]
    Tracker(tmp_path, load_config({"run.name": "000_default"}), searched={"optim.lr": (1e-5, 1e-3)}, objectives=objectives).close()
    (experiment, _), _ = hparams_of(read(tmp_path))
    metrics = [info.name.tag for info in experiment.experiment.metric_infos]
    assert {"val/AP_small", "val/segm/AP75", "speed/latency"} <= set(metrics)
    assert metrics.count("val/AP") == 1


def test_the_settings_that_were_changed_come_first_on_the_hparams_page(finished):
    """TensorBoard shows those that it is told differ before the others, and five of them at first."""
    _, events, _ = finished
    (experiment, _), _ = hparams_of(events)
    first = {info.name for info in experiment.experiment.hparam_infos if info.differs}
    defaults = preset_settings("detr_tiny")
    assert first == {name for name, value in TINY.items() if value != defaults[name]}
    assert first.isdisjoint(PATH_SETTINGS)


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("first/trials/003_lr=2.7e-4_eos=0.05", {"optim.lr": 2.7e-4, "loss.eos_coef": 0.05}, "003 lr=2.7e-4 eos_coef=0.05 (first)"),
        ("first/trials/000_default", {}, "000 defaults (first)"),
        ("other/trials/000_default", {}, "000 defaults (other)"),
        ("first/confirm/trials/017_seed=2_lr=3e-4", {"optim.lr": 3e-4, "run.seed": 2}, "017 confirmed lr=3e-4 eos_coef=0.1 (first)"),
        ("first/confirm/trials/017_seed=3_lr=3e-4", {"optim.lr": 3e-4, "run.seed": 3}, "017 confirmed lr=3e-4 eos_coef=0.1 (first)"),
        ("first/confirm/trials/000_default", {}, "000 confirmed defaults (first)"),
        ("first/confirm/trials/000_seed=3_fold=2", {"run.seed": 3, "data.folds": 2, "data.fold": 2}, "000 confirmed defaults (first)"),
    ],
)
def test_trials_have_short_names_and_the_seeds_of_one_confirmed_setting_the_same(tmp_path, path, changes, expected):
    searched = {"run.seed": [1, 2, 3], "optim.lr": (1e-5, 1e-3), "loss.eos_coef": (0.02, 0.5)}
    searched |= {"data.fold": [1, 2]} if "data.fold" in changes else {}
    storage, name = split(path)
    Tracker(tmp_path, load_config({"run.storage": f"/runs/{storage}", "run.name": name, **changes}), searched=searched).close()
    (_, start), _ = hparams_of(read(tmp_path))
    assert start.session_start_info.group_name == expected


def test_a_plain_run_is_no_group(finished):
    _, events, _ = finished
    (_, start), _ = hparams_of(events)
    assert start.session_start_info.group_name == ""


def test_settings_are_there_as_text(finished):
    _, events, _ = finished
    (event,) = events.Tensors("settings/text_summary")
    (text,) = tensor_util.make_ndarray(event.tensor_proto)
    assert "| optim.lr | 0.0005 | learning rate of the transformer |" in text.decode()
    assert len(text.decode().splitlines()) == len(SETTINGS) + 2


def test_the_curve(finished):
    _, events, _ = finished
    curves = events.Tensors("val/precision_recall")
    assert [curve.step for curve in curves] == [4, 8, 12]
    data = tensor_util.make_ndarray(curves[-1].tensor_proto)
    assert data.shape == (6, 101)
    true_positives, false_positives, _, false_negatives, precision, recall = data
    assert true_positives[0] + false_positives[0] == 9 * 3
    assert set(true_positives + false_negatives) == {9}  # three pictures of three boxes
    np.testing.assert_allclose(recall, true_positives / 9, rtol=1e-6)
    assert ((precision >= 0) & (precision <= 1)).all()


def test_pictures_are_of_the_validation_set(finished):
    _, events, _ = finished
    tags = {tag for tag in events.Tags()["images"] if not tag.startswith("errors/")}
    assert tags == {"pictures/val_000.jpg", "pictures/val_001.jpg"}
    drawn = events.Images("pictures/val_000.jpg")
    assert [image.step for image in drawn] == [4, 8, 12]
    assert Image.open(io.BytesIO(drawn[0].encoded_image_string)).size == (96, 64)


def test_custom_scalars_name_tags_that_are_there(finished):
    _, events, _ = finished
    layout = custom_scalars()
    assert list(layout) == ["AP", "validation", "training"]
    tags = events.Tags()["scalars"]
    by_chart = {
        f"{group} {name}" if group != "AP" else name: [tag for tag in tags if any(re.fullmatch(each, tag) for each in chart[1])]
        for group, charts in layout.items()
        for name, chart in charts.items()
    }
    assert layout["AP"]["AP with 95 % interval"] == ["Margin", ["val/AP", "val/AP_low", "val/AP_high"]]  # the value within its interval
    assert set(by_chart["AP with 95 % interval"]) == {"val/AP", "val/AP_low", "val/AP_high"}
    assert next(iter(layout["AP"])) == "AP"  # alone; TensorBoard shows the chart with the interval last
    assert set(by_chart["AP"]) == {"val/AP"}
    assert set(by_chart["AP50 and AP75"]) == {"val/AP50", "val/AP75"}
    assert set(by_chart["AP by category"]) == {"val/AP/square", "val/AP/oblong"}
    assert by_chart["validation loss_ce"] == ["val/loss_ce"]
    assert by_chart["training loss_ce"] == ["train_epoch/loss_ce"]
    assert all(by_chart.values())
    assert "custom_scalars__config__" in events.Tags()["tensors"]


@pytest.mark.parametrize(("stop_in", "at"), [(2, "step"), (2, "report"), (1, "step")])
def test_going_on_writes_nothing_twice_and_loses_nothing(finished, stop_in, at):
    whole, expected, _ = finished
    config = settings(whole.data.path, f"stopped-{stop_in}-{at}")
    with pytest.raises(KeyboardInterrupt):
        fit(config, Watcher(stop_in, at))
    fit(config, LocalReporter())
    events = events_of(config)
    assert events.Tags()["scalars"] == expected.Tags()["scalars"]
    for tag in (PER_STEP | PER_EPOCH) - {"speed/images_per_second"}:
        assert points(events, tag) == points(expected, tag), tag
    for tag in expected.Tags()["tensors"]:
        assert [event.step for event in events.Tensors(tag)] == [event.step for event in expected.Tensors(tag)], tag
    for tag in expected.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [event.step for event in expected.Images(tag)], tag
    assert set(hparams_of(events)[1]) == set(hparams_of(expected)[1])


def test_a_run_is_on_the_hparams_page_while_it_runs(coco_folder):
    config = settings(coco_folder(), "running")
    with pytest.raises(KeyboardInterrupt):
        fit(config, Watcher(stop_in=1, at="step"))
    (experiment, start), content = hparams_of(events_of(config))
    assert experiment.experiment.metric_infos
    assert start.session_start_info.hparams["run.name"].string_value == "running"
    assert hparams_metadata.SESSION_END_INFO_TAG not in content


def test_a_folder_whose_events_were_lost_is_described_again(tmp_path):
    tracker = Tracker(tmp_path, load_config({}), seen=10)
    tracker.close()
    assert hparams_of(read(tmp_path))[0]
    assert "settings/text_summary" in read(tmp_path).Tags()["tensors"]


def test_pictures_show_true_and_found_boxes(coco_folder):
    config = settings(coco_folder(val=5, size=(960, 640)), "a")
    images = CocoImages(find_split(config.data, "val"), val_transforms(config.data))
    boxes = np.tile(np.float32([480.0, 320.0, 300.0, 200.0]), (5, 2, 1))
    scores, labels = np.float32([[0.9, 0.2]] * 5), np.int64([[1, 0]] * 5)
    drawn = Pictures(images, 2).draw(Detections(np.array(images.image_ids), boxes, scores, labels))
    assert list(drawn) == ["val_000.jpg", "val_002.jpg"]
    nothing = Pictures(images, 2).draw(Detections(np.array(images.image_ids), boxes, 0 * scores, labels))
    picture, without = np.asarray(drawn["val_000.jpg"]), np.asarray(nothing["val_000.jpg"])
    assert picture.shape == (427, 640, 3)
    changed = (picture != without).any(-1)
    assert changed[213:347, 320].mean() > 0.9  # the left edge of the found box, at two thirds of its size
    assert not changed[:190].any()
    plain = np.asarray(Image.open(images.split.images / "val_000.jpg").resize((640, 427)))
    for annotation in images.coco["annotations"]:
        if annotation["image_id"] == images.image_ids[0]:
            x, y, _, height = (round(side * 2 / 3) for side in annotation["bbox"])
            edge = np.abs(without[y + height // 2, x - 2 : x + 3].astype(int) - plain[y + height // 2, x - 2 : x + 3]).max()
            assert edge > 60


def test_pictures_show_true_and_found_masks(coco_folder):
    config = settings(coco_folder(val=1, size=(960, 640)), "a")
    images = CocoImages(find_split(config.data, "val"), val_transforms(config.data))
    corner, middle = np.zeros((2, 1, 640, 960), bool)
    corner[:, :300, :300] = True
    middle[:, 300:600, 300:900] = True
    boxes, scores, labels = np.float32([[[480, 320, 300, 200]] * 2]), np.float32([[0.9, 0.2]]), np.int64([[1, 0]])
    detections = Detections(np.array(images.image_ids), boxes, scores, labels)
    plain = np.asarray(Pictures(images, 1).draw(detections)["val_000.jpg"])
    for annotation in images.coco["annotations"]:
        annotation["segmentation"] = None
    images.coco["annotations"][0]["segmentation"] = encode_masks(corner)[0]
    found = [encode_masks(middle)[0], None]
    masked = np.asarray(Pictures(images, 1).draw(detections._replace(rles=[found]))["val_000.jpg"])
    changed = (masked != plain).any(-1)
    assert changed[240:360, 240:560].mean() > 0.9, "the found mask is tinted, at two thirds of its size"
    assert changed[:200, 199].mean() > 0.7, "the true mask has an outline"
    assert not changed[204:, :190].any()


def test_more_pictures_than_there_are(coco_folder):
    config = settings(coco_folder(val=2), "a")
    images = CocoImages(find_split(config.data, "val"), val_transforms(config.data))
    nothing = Detections(np.array(images.image_ids), np.zeros((2, 0, 4)), np.zeros((2, 0)), np.zeros((2, 0), int))
    assert set(Pictures(images, 8).draw(nothing)) == {"val_000.jpg", "val_001.jpg"}
    assert Pictures(images, 0).draw(nothing) == {}


def line(epoch, loss=1.0):
    return {"epoch": epoch, "train_loss": loss}


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_log_has_each_epoch_once(tmp_path):
    path = tmp_path / "log.txt"
    log = Log(path, 0)
    for epoch in range(3):
        log.append(line(epoch))
    Log(path, 1).append(line(1, 4.0))  # resumed after the first epoch
    assert lines_of(path) == [line(0), line(1, 4.0)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", ['{"epoch": 2, "train_lo', '{"train_loss": 1.0}', "[]", "\x00\x00", '{"epoch": null}'])
def test_a_last_line_that_was_cut_short_is_removed(tmp_path, half):
    path = tmp_path / "log.txt"
    path.write_text(f"{json.dumps(line(0))}\n{json.dumps(line(1))}\n{half}")
    assert logged_epochs(path) == 2
    log = Log(path, 2)
    assert log.was_cut
    log.append(line(2))
    assert lines_of(path) == [line(0), line(1), line(2)]
    assert not Log(path, 3).was_cut


def test_damage_elsewhere_in_the_log_is_named(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(f"{json.dumps(line(0))}\nnonsense\n{json.dumps(line(2))}\n")
    with pytest.raises(UserError, match=r"log\.txt, line 2: not a line of a training log; correct it, remove it, or move the file away"):
        Log(path, 3)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"log\.txt: not a log of this run .*; move it away"):
        Log(path, 3)
    assert logged_epochs(path) == 0


def test_a_line_that_could_not_be_written_comes_with_the_next(tmp_path):
    path = tmp_path / "log.txt"
    log = Log(path, 0)
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        log.append(line(0))
    path.rmdir()
    log.append(line(1))
    assert lines_of(path) == [line(0), line(1)]
