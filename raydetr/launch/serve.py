"""``raydetr serve``: the web application and the models of :mod:`raydetr.serving` in the processes of Ray Serve.

Each replica of the model is a process that decodes images and predicts. The command itself reads uploads and answers. On a cluster, where
Ray Serve has the HTTP server, an ingress does: :func:`application` is what a configuration file of Ray Serve names, as
``cluster/kuberay/rayservice.yaml`` does.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray

from raydetr.errors import UserError
from raydetr.launch import ray_private
from raydetr.launch.session import ending_if_ray_is_lost, ray_session
from raydetr.launch.signals import ending_signals
from raydetr.tensorboard import has_browser
from raydetr.text import count, one_line

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from ray import serve
    from ray.exceptions import RayActorError, RayError
    from ray.serve.config import BackpressureConfig
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import ApplicationStatus
except ImportError:  # Ray names the package that is missing
    raise UserError("serve: needs Ray Serve and FastAPI; install them: pip install 'raydetr[serve]'") from None

from raydetr.serving.app import Backend, Busy, build_app, token_digest
from raydetr.serving.batches import Batches
from raydetr.serving.options import RETRY_AFTER_S, Options
from raydetr.serving.uploads import Upload

NAME = "raydetr"  # of the application
TOKEN = "RAYDETR_SERVE_TOKEN"  # the environment variable with the token that requests for predictions must have
DECODERS = 4  # threads of a replica that decode images
OTHER_REQUESTS = 64  # pages and health checks that are answered beside predictions
KEEP_ALIVE_S = 90  # an idle connection is closed after this time, as by Ray Serve
GRACE_S = 20  # for the requests that are being answered when the server ends, as by Ray Serve
QUIET = {"log_level": "WARNING", "enable_access_log": False}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENVIRONMENT = {"RAY_worker_niceness": "0"}  # of the Ray that `raydetr serve` starts; Ray gives its workers a low priority


@serve.deployment
class Model:
    """A replica of the model.

    Args:
        options: What the server is started with.
    """

    def __init__(self, options: Options):
        import torch  # which only the replicas need

        from raydetr.serving.predictor import Predictor

        ray_private.replica_on_loopback()
        self.predictor = Predictor(options)
        self.predictor.warm_up()
        self.batches = Batches(self.predictor.predict, options.batch_size, self.predictor.at_a_time)
        self.decoders = ThreadPoolExecutor(DECODERS, initializer=torch.set_num_threads, initargs=(1,))
        # So many decoded images are in memory, however many a zip has. The parts of one image fill a batch by themselves.
        self.room = asyncio.Semaphore(2 if options.tiles else options.ongoing)

    async def describe(self) -> dict[str, Any]:
        """Return the model's categories and thresholds."""
        return self.predictor.describe()

    async def predict(self, uploads: list[Upload], threshold: float | None) -> list[Any]:
        """Return a :class:`raydetr.serving.predictor.Answer` for each image."""
        return await asyncio.gather(*(self._answer(upload, threshold) for upload in uploads))

    async def _answer(self, upload: Upload, threshold: float | None) -> Any:
        async with self.room:
            views = await asyncio.get_running_loop().run_in_executor(self.decoders, self.predictor.views, upload)
            if not isinstance(views, list):
                return views
            predictions = await asyncio.gather(*(self.batches(view) for view in views))
            return self.predictor.answer(upload, views, predictions, threshold)


@serve.deployment
@serve.ingress()
class Ingress:
    """The process that reads uploads and answers on a cluster.

    Args:
        model: Handle of the replicas.
        options: What the server is started with.
        digest: Digest of the token; None if there is none.
    """

    async def __init__(self, model: DeploymentHandle, options: Options, digest: str | None):
        ray_private.replica_on_loopback()
        self.backend = Backend(partial(_predict, model), _health, await model.describe.remote())
        self.options, self.digest = options, digest

    def __serve_build_asgi_app__(self) -> Any:  # the name that Ray Serve calls
        return build_app(self.backend, self.options, self.digest)


async def _predict(model: DeploymentHandle, uploads: list[Upload], threshold: float | None) -> list[Any]:
    try:
        return await model.predict.remote(uploads, threshold)
    except BackPressureError:
        raise Busy from None
    except (RayActorError, DeploymentUnavailableError):
        detail = "the process that predicts was lost, another one starts; try again"
        raise HTTPException(503, detail, {"Retry-After": str(RETRY_AFTER_S)}) from None
    except UserError as error:
        raise HTTPException(500, one_line(error)) from None


async def _health() -> str:
    status = await asyncio.to_thread(serve.status)
    states = [each for each in status.applications.values() if each.status != ApplicationStatus.RUNNING]
    return ", ".join(one_line(each.message or each.status.lower()) for each in states)


