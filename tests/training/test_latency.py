import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.transforms import val_transforms
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import DETR
from raydetr.training import latency
from raydetr.training.fit import fit
from raydetr.training.latency import seconds_per_image
from tests.helpers import tiny_config
from tests.training.runs import TINY, Watcher, folder_of, last_of, settings


@pytest.fixture(scope="module")
def data(module_coco_folder):
    return module_coco_folder(train=2, val=3)


@pytest.fixture(scope="module")
def images(data):
    config = tiny_config(TINY, data, "unused")
    return CocoImages(find_split(config.data, "val"), val_transforms(config.data))


def network(dec_layers=2):
    config = load_config(TINY | {"model.dec_layers": dec_layers})
    return DETR(config.model, 2), build_criterion(2, dec_layers=dec_layers)


def test_each_image_is_a_batch_of_its_own_without_losses_or_gradients(images, monkeypatch):
    model, criterion = network()
    model.train()
    seen = []
    model.register_forward_hook(lambda module, inputs, _outputs: seen.append((module.training, torch.is_grad_enabled(), inputs[0].shape)))
    monkeypatch.setattr(criterion, "forward", None)
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    assert seconds_per_image(model, criterion, images, torch.device("cpu"), torch.float32) > 0
    assert len(seen) == (1 + latency.LEAST_ROUNDS) * 3  # the first round is for libraries to choose their algorithms
    assert {each[:2] for each in seen} == {(False, False)}
    assert [shape for *_, shape in seen[:3]] == [(1, *images[index][0].shape) for index in range(3)]


def test_the_latency_is_the_median_of_all_rounds_but_the_first(images, monkeypatch):
    times = iter([100.0] * 3 + [3.0, 1.0, 2.0] + [2.0] * 300)
    monkeypatch.setattr(latency, "_seconds", lambda *_: next(times))
    assert seconds_per_image(*network(), images, torch.device("cpu"), torch.float32) == 2.0


def test_a_trial_measures_its_latency_after_its_last_epoch(data, monkeypatch):
    """Resumed when it is finished, it tells the same number again."""
    config = settings(data, "fast", optim__epochs=2)
    watcher = Watcher()
    watcher.searched, watcher.objectives = {"optim.lr": (1e-5, 1e-3)}, ["AP", "latency"]
    metrics = fit(config, watcher)
    first, last = (event["metrics"] for event in watcher.of_kind("report"))
    assert "latency" not in first
    assert last["latency"] == metrics["latency"] == last_of(config)["metrics"]["latency"] > 0
    monkeypatch.setattr("raydetr.training.fit.seconds_per_image", None)
    assert fit(config, watcher)["latency"] == last["latency"]
    events = EventAccumulator(str(folder_of(config) / "tb")).Reload()
    assert [event.value for event in events.Scalars("speed/latency")] == pytest.approx([last["latency"]])


def test_a_run_that_is_no_trial_measures_nothing(data, monkeypatch):
    monkeypatch.setattr("raydetr.training.fit.seconds_per_image", None)
    assert "latency" not in fit(settings(data, "plain", optim__epochs=1), Watcher())
