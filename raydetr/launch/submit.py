"""`raydetr submit`: a training or a search as a job on a Ray cluster; what Ray's job submission needs every time is added here."""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from raydetr.errors import UserError
from raydetr.launch.nodes import TOKEN, check_listening
from raydetr.storage import store_environment

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the environment variables that name a cluster; Ray takes the first first
AGENT_WAIT_S = 60  # for a cluster that has just started and says that none of its machines takes a job yet
STOP_WAIT_S = 300  # what `ray job stop` leaves a search to end in order; Ray kills it after 3 s otherwise

# Stays here: photographs and runs belong on a disk that all machines see. Anchored, for raydetr/data/ is code.
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
    """Run ``raydetr <command>`` as a job on the cluster at ``address`` and follow it; returns its exit code, 130 where it was stopped.

    ``entrypoint`` are the resources of the command itself under Ray's names (``entrypoint_num_cpus``, ...); without any it runs on the
    head. Ctrl-C ends the following, not the job. Raises UserError where the cluster cannot be reached or does not fit.
    """
    working_dir = Path(working_dir).expanduser().absolute()
    if not working_dir.is_dir():
        raise UserError(f"--working-dir: there is no folder {working_dir}")
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # uploads and closed connections are told at INFO
    client = connect(address)
    job = hand_over(
        client,
        entrypoint=shlex.join(["python", "-m", "raydetr.cli", *command]),
        submission_id=f"{name or f'raydetr-{command[0]}'}-{time.strftime('%Y%m%d-%H%M%S')}",
        runtime_env=runtime_environment(working_dir, excludes),
        **(entrypoint or {}),
    )
    write(f"job {job} is on its way; {ways_on(client, job)}")
    return follow(client, job) if wait else 0


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises UserError where it cannot be reached, refuses the token, or has another Ray or Python; the line says both versions.
    """
    given = next(((f"{variable} {os.environ[variable]}", os.environ[variable]) for variable in ADDRESSES if os.environ.get(variable)), None)
    what, where = (
        (f"--address {address}", address) if address else given or ("http://127.0.0.1:8265 (no --address)", "http://127.0.0.1:8265")
    )
    check_listening(what, where)
    for variable in ADDRESSES:
        os.environ.pop(variable, None)  # Ray would take them before the address that it is given
    try:
        client = JobSubmissionClient(where)
        theirs = versions(client)
    except AuthenticationError as error:
        raise UserError(f"{what}: the cluster wants its token: {TOKEN}") from error
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, RayError, requests.RequestException) as error:
        raise UserError(f"{what}: no Ray cluster takes jobs there: {one_line(error)}") from error
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    same_python = theirs["Python"].split(".")[:2] == ours["Python"].split(".")[:2]  # a job does not see the patch: what goes along is text
    if theirs["Ray"] != ours["Ray"] or not same_python:
        told = [" and ".join(f"{name} {version}" for name, version in each.items()) for each in (theirs, ours)]
        raise UserError(f"{what}: the cluster has {told[0]}, here are {told[1]}; submit from an environment with the cluster's versions")
    return client


def versions(client: JobSubmissionClient) -> dict[str, str]:
    """The versions of Ray and Python on the cluster."""
    response = client._do_request("GET", "/api/v0/cluster_metadata")
    response.raise_for_status()
    metadata = response.json()["data"]
    return {"Ray": metadata["rayVersion"], "Python": metadata["pythonVersion"]}


def hand_over(client: JobSubmissionClient, **job: Any) -> str:
    """Give a job to the cluster, which may need a moment to take one after its own start; returns the job's id. Raises UserError."""
    until = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return client.submit_job(**job)
        except (RuntimeError, ValueError, requests.RequestException) as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise UserError(f"the cluster did not take the job: {one_line(error)}") from error
        time.sleep(1)


def runtime_environment(working_dir: Path, excludes: Iterable[str] = ()) -> dict[str, Any]:
    """Ray's runtime environment of a job: the folder without data and runs and, where it has a constraints.txt, the versions in it."""
    environment = {
        "working_dir": str(working_dir),
        "excludes": [*EXCLUDES, *excludes],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **store_environment()},
    }
    constraints = working_dir / "constraints.txt"
    if constraints.is_file():
        digest = hashlib.sha256(constraints.read_bytes()).hexdigest()[:16]  # Ray installs anew when the text of this list changes
        needed = [line for line in importlib.metadata.requires("raydetr") or [] if "extra ==" not in line]
        environment["pip"] = [*needed, f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/constraints.txt  # {digest}"]
    return environment


def follow(client: JobSubmissionClient, job: str) -> int:
    """Show a job's output until it ends; returns its exit code."""
    try:
        absent = asyncio.run(_tail(client, job))
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"\nraydetr: the job goes on; {ways_on(client, job)}", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, requests.RequestException) as error:
        raise UserError(f"lost sight of job {job}, which may go on ({one_line(error)}); {ways_on(client, job)}") from error
    if info.status == JobStatus.STOPPED:
        print(f"raydetr: job {job} was stopped", file=sys.stderr)
        return 130
    if absent:
        raise UserError("no raydetr on the cluster's machines: take an image that has it (cluster/Dockerfile), or pip install it on each")
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        raise UserError(f"job {job} did not start: {one_line(info.message or '')}")
    return info.driver_exit_code or 0


async def _tail(client: JobSubmissionClient, job: str) -> bool:
    """Write a job's output to the terminal as it comes; returns whether it said that there is no raydetr."""
    absent = False
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()
        absent = absent or "No module named 'raydetr'" in text
    return absent


def ways_on(client: JobSubmissionClient, job: str) -> str:
    """How to follow and to stop a job, in words."""
    at = f"--address {client.get_address()}"
    return f"follow it by `ray job logs {at} --follow {job}`, stop it by `ray job stop {at} {job}`"


def resources(text: str | None) -> dict[str, float] | None:
    """Custom resources as Ray's commands take them, ``{"trial_driver": 1}``; raises UserError where they are no such thing."""
    if text is None:
        return None
    try:
        found = json.loads(text)
        return {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--entrypoint-resources: {text!r} is not like '{{\"trial_driver\": 1}}'") from None


def one_line(error: Exception | str, longest: int = 300) -> str:
    """An error's text in one line that is not too long to read; the end of it, where Ray says what was wrong."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"... {text[-longest:]}"
