"""What runs in a trial of a search: ``fit`` in the trial's own process, or a TorchTrainer with several workers."""

import os
import socket
from collections.abc import Mapping, Sequence
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
from raydetr.launch import ray_private
from raydetr.launch.mailbox import Mailbox
from raydetr.launch.reporter import assigned_cores
from raydetr.launch.train import fit_with_retries, is_repeatable, ray_run_config, torch_config, train_worker
from raydetr.memory import without_collections
from raydetr.text import one_line
from raydetr.training.metrics import LATENCY


class TuneReporter:
    """The reporter of ``fit`` in a trial of one worker.

    Args:
        objectives: The names of the objectives of the search.
        searched: The settings that the search varies, by name, with their domains.
        images: The decoded images that all trials share; None if each decodes its own.
    """

    rank, world_size, local_rank = 0, 1, 0
    searched: Mapping[str, tuple | list] | None
    images: DecodedImages | None

    def __init__(self, objectives: Sequence[str], searched: Mapping[str, tuple | list], images: DecodedImages | None = None):
        self.objectives, self.searched, self.images = objectives, searched, images
        self.cores = assigned_cores()

    def checkpoint(self) -> None:
        """Return None: a trial resumes from the ``last.pth`` of its run folder."""

    def show(self, event: dict) -> None:
        """Ignore the event, since the search shows its trials in a table."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Report an epoch's metrics to Ray Tune.

        Args:
            metrics: The metrics by name.
            checkpoint: Ignored, since the checkpoint is in the run folder already.

        Raises:
            UserError: An objective is None, because no validation image has an object that it counts.
        """
        for name in self.objectives:
            if name != LATENCY and metrics.get(name) is None:
                flag = "--metric" if name == self.objectives[0] else "--also"
                raise UserError(f"{flag} {name}: the validation set has no object that it counts")
        ray.tune.report(with_node(metrics))


def with_node(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that are not None, with the node and the GPUs of the trial.

    Args:
        metrics: The metrics by name.

    Returns:
        The metrics, ``node`` (Ray's id of the node) and ``cards`` (ids of the GPUs, separated by commas; left out without GPUs).
    """
    here = {"node": ray.get_runtime_context().get_node_id(), "cards": ",".join(map(str, ray.get_gpu_ids()))}
    return {name: value for name, value in {**metrics, **here}.items() if value not in (None, "")}


def run_trial(assigned: Mapping[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """Train one trial of a search; Ray Tune calls this function.

    A failure that a retry would repeat is reported and not raised: ``failed`` is the reason. A fault of the machine (a killed loader
    process, a CUDA error, a file that cannot be read for a moment) is reported as ``fault`` and ends the process, because nothing else is
    sure to work in it. Ray Tune then starts the trial in a new process, where it resumes from the ``last.pth`` of its run folder.
    ``repeatable`` says whether the fault may come from the program itself. ``full`` reports a full disk, which ends the search.

    Args:
        assigned: ``number`` of the trial, ``config`` with its settings, ``objectives`` (their names), ``searched`` (the settings that vary,
            with their domains), ``slots`` (a :class:`raydetr.launch.slots.Slots`), and ``node``, the id of the node that it is meant for,
            or None.
        images: A reference to the decoded images, if they are shared.
    """
    os.environ.setdefault(ray_private.STOP_TIMEOUT, ray_private.STOP_TIMEOUT_S)
    with without_collections():
        from raydetr.training.fit import fit

    config = assigned["config"]
    try:
        if config.run.workers == 1:
            last = fit(config, TuneReporter(assigned["objectives"], assigned["searched"], *map(ray.get, images)))
        else:
            last = fit_with_workers(config, assigned, images)
    except DiskFull as error:
        ray.tune.report({"epoch": 0, "full": f"{socket.gethostname()}: {error}"})
    except UserError as error:
        ray.tune.report({"epoch": 0, "failed": str(error)})
    except (NotImplementedError, RecursionError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        ray.tune.report({"epoch": 0, "failed": _in_one_line(error)})
    except (RuntimeError, OSError, MemoryError) as error:
        ray.tune.report({"epoch": 0, "fault": f"{socket.gethostname()}: {_in_one_line(error)}", "repeatable": is_repeatable(error)})
        os._exit(1)  # also for a CUDA error, after which every call of this process fails
    else:
        ray.tune.report({**with_node(last), "finished": True})


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def fit_with_workers(config: settings.Config, assigned: Mapping[str, Any], images: Sequence[ray.ObjectRef]) -> dict[str, Any]:
    """Run ``fit`` in several Ray Train workers, whose reports are passed on to Ray Tune.

    Args:
        config: The settings of the trial.
        assigned: The trial, as :func:`run_trial` takes it.
        images: A reference to the decoded images, if they are shared.

    Returns:
        The last epoch's metrics.

    Raises:
        UserError: The run failed.
    """
    mailbox, slots = Mailbox.remote(), assigned["slots"]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "mailbox": mailbox, "images": list(images)}
        | {name: assigned[name] for name in ("objectives", "searched")},
        torch_config=torch_config(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=int(config.run.workers),
            use_gpu=slots.gpus > 0,
            resources_per_worker={"CPU": slots.cpus, **({"GPU": slots.gpus} if slots.gpus else {})},
            placement_strategy=slots.placement.upper(),
        ),
        run_config=ray_run_config(config, [TuneReportCallback()]),
    )
    return fit_with_retries(ray_private.without_idle_processes(trainer), mailbox, config)
