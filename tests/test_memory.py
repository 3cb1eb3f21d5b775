import gc
import platform
import resource
import subprocess
import sys
import weakref

import pytest
import torch

from raydetr.memory import kept_memory, without_collections


def test_no_garbage_is_looked_for_within_and_again_afterwards():
    def make_many():
        kept = [[number] for number in range(100_000)]
        return len(seen), len(kept)

    @without_collections()
    def fail():
        during.append(make_many())
        raise ZeroDivisionError

    seen, during = [], []
    gc.callbacks.append(lambda phase, _info: seen.append(phase))
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert gc.isenabled()
        make_many()
    finally:
        gc.callbacks.pop()
    assert during == [(0, 100_000)]
    assert seen


SCRIPT = """
import contextlib, resource, sys
from pathlib import Path
from raydetr.memory import kept_memory

def pages_of_maps():  # that the system gives for ten of 40 MiB, each freed before the next
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"1" * (40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

b"1" * (40 * 2**20)
first = resident()
with contextlib.suppress(ZeroDivisionError), kept_memory(sys.argv[1]):
    b"1" * (40 * 2**20)
    within, kept = pages_of_maps(), resident() - first
    raise ZeroDivisionError
print(within, kept, resident() - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_freed_memory_is_kept_within_on_a_cpu_and_given_back_afterwards(device):
    command, page = [sys.executable, "-c", SCRIPT, device], resource.getpagesize()
    within, kept, afterwards = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    if device == "cpu":
        assert within < 100
        assert kept > 0.9 * 40 * 2**20 // page
    else:
        assert within > 0.9 * 400 * 2**20 // page
        assert kept < 100
    assert afterwards < 100


def test_a_failure_on_a_gpu_keeps_no_memory_for_its_traceback():
    class Tensors:
        """Stands for the tensors of a step, which the local variables of its functions hold."""

    held = []

    def step():
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        try:
            raise MemoryError("CUDA out of memory")
        except MemoryError as error:
            raise RuntimeError("the step failed") from error

    with pytest.raises(RuntimeError) as raised, kept_memory("cuda"):
        step()
    assert str(raised.value) == "the step failed"
    assert held[0]() is None


def test_memory_of_a_gpu_is_given_back_at_the_end(monkeypatch):
    class Network:
        """Refers to itself, as a network and its hooks do."""

        def __init__(self):
            self.hook = self

    network = weakref.ref(Network())
    there = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(network()))
    with without_collections(), kept_memory("cpu"):
        pass
    assert not there
    with without_collections(), kept_memory("cuda"):
        pass
    assert there == [None]
