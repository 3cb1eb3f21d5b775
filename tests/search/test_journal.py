import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raydetr.errors import UserError
from raydetr.search import journal
from raydetr.search.journal import StudyJournal, read_study
from raydetr.search.study import open_search
from tests.search.searches import run


@pytest.fixture
def waits(monkeypatch):
    """The sizes of the file at which the disk was waited for."""
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file)))
    return sizes


def test_reports_and_draws_do_not_wait_for_the_disk_and_the_end_of_a_trial_does(tmp_path, waits):
    path = tmp_path / "study.journal"
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1)  # notes the value at each rung
    study = optuna.create_study(storage=JournalStorage(StudyJournal(path)), pruner=pruner)
    trial = study.ask()
    before = len(waits)
    for name in ("optim.lr", "loss.eos_coef"):
        trial.suggest_float(name, 0, 1)
    for epoch in range(1, 6):
        trial.report(0.1 * epoch, epoch)
        trial.should_prune()
    assert "completed_rung_0" in study.trials[0].system_attrs
    assert len(waits) == before
    study.tell(trial, 0.5)
    assert waits[-1] == path.stat().st_size  # the reports before it are on the disk as well


def test_the_file_is_read_again_only_when_it_has_grown(tmp_path, monkeypatch):
    path, reads, read_logs = tmp_path / "study.journal", [], JournalFileBackend.read_logs
    monkeypatch.setattr(JournalFileBackend, "read_logs", lambda *given: reads.append(1) or read_logs(*given))
    ours, others = StudyJournal(path), StudyJournal(path)
    ours.append_logs([{"a": 1}, {"a": 2}])
    assert list(ours.read_logs(0)) == [{"a": 1}, {"a": 2}]
    assert list(ours.read_logs(2)) == []
    assert len(reads) == 1
    others.append_logs([{"a": 3}])
    with path.open("ab") as file:
        file.write(b'{"a"')  # another process is writing
    assert list(ours.read_logs(2)) == [{"a": 3}]
    assert list(ours.read_logs(3)) == []
    with path.open("ab") as file:
        file.write(b": 4}\n")
    assert list(ours.read_logs(3)) == [{"a": 4}]
    assert list(ours.read_logs(0)) == [{"a": number} for number in (1, 2, 3, 4)]


def test_the_file_is_the_one_that_optuna_writes_and_reads(tmp_path):
    """Readers see a report at once, and each line is one record."""
    path = tmp_path / "study.journal"
    study = optuna.create_study(study_name="search", storage=JournalStorage(StudyJournal(path)))
    trial = study.ask({"optim.lr": optuna.distributions.FloatDistribution(0, 1)})
    trial.report(0.25, 1)
    read = optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend(str(path)))).trials[0]
    assert read.intermediate_values == {1: 0.25}
    assert read.params == trial.params
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert not (tmp_path / "study.journal.lock").is_symlink()


def test_the_lock_is_released_where_the_file_cannot_be_written(tmp_path):
    journal = StudyJournal(tmp_path / "study.journal")
    journal.path = tmp_path / "missing" / "study.journal"
    with pytest.raises(FileNotFoundError):
        journal.append_logs([{"op_code": 0}])
    assert not (tmp_path / "study.journal.lock").is_symlink()


def test_the_lock_of_a_killed_writer_is_removed_and_that_of_a_live_one_is_left(make, monkeypatch):
    search = make()
    lock = search.folder / "study.journal.lock"
    lock.symlink_to(search.folder / "study.journal")
    monkeypatch.setattr(journal.time, "sleep", lambda seconds: replaced(lock) if seconds == journal.LOCK_SECONDS else None)

    def replaced(lock):  # another writer took the lock meanwhile
        lock.unlink()
        lock.symlink_to(search.folder / "config.yaml")

    journal.mend(search.folder / "study.journal")
    assert lock.is_symlink()
    monkeypatch.undo()
    open_search(search.folder)
    assert not lock.is_symlink()  # otherwise Optuna would wait for half a minute


def test_an_unfinished_last_line_is_cut_off(make):
    search = make()
    search.ask("a")
    journal = search.folder / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":8,"work')
    assert len(read_study(search.folder).trials) == 1  # readers pass over it
    search = open_search(search.folder)
    search.tell(0, "complete", 0.5)
    assert search.ask("b")[0] == 1
    assert [trial.value for trial in read_study(search.folder).trials] == [0.5, None]


