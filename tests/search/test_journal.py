import json
import os

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raydetr.search.journal import StudyJournal


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
