import io
import time
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial
from rich.console import Console

from raydetr import config
from raydetr.launch import scheduling
from raydetr.launch.scheduling import Hopeless, PopulationScheduler, StudyScheduler, StudySearcher, Watcher, grace_epochs, reported_metrics
from raydetr.launch.slots import Demands, Slots
from raydetr.launch.train import TWICE
from raydetr.launch.trial import EARLIER, unpacked
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
    meant = [unpacked(searcher.suggest(key)).node for key in "1234"]
    assert meant == ["a", "a", "b", "b"]
    assert searcher.suggest("5") is None  # there is no room
    machines[0]["Alive"] = False
    searcher.on_trial_complete("3")
    assert searcher.suggest("5") is None
    machines += [{"NodeID": "c", "Alive": True, "Resources": {"CPU": 8, "GPU": 2}}]  # now there is
    assert [unpacked(searcher.suggest(key)).node for key in "567"] == ["b", "c", "c"]


def test_each_trial_draws_its_own_validation_images_and_none_trains_in_folds(monkeypatch, coco_folder, tmp_path):
    monkeypatch.setattr(scheduling.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 8}}])
    for name, changes, expected in (
        ("plain", {}, [(False, 0, None, None)] * 2),
        ("reshuffled", {"data.reshuffle": True}, [(True, 0, None, None), (True, 1, None, None)]),
        ("folds", {"data.folds": 4}, [(False, 0, None, None)] * 2),
        ("fold", {"data.folds": 4, "data.fold": 2}, [(False, 0, 4, 2)] * 2),
    ):
        known = config.load_config({"data.path": str(coco_folder(folder=name)), **changes})
        search = create_search(tmp_path / name, read_space(SPACE), known, trials=8)
        searcher = StudySearcher(search, Demands(), Slots(4, 2, 0))
        datas = [unpacked(searcher.suggest(key)).config.data for key in "12"]
        assert [(each.reshuffle, each.reshuffle_seed, each.folds, each.fold) for each in datas] == expected, name
        assert search.base_config.data.folds == known.data.folds, "kept for the confirmation"


def test_as_many_trials_are_under_way_as_were_asked_for_or_have_places(monkeypatch, coco_folder, tmp_path):
    search = create_search(tmp_path / "search", read_space(SPACE), config.load_config({"data.path": str(coco_folder())}), trials=8)
    monkeypatch.setattr(scheduling.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 8, "GPU": 2}}])
    assert StudySearcher(search, Demands(gpus=0.5), Slots(4, 2, 0.5)).room() == 4
    assert StudySearcher(search, Demands(gpus=0.5, concurrent=3), Slots(4, 2, 0.5)).room() == 3
    assert StudySearcher(search, Demands(gpus=0.5, concurrent=6), Slots(4, 2, 0.5)).room() == 6  # an autoscaler sees two wait
    monkeypatch.setattr(scheduling.ray, "nodes", list)
    assert StudySearcher(search, Demands(gpus=0.5), Slots(4, 2, 0.5)).room() == 1  # one waits for the cluster to come back


def test_the_grace_comes_after_the_warm_up():
    assert grace_epochs(config.load_config({"optim.epochs": 20, "optim.warmup": 0.25}).optim) == 7
    assert grace_epochs(config.load_config({"optim.epochs": 20, "optim.warmup": 3}).optim) == 5
    assert grace_epochs(config.load_config({"optim.epochs": 1}).optim) == 1


def trial_of(search, key, status=Trial.RUNNING):
    """What Ray Tune has of a trial that was just handed out."""
    search.ask(key)
    return SimpleNamespace(trial_id=key, status=status, pickled_error_file=None, error_file=None)


@pytest.fixture
def search(coco_folder, tmp_path):
    known = config.load_config({"data.path": str(coco_folder()), "run.max_failures": 1})
    return create_search(tmp_path / "search", read_space(SPACE), known, trials=8)


