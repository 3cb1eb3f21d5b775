import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from raydetr import config
from raydetr.cli import main
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.fingerprint import data_fingerprint
from raydetr.data.sets import load_sets
from raydetr.errors import UserError
from raydetr.evaluate.intervals import jackknife_interval
from raydetr.launch import confirm as confirmer
from raydetr.launch.confirm import (
    Plan,
    check_judging_images,
    check_same_data,
    choose,
    confirm,
    forget_stale_scores,
    given_space,
    judged_by,
    judged_on,
    make_plan,
    score_trainings,
)
from raydetr.launch.scheduling import trial_folder
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Demands
from raydetr.launch.tune import tune
from raydetr.model.detr import build_model
from raydetr.predict.score import score_checkpoint
from raydetr.search.confirm import Verdict
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from tests import helpers

TINY = helpers.TINY | {
    "optim.epochs": 1,
    "optim.batch_size": 2,
    "optim.schedule": "constant",
    "data.crop": 0.0,
    "run.name": "search",
    "run.seed": 0,
}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"uniform": [0.05, 0.5]}}


def finished_search(storage, data, aps, metric="AP", **changes):
    """A search that nobody trained: trial n ended with AP ``aps[n]``, or is still running where that is None."""
    base = helpers.tiny_config(TINY, data, storage, **changes)
    search = create_search(storage / "search", read_space(SPACE), base, trials=len(aps), sampler="random", seed=3, metric=metric)
    for number, ap in enumerate(aps):
        search.ask(str(number))
        if ap is not None:
            search.report(number, 1, ap)
            search.tell(number, "complete", ap)
    return Search(search.folder)


def test_the_plan_is_the_best_complete_trials_with_new_seeds(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(), [0.3, 0.5, 0.2, 0.6])
    assert make_plan(search, 3, 5, None) == Plan([3, 1, 2], [1, 2, 3, 4, 5])
    assert make_plan(search, 2, 2, None) == Plan([3, 1], [1, 2])
    assert make_plan(search, 3, 5, 12) == Plan([3, 1], [1, 2, 3, 4])  # two candidates and a third of the budget each
    assert make_plan(search, 3, 5, 24) == Plan([3, 1, 2], list(range(1, 13)), 24)  # a race of all


def test_every_pair_is_trained_once():
    plan = Plan([4, 7], [1, 2])
    assert plan.next_trainings({}) == [(0, 1), (4, 1), (7, 1), (0, 2), (4, 2), (7, 2)]
    assert plan.next_trainings({(0, 1): 0.1, (7, 2): 0.2}) == [(4, 1), (7, 1), (0, 2), (4, 2)]
    assert plan.next_trainings({(setting, seed): 0.1 for setting in (0, 4, 7) for seed in (1, 2)}) == []


def test_folds_judge_where_there_is_no_test_set(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(train=8), [0.3, 0.5], **{"data.folds": 4})
    plan = make_plan(search, 3, 2, None)
    assert plan == Plan([1], [1, 2], folds=4)
    assert (plan.parts, plan.most_trainings, judged_on(search, plan)) == ([1, 2, 3, 4], 16, "folds")
    assert make_plan(search, 3, 5, 48).seeds == [1, 2, 3, 4, 5, 6], "a fourth of 48 trainings are two settings with six seeds"
    with pytest.raises(UserError, match="--budget: a confirmation needs at least 24 trainings in 4 folds"):
        make_plan(search, 3, 5, 23)
    space = given_space(search, plan)
    assert space.dimensions["data.fold"].of == [1, 2, 3, 4]
    (Path(search.base_config.data.path) / "test2017").mkdir()
    assert judged_on(search, make_plan(search, 3, 2, None)) == "test"


