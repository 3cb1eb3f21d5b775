import asyncio
import threading

import pytest

from raydetr.serving.batches import Batches


def test_items_that_come_while_a_batch_is_computed_form_the_next_ones():
    batches, go = [], threading.Event()

    def double(items):
        batches.append(items)
        assert go.wait(10)
        return [2 * item for item in items]

    async def run():
        batched = Batches(double, 3)
        first = asyncio.create_task(batched(1))
        while not batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batched(item)) for item in range(2, 8)]
        await asyncio.sleep(0)
        others[1].cancel()  # nobody waits for 3 any more
        go.set()
        return [await first, *await asyncio.gather(*others, return_exceptions=True)]

    results = asyncio.run(run())
    assert batches == [[1], [2, 4, 5], [6, 7]]
    assert [each for each in results if isinstance(each, int)] == [2, 4, 8, 10, 12, 14]


def test_an_error_reaches_all_of_its_batch_and_no_other():
    def half(items):
        return [10 // item for item in items]

    async def run():
        batched = Batches(half, 2)
        failed = await asyncio.gather(batched(0), batched(5), return_exceptions=True)
        return failed, await batched(2)

    failed, later = asyncio.run(run())
    assert [type(each) for each in failed] == [ZeroDivisionError] * 2
    assert later == 5


def test_a_function_must_return_a_result_for_each_item():
    with pytest.raises(ValueError, match="zip"):
        asyncio.run(Batches(lambda items: [], 2)(1))
