"""The seam between one training run and Ray: what ``fit`` tells, and how it reaches the driver."""

import time
from pathlib import Path
from typing import Any

import ray.train

from raydetr.data.cache import DecodedImages


class TrainReporter:
    """What ``fit`` is given in a Ray Train worker. The run folder itself holds the checkpoint to go on from."""

    step_interval_s = 0.5  # the terminal is brought up to date about as often

    def __init__(self, mailbox, searched: dict[str, Any] | None = None, images: DecodedImages | None = None):
        context = ray.train.get_context()
        self.rank, self.world_size, self.local_rank = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
        self.searched, self.images = searched, images
        self._mailbox = mailbox
        self._last_step = 0.0

    def checkpoint(self) -> None:
        """None: the run folder's own last.pth is what a lost worker goes on from."""

    def show(self, event: dict) -> None:
        """Send an event of rank 0 to the driver's terminal; steps are thinned out."""
        if self.rank:
            return
        if event["kind"] == "step":
            if time.monotonic() - self._last_step < self.step_interval_s:
                return
            self._last_step = time.monotonic()
        self._mailbox.post.remote(event)

    def report(self, metrics: dict, checkpoint: Path | None = None) -> None:
        """Tell Ray Train the epoch's metrics; a barrier over all workers. The checkpoint already is in the run folder."""
        ray.train.report({name: value for name, value in metrics.items() if value is not None})
