"""What runs in a trial of a search: ``fit`` in the trial's own process, or a TorchTrainer with several workers."""

import dataclasses
import os
import pickle
import socket
import time
from collections.abc import Collection, Mapping, Sequence
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
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Slots
from raydetr.launch.train import fit_with_retries, is_repeatable, ray_run_config, torch_config, train_worker
from raydetr.memory import without_collections
from raydetr.text import one_line
from raydetr.training.metrics import LAST_EPOCH, LATENCY

EARLIER = "earlier"  # in a report: the metrics of the epochs since the report before
PACKED = "assignment"  # the only parameter of a trial as Ray Tune knows it


class Gathered:
    """Gathers epochs for one report where they end faster than the process that runs the search can take them.

    Args:
        interval_s: The time between two reports, and before the first one, in seconds. An epoch that ends sooner is reported with the
            next one.
        awaited: Epochs that are reported at once, because the search then decides about the trial. So is the last one.
    """

    def __init__(self, interval_s: float = 0.0, awaited: Collection[int] = ()):
        self.interval_s, self.awaited = interval_s, awaited
        self._epochs: list[dict[str, Any]] = []
        self._taken = time.monotonic()  # when the last report was made, or the trial began

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._taken = time.monotonic()  # the trial begins where this is unpickled, perhaps on a machine with another clock

    def add(self, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add an epoch, and return the report that is due; None if it can wait.

        Args:
            metrics: The metrics of the epoch by name, with its number under ``epoch``.
        """
        self._epochs.append(dict(metrics))
        at_once = metrics.get(LAST_EPOCH) or metrics["epoch"] in self.awaited
        return self.take() if at_once or time.monotonic() - self._taken >= self.interval_s else None

    def take(self) -> dict[str, Any] | None:
        """Return one report of all epochs that wait, which has the metrics of the last one; None if there are none."""
        if not self._epochs:
            return None
        *earlier, last = self._epochs
        self._epochs, self._taken = [], time.monotonic()
        return last | ({EARLIER: earlier} if earlier else {})


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a trial of a search is to do.

    Attributes:
        config: Its settings.
        objectives: The names of the objectives of the search.
        searched: The settings that the search varies, by name, with their domains.
        slots: The resources of each of its workers.
        gathered: What gathers its epochs for one report.
        node: The id of the node that it is meant for; None: any.
    """

    config: settings.Config
    objectives: Sequence[str]
    searched: Mapping[str, tuple | list]
    slots: Slots
    gathered: Gathered
    node: str | None = None

    def packed(self) -> dict[str, bytes]:
        """Return the assignment as the parameters of Ray Tune's trial.

        They are bytes because Ray Tune copies the parameters of a trial several times, writes them into its own record, and gets them back
        with every report.
        """
        return {PACKED: pickle.dumps(self)}


def unpacked(parameters: Mapping[str, Any]) -> Assignment:
    """Return the assignment of a trial from the parameters that Ray Tune passes to it.

    Args:
        parameters: The parameters, which come from :meth:`Assignment.packed`.
    """
    return pickle.loads(parameters[PACKED])


def trial_resources(parameters: Mapping[str, Any]) -> ray.tune.PlacementGroupFactory:
    """Return the resources that Ray Tune reserves for a trial.

    For a trial of several workers this is only the slot of its driver, since its workers reserve their own.

    Args:
        parameters: The parameters of the trial, which come from :meth:`Assignment.packed`.
    """
    assigned = unpacked(parameters)
    if int(assigned.config.run.workers) > 1:
        return ray.tune.PlacementGroupFactory([{DRIVER: 1}])
    # With any strategy, Ray puts a group of one bundle on the emptiest node; only this hint packs. If the node is lost or full, the trial
    # goes to another.
    bundle = {"CPU": assigned.slots.cpus, "GPU": assigned.slots.gpus}
    return ray.tune.PlacementGroupFactory([bundle], "STRICT_PACK", _soft_target_node_id=assigned.node)


class TuneReporter:
    """The reporter of ``fit`` in a trial of one worker.

    Args:
        objectives: The names of the objectives of the search.
        searched: The settings that the search varies, by name, with their domains.
        images: The decoded images that all trials share; None if each decodes its own.
        gathered: What gathers epochs for one report.
    """

    rank, world_size, local_rank = 0, 1, 0
    searched: Mapping[str, tuple | list] | None
    images: DecodedImages | None

    def __init__(
        self,
        objectives: Sequence[str],
        searched: Mapping[str, tuple | list],
        images: DecodedImages | None = None,
        gathered: Gathered | None = None,
    ):
        self.objectives, self.searched, self.images = objectives, searched, images
        self.gathered = gathered or Gathered()
        self.cores = assigned_cores()

    def checkpoint(self) -> None:
        """Return None: a trial resumes from the ``last.pth`` of its run folder."""

    def show(self, event: dict) -> None:
        """Ignore the event, since the search shows its trials in a table."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Report an epoch's metrics to Ray Tune, perhaps together with those of the next epochs.

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
        if due := self.gathered.add(with_node(metrics)):
            ray.tune.report(due)


def with_node(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that are not None, with the node and the GPUs of the trial.

    Args:
        metrics: The metrics by name.

    Returns:
        The metrics, ``node`` (Ray's id of the node) and ``cards`` (ids of the GPUs, separated by commas; left out without GPUs).
    """
    here = {"node": ray.get_runtime_context().get_node_id(), "cards": ",".join(map(str, ray.get_gpu_ids()))}
    return {name: value for name, value in {**metrics, **here}.items() if value not in (None, "")}


def run_trial(parameters: Mapping[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """Train one trial of a search; Ray Tune calls this function.

    A failure that a retry would repeat is reported and not raised: ``failed`` is the reason. A fault of the machine (a killed loader
    process, a CUDA error, a file that cannot be read for a moment) is reported as ``fault`` and ends the process, because nothing else is
    sure to work in it. Ray Tune then starts the trial in a new process, where it resumes from the ``last.pth`` of its run folder.
    ``repeatable`` says whether the fault may come from the program itself. ``full`` reports a full disk, which ends the search.

    Args:
        parameters: The parameters of the trial, which come from :meth:`Assignment.packed`.
        images: A reference to the decoded images, if they are shared.
    """
    os.environ.setdefault(ray_private.STOP_TIMEOUT, ray_private.STOP_TIMEOUT_S)
    assigned = unpacked(parameters)
    try:
        last = (fit_and_report if assigned.config.run.workers == 1 else fit_with_workers)(assigned, images)
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


def fit_and_report(assigned: Assignment, images: Sequence[ray.ObjectRef]) -> dict[str, Any]:
    """Run ``fit`` in this process, and report its epochs to Ray Tune.

    Args:
        assigned: What the trial is to do.
        images: A reference to the decoded images, if they are shared.

    Returns:
        The last epoch's metrics.
    """
    with without_collections():
        from raydetr.training.fit import fit

    reporter = TuneReporter(assigned.objectives, assigned.searched, *map(ray.get, images), gathered=assigned.gathered)
    try:
        return fit(assigned.config, reporter)
    except Exception:
        if waiting := assigned.gathered.take():
            ray.tune.report(waiting)
        raise


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def fit_with_workers(assigned: Assignment, images: Sequence[ray.ObjectRef]) -> dict[str, Any]:
    """Run ``fit`` in several Ray Train workers, whose reports are passed on to Ray Tune.

    Args:
        assigned: What the trial is to do.
        images: A reference to the decoded images, if they are shared.

    Returns:
        The last epoch's metrics.

    Raises:
        UserError: The run failed.
    """
    mailbox, config, slots = Mailbox.remote(), assigned.config, assigned.slots
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "mailbox": mailbox,
            "images": list(images),
            "objectives": assigned.objectives,
            "searched": assigned.searched,
        },
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
