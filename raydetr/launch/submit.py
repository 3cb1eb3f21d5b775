"""``raydetr submit``: run a training or a search as a job on a Ray cluster."""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import requests
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from raydetr.errors import UserError
from raydetr.launch.nodes import TOKEN, check_listening
from raydetr.storage import store_environment
from raydetr.text import one_line, shortlist

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the environment variables that name a cluster, in Ray's order
AGENT_WAIT_S = 60  # how long to retry while a cluster that has just started has no node that takes jobs
STOP_WAIT_S = 300  # the time that `ray job stop` gives a search to end gracefully; by default Ray kills it after 3 s

# Not sent: data and runs belong on a disk that all nodes see. The patterns are anchored, because raydetr/data/ is code.
EXCLUDES = ("/data/", "/runs/", "/.venv/", "/.git/", "__pycache__/")


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    name: str | None = None,
    working_dir: str | Path = ".",
    excludes: Iterable[str] = (),
    entrypoint: Mapping[str, Any] | None = None,
    wait: bool = True,
    write: Callable[[str], None] = print,
) -> int:
    """Run ``raydetr <command>`` as a job on a cluster, and follow its output. Ctrl-C stops following, not the job.

    Args:
        command: ``train`` or ``tune`` and its flags.
        address: The address of the cluster's job server; by default the first of ``ADDRESSES`` that is set, else this computer's.
        name: A name for the job, to which the time is added.
        working_dir: The folder that is sent to the cluster.
        excludes: Patterns, as in .gitignore, of files in it that are not sent.
        entrypoint: The resources of the command itself under Ray's names (``entrypoint_num_cpus``, ...). By default it runs on the head
            node.
        wait: Whether to follow the job.
        write: Called with lines for the user.

    Returns:
        The exit code of the job, 130 if it was stopped or Ctrl-C ended the following, 0 if it is not followed.

    Raises:
        UserError: The folder is too large or missing, or the cluster cannot be reached, does not take the job or has other versions.
    """
    working_dir = Path(working_dir).expanduser().absolute()
    if not working_dir.is_dir():
        raise UserError(f"--working-dir: there is no folder {working_dir}")
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # Ray logs uploads and closed connections at INFO
    environment = runtime_environment(working_dir, excludes, write)
    client = connect(address)
    job = hand_over(
        client,
        entrypoint=shlex.join(["python", "-m", "raydetr.cli", *command]),
        submission_id=f"{name or f'raydetr-{command[0]}'}-{time.strftime('%Y%m%d-%H%M%S')}",
        runtime_env=environment,
        **(entrypoint or {}),
    )
    write(f"job {job} is submitted; {ways_on(client, job)}")
    return follow(client, job) if wait else 0


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the job server of a cluster.

    The environment variables of ``ADDRESSES`` are removed, because Ray would use them instead of the address that it is given.

    Args:
        address: The address, such as ``http://HOST:8265``; None: the first of ``ADDRESSES`` that is set, else this computer's.

    Returns:
        A client of the job server.

    Raises:
        UserError: The server cannot be reached, refuses the token, or has another version of Ray or Python.
    """
    given = next(((f"{variable} {os.environ[variable]}", os.environ[variable]) for variable in ADDRESSES if os.environ.get(variable)), None)
    what, where = (
        (f"--address {address}", address) if address else given or ("http://127.0.0.1:8265 (no --address)", "http://127.0.0.1:8265")
    )
    check_listening(what, where)
    for variable in ADDRESSES:
        os.environ.pop(variable, None)  # Ray would use them instead of the address that it is given
    try:
        client = JobSubmissionClient(where)
        theirs = versions(client)
    except AuthenticationError as error:
        raise UserError(f"{what}: the cluster wants its token: {TOKEN}") from error
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, RayError, requests.RequestException) as error:
        raise UserError(f"{what}: no Ray cluster takes jobs there: {one_line(error)}") from error
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    # What is sent is text, so the patch version of Python does not matter.
    same_python = theirs["Python"].split(".")[:2] == ours["Python"].split(".")[:2]
    if theirs["Ray"] != ours["Ray"] or not same_python:
        told = [" and ".join(f"{name} {version}" for name, version in each.items()) for each in (theirs, ours)]
        raise UserError(f"{what}: the cluster has {told[0]}, here are {told[1]}; submit from an environment with the cluster's versions")
    return client


def versions(client: JobSubmissionClient) -> dict[str, str]:
    """Return the versions of ``Ray`` and ``Python`` on a cluster.

    Args:
        client: A client of the cluster's job server.

    Raises:
        requests.RequestException: The server does not answer properly.
        KeyError: The answer lacks a version.
    """
    response = client._do_request("GET", "/api/v0/cluster_metadata")
    response.raise_for_status()
    metadata = response.json()["data"]
    return {"Ray": metadata["rayVersion"], "Python": metadata["pythonVersion"]}


def hand_over(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job, retrying while a cluster that has just started has no node that takes jobs.

    Args:
        client: A client of the cluster's job server.
        job: The arguments of Ray's ``submit_job``.

    Returns:
        The id of the job.

    Raises:
        UserError: The cluster does not take the job, or a file cannot be read.
    """
    until = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return client.submit_job(**job)
        except (RuntimeError, ValueError, OSError) as error:  # a RequestException is an OSError
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise UserError(f"the cluster did not take the job: {one_line(error)}") from error
        time.sleep(1)