def application(options: Options) -> serve.Application:
    """Return the application for Ray Serve, with an ingress.

    Requests for predictions must have the token of the environment variable ``RAYDETR_SERVE_TOKEN``, if it is set.

    Args:
        options: What it is started with; a configuration file of Ray Serve gives them as ``args``.

    Raises:
        UserError: The token is empty.
    """
    digest = digest_of_token()
    ingress = Ingress.options(
        max_ongoing_requests=options.most_requests + OTHER_REQUESTS,
        max_queued_requests=options.most_requests + OTHER_REQUESTS,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=QUIET,
    )
    return ingress.bind(_model(options), options, digest)


def _model(options: Options) -> serve.Application:
    gpus = options.gpus
    if gpus is None:
        gpus = 0 if options.device == "cpu" or (options.device == "auto" and not ray.cluster_resources().get("GPU")) else 1
    return Model.options(
        num_replicas=options.replicas,
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.most_requests,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": gpus},
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=QUIET,
    ).bind(options)


def digest_of_token() -> str | None:
    """Return the digest of the token in the environment, or None if there is none.

    Raises:
        UserError: The token is empty.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise UserError(f"{TOKEN} is empty; set a token, or unset the variable to need none")
    return None if token is None else token_digest(token.strip())


def serve_checkpoint(options: Options, host: str, port: int, tell: Callable[[str], None], replicas: int | None = None) -> None:
    """Serve predictions of a checkpoint until Ctrl-C or SIGTERM.

    Args:
        options: What the server is started with, apart from ``replicas``, ``cpus`` and ``gpus``.
        host: The address to listen on.
        port: The port to listen on; 0 takes any free one.
        tell: Called with each line for the user; one has the address of the page.
        replicas: Number of processes that predict; None: one for each GPU, or one without GPUs.

    Raises:
        UserError: The checkpoint or an option is wrong, the port is taken, or Ray does not start.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise UserError("serve: starts Ray on this machine; unset RAY_ADDRESS, and on a cluster use cluster/kuberay/rayservice.yaml")
    digest = digest_of_token()
    _check_checkpoint(options)
    os.environ |= {**ENVIRONMENT, **os.environ}
    with (
        _listening(host, port) as listening,
        contextlib.suppress(KeyboardInterrupt),
        ending_signals(_interrupt) as received,
        ray_session(replicas or 1),
        ending_if_ray_is_lost(received, lambda: "start the server again"),
        _replicas(running := _shared_out(options, replicas)) as backend,
        _answering(build_app(backend, running, digest), listening) as server,
    ):
        port = listening.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if host not in LOOPBACK and TOKEN not in os.environ:
            tell(f"warning: whoever reaches {host}:{port} can use it; set {TOKEN} to ask for a token")
        tell(f"predictions at {url} ({count(running.replicas, 'replica')} on {'GPUs' if running.gpus else 'CPUs'}; Ctrl-C ends it)")
        if has_browser():
            webbrowser.open(url)
        server.join()
        raise UserError("serve: the HTTP server ended; start the server again")


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _replicas(options: Options) -> Iterator[Backend]:
    """Start the replicas, and end them with the context."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        model = serve.run(_model(options), name=NAME, route_prefix=None)
        described = model.describe.remote().result(timeout_s=options.timeout_s)
    except (RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise UserError(f"serve: Ray Serve does not start: {one_line(error)}") from error
    try:
        yield Backend(partial(_predict, model), _health, described)
    finally:
        # The rest ends with Ray: serve.shutdown() writes an error of the controller to the terminal.
        with contextlib.suppress(TimeoutError):
            serve.delete(NAME)


@contextlib.contextmanager
def _answering(app: FastAPI, listening: socket.socket) -> Iterator[threading.Thread]:
    """Answer requests in a thread. At the end of the context those that are being answered are finished."""
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def _check_checkpoint(options: Options) -> None:
    """Load the checkpoint once here, because Ray Serve would start a replica again and again that cannot load it."""
    from raydetr.serving.predictor import Predictor

    Predictor(options.model_copy(update={"device": "cpu"}))


def _shared_out(options: Options, replicas: int | None) -> Options:
    """Return the options with an equal share of this machine for each replica."""
    found = 0 if options.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if options.device == "cuda" and not found:
        raise UserError("--device cuda: Ray sees no GPU; --device cpu predicts without")
    replicas = replicas or max(found, 1)
    gpus = 1 / math.ceil(replicas / found) if found else 0
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // replicas)
    return options.model_copy(update={"replicas": replicas, "cpus": cpus, "gpus": gpus})


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Who connects before the model is ready waits for it."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise UserError(f"serve: cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None
