"""Searches over a made-up objective."""

import math

from raydetr.search.study import Search

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.bbox_loss_coef": {"uniform": [2, 8]},
    "matcher.set_cost_bbox": {"same_as": "loss.bbox_loss_coef"},
    "optim.schedule": {"choice": ["step", "cosine"]},
    "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
}


def hill(settings: dict) -> float:
    """An objective with its top of 1 at a rate of 3e-4; nothing else matters."""
    return 1 - abs(math.log10(settings["optim.lr"]) - math.log10(3e-4)) / 2


def run(search: Search, objective=hill, epochs=2) -> Search:
    """Run every trial that is left, one after the other."""
    while (asked := search.ask()) is not None:
        number, settings = asked
        value = objective({**search.base, **settings})
        for epoch in range(1, epochs + 1):
            search.report(number, epoch, value * epoch / epochs)
        search.tell(number, "complete", value)
    return search