def runtime_environment(
    working_dir: Path, excludes: Iterable[str] = (), write: Callable[[str], None] = lambda _line: None
) -> dict[str, Any]:
    """Return Ray's runtime environment of a job: the folder to send and, if it has a constraints.txt, the packages to install.

    Pipes and sockets in the folder are left out, because Ray would wait for their content.

    Args:
        working_dir: The folder to send.
        excludes: Patterns, as in .gitignore, of files in it that are not sent.
        write: Called with a line about what was left out.

    Raises:
        UserError: The folder is larger than a cluster accepts, or a part of it cannot be read.
    """
    excludes = [*EXCLUDES, *excludes]
    sizes, special = sent_files(working_dir, excludes)
    check_size(working_dir, sizes)
    if special:
        write(f"not sent, because it is a pipe, a socket or a device: {shortlist(special)}")
    environment = {
        "working_dir": str(working_dir),
        "excludes": [*excludes, *("/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name) for name in special)],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **store_environment()},
    }
    constraints = working_dir / "constraints.txt"
    if constraints.is_file():
        digest = hashlib.sha256(constraints.read_bytes()).hexdigest()[:16]  # Ray reinstalls the packages if this text changes
        needed = [line for line in importlib.metadata.requires("raydetr") or [] if "extra ==" not in line]
        environment["pip"] = [*needed, f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/constraints.txt  # {digest}"]
    return environment


def sent_files(folder: Path, excludes: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return which files of a folder Ray would send.

    Args:
        folder: The folder.
        excludes: Patterns of files that are not sent, in addition to those in .gitignore and .rayignore.

    Returns:
        The sizes of the files in bytes by their relative paths, and the relative paths of pipes, sockets and devices.

    Raises:
        UserError: A folder cannot be read.
    """
    sizes: dict[str, int] = {}
    special: list[str] = []

    def visit(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            sizes[name] = path.stat().st_size
        elif path.exists() and not path.is_dir():
            special.append(name)

    # Ray's own function (read in Ray 2.60) walks the folder, so that both see the same files.
    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger("ray.submit")
    quiet.disabled = True
    try:
        _dir_travel(folder, [_get_excludes(folder, list(excludes))], visit, include_gitignore=gitignore, logger=quiet)
    except OSError as error:
        raise UserError(
            f"--working-dir: {error.filename or folder} cannot be read ({error.strerror or error}); leave it out with --exclude"
        ) from None
    return sizes, special


def check_size(folder: Path, sizes: Mapping[str, int]) -> None:
    """Check that the files of a folder are not larger than what a cluster accepts.

    Args:
        folder: The folder, for the error message.
        sizes: Sizes of its files in bytes by their relative paths.

    Raises:
        UserError: They are too large together; the message names the largest.
    """
    total = sum(sizes.values())
    if total < DASHBOARD_CLIENT_MAX_SIZE:
        return
    things: Counter[str] = Counter()
    for name, size in sizes.items():
        first, _, inside = name.partition("/")
        things[f"{first}/" if inside else first] += size
    largest = [f"{name} ({size / 1e6:.0f} MB)" for name, size in things.most_common(3)]
    raise UserError(
        f"--working-dir: {folder} has {total / 1e6:.0f} MB, and Ray sends at most {DASHBOARD_CLIENT_MAX_SIZE / 1e6:.0f} MB; "
        f"the largest in it: {', '.join(largest)}; leave out what the job does not need, such as --exclude /{things.most_common(1)[0][0]}"
    )


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the output of a job until it ends.

    Args:
        client: A client of the cluster's job server.
        job: The id of the job.

    Returns:
        The exit code of the job; 130 if it was stopped, or if Ctrl-C ended the following.

    Raises:
        UserError: The connection was lost, the job did not start, or raydetr is not installed on the cluster.
    """
    try:
        absent = asyncio.run(_tail(client, job))
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"\nraydetr: the job continues; {ways_on(client, job)}", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, requests.RequestException) as error:
        raise UserError(f"lost the connection to job {job}, which may continue ({one_line(error)}); {ways_on(client, job)}") from error
    if info.status == JobStatus.STOPPED:
        print(f"raydetr: job {job} was stopped", file=sys.stderr)
        return 130
    if absent:
        raise UserError(
            "raydetr is not installed on the cluster: use an image that has it (cluster/Dockerfile), or pip install it on each node"
        )
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        raise UserError(f"job {job} did not start: {one_line(info.message or '')}")
    return info.driver_exit_code or 0


async def _tail(client: JobSubmissionClient, job: str) -> bool:
    """Print the output of a job as it arrives, and return whether it says that raydetr is not installed."""
    absent = False
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()
        absent = absent or "No module named 'raydetr'" in text
    return absent


def ways_on(client: JobSubmissionClient, job: str) -> str:
    """Return the commands that follow and stop a job, in words.

    Args:
        client: A client of the cluster's job server.
        job: The id of the job.
    """
    at = f"--address {client.get_address()}"
    return f"follow it by `ray job logs {at} --follow {job}`, stop it by `ray job stop {at} {job}`"


def resources(text: str | None) -> dict[str, float] | None:
    """Parse custom resources in the form that Ray's commands take.

    Args:
        text: JSON such as ``{"trial_driver": 1}``, or None.

    Returns:
        Amounts by name; None for None.

    Raises:
        UserError: The text has another form.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--entrypoint-resources: {text!r} is not like '{{\"trial_driver\": 1}}'") from None
