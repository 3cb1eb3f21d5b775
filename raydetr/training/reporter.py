"""The interface by which a training run reports to the process that started it, and gets from it what it needs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from raydetr.data.cache import DecodedImages
from raydetr.training.console import Display


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Reporter(Protocol):
    """The connection between :func:`raydetr.training.fit.fit` and a plain process, a Ray Train worker or a trial of a search.

    Attributes are declared as properties here, so that a reporter may have them with narrower types.
    """

    @property
    def rank(self) -> int:
        """Index of this worker among all workers of the run."""
        ...

    @property
    def world_size(self) -> int:
        """Number of workers of the run."""
        ...

    @property
    def local_rank(self) -> int:
        """Index of this worker among those of its node."""
        ...

    @property
    def cores(self) -> int:
        """Number of CPU cores that this worker may use."""
        ...

    @property
    def searched(self) -> Mapping[str, tuple | list] | None:
        """The settings that a search varies, by dotted name, with their domains: ``(low, high)`` or a list of values.

        They are the columns of TensorBoard's HPARAMS page. None if the run is not part of a search.
        """
        ...

    @property
    def objectives(self) -> Sequence[str]:
        """The names of the objectives of a search; empty if the run is not part of one."""
        ...

    @property
    def images(self) -> DecodedImages | None:
        """Reads images that were decoded once for several runs. None if the run decodes its own."""
        ...

    def checkpoint(self) -> Path | None:
        """Return the checkpoint to start from, or None for the ``last.pth`` of the run folder, if there is one."""

    def show(self, event: dict[str, Any]) -> None:
        """Show an event. Every worker calls this method.

        Args:
            event: One of the events that :mod:`raydetr.training.console` describes.
        """

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Receive the metrics of an epoch. Every worker calls this method after every epoch.

        Args:
            metrics: Flat numbers by name, as :func:`raydetr.training.fit.fit` returns them.
            checkpoint: On rank 0, the file ``last.pth`` of that epoch; None on other ranks.
        """


class LocalReporter:
    """The reporter of a plain process, or of one of several processes that ``torchrun`` started.

    Args:
        checkpoint: The checkpoint to start from; default: the run folder's own ``last.pth``.
        display: Where rank 0 shows events; default: this terminal.
    """

    searched: Mapping[str, tuple | list] | None = None
    objectives: Sequence[str] = ()
    images: DecodedImages | None = None

    def __init__(self, checkpoint: Path | None = None, display: Display | None = None):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._checkpoint = checkpoint
        self._display = display or Display()

    def checkpoint(self) -> Path | None:
        """Return the checkpoint that was given at the start."""
        return self._checkpoint

    def show(self, event: dict[str, Any]) -> None:
        """Show an event on the terminal if this is rank 0.

        Args:
            event: One of the events that :mod:`raydetr.training.console` describes.
        """
        if self.rank == 0:
            self._display.show(event)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Do nothing, since ``fit`` returns the last epoch's metrics and ``show`` gets those of every epoch."""
