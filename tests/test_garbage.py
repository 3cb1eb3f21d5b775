import gc

import pytest

from raydetr.garbage import without_collections


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
