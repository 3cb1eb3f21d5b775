"""TensorBoard for runs. Each run is shown under its own name, and runs that start while TensorBoard is open appear in it."""

import contextlib
import json
import os
import sys
import tempfile
import threading
import urllib.parse
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from raydetr.errors import UserError
from raydetr.storage import EVENTS, fetched

EVENTS_FOLDER = "tb"  # in a run's folder
PINNED = ("val/AP", "val/loss", "train/loss")  # the charts at the top of the page
LOOK_INTERVAL_S = 5.0  # between two scans for new runs


def serve_tensorboard(paths: Sequence[str | Path], host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve TensorBoard until Ctrl-C. Runs in an object store are fetched again every few seconds.

    Args:
        paths: Paths or URIs of runs or of folders of runs.
        host: The address to listen on.
        port: The port to listen on; 0 takes any free one.
        tell: Called with a line for the user that contains the page's address.

    Raises:
        UserError: There is no run in ``paths``, or the port is taken.
    """
    from tensorboard import program

    folders = [fetched(path, only=EVENTS) for path in paths]
    with tempfile.TemporaryDirectory(prefix="raydetr-tensorboard-") as logdir:
        if not link_runs(folders, Path(logdir)):
            raise UserError(f"there is no run with TensorBoard events in {', '.join(map(str, paths))}")
        board = program.TensorBoard()
        board.configure(argv=["tensorboard", "--logdir", logdir, "--host", host, "--port", str(port), "--reload_interval", "5"])
        try:
            address = board.launch()
        except program.TensorBoardServerException as error:
            raise UserError(f"TensorBoard cannot listen on {host}:{port}: {error.msg}; choose another --port") from None
        page = f"{address}?{page_query()}"
        tell(f"TensorBoard is at {page} (Ctrl-C ends it)")
        if has_browser():
            webbrowser.open(page)
        with contextlib.suppress(KeyboardInterrupt):
            while not threading.Event().wait(LOOK_INTERVAL_S):
                with contextlib.suppress(UserError):  # what was fetched before is still shown; fetching is retried
                    for path in paths:
                        fetched(path, only=EVENTS)
                link_runs(folders, Path(logdir))


def page_query() -> str:
    """Return the query string of the page's address, which pins the charts of AP and losses to its top and turns smoothing off."""
    cards = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    return urllib.parse.urlencode({"pinnedCards": json.dumps(cards, separators=(",", ":")), "smoothing": "0"})


def has_browser() -> bool:
    """Return whether a page can be opened for the user: the command runs in a terminal on a computer with a desktop, not over SSH."""
    desktop = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return sys.stdout.isatty() and desktop and "SSH_CONNECTION" not in os.environ


def link_runs(folders: list[Path], logdir: Path) -> int:
    """Link the TensorBoard events of every run into one folder, under the name of the run. Existing links stay.

    Args:
        folders: Folders of runs, or of folders of runs.
        logdir: The folder to create the links in.

    Returns:
        The number of runs that were found.
    """
    runs = dict(_named_runs(folders))
    for name, events in runs.items():
        link = logdir / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events.absolute(), target_is_directory=True)
    return len(runs)


def _named_runs(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    names = [folder.absolute().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        prefix = str(folder.absolute()).strip("/") if names.count(name) > 1 else name
        for here, below, _ in os.walk(folder):
            if EVENTS_FOLDER in below:
                below.clear()  # a run contains no other runs
                inside = Path(here).relative_to(folder)
                alone = len(folders) == 1 and inside != Path()
                yield str(inside if alone else Path(prefix) / inside), Path(here) / EVENTS_FOLDER
