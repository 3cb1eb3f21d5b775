"""Groups of object queries in training (Group DETR): what each learns, and that the model stays that of one group."""

import copy

import pytest
import torch

import raydetr
from raydetr.config import Optim, load_config
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import DETR, build_model
from raydetr.training.engine import take_step
from raydetr.training.schedule import build_optimizer, build_scheduler
from tests.networks import padded
from tests.training.runs import STATEFUL, folder_of, interrupted, last_of, log_of, run, same, settings
from tests.training.test_engine import batches_of, make_training

GROUPS = 3


def grouped(groups=GROUPS, **model_settings) -> DETR:
    torch.manual_seed(0)
    model = build_model("detr_tiny", 2, num_queries=7, dec_layers=2, **model_settings)
    model.add_query_groups(groups)
    return model


def alone(model: DETR, group: int) -> DETR:
    """The plain network that has the queries of one group."""
    plain = build_model("detr_tiny", 2, **{name: model.settings[name] for name in ("num_queries", "dec_layers", "pre_norm")})
    plain.load_state_dict(model.state_dict())
    if group:
        plain.query_embed.weight.data = model.group_embed.weight.detach().unflatten(0, (-1, 7))[group - 1]
    return plain


@pytest.mark.parametrize("pre_norm", [False, True])
def test_each_group_predicts_what_it_would_alone(pre_norm):
    model = grouped(pre_norm=pre_norm).train()
    images, mask = padded([(64, 96), (80, 64)])
    outputs = model(images, mask)
    assert outputs["pred_boxes"].shape == (2 * GROUPS, 7, 4)
    for group in range(GROUPS):
        expected = alone(model, group).train()(images, mask)
        for name in ("pred_logits", "pred_boxes"):
            assert torch.allclose(outputs[name][group::GROUPS], expected[name], atol=1e-5)
            assert torch.allclose(outputs["aux_outputs"][0][name][group::GROUPS], expected["aux_outputs"][0][name], atol=1e-5)
    assert not torch.allclose(outputs["pred_boxes"][0], outputs["pred_boxes"][1], rtol=0, atol=1e-4)


def test_in_evaluation_and_in_its_state_the_model_has_one_group():
    model = grouped()
    plain = alone(model, 0)
    images, mask = padded([(64, 96), (80, 64)])
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        outputs, expected = model.eval()(images, mask), plain.eval()(images, mask)
    assert all(torch.equal(outputs[name], expected[name]) for name in ("pred_logits", "pred_boxes"))
    other = build_model("detr_tiny", 2, num_queries=7, dec_layers=2)
    before = model.group_embed.weight.clone()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.query_embed.weight, other.query_embed.weight)
    assert torch.equal(model.group_embed.weight, before)
    copied = copy.deepcopy(model)  # as the moving average does
    assert list(copied.state_dict()) == list(plain.state_dict())


def test_new_groups_are_near_the_queries_of_the_model_and_differ():
    model = grouped()
    own, further = model.query_embed.weight, model.group_embed.weight.unflatten(0, (-1, 7))
    apart = (further - own).std() / own.std()
    assert 0.2 < apart < 0.4
    assert not torch.equal(further[0], further[1])


def test_the_loss_of_a_step_is_the_mean_over_groups_and_all_groups_learn(coco_folder):
    (batch,) = batches_of(coco_folder(), 2)
    training = make_training(clip=0.0)
    training.detr.add_query_groups(GROUPS)
    optim = Optim(epochs=1, schedule="constant", lr=1e-3, lr_backbone=1e-3)
    training.optimizer = build_optimizer(training.detr, optim)
    training.scheduler = build_scheduler(training.optimizer, optim, 10)
    model = copy.deepcopy(training.detr)
    criterion = build_criterion(2, dec_layers=2)
    images, mask, targets = batch
    outputs = model.train()(images, mask)
    losses = []
    for group in range(GROUPS):
        of_group = {name: outputs[name][group::GROUPS] for name in ("pred_logits", "pred_boxes")}
        earlier = [{name: each[name][group::GROUPS] for name in of_group} for each in outputs["aux_outputs"]]
        losses.append(criterion.weighted_sum(criterion({**of_group, "aux_outputs": earlier}, targets)))
    before = training.detr.group_embed.weight.detach().clone()
    training.model.train()
    record = take_step(training, [batch])
    assert float(record.losses[0]) == pytest.approx(sum(losses).item() / GROUPS, rel=1e-5)
    assert len(record.image_ids) == 2
    assert (training.detr.group_embed.weight != before).any(1).all()


@pytest.fixture(scope="module")
def finished(module_coco_folder):
    config = settings(module_coco_folder(), "groups", **STATEFUL, loss__query_groups=2, optim__epochs=2)
    run(config)
    return config


def test_a_run_keeps_the_official_model(finished):
    plain = DETR(finished.model, 2)
    for name in ("best.pth", "last.pth"):
        model = raydetr.load(folder_of(finished) / name)
        assert list(model.state_dict()) == list(plain.state_dict())
    content = last_of(finished)
    assert content["groups"].shape == (9, 128)
    assert "groups" not in torch.load(folder_of(finished) / "best.pth", weights_only=True)


def test_a_run_interrupted_ends_in_the_same_bits(finished):
    stopped = settings(finished.data.path, "groups stopped", **STATEFUL, loss__query_groups=2, optim__epochs=2)
    interrupted(stopped, lambda event: event["kind"] == "report")
    run(stopped)
    same(last_of(finished), last_of(stopped))
    assert log_of(finished) == log_of(stopped)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_groups_of_a_run_may_not_change(finished, groups):
    with pytest.raises(UserError, match=r"loss\.query_groups.* may not change"):
        run(settings(finished.data.path, "groups", **STATEFUL, loss__query_groups=groups, optim__epochs=3))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model.masks": True, "loss.query_groups": 2}, "loss.query_groups: 2 groups train boxes only"),
        (
            {"model.num_queries": 2000, "loss.query_groups": 6},
            "6 groups of 2000 queries (model.num_queries) are 12000 in training, at most",
        ),
        ({"loss.query_groups": 0}, "loss.query_groups: 0 is out of bounds"),
    ],
)
def test_what_cannot_be_trained_is_refused(given, says):
    with pytest.raises(UserError) as caught:
        load_config(given)
    assert says in str(caught.value)
