"""Messages from the workers to the driver.

They are in a module of their own so that the mailbox's process starts without importing torch, while the workers wait for it.
"""

import ray

from raydetr.errors import UserError


@ray.remote(num_cpus=0, max_restarts=-1)
class Mailbox:
    """Carries events to show, and the first error that the user can fix, from the workers to the driver.

    If the mailbox's process is killed, it is restarted with an empty mailbox.
    """

    def __init__(self):
        self.events, self.error = [], None
        self.crashes: dict[int, str] = {}  # what each rank died of since the last epoch

    def post(self, event: dict) -> None:
        """Keep an event until the driver takes it.

        Args:
            event: One of the events that :mod:`raydetr.training.console` describes. One of kind ``"epoch"`` clears the recorded crashes.
        """
        self.events.append(event)
        if event["kind"] == "epoch":
            self.crashes.clear()

    def crash(self, rank: int, text: str) -> bool:
        """Record the error that ended a worker, and return whether it is the same as the last time.

        Args:
            rank: The worker's rank.
            text: The error on one line.

        Returns:
            Whether the same rank ended with the same text before, without a finished epoch in between.
        """
        again = self.crashes.get(rank) == text
        self.crashes[rank] = text
        return again

    def take(self) -> list[dict]:
        """Return the events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def fail(self, error: UserError) -> None:
        """Record an error that the user can fix; a run with such an error is not retried.

        Args:
            error: The error. It is dropped if there is an earlier one.
        """
        self.error = self.error or error

    def failure(self) -> UserError | None:
        """Return the first error that the user can fix, or None."""
        return self.error