def test_a_trial_that_stops_reporting_is_named_once_with_since_when(search, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    wall = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now, strftime=time.strftime, localtime=time.gmtime)
    monkeypatch.setattr(scheduling, "time", wall)
    said = io.StringIO()
    watcher = Watcher(search, SimpleNamespace(console=Console(file=said), epoch=lambda *_: None, refresh=lambda: None))
    trials = [trial_of(search, key) for key in "abc"]
    for _ in range(3):  # epochs of 200 s each; the third trial is a long one
        clock.now += 200
        watcher.on_step_end(0, trials)
        for trial in trials[:2]:
            watcher.on_trial_result(0, trials, trial, {"epoch": 1})
    assert said.getvalue() == ""
    silent = clock.now
    while clock.now < silent + 1200:
        clock.now += 100
        watcher.on_step_end(0, trials)
        if clock.now % 200 == 0:
            watcher.on_trial_result(0, trials, trials[1], {"epoch": 2})
    lines = said.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [search.trial_name(2), search.trial_name(0)]  # after five times the longest epoch
    assert "since 00:20:00 (" in lines[0]  # when the third was first seen, at 1200 s
    assert "since 00:26:40 (" in lines[1]  # the first's last epoch, at 1600 s


def test_a_trial_that_fits_no_memory_says_so_and_what_to_lower(search, tmp_path):
    trial, ended = trial_of(search, "a"), []
    trial.error_file = tmp_path / "error.txt"
    trial.error_file.write_text("Failure # 1\nsomething else\nFailure # 2\n1 worker was killed due to the node running low on memory.\n")
    controller = SimpleNamespace(
        search_alg=SimpleNamespace(on_trial_complete=lambda key, error: ended.append(key)), stop_trial=lambda trial: ended.append(trial)
    )
    scheduler = StudyScheduler(search)
    for _ in range(2):
        scheduler.on_trial_error(controller, trial)
        scheduler.on_trial_add(controller, trial)
    assert ended == ["a", trial]
    reason = search.frozen()[0].user_attrs["reason"]
    assert reason.startswith("lost 2 times (run.max_failures), the last time: the machine ran out of memory")
    assert "optim.batch_size" in reason


def test_an_error_of_the_code_is_retried_once_unless_an_epoch_went_well_in_between(search):
    trial, ended = trial_of(search, "a"), []
    controller = SimpleNamespace(
        search_alg=SimpleNamespace(on_trial_complete=lambda key, error: ended.append(key)), stop_trial=lambda trial: None
    )
    scheduler = StudyScheduler(search)
    scheduler.max_failures = 9

    def crash(host, error, repeatable=True):
        scheduler.on_trial_result(controller, trial, {"epoch": 0, "fault": f"{host}: {error}", "repeatable": repeatable})
        scheduler.on_trial_error(controller, trial)
        scheduler.on_trial_add(controller, trial)

    crash("one", "RuntimeError: shapes do not fit")
    scheduler.on_trial_result(controller, trial, {"epoch": 1, "AP": 0.5})
    crash("one", "RuntimeError: shapes do not fit")
    crash("one", "RuntimeError: another")
    for _ in range(3):
        crash("one", "OSError: Stale file handle", repeatable=False)
    crash("one", "RuntimeError: shapes do not fit")
    assert ended == []
    crash("other", "RuntimeError: shapes do not fit")
    assert ended == ["a"]
    reason = search.frozen()[0].user_attrs["reason"]
    assert reason == f"lost 8 times ({TWICE}), the last time: other: RuntimeError: shapes do not fit"


def test_what_ray_tune_adds_to_a_result_is_no_metric():
    result = {"AP": 0.5, "node": "a", "pid": 7, "time_total_s": 3.0, "trial_log_path": "x", "config": {}}
    assert reported_metrics(result) == {"AP": 0.5, "node": "a"}


