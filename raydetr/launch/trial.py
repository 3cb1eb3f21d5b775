"""What runs in a trial of a search: ``fit`` right there, or an inner TorchTrainer with several workers."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from raydetr import config as settings
from raydetr.data.cache import DecodedImages
from raydetr.errors import DiskFull, UserError
from raydetr.launch.mailbox import Mailbox
from raydetr.launch.train import fit_on_machines, run_folder, train_worker
from raydetr.memory import without_collections


class TuneReporter:
    """What ``fit`` is given in a trial of one worker. ``searched`` are the searched settings by name, with their domains."""

    rank, world_size, local_rank = 0, 1, 0

    def __init__(self, metric: str, searched: dict[str, Any], images: DecodedImages | None = None):
        self.metric, self.searched, self.images = metric, searched, images

    def checkpoint(self) -> None:
        """None: the trial's folder holds the last.pth to go on from."""

    def show(self, event: dict) -> None:
        """Nothing: the search shows its trials in a table."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Tell Ray Tune the epoch's metrics; raises UserError where the objective is not defined on this data."""
        if metrics[self.metric] is None:
            raise UserError(f"--metric {self.metric}: the validation set has no object that it counts")
        ray.tune.report(_told(metrics))


def _told(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as Ray Tune is told them: those that are defined, and the machine and cards that the trial has."""
    here = {"node": ray.get_runtime_context().get_node_id(), "cards": ",".join(map(str, ray.get_gpu_ids()))}
    return {name: value for name, value in {**metrics, **here}.items() if value not in (None, "")}


def run_trial(assigned: dict[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """What Ray Tune calls for a trial. A failure is told, not raised: it would come again. ``images`` are the decoded pictures, if any.

    Only a lost process makes Ray Tune start a trial once more; it goes on from the last.pth of the trial's folder.
    """
    with without_collections():
        from raydetr.training.fit import fit

    config = settings.load_config(assigned["settings"])
    try:
        if config.run.workers == 1:
            last = fit(config, TuneReporter(assigned["metric"], assigned["searched"], *map(ray.get, images)))
        else:
            last = fit_with_workers(config, assigned["places"], assigned["searched"], images)
    except DiskFull as error:
        ray.tune.report({"epoch": 0, "full": f"{socket.gethostname()}: {error}"})
    except UserError as error:
        ray.tune.report({"epoch": 0, "failed": str(error)})
    except (RuntimeError, ValueError, TypeError, LookupError, OSError, ArithmeticError) as error:
        ray.tune.report({"epoch": 0, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
    else:
        ray.tune.report({**_told(last), "finished": True})


def fit_with_workers(
    config: settings.Config, places: dict[str, Any], searched: dict[str, Any], images: Sequence[ray.ObjectRef]
) -> dict[str, Any]:
    """``fit`` in several Ray Train workers, whose reports go on to Ray Tune. Returns the last epoch's metrics."""
    mailbox = Mailbox.remote()
    each = {"CPU": places["cpus"], **({"GPU": places["gpus"]} if places["gpus"] else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings.to_dict(config), "mailbox": mailbox, "searched": searched, "images": list(images)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.run.workers,
            use_gpu=places["gpus"] > 0,
            resources_per_worker=each,
            placement_strategy=places["placement"].upper(),
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(run_folder(config)),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=[TuneReportCallback()],
        ),
    )
    return fit_on_machines(trainer, mailbox, config)
