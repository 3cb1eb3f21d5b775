"""The web application: ``POST /predict``, ``/healthz``, ``/openapi.json`` and a page to drop an image on, ``serve.html``."""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from raydetr import __version__
from raydetr.pages import page_environment
from raydetr.serving.options import RETRY_AFTER_S, Options
from raydetr.serving.uploads import Upload, read_uploads

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {"schema": {"type": "object", "properties": {"file": {"type": "array", "items": BINARY["schema"]}}, "required": ["file"]}}
ACCEPTED = {"image/*": BINARY, "application/zip": BINARY, "multipart/form-data": FORM}
ERROR = {"content": {"application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}}}
REFUSALS = {
    400: "there is no image, or a zip is broken",
    401: "the token is missing or wrong",
    408: "the upload took too long",
    413: "the upload, the image or the contents of the zip are too large",
    415: "the image cannot be read",
    422: "the threshold is not a number from 0 to 1",
    503: "too many requests wait; try again after the seconds of Retry-After",
    504: "the prediction took too long",
}


class Busy(Exception):
    """All replicas are busy and the queue is full."""


@dataclass(frozen=True)
class Backend:
    """What the application calls.

    Attributes:
        predict: Takes images and the lowest score (None: the server's), returns an answer for each, or raises :class:`Busy`.
        health: Returns what is wrong, or an empty text.
        model: The model, as :meth:`raydetr.serving.predictor.Predictor.describe` returns it.
    """

    predict: Callable[[list[Upload], float | None], Awaitable[list[Any]]]
    health: Callable[[], Awaitable[str]]
    model: dict[str, Any]


def token_digest(token: str) -> str:
    """Return what is kept of a token, so that the token itself is in no file and no log."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_app(backend: Backend, options: Options, digest: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        backend: What it calls.
        options: The limits.
        digest: The :func:`token_digest` of the token that requests for predictions must have; None: they need none.
    """
    title = f"raydetr: {options.checkpoint.rsplit('/', 2)[-2] if '/' in options.checkpoint else options.checkpoint}"
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None)  # both would load scripts from elsewhere
    bearer = HTTPBearer(auto_error=False)
    taken = 0

    def check_token(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        given = credentials.credentials if credentials else ""
        if digest is not None and not hmac.compare_digest(token_digest(given), digest):
            detail = "the token is wrong" if given else "a token is needed: send the header Authorization: Bearer TOKEN"
            raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})

    @app.post(
        "/predict",
        summary="Detect objects in an image, in several images of a form, or in a zip of images.",
        dependencies=[Depends(check_token)],
        openapi_extra={"requestBody": {"required": True, "content": ACCEPTED}},
        responses={status: {"description": meaning} | ERROR for status, meaning in REFUSALS.items()},
    )
    async def predict(
        request: Request,
        threshold: Annotated[float | None, Query(ge=0, le=1, description="Lowest score of a detection; 0 returns all.")] = None,
    ) -> JSONResponse:
        nonlocal taken
        if taken >= options.most_requests:
            raise Busy
        taken += 1
        try:
            uploads = await read_uploads(request, options)
            answers = await asyncio.wait_for(_while_connected(request, backend.predict(uploads, threshold)), options.timeout_s)
        except TimeoutError:
            raise HTTPException(504, f"the prediction took more than {options.timeout_s:g} s") from None
        finally:
            taken -= 1
        return JSONResponse(_as_coco(answers, backend.model["categories"]))

    @app.get("/healthz", summary="Tell whether predictions can be made.", responses={503: {"description": "they cannot"}})
    async def healthz() -> JSONResponse:
        wrong = await backend.health()
        return JSONResponse({"status": wrong or "ok"}, 503 if wrong else 200)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        own = f"default-src 'none'; connect-src 'self'; img-src blob: data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        headers = {"Content-Security-Policy": f"{own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        return HTMLResponse(_page(title, backend.model, options, digest is not None, nonce), headers=headers)

    @app.exception_handler(Busy)
    async def busy(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "too many requests wait; try again"}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": "; ".join(lines)}, 422)

    return app


async def _while_connected(request: Request, predicting: Awaitable[list[Any]]) -> list[Any]:
    """Return the answers, or cancel the prediction if the client leaves, who would otherwise take the place of others."""
    working, leaving = asyncio.ensure_future(predicting), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(400, "the client left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_coco(answers: list[Any], categories: list[dict]) -> dict[str, Any]:
    """Return answers as COCO images and results. An image that cannot be read is left out; if none can be, this is an error.

    Raises:
        HTTPException: None of the images can be read.
    """
    unread = [each for each in answers if each.error]
    if len(unread) == len(answers):
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise HTTPException(unread[0].status, unread[0].error + more)
    images, predictions = [], []
    for image_id, answer in enumerate(answers, 1):
        if not answer.error:
            width, height = answer.size
            images.append({"id": image_id, "file_name": answer.name, "width": width, "height": height})
            predictions += [{"image_id": image_id, **result} for result in answer.results]
    return {"images": images, "categories": categories, "predictions": predictions, "left_out": [each.error for each in unread]}


def _page(title: str, model: dict[str, Any], options: Options, asks_token: bool, nonce: str) -> str:
    lowest = sorted(set(model["thresholds"]))
    return (
        page_environment("raydetr.serving")
        .get_template("serve.html")
        .render(
            title=title, model=model, options=options, asks_token=asks_token, nonce=nonce, lowest=lowest[0] if len(lowest) == 1 else None
        )
    )
