from types import SimpleNamespace

import pytest
import torch

from raydetr.config import read_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import largest_side
from raydetr.data.transforms import train_transforms
from raydetr.errors import UserError
from raydetr.training import batch_size, engine
from raydetr.training.batch_size import with_batch_size
from tests.training.runs import folder_of, interrupted, last_of, run, same, settings

GPU = torch.device("cuda")


class Memory:
    """Stands for the memory of a GPU: a step on more than ``most`` images raises what PyTorch raises."""

    def __init__(self, most, error=None, step=lambda training, batches: None):
        self.most, self.step, self.batches, self.released = most, step, [], []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    @property
    def tried(self):
        return [len(images) for images, _, _ in self.batches]

    def take_step(self, training, batches):
        self.batches += batches
        if self.tried[-1] > self.most:
            raise self.error
        return self.step(training, batches)


def limit_memory(monkeypatch, *arguments, **options):
    memory = Memory(*arguments, **options)
    monkeypatch.setattr(batch_size, "take_step", memory.take_step)
    monkeypatch.setattr(batch_size, "release_gpu_memory", lambda: memory.released.append(len(memory.batches)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: None)
    return memory


@pytest.fixture(scope="module")
def folder(module_coco_folder):
    return module_coco_folder(train=8, boxes=5)


def chosen(folder, saved=None, pad_to=1, **changes):
    """Returns batch size and accumulation, and what is said."""
    config = settings(folder, "run", **changes)
    images = CocoImages(find_split(config.data, "train"), train_transforms(config.data))
    training = SimpleNamespace(optimizer=SimpleNamespace(zero_grad=lambda: None))
    config, notes = with_batch_size(config, GPU, saved, lambda: training, images, pad_to)
    return (config.optim.batch_size, config.optim.accumulate), notes


@pytest.mark.parametrize(
    ("asked", "accumulate", "most", "tried", "expected"),
    [
        ("auto:16", 1, 5, [1, 2, 4, 8], (4, 4)),
        ("auto:16", 1, 99, [1, 2, 4, 8, 16], (16, 1)),
        ("auto:6", 2, 3, [1, 2, 3, 4], (3, 4)),
        ("auto:7", 1, 3, [1, 7], (1, 7)),
        ("auto", 4, 99, [1, 2, 4, 8], (8, 1)),  # the preset's two images, four times
    ],
)
def test_the_largest_part_of_the_step_that_fits_is_taken(monkeypatch, folder, asked, accumulate, most, tried, expected):
    memory = limit_memory(monkeypatch, most)
    found, (note,) = chosen(folder, optim__batch_size=asked, optim__accumulate=accumulate)
    assert found == expected
    assert memory.tried == tried
    assert memory.released == list(range(1, len(tried) + 1)), "the memory of one does not fail the next"
    assert note.startswith(f"optim.batch_size {asked}: {expected[0]} image")


def test_the_batches_that_are_tried_are_as_large_as_those_of_the_run_get(monkeypatch, folder):
    memory = limit_memory(monkeypatch, 1)
    chosen(folder, pad_to=32, optim__batch_size="auto:2")
    config = settings(folder, "run")
    side = largest_side(CocoImages(find_split(config.data, "train"), train_transforms(config.data)), 32)
    assert side % 32 == 0
    for number, (images, mask, targets) in enumerate(memory.batches, 1):
        assert images.shape == (number, 3, side, side)
        assert mask.shape == (number, side, side)
        assert [target["boxes"].shape for target in targets] == [(5, 4)] * number


def test_a_network_that_never_fits_is_an_error(monkeypatch, folder):
    limit_memory(monkeypatch, 0)
    with pytest.raises(UserError, match=r"^optim\.batch_size auto:4: not even one image of \d+ x \d+ pixels fits .*data\.max_size"):
        chosen(folder, optim__batch_size="auto:4")


def test_errors_of_cublas_about_memory_count_and_others_do_not(monkeypatch, folder):
    limit_memory(monkeypatch, 1, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert chosen(folder, optim__batch_size="auto:2")[0] == (1, 2)
    limit_memory(monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        chosen(folder, optim__batch_size="auto:2")


def test_a_resumed_run_keeps_its_batch_size(monkeypatch, folder):
    memory = limit_memory(monkeypatch, 99)
    saved = {"optim": {"batch_size": 2, "accumulate": 8}}
    assert chosen(folder, saved, optim__batch_size="auto:16") == ((2, 8), [])
    assert not memory.batches


def test_a_number_is_not_tried(monkeypatch, folder):
    memory = limit_memory(monkeypatch, 99)
    assert chosen(folder, optim__batch_size=4) == ((4, 1), [])
    assert not memory.batches


def test_trying_leaves_no_trace_in_the_run(monkeypatch, folder):
    """Nor in the run of a worker that was lost and comes back, with the settings of the first call."""
    plain = settings(folder, "plain", optim__batch_size=1, optim__accumulate=2, optim__epochs=2, model__dropout=0.2)
    run(plain)
    memory = limit_memory(monkeypatch, 1, step=engine.take_step)
    monkeypatch.setattr(batch_size, "WITH_OWN_MEMORY", ("cpu",))
    found = settings(folder, "found", optim__batch_size="auto:2", optim__epochs=2, model__dropout=0.2)
    interrupted(found, lambda event: event["kind"] == "step" and event["epoch"] == 2)
    run(found)
    assert memory.tried == [1, 2], "the batches of the run itself are not tried, nor is anything by the second call"
    same({**last_of(plain), "settings": None}, {**last_of(found), "settings": None})
    optim = read_config(folder_of(found) / "config.yaml").optim
    assert (optim.batch_size, optim.accumulate) == (1, 2)


def test_a_cpu_has_nothing_to_ask(folder):
    known = settings(folder, "cpu", optim__batch_size="auto:3", optim__accumulate=2, optim__epochs=1)
    _, watcher = run(known)
    said = [event["text"] for event in watcher.of_kind("message")]
    assert "optim.batch_size auto:3: a CPU has no memory of its own to ask, so batches have 3 images" in said
    optim = read_config(folder_of(known) / "config.yaml").optim
    assert (optim.batch_size, optim.accumulate) == (3, 2)


def test_all_workers_take_what_fits_each_of_them(monkeypatch, folder):
    memory = limit_memory(monkeypatch, 99)
    monkeypatch.setattr(batch_size, "gathered", lambda mine: [mine, memory.tried[-1] <= 4])  # the other worker's GPU is smaller
    assert chosen(folder, optim__batch_size="auto:16")[0] == (4, 4)
    assert memory.tried == [1, 2, 4, 8], "both try the same, also after one failed"
