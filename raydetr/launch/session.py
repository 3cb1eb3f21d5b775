"""The Ray session of a run or a search: Ray started on this machine, or an existing cluster, and what happens if it is lost."""

import contextlib
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from raydetr.errors import UserError
from raydetr.launch import ray_private
from raydetr.launch.nodes import TOKEN, check_listening
from raydetr.launch.signals import Received, kept_handlers
from raydetr.storage import store_environment
from raydetr.text import one_line

DRIVER = "trial_driver"  # the resource that keeps the drivers of multi-worker trials off the CPUs
WATCH_INTERVAL_S = 1.0  # between two checks that a Ray that this process started still runs
PROBE_INTERVAL_S = 2.0  # between two connections to a cluster; its raylet logs each of them
CONNECT_TIMEOUT_S = 5.0
LOSS_PATIENCE_S = 4.0  # for the processes of a Ray that this process started and for this node's raylet; nothing restarts them
STORE_SHARE = 0.3  # of the machine's memory: Ray's object store, which every process maps
PROCESS_BYTES = 8e9  # address space of a process of Ray's that has loaded torch, without the store
HEAD_PATIENCE = 0.7  # for a cluster's head, which may be restarted; a share of the time after which Ray aborts this process


@contextlib.contextmanager
def ray_session(workers: int, drivers: bool = False) -> Iterator[None]:
    """Connect to the cluster at ``RAY_ADDRESS``, or start Ray on this machine, and shut it down at the end of the context.

    A Ray that is started here listens on 127.0.0.1 only. If Ray is initialized already, nothing is started or shut down.

    Args:
        workers: Smallest number of training workers that must fit on this machine.
        drivers: Whether trials start workers of their own.

    Raises:
        UserError: Ray does not start, or the cluster cannot be reached or has another version of Ray or Python.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join_cluster(address)
    else:
        _start_own(workers, drivers)
    try:
        yield
    finally:
        ray.shutdown()


def _join_cluster(address: str) -> None:
    check_listening(f"RAY_ADDRESS {address}", address)
    try:
        _initialize(address=address, **workers_environment())
    except Exception as error:  # Ray raises many types here, Exception itself among them
        text = one_line(error, longest=600)
        if text.startswith("Version mismatch"):
            raise UserError(f"RAY_ADDRESS {address}: {text}; take the cluster's versions of Ray and Python here") from error
        raise UserError(
            f"cannot reach the Ray cluster at {address} (RAY_ADDRESS): {text or type(error).__name__}; if it wants its token, {TOKEN}"
        ) from error


def check_address_space() -> None:
    """Check that the limit on address space allows Ray's object store; otherwise Ray aborts with a C++ stack trace.

    Raises:
        UserError: The limit on a process's address space is too low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = STORE_SHARE * memory + PROCESS_BYTES
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"Ray does not start on this machine: a process may have {limit / 1e9:.1f} GB of address space (ulimit -v) and needs "
            f"{needed / 1e9:.1f} GB; lift the limit: ulimit -v unlimited"
        )


def _start_own(workers: int, drivers: bool) -> None:
    check_address_space()
    os.environ |= {**ray_private.SPARING, **os.environ}
    cpus = max(os.cpu_count() or 1, workers)
    try:
        with ray_private.on_loopback(), ray_private.in_own_process_groups():
            # The dashboard's server frees the resources of a multi-worker trial that was stopped.
            _initialize(address="local", num_cpus=cpus, include_dashboard=drivers, resources={DRIVER: 64})
    except Exception as error:  # as above
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"Ray does not start on this machine: {reason}; it needs a writable folder with a short name for its sockets "
            "(RAY_TMPDIR, /tmp by default), a gigabyte of memory, and no limit on address space (ulimit -v)"
        ) from error


def _initialize(**options: Any) -> None:
    with kept_handlers():
        # The events of a run come through its mailbox; the workers' own output stays in Ray's log files.
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)


def workers_environment() -> dict[str, Any]:
    """Return the options of ``ray.init`` that make workers on other nodes use the same object store as this process."""
    variables = store_environment()
    # A job's workers get the environment of the job, and Ray refuses variables that are given twice.
    return {"runtime_env": {"env_vars": variables}} if variables and ray_private.JOB_CONFIG not in os.environ else {}


@contextlib.contextmanager
def ending_if_ray_is_lost(received: Received, last_words: Callable[[], str]) -> Iterator[None]:
    """End this process with one line on stderr if it loses Ray: the cluster's head, or the node that the process is on.

    Ray itself would abort the process after a minute with a C++ stack trace, and its calls may not return before. The exit code is 1; if a
    signal was received before, it is 128 plus that signal's number (a signal to all processes of a service or a Slurm job also ends Ray's
    processes).

    Args:
        received: The record of the signal that was received, if any.
        last_words: Called before the process ends; returns how to resume.
    """
    address, done = ray.get_runtime_context().gcs_address, threading.Event()
    own = "RAY_ADDRESS" not in os.environ
    patience_s = HEAD_PATIENCE * float(os.environ.get(ray_private.RECONNECT_TIMEOUT, ray_private.RECONNECT_TIMEOUT_S))

    def watch() -> None:
        lost_since: float | None = None
        while not done.wait(WATCH_INTERVAL_S if own else PROBE_INTERVAL_S):
            began = time.monotonic()
            part = ray_private.lost_part(address, CONNECT_TIMEOUT_S)
            lost_since = None if part is None else lost_since or began
            if lost_since and time.monotonic() - lost_since >= (patience_s if part == "head" and not own else LOSS_PATIENCE_S):
                break
        else:
            return
        what = f"the head of the Ray cluster at {address}" if part == "head" else "Ray on this machine"
        _exit(f"{what} is lost", received, last_words)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=CONNECT_TIMEOUT_S)


def _exit(what: str, received: Received, last_words: Callable[[], str]) -> None:
    try:
        text = last_words()
    except Exception as error:  # the process must end here, whatever else fails
        text = str(error)
    print(f"raydetr: {what}; {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1 if received.number is None else 128 + received.number)
