import copy
import math

import pytest
import torch

from raydetr.config import Optim
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.training.schedule import MovingAverage, build_optimizer, build_scheduler, lr_factor


def factors(steps_per_epoch=10, **settings):
    optim = Optim(**settings)
    return [lr_factor(optim, step, steps_per_epoch) for step in range(optim.epochs * steps_per_epoch)]


def test_step_drops_at_a_fraction_of_the_run():
    assert factors(epochs=4, lr_drop=0.75) == [1] * 30 + [pytest.approx(0.1)] * 10


def test_step_drops_every_so_many_epochs_as_the_official_steplr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    official = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    expected = []
    for _ in range(5):
        expected += official.get_last_lr() * 10
        optimizer.step()
        official.step()
    assert factors(epochs=5, lr_drop=2) == pytest.approx(expected)


def test_a_drop_of_0_never_comes():
    assert factors(epochs=3, lr_drop=0) == [1] * 30


def test_cosine_falls_from_1_to_nearly_0():
    values = factors(epochs=2, schedule="cosine")
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])


def test_constant():
    assert factors(epochs=2, schedule="constant") == [1] * 20


@pytest.mark.parametrize("warmup", [0.25, 1.0], ids=["fraction", "epochs"])
@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_warmup_rises_in_equal_parts_to_the_whole_rate(warmup, schedule):
    values = factors(epochs=4, warmup=warmup, schedule=schedule, lr_drop=3)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == pytest.approx(1)


def test_a_scheduler_built_in_mid_run_stands_where_the_run_was():
    def run(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    optim = Optim(epochs=4, warmup=0.5, schedule="cosine")
    model = build_model("detr_tiny", 2)
    optimizer = build_optimizer(model, optim)
    whole = run(optimizer, build_scheduler(optimizer, optim, 5), 20)
    again = build_optimizer(model, optim)
    again.load_state_dict(optimizer.state_dict())
    assert run(again, build_scheduler(again, optim, 5, done=7), 13) == whole[7:]
    longer = Optim(epochs=8, warmup=0.25, schedule="cosine")
    build_scheduler(again, longer, 5, done=20)
    assert again.param_groups[0]["lr"] == pytest.approx(longer.lr * lr_factor(longer, 20, 5))


def test_two_groups_of_all_that_trains():
    model = build_model("detr_resnet50", 2)
    groups = build_optimizer(model, Optim(lr=1e-3, lr_backbone=1e-4)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    transformer, backbone = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert transformer | backbone == set(names.values())
    assert backbone == {name for name in names.values() if name.startswith("backbone.0.body.layer")}
    assert not any(name.startswith("backbone.0.body.layer1") for name in backbone)
    assert [(group["name"], group["lr"], group["fused"]) for group in groups] == [("transformer", 1e-3, True), ("backbone", 1e-4, True)]


@pytest.mark.parametrize("settings", [{"freeze_backbone": True}, {"lr_backbone": 0.0}])
def test_frozen_backbone(settings):
    model = build_model("detr_tiny", 2)
    groups = build_optimizer(model, Optim(**settings)).param_groups
    assert groups[1]["params"] == []
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert len(groups[0]["params"]) == sum(1 for name, _ in model.named_parameters() if not name.startswith("backbone."))


def rates_by_name(model, optim):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, optim).param_groups
    return groups, {names[id(each)]: group["lr"] for group in groups for each in group["params"]}


def test_lower_layers_have_smaller_rates():
    model = build_model("detr_resnet50", 2)
    optim = Optim(lr=1e-3, lr_backbone=1e-4, layer_decay=0.5, schedule="constant")
    groups, rates = rates_by_name(model, optim)
    assert rates["class_embed.weight"] == rates["input_proj.weight"] == 1e-3
    assert rates["transformer.decoder.layers.5.linear1.weight"] == 5e-4
    assert rates["transformer.decoder.layers.0.linear1.weight"] == pytest.approx(1e-3 / 2**6)
    assert rates["transformer.encoder.layers.0.linear1.weight"] == pytest.approx(1e-3 / 2**12)
    assert rates["backbone.0.body.layer4.0.conv1.weight"] == 1e-4
    assert rates["backbone.0.body.layer2.0.conv1.weight"] == 2.5e-5
    assert [group["name"] for group in groups[:2]] == ["transformer", "backbone"]
    assert [group["lr"] for group in groups[:2]] == [1e-3, 1e-4]
    optimizer = build_optimizer(model, optim)
    build_scheduler(optimizer, optim, 5, done=7)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]


def test_without_decay_there_are_two_groups_and_old_checkpoints_fit():
    model = build_model("detr_tiny", 2)
    optimizer = build_optimizer(model, Optim())
    assert len(optimizer.param_groups) == 2
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["scale"]
    optimizer.load_state_dict(state)
    build_scheduler(optimizer, Optim(lr=0.5), 5)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize(("preset", "number", "frozen"), [("detr_resnet50", 2, ["layer2", "layer3"]), ("detr_tiny", 1, ["layers.0"])])
def test_the_first_layers_can_be_frozen(preset, number, frozen):
    model = build_model(preset, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    build_optimizer(model, Optim(freeze_layers=number))
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained - now == {name for name in trained if name.startswith(tuple(f"backbone.0.body.{each}." for each in frozen))}


def test_freezing_reaches_the_encoder_and_ends_there():
    model = build_model("detr_tiny", 2)
    build_optimizer(model, Optim(freeze_layers=4))
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".layers.")[0] for name in fixed} == {"backbone.0.body", "transformer.encoder"}
    assert not any(name.startswith("transformer.encoder.layers.1") for name in fixed)
    with pytest.raises(UserError, match=r"optim\.freeze_layers: 6 is more than the 5 layers of backbone and encoder"):
        build_optimizer(build_model("detr_tiny", 2), Optim(freeze_layers=6))


def test_moving_average_follows_its_formula_and_leaves_frozen_weights():
    model = build_model("detr_tiny", 2)
    model.backbone.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    average = MovingAverage(model, 0.5)
    expected = start["class_embed.weight"].clone()
    for update in range(6):
        with torch.no_grad():
            model.class_embed.weight += 1
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.class_embed.weight.detach()
    kept = average.module.state_dict()
    torch.testing.assert_close(kept["class_embed.weight"], expected)
    assert kept["class_embed.weight"].min() > start["class_embed.weight"].min()
    frozen = [name for name in start if name.startswith("backbone.")]
    assert all(torch.equal(kept[name], start[name]) for name in frozen)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_moving_average_of_a_short_run_forgets_its_start():
    model = build_model("detr_tiny", 2)
    average = MovingAverage(model, 0.9999)
    with torch.no_grad():
        model.class_embed.weight.fill_(7.0)
    for _ in range(50):
        average.update()
    torch.testing.assert_close(average.module.class_embed.weight, model.class_embed.weight, atol=0.01, rtol=0)
