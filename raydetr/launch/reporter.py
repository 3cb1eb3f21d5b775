"""The reporter that ``fit`` calls in a Ray Train worker: it reports to Ray Train and to the driver."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raydetr.data.cache import DecodedImages


def assigned_cores() -> int:
    """Return the number of CPUs that Ray has assigned to this worker or trial."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


class TrainReporter:
    """The reporter of ``fit`` in a Ray Train worker. The run folder itself holds the checkpoint to resume from.

    Args:
        mailbox: The run's :class:`raydetr.launch.mailbox.Mailbox`.
        searched: In a search, the settings that it varies, by name, with their domains.
        images: Decoded images that several runs share; None if the run decodes its own.
        objectives: In a search, the names of its objectives.
    """

    searched: Mapping[str, tuple | list] | None
    images: DecodedImages | None
    step_interval_s = 0.5  # between two steps that are shown

    def __init__(
        self,
        mailbox: Any,
        searched: Mapping[str, tuple | list] | None = None,
        images: DecodedImages | None = None,
        objectives: Sequence[str] = (),
    ):
        context = ray.train.get_context()
        self.rank, self.world_size, self.local_rank = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
        if torch.cuda.is_available():
            # Ray has made this device current. The local rank may be another one's number: Ray sorts the ids in CUDA_VISIBLE_DEVICES as
            # text, "10" before "2".
            self.local_rank = ray.train.torch.get_device().index
        self.cores = assigned_cores()
        self.searched, self.images, self.objectives = searched, images, objectives
        self._mailbox = mailbox
        self._last_step = 0.0

    def checkpoint(self) -> None:
        """Return None: a worker resumes from the ``last.pth`` of its run folder."""

    def show(self, event: dict) -> None:
        """Send an event of rank 0 to the driver's terminal.

        Args:
            event: One of the events that :mod:`raydetr.training.console` describes. Of steps, at most one each ``step_interval_s`` is sent.
        """
        if self.rank:
            return
        if event["kind"] == "step":
            if time.monotonic() - self._last_step < self.step_interval_s:
                return
            self._last_step = time.monotonic()
        self._mailbox.post.remote(event)

    def report(self, metrics: dict, checkpoint: Path | None = None) -> None:
        """Report an epoch's metrics to Ray Train, which waits for all workers.

        Args:
            metrics: The metrics by name; those that are None are left out.
            checkpoint: Ignored, since the checkpoint is in the run folder already.
        """
        ray.train.report({name: value for name, value in metrics.items() if value is not None})