def test_each_setting_and_seed_is_trained_once_in_each_fold(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(train=6), [0.3, 0.5], **{"data.folds": 2})
    plan = make_plan(search, 1, 2, None)
    place = str(search.folder / "confirm")
    for _ in range(2):  # as a resumed confirmation opens it
        confirmation, opened = confirmer._open(search, place, plan)
        assert opened == plan
    for (setting, seed), fold in itertools.product(plan.next_trainings({}), plan.parts):
        if (setting, seed, fold) != (0, 1, 1):
            point = confirmer._point(search, confirmation, setting, seed, fold)
            confirmation.study.enqueue_trial(point, user_attrs={confirmer.CONFIRMED: [setting, seed, fold]})
    confirmation.extend(len(confirmation.frozen()))
    trained = [confirmation.complete(confirmation.ask(str(number))[1]) for number in range(8)]
    assert confirmation.ask("9") is None
    assert {(each.optim.lr, each.run.seed, each.data.fold, each.data.folds) for each in trained} == {
        (search.config(number).optim.lr, seed, fold, 2) for number in (0, 1) for seed in (1, 2) for fold in (1, 2)
    }
    assert sorted(map(len, confirmer._pairs(confirmation, plan).values())) == [2] * 4
    assert confirmer._read_scores(confirmation, plan) == {}


def test_few_images_of_a_category_are_refused_before_a_training(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(train=6, boxes=1), [0.3, 0.5], **{"data.folds": 6})
    with pytest.raises(UserError, match=r"data\.folds: 6 folds are more than the \d images? of category"):
        confirm(search.folder)


def test_a_test_set_that_shares_images_is_refused(coco_folder, tmp_path):
    data = coco_folder(train=4, val=6)
    search = finished_search(tmp_path, data, [0.3, 0.5])
    shutil.copytree(data / "val2017", data / "test2017")
    shutil.copy(data / "annotations" / "custom_val.json", data / "annotations" / "custom_test.json")
    for number in range(1, 6):
        file = data / "test2017" / f"val_{number:03d}.jpg"
        file.write_bytes(file.read_bytes() + b"other")
    with pytest.raises(
        UserError, match=r"confirm: 1 test image is also in the data that was trained on, the first is .*test2017/val_000"
    ) as error:
        confirm(search.folder)
    assert "\n" not in str(error.value)