def test_a_trials_settings_are_drawn_once(search, monkeypatch):
    drawn = []
    suggest = type(search.space).suggest
    monkeypatch.setattr(type(search.space), "suggest", lambda *given: drawn.append(given) or suggest(*given))
    searcher = StudySearcher(search, Demands(concurrent=2), Slots(2, 1, 0.0))
    monkeypatch.setattr(scheduling.ray, "nodes", list)
    monkeypatch.setattr(search, "trial_name", lambda number: f"{number:03d}")
    searcher.suggest("a")
    assigned = searcher.suggest("b")
    assert len(drawn) == 1
    assert unpacked(assigned).config.optim.lr == search.settings(1)["optim.lr"]


class Controller:
    """What schedulers use of Ray Tune's controller; keeps what they ask for."""

    def __init__(self, *trials):
        self.trials, self.asked = list(trials), []
        self.search_alg = SimpleNamespace(on_trial_complete=lambda key, error: self.asked.append(("complete", key)))

    def get_trials(self):
        return self.trials

    def stop_trial(self, trial):
        self.asked.append(("stop", trial.trial_id))

    def pause_trial(self, trial, should_checkpoint):
        trial.status = Trial.PAUSED
        self.asked.append(("pause", trial.trial_id))

    def request_stop_experiment(self):
        self.asked.append("end")


def epoch_of(trial, number, value=0.5, **other):
    trial.last_result = {"epoch": number, "AP": value, **other}
    return trial.last_result


@pytest.fixture
def promoting(tmp_path, coco_folder, monkeypatch):
    """A search of two trials that pauses them at epoch 2, its searcher, and a function that reports an epoch and returns the decision."""
    known = config.load_config({"data.path": str(coco_folder()), "optim.epochs": 9})
    search = create_search(tmp_path / "search", read_space(SPACE), known, trials=2, pruner="promote", grace=2, sampler="random")
    searcher, scheduler = StudySearcher(search, Demands(concurrent=2), Slots(2, 1, 0.0)), StudyScheduler(search)
    monkeypatch.setattr(scheduling.ray, "nodes", list)
    monkeypatch.setattr(scheduling, "tidy_trial", lambda trial: None)

    def report(key, epoch, value):
        trial = SimpleNamespace(trial_id=key)
        decision = scheduler.on_trial_result(Controller(trial), trial, {"epoch": epoch, "AP": value})
        if decision == StudyScheduler.STOP:
            searcher.on_trial_complete(key, {"epoch": epoch, "AP": value})
        return decision

    yield search, searcher, report
    searcher.close()


def test_a_trial_that_comes_to_a_rung_gives_its_slot_away_and_gets_one_when_it_is_promoted(promoting):
    search, searcher, report = promoting
    for key in "ab":
        searcher.suggest(key)
    assert report("b", 1, 0.5) == StudyScheduler.CONTINUE
    assert report("b", 2, 0.5) == StudyScheduler.STOP
    assert list(searcher.live) == ["a"]
    assert searcher.suggest("c") is None  # not the end: trial 0 may turn out to be worse
    report("a", 1, 0.1)
    assert report("a", 2, 0.1) == StudyScheduler.CONTINUE
    assigned = searcher.suggest("c")
    assert (unpacked(assigned).config.run.name, search.number("c")) == (search.trial_name(1), 1)
    assert report("c", 3, 0.5) == StudyScheduler.CONTINUE


def test_all_epochs_of_a_report_are_recorded_before_the_decision(promoting):
    search, searcher, _ = promoting
    for key in "ab":
        searcher.suggest(key)
    trial, scheduler = SimpleNamespace(trial_id="b"), StudyScheduler(search)
    result = {EARLIER: [{"epoch": 1, "AP": 0.5}], "epoch": 2, "AP": 0.3}
    assert scheduler.on_trial_result(Controller(trial), trial, result) == StudyScheduler.STOP
    assert search.frozen()[1].intermediate_values == {1: 0.5, 2: 0.5}


def test_an_epoch_with_a_decision_is_reported_at_once_and_others_as_fast_as_the_search_takes_them(promoting):
    search, searcher, _ = promoting
    assert scheduling.decision_epochs(search, 9) == {2, 6}
    searcher.demands = Demands(concurrent=500)
    gathered = unpacked(searcher.suggest("a")).gathered
    assert gathered.interval_s == 500 * scheduling.REPORT_S
    assert gathered.awaited == {2, 6}


