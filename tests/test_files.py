import os
import subprocess
import sys
import time

import pytest

from raydetr.errors import UserError
from raydetr.files import atomic_write, atomic_write_text, delete_partial_files, one_process


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "kept.txt"
    atomic_write_text(file, "old")
    with pytest.raises(TypeError), atomic_write(file) as out:
        out.writelines([b"half of the new", None])
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_replaces_the_file_at_its_end(tmp_path):
    file = tmp_path / "kept.txt"
    file.write_text("old")
    with atomic_write(file) as out:
        out.write(b"new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_partial_files_of_killed_processes_are_deleted_once_they_are_old(tmp_path):
    old, young = tmp_path / ".kept.txt.1.partial", tmp_path / ".kept.txt.2.partial"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    atomic_write_text(tmp_path / "kept.txt", "\ud800")
    assert not old.exists()
    assert young.exists()
    assert (tmp_path / "kept.txt").read_text() == "?"


def test_partial_files_are_deleted_and_others_kept(tmp_path):
    for name in (".last.pth.1.partial", ".lock", "last.pth", "a.partial"):
        (tmp_path / name).touch()
    delete_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.partial", "last.pth"]


HOLD = """
import sys
from pathlib import Path
from raydetr.files import one_process
with one_process(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path, capfd):
    lock = tmp_path / "new folder" / "of.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError), one_process(lock, wait=False):
        pytest.fail("entered beside the other process")
    holder.kill()
    holder.wait()
    with one_process(lock, wait=False):
        pass
    assert capfd.readouterr().err == ""


def test_a_waiting_process_says_what_it_waits_for(tmp_path, capfd):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "of.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    waiter = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace(")):", "), waiting_for='the other'):"), tmp_path / "of.lock"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert waiter.stderr.readline() == b"waiting for the other\n"
    holder.communicate()
    assert waiter.communicate()[0] == b"held\n"


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"of\.lock: cannot be locked \(.+\)"), one_process(tmp_path / "file" / "of.lock"):
        pytest.fail("entered without a lock")


def test_a_file_system_without_locks_is_told_and_not_refused(tmp_path, capfd, monkeypatch):
    import filelock

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with one_process(tmp_path / "of.lock"):
        pass
    assert "this file system has no locks" in capfd.readouterr().err
