"""From the workers to the driver. Alone in its module: its process then starts without torch, beside the worker that everyone waits for."""

import ray

from raydetr.errors import UserError


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries what there is to show, and the first error that the user can mend, from the workers to the driver."""

    def __init__(self):
        self.events, self.error = [], None

    def post(self, event: dict) -> None:
        """Keep an event for the driver."""
        self.events.append(event)

    def take(self) -> list[dict]:
        """The events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def fail(self, error: UserError) -> None:
        """Keep the first user error: a run that fails by it is not tried again."""
        self.error = self.error or error

    def failure(self) -> UserError | None:
        """The first user error, or None."""
        return self.error
