"""Where a run resumes: its last checkpoint, the checks that it belongs to this run, and what to do if it is lost."""

import math
from pathlib import Path
from typing import Any

from raydetr.config import SETTINGS, Config, to_dict
from raydetr.data.fingerprint import fingerprint_difference
from raydetr.errors import UserError
from raydetr.storage import fetch, join, push
from raydetr.training.engine import gathered
from raydetr.training.reporter import Reporter
from raydetr.training.tracking import logged_epochs
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint

BEST, LAST = "best.pth", "last.pth"


def find_checkpoint(root: str, folder: Path, reporter: Reporter) -> Path | None:
    """Return the checkpoint to resume from, which is the same on every worker.

    Args:
        root: Path or URI of the run folder.
        folder: The run folder on this node.
        reporter: May name another checkpoint than the run's own.

    Returns:
        The local file, or None if the run has not finished an epoch.

    Raises:
        UserError: ``last.pth`` is lost, though the run has finished epochs that a new start would overwrite.
    """
    given = reporter.checkpoint()
    if given or gathered((folder / LAST).exists())[0]:
        return given or folder / LAST
    # A run that is killed in its first epoch may have saved best.pth and not yet last.pth; nothing is lost by starting it again.
    finished = max(_epoch_of_best(folder) or 0, logged_epochs(folder / "log.txt"))
    if finished > 1:
        raise UserError(
            f"{join(root, LAST)} is missing, and {finished} epochs of this run are finished: starting again would overwrite them; "
            f"{_advice(root, folder)}"
        )
    return None


def read_resumable(path: Path, root: str) -> dict[str, Any]:
    """Read a checkpoint to resume from.

    Args:
        path: The checkpoint.
        root: Path or URI of the run folder, for the error message.

    Returns:
        Its content.

    Raises:
        UserError: The file is damaged (the message says up to which epoch ``best.pth`` goes), or has weights only.
    """
    try:
        content = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; {_advice(root, path.parent)}") from None
    if not {"optimizer", "progress", "random"} <= content.keys():
        raise UserError(f"{path} holds weights only, no run to resume; start a new one from it by model.weights")
    return content


def restart_from_best(root: str) -> None:
    """Make ``last.pth`` of a run folder from its ``best.pth``.

    The run then resumes with the weights of its best epoch and with the learning rates that the schedule has after that epoch. The state of
    the optimizer is lost, and later epochs are trained again.

    Args:
        root: Path or URI of the run folder.

    Raises:
        UserError: There is no ``best.pth``, it is damaged, or the folder cannot be written.
    """
    folder = fetch(root)
    content = read_checkpoint(folder / BEST)
    metrics = content["metrics"]
    loss = metrics["val_loss"] if metrics["val_loss"] is not None else math.inf
    progress = {"epoch": content["epoch"], "best_epoch": content["epoch"], "best_AP": metrics["AP"], "best_loss": loss, "stale": 0}
    step = content.get("step")
    state = {"optimizer": None, "scaler": {}, "ema": None, "ema_updates": step or 0, "trained": None, "random": []}
    save_checkpoint(folder / LAST, {**content, **state, "step": step, "progress": progress})
    push(root)


def check_same_network(config: Config, content: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint is of the network that the settings describe.

    Args:
        config: The settings to resume with.
        content: Content of the checkpoint.
        path: The checkpoint, for the error message.

    Raises:
        UserError: A ``model`` setting other than the preset and the initial weights differs.
    """
    before, now = content["settings"]["model"], to_dict(config)["model"]
    for name in now:
        known = before.get(name, SETTINGS[f"model.{name}"].default)  # an earlier version did not have the setting
        if name not in ("preset", "weights") and known != now[name]:
            raise UserError(f"{path} is of a network with model.{name} {known}, not {now[name]}; choose another run.name")


def check_same_data(data: dict[str, dict[str, Any]], content: dict[str, Any], root: str) -> None:
    """Check that a checkpoint was trained on the same data.

    Args:
        data: Fingerprints of the training and validation set by ``"train"`` and ``"val"``.
        content: Content of the checkpoint; nothing is checked if it has no fingerprints.
        root: Path or URI of the run folder, for the error message.

    Raises:
        UserError: The data differ; the message has the first differences.
    """
    for split, before in content.get("data", {}).items():
        different = fingerprint_difference(before, data[split])
        if different:
            raise UserError(
                f"the {split} set is not the one that {root} was trained on: {'; '.join(different)}; undo that, or start a new run with "
                f"--model.weights {join(root, BEST)}"
            )


def _advice(root: str, folder: Path) -> str:
    epoch = _epoch_of_best(folder)
    if epoch is None:
        return "bring it back, or choose another run.name"
    return f"{BEST} goes as far as epoch {epoch}: resume from there with raydetr train --resume {join(root, BEST)}"


def _epoch_of_best(folder: Path) -> int | None:
    try:
        return read_checkpoint(folder / BEST)["epoch"]
    except (UserError, KeyError):  # missing or damaged
        return None