RUNNER = """
import sys, time
from raydetr.search.study import open_search
search = open_search(sys.argv[1])
search.reclaim(())
while (asked := search.ask()) is not None:
    for epoch in range(1, 4):
        time.sleep(0.01)
        search.report(asked[0], epoch, epoch / 10)
    search.tell(asked[0], "complete", asked[1]["optim.lr"])
"""


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_with_every_trial_once(make):
    """Real processes, killed at seeded moments, while another reads the journal as Optuna's own users do."""
    search = make(trials=20, sampler="random", seed=7)
    moments = random.Random(0)
    kills, seen = 0, 0
    for _ in range(20):
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(search.folder)])
        started = time.monotonic()
        limit = None
        while runner.poll() is None:
            storage = JournalStorage(JournalFileBackend(str(search.folder / "study.journal")))
            count = len(optuna.load_study(study_name=None, storage=storage).trials)
            assert count >= seen
            if count > seen and limit is None:
                limit = time.monotonic() + moments.uniform(0.0, 0.4)
            seen = count
            if (limit and time.monotonic() > limit and kills < 6) or time.monotonic() - started > 120:
                runner.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        if runner.wait() == 0:
            break
    trials = read_study(search.folder).trials
    assert kills >= 3
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 20
    through = run(make(name="through", trials=20, sampler="random", seed=7)).frozen()
    # Only a trial that was killed in the middle of its drawing may have other values.
    assert sum(trial.params != other.params for trial, other in zip(trials, through, strict=True)) <= kills


def test_a_folder_without_a_whole_search_is_refused(make, tmp_path):
    with pytest.raises(UserError, match=r"holds no search \(study.journal is missing\)"):
        open_search(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "study.journal").write_text("no journal\nat all\n")
    with pytest.raises(UserError, match="not the journal of an Optuna study"):
        open_search(tmp_path)
    (tmp_path / "study.journal").write_text('{"some": "json"}\n')
    with pytest.raises(UserError, match="not the journal of an Optuna study"):
        open_search(tmp_path)
    journal = make().folder / "study.journal"
    lines = [line for line in journal.read_text().splitlines() if '"search"' not in json.dumps(json.loads(line).get("user_attr", {}))]
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="interrupted while it was being made"):
        open_search(journal.parent)


@pytest.mark.parametrize("damage", [b'{"op_code":8,"work', b"\xff\xfe", b"[1]", b'{"some": "json"}', b""])
def test_damage_in_the_middle_of_the_journal_names_the_line(make, damage):
    journal = run(make()).folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:20], damage + b"\n", *lines[21:]]))
    with pytest.raises(UserError) as caught:
        open_search(journal.parent)
    says = f"line 21: the journal is damaged; to resume with what was recorded before it, keep the first 20 lines of {len(lines)}"
    assert f"study.journal, {says} (head -n 20)" in str(caught.value)
    journal.write_bytes(b"".join(lines[:20]))  # as the message says
    assert len(open_search(journal.parent).frozen()) >= 1


WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # root may read anything


@pytest.mark.skipif(bool(WITHOUT_PRIVILEGES) and not shutil.which("setpriv"), reason="needs setpriv to give up root's privileges")
@pytest.mark.parametrize(
    ("file", "mode"), [("study.journal", 0o000), ("study.journal", 0o400), (".", 0o500), (".", 0o000), ("space.yaml", 0o000)]
)
def test_missing_permissions_are_one_line(make, file, mode):
    search = make()
    target = search.folder / file
    target.chmod(mode)
    code = "import sys; from raydetr.errors import UserError\nfrom raydetr.search.study import open_search\n"
    code += "try: open_search(sys.argv[1])\nexcept UserError as error: print(error)"
    try:
        said = subprocess.run([*WITHOUT_PRIVILEGES, sys.executable, "-c", code, search.folder], capture_output=True, text=True, check=False)
    finally:
        target.chmod(0o700)
    assert "Permission denied" in said.stdout, said.stderr
    assert str(target) in said.stdout
    assert said.stdout.count("\n") == 1