def test_the_detections_of_all_folds_are_judged_together(coco_folder, tmp_path, monkeypatch):
    data = coco_folder(train=6)
    known = helpers.tiny_config(TINY, data, tmp_path)
    perfect = []
    for fold in (1, 2, 3):
        _, val = load_sets(config.with_settings(known, {"data.folds": 3, "data.fold": fold}).data)
        found = [{key: each[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for each in val.coco["annotations"]]
        perfect.append(SimpleNamespace(coco=val.coco, results=found))
    monkeypatch.setattr(confirmer, "detect", lambda checkpoint, *_, split, masks: perfect[int(checkpoint)])
    whole = score_trainings(["0", "1", "2"], {}, "folds", False)
    assert (whole["AP"], whole["images"], len(whole["left_out"])) == (1.0, 6, 6)
    perfect[1].results.clear()
    assert score_trainings(["0", "1", "2"], {}, "folds", False)["AP"] == pytest.approx(2 / 3, abs=0.25)


@pytest.mark.parametrize(("metric", "measure"), [("AP", "AP"), ("AP50", "AP"), ("segm_AP", "segm_AP"), ("segm_AR10", "segm_AP")])
def test_a_search_for_masks_is_judged_by_masks(coco_folder, tmp_path, metric, measure):
    assert judged_by(finished_search(tmp_path, coco_folder(), [0.3], metric)) == measure


@pytest.fixture
def masks_checkpoint(tmp_path):
    """Boxes as of chance; ``write(name, masks)`` writes a checkpoint whose masks are all empty or all full."""

    def write(name, bias):
        torch.manual_seed(0)
        model = build_model("detr_tiny", 2, masks=True)
        with torch.no_grad():
            model.class_embed.bias[0] += 20  # each query detects a square
            model.mask_head.out_lay.bias.fill_(bias)
        about = config.to_dict(config.load_config({"model.preset": "detr_tiny", "data.val_size": 64, "model.masks": True}))
        content = {
            "model": model.state_dict(),
            "settings": about,
            "categories": [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}],
            "epoch": 1,
            "metrics": {},
        }
        save_checkpoint(tmp_path / name, content)
        return str(tmp_path / name)

    return write


def test_masks_are_scored_as_the_evaluation_does_with_and_without_each_image(coco_folder, masks_checkpoint):
    data = {"data.path": str(whole_images(coco_folder(train=1, val=6))), "data.num_workers": 0}
    full, empty = masks_checkpoint("full.pth", 30.0), masks_checkpoint("empty.pth", -30.0)
    scored = score_trainings([full], data, "val", True)
    segm = score_checkpoint(full, data)["segm"]
    assert 0 < scored["AP"] == pytest.approx(segm["AP"], abs=1e-9)
    assert jackknife_interval(scored["AP"], np.array(scored["left_out"])) == pytest.approx(segm["AP_interval"], abs=1e-9)
    assert score_trainings([empty], data, "val", True)["AP"] == 0
    assert score_trainings([full], data, "val", False)["AP"] == score_trainings([empty], data, "val", False)["AP"]


def whole_images(folder):
    """Let every object be a square whose mask is the whole image."""
    for split in ("train", "val"):
        file = folder / "annotations" / f"custom_{split}.json"
        coco = json.loads(file.read_text())
        for each in coco["annotations"]:
            each |= {"category_id": coco["categories"][0]["id"], "segmentation": [[0, 0, 96, 0, 96, 64, 0, 64]], "area": 96 * 64}
        file.write_text(json.dumps(coco))
    return folder


def test_masks_cannot_judge_where_the_images_have_none(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(val=5), [0.3, 0.5], "segm_AP")
    with pytest.raises(UserError, match=r"confirm: .*custom_val\.json has no mask, and the search maximized the AP of masks"):
        confirm(search.folder)


def test_edited_masks_are_changed_data(coco_folder, tmp_path):
    data = whole_images(coco_folder(val=5))
    search = finished_search(tmp_path, data, [0.3, 0.5], "segm_AP", **{"model.masks": True})
    known = {
        split: data_fingerprint(each.coco)
        for split, each in zip(("train", "val"), load_sets(search.base_config.data, masks=True), strict=True)
    }
    trial_folder(search, 0).mkdir(parents=True)
    save_checkpoint(trial_folder(search, 0) / "best.pth", {"model": {"w": torch.zeros(1)}, "data": known})
    check_same_data(search)
    file = data / "annotations" / "custom_val.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["segmentation"] = [[0, 0, 96, 0, 96, 63, 0, 63]]
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=r"the val set is not the one of .*: masks of image \d+ changed; undo that"):
        check_same_data(search)


def test_a_race_drops_who_falls_behind_and_resumes_within_a_round():
    plan, ap = Plan([4, 7], [1, 2, 3, 4], 20), {0: 0.3, 4: 0.1, 7: 0.5}
    scored = {}
    assert plan.next_trainings(scored) == [(0, 1), (4, 1), (7, 1)]
    scored |= {(setting, 1): ap[setting] for setting in ap}
    assert plan.next_trainings(scored) == [(0, 2), (4, 2), (7, 2)]
    scored |= {(7, 2): 0.51}
    assert plan.next_trainings(scored) == [(0, 2), (4, 2)]  # of the round that was interrupted
    scored |= {(0, 2): 0.31, (4, 2): 0.11}
    assert plan.next_trainings(scored) == [(0, 3), (7, 3)]
    assert Plan([4, 7], [1, 2, 3, 4], 6).next_trainings(scored) == []


