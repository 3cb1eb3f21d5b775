"""Runs in trackers other than TensorBoard: MLflow, Weights & Biases and trackio, each behind the same four methods.

``run.tracker`` names one. It gets the settings at the start, the numbers of every epoch and the drawn validation images under
TensorBoard's tags, and at the end ``config.yaml``, ``log.txt`` and ``best.pth``. Where it keeps them, and whether that is online, its own
environment variables say: ``MLFLOW_TRACKING_URI``, ``WANDB_MODE``, ``TRACKIO_DIR`` and so on. A run that is resumed continues its entry
in the tracker, which ``tracker.json`` in the run folder names.
"""

import importlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from raydetr.errors import UserError
from raydetr.files import atomic_write_text, one_process
from raydetr.text import one_line

PROJECT = "raydetr"  # unless the tracker's environment variable names another
ID_FILE = "tracker.json"
PARAMETERS_AT_A_TIME = 100  # that MLflow takes
LONGEST_PARAMETER = 500  # characters, MLflow's limit in older servers


class ExternalTracker(Protocol):
    """One run in a tracker."""

    @property
    def run_id(self) -> str:
        """What names the run in the tracker."""
        ...

    def log(self, seen: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag after so many training images."""

    def log_pictures(self, seen: int, pictures: Mapping[str, Image.Image]) -> None:
        """Record images by file name after so many training images."""

    def log_files(self, files: Sequence[Path]) -> None:
        """Keep files with the run."""

    def close(self, failed: bool) -> None:
        """End the run, or mark it as failed; a resumed run opens it again."""


def open_tracker(kind: str, name: str, folder: Path, settings: Mapping[str, Any]) -> ExternalTracker:
    """Open the run's entry in a tracker, the one of an earlier process where there is one.

    Args:
        kind: ``mlflow``, ``wandb`` or ``trackio``.
        name: Name of the run to show.
        folder: The run folder, which gets ``tracker.json``.
        settings: The settings by dotted name.

    Raises:
        UserError: The package is missing, or the tracker refuses: no login, say, or a server that does not answer.
    """
    package = _import(kind)
    try:
        tracker = {"mlflow": MlflowTracker, "wandb": WandbTracker, "trackio": TrackioTracker}[kind](
            package, name, folder, settings, _known_id(folder, kind)
        )
    except Exception as error:  # each package raises its own kinds
        reason = one_line(error) or type(error).__name__
        raise UserError(f"run.tracker {kind}: {reason}; {ADVICE[kind]}, or set run.tracker none") from error
    atomic_write_text(folder / ID_FILE, json.dumps({kind: tracker.run_id}))
    return tracker


ADVICE = {
    "mlflow": "check MLFLOW_TRACKING_URI",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "check TRACKIO_DIR",
}


def _import(kind: str) -> Any:
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise UserError(f"run.tracker {kind} needs the package {error.name or kind}: pip install 'raydetr[{kind}]'") from None


def _known_id(folder: Path, kind: str) -> str | None:
    """Return the id of the run's entry, of an earlier process."""
    try:
        found = json.loads((folder / ID_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = found.get(kind) if isinstance(found, dict) else None
    return known if isinstance(known, str) else None


def _tag(text: str) -> str:
    """Return text as all trackers take it in a name."""
    return re.sub(r"[^\w./ -]", "_", text, flags=re.ASCII)


class MlflowTracker:
    """A run in MLflow. Without ``MLFLOW_TRACKING_URI`` it is kept in ``mlflow.db`` and ``mlflow-files`` beside the run folder."""

    def __init__(self, package: Any, name: str, folder: Path, settings: Mapping[str, Any], run_id: str | None):
        self._entities, uri, files = package.entities, os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            uri, files = f"sqlite:///{folder.parent.absolute() / 'mlflow.db'}", (folder.parent.absolute() / "mlflow-files").as_uri()
        with one_process(folder.parent / ".mlflow.lock"):  # trials of a search start together, and one of them makes the tables
            self._client = package.MlflowClient(uri)
            self.run_id = run_id or self._new_run(name, files)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            return
        parameters = [self._entities.Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in settings.items()]
        for start in range(0, len(parameters), PARAMETERS_AT_A_TIME):
            self._client.log_batch(self.run_id, params=parameters[start : start + PARAMETERS_AT_A_TIME])

    def _new_run(self, name: str, files: str | None) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project, files)
        return self._client.create_run(experiment, run_name=name).info.run_id

    def log(self, seen: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag after so many training images."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [self._entities.Metric(_tag(key), float(value), now, seen) for key, value in numbers.items()])

    def log_pictures(self, seen: int, pictures: Mapping[str, Image.Image]) -> None:
        """Record images by file name after so many training images."""
        for name, picture in pictures.items():
            self._client.log_image(self.run_id, picture, artifact_file=f"pictures/{seen:08}-{_tag(name).replace('/', '_')}.png")

    def log_files(self, files: Sequence[Path]) -> None:
        """Keep files with the run."""
        for file in files:
            self._client.log_artifact(self.run_id, str(file))

    def close(self, failed: bool) -> None:
        """End the run, or mark it as failed."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class WandbTracker:
    """A run in Weights & Biases. With ``WANDB_MODE=offline`` it is kept in ``wandb/`` in the run folder, for ``wandb sync``."""

    def __init__(self, package: Any, name: str, folder: Path, settings: Mapping[str, Any], run_id: str | None):
        self._package = package
        quiet = package.Settings(console="off", silent=True, disable_git=True, save_code=False)  # the terminal and the code are ours
        where = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "name": name, "dir": str(folder)}
        again = {"id": run_id, "resume": "allow"} if run_id else {}
        self._run = package.init(config=dict(settings), settings=quiet, reinit="create_new", **where, **again)
        self._run.define_metric("*", step_metric="step")  # its own steps cannot go back, as those of an interrupted epoch do
        self.run_id: str = self._run.id

    def log(self, seen: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag after so many training images."""
        self._run.log({"step": seen, **numbers})

    def log_pictures(self, seen: int, pictures: Mapping[str, Image.Image]) -> None:
        """Record images by file name after so many training images."""
        images = {f"pictures/{_tag(name)}": self._package.Image(picture) for name, picture in pictures.items()}
        self._run.log({"step": seen, **images})

    def log_files(self, files: Sequence[Path]) -> None:
        """Keep files with the run."""
        artifact = self._package.Artifact(f"run-{self.run_id}", type="model")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        """End the run, or mark it as failed."""
        self._run.finish(exit_code=int(failed))


class TrackioTracker:
    """A run in trackio, kept on this computer where ``TRACKIO_DIR`` says."""

    def __init__(self, package: Any, name: str, folder: Path, settings: Mapping[str, Any], run_id: str | None):
        self._package = package
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run_id: str = run_id or f"{name}-{os.urandom(3).hex()}"  # a name is what trackio resumes by
        self._run = package.init(project=project, name=self.run_id, config=dict(settings), resume="allow", embed=False)

    def log(self, seen: int, numbers: Mapping[str, float]) -> None:
        """Record numbers by tag after so many training images."""
        self._run.log(dict(numbers), step=seen)

    def log_pictures(self, seen: int, pictures: Mapping[str, Image.Image]) -> None:
        """Record images by file name after so many training images."""
        self._run.log({f"pictures/{_tag(name)}": self._package.Image(picture) for name, picture in pictures.items()}, step=seen)

    def log_files(self, files: Sequence[Path]) -> None:
        """Keep files with the run."""
        artifact = self._package.Artifact(self.run_id, type="model")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        """End the run; trackio has no mark for a failure."""
        self._run.finish()
