import subprocess
import sys

from benchmarks.measure import interleaved, machine, peak_memory, ratio, spread, table


def test_every_round_calls_each_contender_once_in_a_drawn_order():
    called = []
    seconds = interleaved({name: lambda name=name: called.append(name) for name in "abc"}, repeats=8, warmup=2)
    rounds = ["".join(called[start : start + 3]) for start in range(0, len(called), 3)]
    assert len(rounds) == 10
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    again, called = called.copy(), called
    called.clear()
    interleaved({name: lambda name=name: called.append(name) for name in "abc"}, repeats=8, warmup=2)
    assert called == again
    assert {name: len(each) for name, each in seconds.items()} == {"a": 8, "b": 8, "c": 8}


def test_the_ratio_is_the_median_of_the_rounds():
    # The whole machine was slow in the second round, only the peer in the third.
    assert ratio({"peer": [2.0, 20.0, 9.0], "ours": [1.0, 10.0, 1.0]}, "peer", "ours") == 2


def test_what_is_shown():
    assert spread([0.1, 0.3, 0.2]) == "200 ms (100 to 300)"
    assert spread([1.5]) == "1.5 s (1.5 to 1.5)"
    assert table([["step", 1.666], ["inference", ""]], ["what", "ratio"]).splitlines() == [
        "| what      | ratio |",
        "|-----------|-------|",
        "| step      | 1.67  |",
        "| inference |       |",
    ]
    assert "cores" in machine()
    assert "torch" in machine()


def test_peak_memory_is_of_the_process_alone():
    """Not of the one that started it, however much that holds."""
    held = bytearray(b"x" * (600 * 2**20))
    code = "from benchmarks.measure import peak_memory; before = peak_memory(); x = b'x' * (100 * 2**20); print(before, peak_memory())"
    before, after = map(float, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    assert peak_memory() - before > 300
    assert 80 < after - before < 150
    del held
