"""Checkpoint files: what is read, what is refused, and that writing is atomic."""

import argparse
import contextlib
import functools
import itertools
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.model.detr import build_model
from raydetr.weights import checkpoint
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.fitting import load, load_weights
from tests.weights.states import categories, own_content, saved


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [2, 4, None])
def test_pickle_bomb_is_not_run(tmp_path, protocol):
    """As a plain pickle, and inside what torch.save writes (None)."""
    target, path = tmp_path / "ran", tmp_path / "bomb.pth"
    if protocol is None:
        torch.save({"model": {"class_embed.weight": torch.ones(2, 2)}, "args": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Bomb(target)}, protocol=protocol))
    for reader in (read_checkpoint, load, lambda path: load_weights(build_model("detr_tiny", 1), str(path), categories("balloon"))):
        with pytest.raises(UserError, match=r"contain.* code( \(posix.system\))?, which raydetr does not run") as error:
            reader(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert not target.exists()


def test_whole_model_in_a_file_is_not_built(tmp_path):
    with pytest.raises(UserError, match=r"contains code \(torch.nn.modules.linear.Linear\)"):
        read_checkpoint(saved(tmp_path / "model.pth", torch.nn.Linear(2, 2)))


def test_zip_bomb_is_not_expanded(tmp_path):
    saved(tmp_path / "plain.pth", {"model": torch.zeros(1_000_000)})
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed archive that expands to 40"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_memory_bomb(tmp_path):
    class Memory:
        def __reduce__(self):
            return bytearray, (1 << 60,)

    with pytest.raises(UserError, match="asks for more memory than there is"):
        read_checkpoint(saved(tmp_path / "bomb.pth", {"model": Memory()}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello world" * 1000, "not a checkpoint"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not a checkpoint"),
        (b"PK\x03\x04" + bytes(1000), "damaged"),
        ((2).to_bytes(8, "little") + b"{}", "a safetensors file, not a checkpoint; .*model.weights coco"),
        ((70_000).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}' + bytes(80_000), "a safetensors file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(1000), "an HDF5 file"),
        (b"\x1f\x8b\x08" + bytes(1000), "compressed with gzip; unpack it first"),
    ],
)
def test_garbage(tmp_path, content, message):
    path = tmp_path / "best.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.99])
def test_truncated(tmp_path, zipped, fraction):
    path = tmp_path / "best.pth"
    torch.save(own_content(), path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)["epoch"] == 3
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match=r"best.pth: a damaged checkpoint, perhaps cut short"):
        read_checkpoint(path)


