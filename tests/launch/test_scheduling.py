from raydetr import config
from raydetr.launch import scheduling
from raydetr.launch.scheduling import StudySearcher, grace_epochs
from raydetr.launch.slots import Demands, Slots
from raydetr.search.space import read_space
from raydetr.search.study import create_search

SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"uniform": [0.05, 0.5]}}


def test_trials_go_where_the_fullest_machine_has_a_place(monkeypatch, coco_folder, tmp_path):
    known = config.load_config({"data.path": str(coco_folder())})
    search = create_search(tmp_path / "search", read_space(SPACE), known, trials=8)
    machines = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4, "GPU": 1}} for name in "ab"]
    monkeypatch.setattr(scheduling.ray, "nodes", lambda: machines)
    monkeypatch.setattr(scheduling, "ROOM_INTERVAL_S", 0)
    searcher = StudySearcher(search, Demands(gpus=0.5), Slots(4, 2, 0.5))
    meant = [searcher.suggest(key)["node"] for key in "1234"]
    assert meant == ["a", "a", "b", "b"]
    assert searcher.suggest("5") is None  # there is no room
    machines[0]["Alive"] = False
    searcher.on_trial_complete("3")
    assert searcher.suggest("5") is None
    machines += [{"NodeID": "c", "Alive": True, "Resources": {"CPU": 8, "GPU": 2}}]  # now there is
    assert [searcher.suggest(key)["node"] for key in "567"] == ["b", "c", "c"]


def test_as_many_trials_are_under_way_as_were_asked_for_or_have_places(monkeypatch, coco_folder, tmp_path):
    search = create_search(tmp_path / "search", read_space(SPACE), config.load_config({"data.path": str(coco_folder())}), trials=8)
    monkeypatch.setattr(scheduling.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 8, "GPU": 2}}])
    assert StudySearcher(search, Demands(gpus=0.5), Slots(4, 2, 0.5)).room() == 4
    assert StudySearcher(search, Demands(gpus=0.5, concurrent=3), Slots(4, 2, 0.5)).room() == 3
    assert StudySearcher(search, Demands(gpus=0.5, concurrent=6), Slots(4, 2, 0.5)).room() == 6  # an autoscaler sees two wait


def test_the_grace_comes_after_the_warm_up():
    assert grace_epochs(config.load_config({"optim.epochs": 20, "optim.warmup": 0.25}).optim) == 7
    assert grace_epochs(config.load_config({"optim.epochs": 20, "optim.warmup": 3}).optim) == 5
    assert grace_epochs(config.load_config({"optim.epochs": 1}).optim) == 1
