from types import SimpleNamespace

import pytest
import torch

from raydetr.config import load_config
from raydetr.data.coco import CocoImages
from raydetr.training import reporter
from raydetr.training import run as module
from raydetr.training.run import Progress, loading_processes, pad_to, val_batch_size
from tests.training.runs import interrupted, last_of, run, settings


def test_progress_counts_epochs_and_finds_the_best():
    progress = Progress()
    epochs = [(0.0, 3.0), (0.0, 2.0), (0.0, 2.5), (0.3, 9.0), (0.2, 1.0), (0.3, 9.0)]
    seen = [(progress.update(*each), progress.stale) for each in epochs]
    assert seen == [(True, 0), (True, 1), (False, 2), (True, 0), (False, 1), (False, 2)]  # a better loss alone is no progress
    assert (progress.epoch, progress.best_epoch, progress.best_AP) == (6, 4, 0.3)
    undefined = Progress()
    assert [undefined.update(None, loss) for loss in (1.0, 2.0, 3.0)] == [True] * 3
    assert (undefined.best_AP, undefined.stale) == (None, 0)


@pytest.mark.parametrize(("given", "device", "expected"), [(None, "cpu", 3), (None, "cuda", 8), (5, "cpu", 5), (5, "cuda", 5)])
def test_batches_of_the_validation_set_have_their_own_size(given, device, expected):
    config = load_config({"optim.batch_size": 3, "data.val_batch_size": given})
    assert val_batch_size(config, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("given", "device", "cores", "expected"),
    [(None, "cuda", 4, 4), (None, "cuda", 1, 1), (None, "cuda", 32, 8), (None, "cpu", 32, 2), (0, "cuda", 4, 0), (12, "cpu", 4, 12)],
)
def test_loading_processes_follow_the_cores_of_a_worker_with_a_gpu(given, device, cores, expected):
    data = load_config({"data.num_workers": given}).data
    assert loading_processes(data, torch.device(device), cores) == expected


def test_the_cores_of_a_machine_are_shared_by_its_workers(monkeypatch):
    monkeypatch.setattr(reporter, "usable_cores", lambda: 12)
    assert reporter.LocalReporter().cores == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # which torchrun sets
    assert reporter.LocalReporter().cores == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert reporter.LocalReporter().cores == 1


def test_a_run_loads_with_that_many_processes(monkeypatch, coco_folder):
    config = settings(coco_folder(), "run", data__num_workers=None)
    images = module._data_sets(config, SimpleNamespace(world_size=1, images=None), torch.device("cpu"), None)
    here = SimpleNamespace(rank=0, world_size=1, cores=1)
    monkeypatch.setattr(module, "pad_to", lambda config, device: 1)
    for device, expected in (("cpu", 2), ("cuda", 1)):
        loaders = module._loaders(config, here, torch.device(device), *images)
        assert [loader.num_workers for loader in loaders] == [expected] * 2


@pytest.mark.parametrize(("given", "device", "expected"), [(None, "cpu", 1), (None, "cuda", 64), (32, "cpu", 32), (1, "cuda", 1)])
def test_sides_of_training_batches_are_rounded_up_on_a_gpu(given, device, expected):
    assert pad_to(load_config({"speed.pad_to": given}), torch.device(device)) == expected


def test_rounding_sides_up_pads_training_batches_alone(coco_folder):
    """A run that learns nothing evaluates the same network with and without."""
    folder, still = coco_folder(train=2, val=3), {"optim__epochs": 1, "optim__lr": 0.0, "optim__lr_backbone": 0.0}
    plain, padded = (run(settings(folder, str(pad), speed__pad_to=pad, **still))[0] for pad in (1, 50))
    assert plain["train_loss"] != padded["train_loss"], "the batches were padded"
    for name in ("AP", "val_loss", "val_loss_giou"):
        assert plain[name] == padded[name], name


def test_the_size_of_validation_batches_changes_no_result(coco_folder):
    folder = coco_folder(train=2, val=3)
    metrics = [run(settings(folder, str(size), optim__epochs=1, data__val_batch_size=size))[0] for size in (1, 3)]
    for name in ("AP", "AR100", "val_loss", "val_loss_giou"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name


def test_each_epoch_has_its_own_order_and_crops_and_a_resumed_one_those_of_its_number(coco_folder, monkeypatch):
    set_epoch, epochs = CocoImages.set_epoch, []
    monkeypatch.setattr(CocoImages, "set_epoch", lambda images, epoch: epochs.append(epoch) or set_epoch(images, epoch))
    config = settings(coco_folder(), "run")
    interrupted(config, lambda event: event["kind"] == "step" and event["epoch"] == 2)
    assert epochs == [1, 2]
    run(config)
    assert epochs == [1, 2, 2, 3]


def test_workers_share_the_memory_for_decoded_images(coco_folder):
    config = settings(coco_folder(train=4, val=2), "run", data__cache_gb=6 * (3 * 96 * 64) / 1e9)  # as much as the six take
    kept = [
        module._data_sets(config, SimpleNamespace(world_size=number, images=None), torch.device("cpu"), None)[0].images.files
        for number in (1, 2)
    ]
    assert [len(files) for files in kept] == [6, 3]


def test_a_run_resumed_on_a_gpu_seeds_each_rank_of_it_anew(coco_folder, monkeypatch):
    config = settings(coco_folder(), "run", optim__epochs=1)
    run(config)
    content = last_of(config)
    assert content["random"][0]["cuda"] is None
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    drawn = []
    for rank in (0, 1):
        module._restore_random_state(config, rank, 1, torch.device("cuda"), content)
        drawn.append(torch.rand(1))
    assert len(set(seeds)) == 2
    assert drawn[0] != drawn[1]
    torch.set_rng_state(content["random"][0]["torch"])
    assert torch.rand(1) == drawn[0]  # what the checkpoint has is continued