@pytest.mark.parametrize(
    ("aps", "numbers", "message"),
    [
        ([0.3], {}, "no complete trial has other settings than trial 0"),
        ([0.3, 0.5, None], {}, r"1 trial still running \(2\); .*raydetr tune --resume"),
        ([0.3, 0.5], {"seeds": 1}, "at least 1 setting and 2 seeds"),
        ([0.3, 0.5], {"budget": 5}, "at least 6 trainings"),
    ],
)
def test_searches_that_cannot_be_confirmed(coco_folder, tmp_path, capsys, aps, numbers, message):
    search = finished_search(tmp_path, coco_folder(val=5), aps)
    with pytest.raises(UserError, match=message) as error:
        confirm(search.folder, **numbers)
    assert "\n" not in str(error.value)
    if not numbers:
        assert main(["confirm", str(search.folder)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_four_images_say_nothing(coco_folder, tmp_path):
    search = finished_search(tmp_path, coco_folder(val=4), [0.3, 0.5])
    with pytest.raises(UserError, match="With 4 images no difference can be shown, whatever the number of seeds; at least 5"):
        confirm(search.folder)
    check_judging_images(helpers.tiny_config(TINY, coco_folder(val=5, folder="five"), tmp_path).data, "val")


def test_changed_data_are_refused_with_the_difference(coco_folder, tmp_path):
    data = coco_folder(val=5)
    search = finished_search(tmp_path, data, [0.3, 0.5])
    with pytest.raises(UserError, match=r"trial 0 has no best\.pth"):
        confirm(search.folder)
    known = {
        split: data_fingerprint(CocoImages(find_split(search.base_config.data, split), lambda *each: each).coco)
        for split in ("train", "val")
    }
    trial_folder(search, 0).mkdir(parents=True)
    save_checkpoint(trial_folder(search, 0) / "best.pth", {"model": {"w": torch.zeros(1)}, "data": known})
    check_same_data(search)
    file = data / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    coco["annotations"].pop()
    file.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=r"the train set is not the one of .*: boxes of image \d+ changed \(3 before, 2 now\)"):
        confirm(search.folder)


def test_scores_are_forgotten_once_other_images_judge(coco_folder, tmp_path):
    data = coco_folder(val=5)
    search = finished_search(tmp_path, data, [0.3, 0.5])
    confirmation, _ = confirmer._open(search, str(search.folder / "confirm"), make_plan(search, 1, 2, None))
    scores = confirmation.folder / "scores.json"

    def kept(split):
        scores.write_text("{}")
        forget_stale_scores(confirmation, search.base_config.data, split)
        return scores.exists()

    assert not kept("val"), "of unknown images"
    assert kept("val")
    shutil.copytree(data / "val2017", data / "test2017")
    test = data / "annotations" / "custom_test.json"
    test.write_text((data / "annotations" / "custom_val.json").read_text())
    assert not kept("test")
    assert kept("test")
    coco = json.loads(test.read_text())
    coco["annotations"].pop()
    test.write_text(json.dumps(coco))
    assert not kept("test")


def test_the_defaults_are_kept_where_the_winner_is_not_above_them():
    verdict = Verdict(4, 0.02, -0.01, 0.05, 2, 50, None, None, 0.02)
    assert choose(verdict) == 4
    assert choose(Verdict(4, -0.01, -0.04, 0.02, 2, 50, None, None, 0.02)) == 0


def test_tune_confirms_at_its_end_on_request(coco_folder, tmp_path, monkeypatch, capsys):
    data = coco_folder(val=5)
    search = finished_search(tmp_path, data, [0.3, 0.5])
    content = {"sentence": "Settings 1 beat the defaults.", "caveat": "Judged on few images.", "chosen": 1, "seeds": 5}
    asked = []
    monkeypatch.setattr("raydetr.launch.tune.tune", lambda *_, **__: search)
    monkeypatch.setattr(confirmer, "confirm", lambda folder, **_: asked.append(str(folder)) or content)
    flags = ["tune", "--space", "loss", "--data", str(data), "--storage", str(tmp_path)]
    assert main(flags) == 0
    assert not asked
    assert main([*flags, "--confirm"]) == 0
    assert asked == [str(search.folder)]
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[:2] == [content["sentence"], content["caveat"]]
    assert "now hold settings 1, trained with 5 seeds" in last[2]


@pytest.mark.slow
def test_a_search_is_confirmed_in_its_folds(module_coco_folder, tmp_path):
    data = module_coco_folder(train=6, val=2, folder="folds")
    search = finished_search(tmp_path, data, [0.3, 0.5], **{"data.folds": 2})
    train, val = load_sets(search.base_config.data)
    known = {"train": data_fingerprint(train.coco), "val": data_fingerprint(val.coco)}
    for number in (0, 1):
        trial_folder(search, number).mkdir(parents=True)
        save_checkpoint(trial_folder(search, number) / "best.pth", {"model": {"trial": torch.tensor(number)}, "data": known})
    ray.init(address="local", num_cpus=2, include_dashboard=True, resources={DRIVER: 4}, logging_level="error", log_to_driver=False)
    try:
        content = confirm(search.folder, top=1, seeds=2, demands=Demands(concurrent=2))
    finally:
        ray.shutdown()
    assert (content["judged_on"], content["images"], content["seeds"]) == ("folds", 6, 2)
    assert "6 held-out images" in content["sentence"]
    assert content["caveat"].startswith("Judged in the folds that the search did not use")
    confirmation = Search(search.folder / "confirm")
    trained = [confirmation.config(number) for number in range(8)]
    assert {(each.optim.lr, each.run.seed, each.data.fold) for each in trained} == {
        (search.config(number).optim.lr, seed, fold) for number in (0, 1) for seed in (1, 2) for fold in (1, 2)
    }
    for number, each in enumerate(trained):
        ids = read_checkpoint(trial_folder(confirmation, number) / "last.pth")["data"]["val"]["image_ids"].tolist()
        assert ids == load_sets(each.data)[1].image_ids
    assert len(json.loads((confirmation.folder / "scores.json").read_text())) == 4
    assert read_checkpoint(search.folder / "best.pth")["model"]["trial"] == content["chosen"], "the search's own, trained on all images"
    assert config.load_config(config.read_yaml(search.folder / "best.yaml")).data.folds is None


@pytest.mark.slow
def test_a_search_is_confirmed_on_its_test_set_and_no_training_runs_twice(module_coco_folder, tmp_path_factory, monkeypatch):
    data, storage = module_coco_folder(val=2), tmp_path_factory.mktemp("confirmed")
    ray.init(address="local", num_cpus=2, include_dashboard=True, resources={DRIVER: 4}, logging_level="error", log_to_driver=False)
    try:
        search = tune(
            helpers.tiny_config(TINY, data, storage), SPACE, trials=2, scheduler="none", sampler="random", demands=Demands(concurrent=2)
        )
        other = module_coco_folder(train=1, val=6, seed=5, folder="test")
        shutil.move(other / "val2017", data / "test2017")
        shutil.move(other / "annotations" / "custom_val.json", data / "annotations" / "custom_test.json")
        content = confirm(search.folder, top=1, seeds=2, demands=Demands(concurrent=2))
        assert content["judged_on"] == "test"
        assert content["images"] == 6
        assert content["seeds"] == 2
        assert content["caveat"] == ""
        assert "6 test images" in content["sentence"]
        assert json.loads((search.folder / "verdict.json").read_text()) == content

        confirmation = Search(search.folder / "confirm")
        trained = {(config.by_name(confirmation.config(number))["optim.lr"], confirmation.config(number).run.seed) for number in range(4)}
        assert trained == {(search.config(number).optim.lr, seed) for number in (0, 1) for seed in (1, 2)}
        scores = json.loads((confirmation.folder / "scores.json").read_text())
        assert [len(each["left_out"]) for each in scores.values()] == [6] * 4
        best = config.load_config(config.read_yaml(search.folder / "best.yaml"))
        assert best.optim.lr == search.config(content["chosen"]).optim.lr
        kept = read_checkpoint(search.folder / "best.pth")["settings"]
        assert kept["optim"]["lr"] == best.optim.lr
        assert kept["run"]["seed"] in (1, 2)

        # Given again it trains and scores nothing; without the scores of one training it scores that one alone.
        monkeypatch.setattr(confirmer, "run_trials", lambda *_: pytest.fail("a finished training ran again"))
        assert confirm(search.folder, top=1, seeds=2) == content
        gone = scores.pop("2")
        (confirmation.folder / "scores.json").write_text(
            json.dumps({number: each | {"AP": each["AP"] + 1e-9} for number, each in scores.items()})
        )
        confirm(search.folder, top=1, seeds=2)
        now = json.loads((confirmation.folder / "scores.json").read_text())
        assert now["2"] == gone
        assert np.isclose(now["0"]["AP"] - scores["0"]["AP"], 1e-9, rtol=1e-3)
    finally:
        ray.shutdown()
