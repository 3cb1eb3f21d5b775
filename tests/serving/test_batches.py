import asyncio
import threading

import pytest

from raydetr.serving.batches import Batches


def test_items_that_come_while_a_batch_is_computed_form_the_next_ones():
    batches, go = [], threading.Event()

    def double(items, _alone):
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


def test_several_batches_are_computed_at_a_time_and_know_whether_they_are_alone():
    batches, go = [], threading.Event()

    def double(items, alone):
        batches.append((items, alone))
        assert go.wait(10)
        return [2 * item for item in items]

    async def run():
        batched = Batches(double, 2, at_a_time=2)
        tasks = []
        for count in (1, 2):  # the second one comes while the first one is computed
            tasks.append(asyncio.create_task(batched(count)))
            while len(batches) < count:
                await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batched(item)) for item in range(3, 7)]
        await asyncio.sleep(0)
        assert len(batches) == 2
        go.set()
        return await asyncio.gather(*tasks), await batched(7)

    results, last = asyncio.run(run())
    assert (results, last) == ([2, 4, 6, 8, 10, 12], 14)
    assert batches[:2] == [([1], True), ([2], False)]
    assert sorted(batches[2:4]) == [([3, 4], False), ([5, 6], False)]
    assert batches[4] == ([7], True)


def test_an_error_reaches_all_of_its_batch_and_no_other():
    def half(items, _alone):
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
        asyncio.run(Batches(lambda _items, _alone: [], 2)(1))
