"""Dynamic batching: single items become batches for a function that is faster with several at a time."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """Collects items into batches. While batches are computed the next one fills, and an item that finds the function idle does not wait.

    ``@serve.batch`` of Ray Serve closes a batch when a waiting time is over, also if the function is still busy with the one before. On a
    busy server with a slow model most of its batches would be of one item.

    Args:
        compute: The function: takes a list of items, and whether the batch is alone (no other one is computed, and no item waits); returns
            a result for each. It runs in threads of its own.
        most: Largest number of items in a batch.
        at_a_time: Number of batches that are computed at a time.
    """

    def __init__(self, compute: Callable[[list[Item], bool], list[Result]], most: int, at_a_time: int = 1):
        self._compute, self._most, self._at_a_time = compute, most, at_a_time
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._threads = ThreadPoolExecutor(at_a_time)
        self._running: set[asyncio.Task] = set()
        self._computing = 0

    async def __call__(self, item: Item) -> Result:
        """Return the result of an item. What ``compute`` raises for its batch is raised here."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._running) < self._at_a_time:
            self._running.add(asyncio.create_task(self._run()))
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._next():
                await self._finish(batch)
        finally:
            self._running.remove(cast(asyncio.Task, asyncio.current_task()))

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Take the next batch, without items that nobody waits for any more."""
        batch = []
        while self._waiting and len(batch) < self._most:
            item, future = self._waiting.popleft()
            if not future.cancelled():
                batch.append((item, future))
        return batch

    async def _finish(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        items, alone = [item for item, _ in batch], not self._waiting and not self._computing
        self._computing += 1
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, items, alone)
            finished = list(zip(batch, results, strict=True))
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in finished:
                if not future.done():
                    future.set_result(result)
        finally:
            self._computing -= 1