def test_a_trial_that_was_promoted_has_no_new_attempts(promoting):
    search, searcher, report = promoting
    scheduler = StudyScheduler(search)
    scheduler.max_failures, ended = 1, []
    controller = SimpleNamespace(
        search_alg=SimpleNamespace(on_trial_complete=lambda key, error: ended.append(key)), stop_trial=lambda trial: None
    )

    def lose(key):
        trial = SimpleNamespace(trial_id=key, pickled_error_file=None, error_file=None)
        scheduler.on_trial_error(controller, trial)
        scheduler.on_trial_add(controller, trial)

    for key in "ab":
        searcher.suggest(key)
    lose("b")
    report("b", 2, 0.5)
    report("a", 2, 0.1)
    assert unpacked(searcher.suggest("c")).config.run.name == search.trial_name(1)
    lose("c")
    assert ended == ["c"]
    assert search.frozen()[1].user_attrs["reason"].startswith("lost 2 times (run.max_failures)")


def test_a_free_slot_without_a_trial_for_it_is_not_the_end_while_trials_run(promoting):
    """Both trials run and none is paused yet: what they leave may be promoted."""
    search, searcher, report = promoting
    searcher.demands = Demands(concurrent=3)
    for key in "ab":
        searcher.suggest(key)
    assert searcher.suggest("c") is None
    report("a", 2, 0.1)
    report("b", 1, 0.5)
    assert report("b", 2, 0.5) == StudyScheduler.CONTINUE  # in the better half as it comes to the rung
    searcher.on_trial_complete("a", {"failed": "no image can be read"})
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("b", {"epoch": 9, "AP": 0.5, "finished": True})
    assert searcher.suggest("c") == "FINISHED"
    assert [trial.state.name for trial in search.frozen()] == ["FAIL", "COMPLETE"]


def test_a_trial_that_ray_tune_gave_up_is_handed_out_again(promoting):
    search, searcher, _ = promoting
    for key in "ab":
        searcher.suggest(key)
    controller = Controller(SimpleNamespace(trial_id="b", status=Trial.ERROR))
    told = []
    controller.search_alg = SimpleNamespace(
        on_trial_complete=lambda key, error: told.append(key) or searcher.on_trial_complete(key, error=error)
    )
    scheduler = StudyScheduler(search)
    for _ in range(2):
        assert scheduler.choose_trial_to_run(controller) is None
    assert told == ["b"]
    assert list(searcher.live) == ["a"]
    assert unpacked(searcher.suggest("c")).config.run.name == search.trial_name(1)
    assert searcher.suggest("d") is None


def test_a_trial_whose_patience_ends_at_a_rung_is_not_paused_there(promoting):
    search, searcher, _ = promoting
    for key in "ab":
        searcher.suggest(key)
    trial = SimpleNamespace(trial_id="b")
    result = {"epoch": 2, "AP": 0.5, "last_epoch": True}
    assert StudyScheduler(search).on_trial_result(Controller(trial), trial, result) == StudyScheduler.CONTINUE


def test_the_search_ends_when_no_paused_trial_can_be_promoted(promoting):
    search, searcher, report = promoting
    for key in "ab":
        searcher.suggest(key)
    for epoch in (1, 2):
        report("b", epoch, 0.1)
        report("a", epoch, 0.5)
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("a", {"epoch": 9, "AP": 0.5, "finished": True})
    assert searcher.suggest("c") == "FINISHED"
    assert [trial.state.name for trial in search.frozen()] == ["COMPLETE", "PRUNED"]


