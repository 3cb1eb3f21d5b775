import pytest

from raydetr import config
from raydetr.errors import UserError
from raydetr.launch import slots
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Demands, Slots, check_disk, find_slots


def settings(folder, **changes):
    return config.load_config({"data.path": str(folder), "model.preset": "detr_tiny"}, changes)


def test_impossible_requests_are_refused_with_the_numbers(monkeypatch, coco_folder, tmp_path):
    monkeypatch.setattr(slots, "nodes_resources", lambda: [{"CPU": 2, DRIVER: 64}])
    known = settings(coco_folder())
    assert find_slots(known, Demands(), 8) == Slots(2, 1, 0.0)
    assert find_slots(known, Demands(concurrent=1), 8) == Slots(1, 2, 0.0)
    with pytest.raises(UserError, match="--concurrent 3: 2 CPUs hold 2 trials"):
        find_slots(known, Demands(concurrent=3), 8)
    waiting = settings(known.data.path, **{"run.wait_for_machines_min": 5})
    assert find_slots(waiting, Demands(concurrent=3), 8) == Slots(3, 1, 0.0)  # an autoscaler brings a machine for the third
    with pytest.raises(UserError, match=r"--workers-per-trial 3: .* 2 CPUs"):
        find_slots(known, Demands(workers=3), 8)
    with pytest.raises(UserError, match="NCCL"):
        find_slots(known, Demands(workers=2, gpus=0.5), 8)
    with pytest.raises(UserError, match="sees no GPU"):
        find_slots(settings(known.data.path, **{"speed.device": "cuda"}), Demands(), 8)


def test_gpus_are_shared_and_more_than_a_machine_has_are_refused(monkeypatch, coco_folder, tmp_path):
    monkeypatch.setattr(slots, "nodes_resources", lambda: [{"CPU": 16, "GPU": 2, DRIVER: 8}, {"CPU": 8, "GPU": 1}])
    known = settings(coco_folder())
    assert find_slots(known, Demands(gpus=0.5), 32).concurrent == 6
    assert find_slots(known, Demands(workers=2), 32).concurrent == 1
    asking = settings(known.data.path, **{"optim.batch_size": "auto:8"})
    assert find_slots(asking, Demands(gpus=1), 32).concurrent == 3
    with pytest.raises(UserError, match=r"optim\.batch_size auto:8: .*--gpus-per-trial 1"):
        find_slots(asking, Demands(gpus=0.5), 32)
    with pytest.raises(UserError, match=r"--gpus-per-trial 4: no machine has more than 2 GPUs"):
        find_slots(known, Demands(gpus=4), 32)


def test_trials_of_several_workers_never_wait_for_a_driver_that_cannot_come(monkeypatch, coco_folder, tmp_path):
    monkeypatch.setattr(slots, "nodes_resources", lambda: [{"CPU": 16}])
    with pytest.raises(UserError, match="ray start --head --resources"):
        find_slots(settings(coco_folder()), Demands(workers=2), 8)


def test_a_search_that_the_disk_cannot_hold_is_refused(coco_folder, tmp_path):
    known = settings(coco_folder(), **{"model.preset": "detr_resnet50"})
    assert check_disk(known, tmp_path / "search", 2, 1).startswith("2 trials x 2 x 16")
    with pytest.raises(UserError, match="GB free"):
        check_disk(known, tmp_path / "search", 10**9, 2)
