"""CUDA graphs on a machine without a GPU, see :mod:`tests.recorded_graphs`."""

import copy

import pytest
import torch

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model
from raydetr.training import engine, graphs
from raydetr.training import fit as fitting
from raydetr.training import run as module
from raydetr.training.engine import Training, take_step
from raydetr.training.graphs import SEEN_BEFORE_RECORDING, GraphedNetwork
from raydetr.training.schedule import build_optimizer, build_scheduler
from tests.recorded_graphs import record_with_stand_in
from tests.training.runs import run, settings

CLASSES = 2


@pytest.fixture
def recorder(monkeypatch):
    return record_with_stand_in(monkeypatch)


def training_of(graphed=False, accumulate=1, dtype=torch.float32):
    torch.manual_seed(0)
    model = build_model("detr_tiny", CLASSES, num_queries=9, dec_layers=2)
    optim = load_config({"model.preset": "detr_tiny", "optim.epochs": 1, "optim.schedule": "constant"}).optim
    optimizer = build_optimizer(model, optim)
    criterion = build_criterion(CLASSES, dec_layers=2)
    scaler, scheduler = torch.amp.GradScaler("cpu", enabled=False), build_scheduler(optimizer, optim, 100)
    graphs = GraphedNetwork(model) if graphed else None
    return Training(model, criterion, optimizer, scheduler, scaler, None, torch.device("cpu"), dtype, accumulate, 0.1, graphs=graphs)


def batch_of(number, shape=(2, 32, 48), padded=True):
    generator = torch.Generator().manual_seed(number)
    images, height, width = shape
    mask = torch.zeros(shape, dtype=torch.bool) if padded else None
    if padded:
        mask[0, :, width // 2 :] = True
    target = {"boxes": torch.full((2, 4), 0.5), "labels": torch.tensor([0, 1]), "image_id": torch.tensor([number])}
    return torch.randn(images, 3, height, width, generator=generator), mask, [target] * images


@pytest.mark.parametrize(("accumulate", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_a_graphed_training_is_the_plain_one(recorder, accumulate, dtype):
    """Also where two batches of a step have the same shape: the second replay overwrites the gradients of the first."""
    plain, graphed = training_of(accumulate=accumulate, dtype=dtype), training_of(True, accumulate, dtype)
    for number in range(6):
        batches = [batch_of(10 * number + part) for part in range(accumulate)]
        expected, found = take_step(plain, batches), take_step(graphed, batches)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
    for (name, weight), expected in zip(graphed.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert len(recorder.recorded) == 1
    assert len(recorder.replayed) == 6 * accumulate - SEEN_BEFORE_RECORDING + 1


def shapes_of(widths):
    return [(2, 48, width) for width in widths]


def test_shapes_are_recorded_once_they_came_often(recorder):
    graphed = GraphedNetwork(training_of().model)
    for number, shape in enumerate(shapes_of([64, 64, 48, 64, 64, 48, 64])):
        graphed(*batch_of(number, shape)[:2])
    assert recorder.recorded == [(2, 3, 48, 64)]
    assert recorder.replayed == [(2, 3, 48, 64)] * 2
    assert recorder.options == [("the pool", "thread_local")]


def test_one_graph_serves_batches_with_and_without_padding(recorder):
    model = training_of().model.eval()
    graphed = GraphedNetwork(model)
    for _ in range(SEEN_BEFORE_RECORDING):
        graphed(*batch_of(0)[:2])
    images, _, _ = batch_of(1, padded=False)
    expected = model(images, None)
    torch.testing.assert_close(graphed(images, None)["pred_boxes"], expected["pred_boxes"], rtol=1e-4, atol=1e-5)
    assert len(recorder.recorded) == 1


def test_the_graph_that_was_used_longest_ago_is_dropped(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    graphed = GraphedNetwork(training_of().model)

    def call(width, times=1):
        before = len(recorder.recorded)
        for _ in range(times):
            graphed(*batch_of(0, (1, 32, width))[:2])
        return len(recorder.recorded) - before

    assert [call(width, SEEN_BEFORE_RECORDING) for width in (32, 48)] == [1, 1]
    assert call(32) == 0
    assert call(64, SEEN_BEFORE_RECORDING) == 1, "48 makes room"
    assert call(32) == 0
    assert call(48, SEEN_BEFORE_RECORDING - 1) == 0, "it has to come often again"
    assert call(48) == 1


def test_the_network_itself_stays_as_it_is(recorder):
    """Evaluation, checkpoints and the moving average see a plain network."""
    model = training_of().model
    names, forward = list(model.state_dict()), model.forward
    graphed = GraphedNetwork(model)
    for number in range(SEEN_BEFORE_RECORDING + 1):
        graphed(*batch_of(number)[:2])
    assert list(model.state_dict()) == names
    assert model.forward == forward
    copy.deepcopy(model)


def test_gradients_have_memory_of_their_own_and_keep_it(recorder):
    training = training_of(True)
    kept = [each.grad.data_ptr() for each in training.model.parameters() if each.requires_grad]
    for number in range(6):
        take_step(training, [batch_of(number)])
    assert [each.grad.data_ptr() for each in training.model.parameters() if each.requires_grad] == kept
    assert all(not each.grad.any() for each in training.model.parameters() if each.requires_grad)


def test_graphs_are_for_one_worker_with_a_gpu(coco_folder, monkeypatch):
    known = settings(coco_folder(), "run", speed__graphs=True)
    with pytest.raises(UserError, match=r"^speed\.graphs: a CPU has no CUDA graphs"):
        run(known)
    with pytest.raises(UserError, match=r"^speed\.graphs: works with one worker only"):
        module._graphed(training_of().model, torch.device("cuda"), 2)
    monkeypatch.setattr(module, "_graphed", lambda model, device, world_size: "the graphs")
    assert module._training(known, 1, training_of().model, CLASSES, 1, None).graphs == "the graphs"
    assert module._training(load_config({"speed.graphs": False}), 1, training_of().model, CLASSES, 1, None).graphs is None


@pytest.mark.parametrize("other", [{"speed.compile": "on"}, {"optim.batch_size": "auto:8"}, {"model.masks": True}])
def test_what_graphs_do_not_go_with_is_refused(other):
    with pytest.raises(UserError, match=r"speed\.graphs"):
        load_config({"speed.graphs": True, **other})


def test_an_evaluation_uses_no_graph(recorder, coco_folder, monkeypatch):
    """A run is trained with the stand-in's graphs on a CPU; its evaluation gets the plain network."""
    monkeypatch.setattr(module, "_graphed", lambda model, device, world_size: GraphedNetwork(model))
    evaluated, evaluate = [], engine.evaluate
    monkeypatch.setattr(fitting, "evaluate", lambda model, *rest: evaluated.append(model) or evaluate(model, *rest))
    known = {"speed__graphs": True, "data__train_sizes": [48], "data__crop": 0.0, "optim__epochs": 2}
    run(settings(coco_folder(train=8), "run", **known))
    assert recorder.replayed
    assert not any(isinstance(model, GraphedNetwork) for model in evaluated)