def test_the_fault_of_a_lost_trial_is_forgotten_after_an_epoch_that_went_well(search):
    trial, scheduler = trial_of(search, "a"), StudyScheduler(search)
    controller = Controller(trial)
    scheduler.on_trial_result(controller, trial, {"fault": "CUDA error", "epoch": 0})
    scheduler.on_trial_result(controller, trial, epoch_of(trial, 1))
    trial.error_file = None
    for _ in range(2):
        scheduler.losses[0] += 1
        scheduler.on_trial_add(controller, trial)
    assert search.frozen()[0].user_attrs["reason"] == "lost 2 times (run.max_failures), the last time: its process was killed"
    assert controller.asked == [("complete", "a"), ("stop", "a")]


def test_a_full_disk_ends_the_search_and_the_first_who_said_so_is_quoted(search):
    trials = [trial_of(search, key) for key in "ab"]
    scheduler, controller = StudyScheduler(search), Controller(*trials)
    for trial in trials:
        assert scheduler.on_trial_result(controller, trial, {"full": f"the disk is full ({trial.trial_id})"}) == StudyScheduler.STOP
    assert controller.asked == ["end", "end"]
    assert scheduler.full == "the disk is full (a)"
    assert not search.frozen()[0].state.is_finished()  # it is resumed where there is room


def test_a_search_is_hopeless_after_three_failures_and_not_after_a_single_epoch(search):
    hopeless = Hopeless(search)
    for number, key in enumerate("abc"):
        assert not hopeless.stop_all()
        search.ask(key)
        search.tell(number, "failed", reason="no image can be read")
    assert hopeless.stop_all()
    assert not hopeless("c", {})
    search.ask("d")
    search.report(3, 1, 0.1)
    assert not hopeless.stop_all()


@pytest.fixture
def population(coco_folder, tmp_path):
    """A search by population-based training of 8 epochs, three of its trials, and the scheduler and controller of them."""
    known = config.load_config({"data.path": str(coco_folder()), "optim.epochs": 8})
    search = create_search(tmp_path / "population", read_space(SPACE), known, trials=8, sampler="random", pruner="pbt")
    scheduler = PopulationScheduler(search, StudySearcher(search, Demands(concurrent=2), Slots(2, 1, 0.0)))
    trials = [trial_of(search, key) for key in "abc"]
    for trial in trials:
        trial.set_config = lambda assigned, trial=trial: setattr(trial, "config", assigned)
    return search, scheduler, Controller(*trials), trials


def test_the_members_of_a_population_take_turns_at_every_quarter_but_the_last(population):
    search, scheduler, controller, (trial, *_) = population
    paused = [epoch for epoch in range(1, 9) if scheduler.on_trial_result(controller, trial, epoch_of(trial, epoch)) == scheduler.NOOP]
    assert paused == [2, 4, 6]
    assert controller.asked == [("pause", "a")] * 3
    assert scheduling.decision_epochs(search, 8) >= set(paused)


def test_the_member_that_has_trained_least_is_next_where_there_is_a_slot(population, tmp_path):
    search, scheduler, controller, (first, second, third) = population
    for trial, epoch, value in ((first, 2, 0.5), (first, 4, 0.5), (second, 2, 0.0), (third, 2, 0.9)):
        scheduler.on_trial_result(controller, trial, epoch_of(trial, epoch, value))
    third.status = Trial.RUNNING
    folder = tmp_path / "population" / "trials"
    for number, content in ((1, "weights of the second"), (2, "weights of the third")):
        (folder / search.trial_name(number)).mkdir(parents=True)
        for name in ("best.pth", "last.pth"):
            (folder / search.trial_name(number) / name).write_text(content)
    assert scheduler.choose_trial_to_run(controller) is second
    assert (folder / search.trial_name(1) / "last.pth").read_text() == "weights of the third"
    assert search.frozen()[1].user_attrs["taken over"][0]["from"] == 2
    assert unpacked(second.config).config.optim.lr == search.settings(1)["optim.lr"] != search.frozen()[1].params["optim.lr"]
    second.status = Trial.RUNNING
    assert scheduler.choose_trial_to_run(controller) is None  # two run, and no more may
    first.status = Trial.PENDING
    assert scheduler.choose_trial_to_run(controller) is first  # one that has not begun comes first