def test_random_damage_ends_in_one_line(tmp_path):
    """Whatever byte of the pickled part is wrong: the file is read, or refused in one line."""
    path = tmp_path / "best.pth"
    torch.save({"model": {"a": torch.ones(3)}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path, _use_new_zipfile_serialization=False)
    sound, random, messages = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(300):
        damaged = bytearray(sound)
        for place in random.integers(0, len(sound), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_missing_folder_and_others(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"a folder, not a checkpoint$"):
        read_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    with pytest.raises(UserError, match=r"a folder, not a checkpoint; did you mean .*last\.pth\?"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        read_checkpoint("/dev/zero")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(saved(tmp_path / "list.pth", [torch.ones(1)]))


def test_numbers_of_numpy_become_pythons(tmp_path):
    numbers = {
        "f": np.float64(3.5),
        "h": np.float32(0.25),
        "i": np.int64(-7),
        "u": np.uint8(200),
        "b": np.bool_(True),
        "big": np.dtype(">f8").type(1.5),
    }
    path = saved(tmp_path / "numbers.pth", {"model": {}, "args": argparse.Namespace(lr=np.float64(1e-4)), **numbers})
    content = read_checkpoint(path)
    assert content["args"].lr == 1e-4
    assert {name: content[name] for name in numbers} == {"f": 3.5, "h": 0.25, "i": -7, "u": 200, "b": True, "big": 1.5}
    assert {type(content[name]) for name in numbers} == {float, int, bool}
    # As numpy 1 named it, and in the other byte order.
    old = {"f": np.frombuffer(np.array([2.5], ">f8").tobytes(), ">f8")[0]}
    torch.save(old, path, _use_new_zipfile_serialization=False)
    file = Path(path)
    file.write_bytes(file.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(path) == {"f": 2.5}


def test_paths_become_text(tmp_path):
    """Trainers keep them among their arguments."""
    path = saved(tmp_path / "args.pth", {"args": argparse.Namespace(output_dir=Path("runs/a"), resume=Path("/x"))})
    assert vars(read_checkpoint(path)["args"]) == {"output_dir": "runs/a", "resume": "/x"}


def test_arrays_of_numpy_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"contains code \(numpy\._?core\.multiarray\._reconstruct\)"):
        read_checkpoint(saved(tmp_path / "arrays.pth", {"model": {"weight": np.ones(3)}}))


def test_reading_leaves_torch_as_strict_as_it_was(tmp_path):
    path = saved(tmp_path / "args.pth", {"args": argparse.Namespace(lr=1)})
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_save_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "last.pth"
    for epoch in range(2):
        save_checkpoint(path, {"epoch": epoch, "tensor": torch.ones(2), "more": [(None, True, "text", 1.5, b"bytes")]})
    assert read_checkpoint(path) == {"epoch": 1, "tensor": pytest.approx(torch.ones(2)), "more": [(None, True, "text", 1.5, b"bytes")]}
    assert os.listdir(path.parent) == ["last.pth"]


@pytest.mark.parametrize("value", [np.float64(1), np.ones(2), Path("a"), argparse.Namespace(), load_config(), print])
def test_save_refuses_what_could_not_be_read(tmp_path, value):
    with pytest.raises(TypeError, match=r"content\['metrics'\]\['AP'\]\[1\] is a "):
        save_checkpoint(tmp_path / "last.pth", {"metrics": {"AP": [1, value]}})
    assert not os.listdir(tmp_path)


SAVE = """
    import sys, torch
    from raydetr.errors import UserError
    from raydetr.weights.checkpoint import save_checkpoint
    for numbers in (1_000_000, 262_144 - 300, 262_144 - 50):
        try:
            save_checkpoint(sys.argv[1], {"model": {"a": torch.randn(numbers), "b": torch.ones(3)}})
        except UserError as error:
            print(error)
"""


def save_in_process(path, **options):
    command = [sys.executable, "-c", textwrap.dedent(SAVE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_disk_that_ends_while_saving_costs_nothing(tmp_path):
    """A limit on the size of files stands for the end of the disk; the third size passes it only with the archive's last bytes."""
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"epoch": 1})
    limit = 1 << 20
    lines = save_in_process(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert lines == [f"{path}: not saved (File too large); the file that was there is untouched"] * 3
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pth"]


def test_ctrl_c_while_saving_stays_ctrl_c_and_costs_nothing(tmp_path, monkeypatch):
    """Wherever between the first byte and the last it comes."""
    path, content, whole = tmp_path / "last.pth", {"model": {"a": torch.randn(70_000), "b": torch.ones(3)}}, checkpoint.atomic_write
    save_checkpoint(path, {"epoch": 1})

    @contextlib.contextmanager
    def interrupted(path, after):
        with whole(path) as file:
            write, writes = file.write, itertools.count()

            def write_until(data):
                if next(writes) == after:
                    raise KeyboardInterrupt
                return write(data)

            yield SimpleNamespace(write=write_until, flush=file.flush, fileno=file.fileno)

    for after in itertools.count():
        monkeypatch.setattr(checkpoint, "atomic_write", functools.partial(interrupted, after=after))
        try:
            save_checkpoint(path, content)
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == ["last.pth"]
            assert read_checkpoint(path) == {"epoch": 1}
        else:
            break
    assert after > 10
    assert read_checkpoint(path).keys() == {"model"}


@pytest.mark.slow
def test_full_disk_while_saving_costs_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        path = disk / "last.pth"
        save_checkpoint(path, {"epoch": 1})
        lines = save_in_process(path)
        assert lines == [f"{path}: not saved (No space left on device); the file that was there is untouched"] * 3
        assert read_checkpoint(path) == {"epoch": 1}
        assert os.listdir(disk) == ["last.pth"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder_in_the_way_of_saving(tmp_path):
    (tmp_path / "last.pth").mkdir()
    with pytest.raises(UserError, match="not saved"):
        save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/last\.pth: not saved"):
        save_checkpoint(tmp_path / "file" / "last.pth", {"epoch": 1})
    assert sorted(os.listdir(tmp_path)) == ["file", "last.pth"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json"])  # one model.safetensors is read
def test_folder_of_hugging_face_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"a model folder of Hugging Face transformers, not a checkpoint; .*use model.weights coco"):
        read_checkpoint(tmp_path)


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: it becomes a plain one by ``cpu``, and a reader would refuse it as it is."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_tensors_are_saved_as_those_of_a_cpu(tmp_path):
    """So that a plain ``torch.load`` needs no GPU."""
    tensor = torch.arange(3.0).as_subclass(OnDevice)
    state = OrderedDict(weight=tensor)
    state._metadata = {"": {"version": 1}}
    save_checkpoint(tmp_path / "last.pth", {"model": state, "random": [(1, tensor)]})
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    assert [type(each) for each in (content["model"]["weight"], content["random"][0][1])] == [torch.Tensor] * 2
    assert content["model"]["weight"].tolist() == [0, 1, 2]
    assert content["model"]._metadata == {"": {"version": 1}}
    assert type(state["weight"]) is OnDevice, "what is saved is not changed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_checkpoint_made_on_a_gpu_is_read_without_one(tmp_path):
    save_checkpoint(tmp_path / "last.pth", {"model": {"weight": torch.ones(2, device="cuda")}})
    assert torch.load(tmp_path / "last.pth", weights_only=True)["model"]["weight"].device.type == "cpu"
