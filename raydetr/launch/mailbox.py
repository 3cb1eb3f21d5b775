"""Messages from the workers to the driver.

In a module of its own, so that the mailbox's process starts without torch while the workers wait for it.
"""

import ray

from raydetr.errors import UserError


@ray.remote(num_cpus=0, max_restarts=-1)
class Mailbox:
    """Carries events to show, and the first error that the user can fix, from the workers to the driver.

    A mailbox whose process is killed starts again, empty.
    """

    def __init__(self):
        self.events, self.error = [], None
        self.crashes: dict[int, str] = {}  # what each rank died of since the last epoch

    def post(self, event: dict) -> None:
        """Keep an event for the driver."""
        self.events.append(event)
        if event["kind"] == "epoch":
            self.crashes.clear()

    def crash(self, rank: int, text: str) -> bool:
        """Keep what a worker died of, and return whether it died of the same before, with no finished epoch in between."""
        again = self.crashes.get(rank) == text
        self.crashes[rank] = text
        return again

    def take(self) -> list[dict]:
        """Return the events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def fail(self, error: UserError) -> None:
        """Keep the first user error; a run that fails with one is not retried."""
        self.error = self.error or error

    def failure(self) -> UserError | None:
        """Return the first user error, or None."""
        return self.error
