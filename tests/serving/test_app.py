"""Uploads, limits and pages of the application, with the model in this process; Ray Serve is in tests/launch/test_serve.py."""

import asyncio
import io
import re
import struct
import zipfile
import zlib

import httpx2
import pytest
from fastapi import HTTPException, Request
from starlette.testclient import TestClient

from raydetr.serving.app import Backend, build_app, token_digest
from raydetr.serving.options import MOST_ENTRIES, UNPACKED, Options
from raydetr.serving.predictor import Predictor
from raydetr.serving.uploads import read_uploads

OPTIONS = Options(checkpoint="runs/first/best.pth", max_megabytes=1, max_megapixels=2, max_images=3)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(OPTIONS.model_copy(update={"checkpoint": str(checkpoint)}))


@pytest.fixture(scope="module")
def backend(predictor):
    async def predict(uploads, threshold):
        return [answer(upload, threshold) for upload in uploads]

    def answer(upload, threshold):
        views = predictor.views(upload)
        return predictor.answer(upload, views, predictor.predict(views), threshold) if isinstance(views, list) else views

    async def healthy():
        return ""

    return Backend(predict, healthy, predictor.describe())


@pytest.fixture(scope="module")
def client(backend):
    return TestClient(build_app(backend, OPTIONS))


def gigantic_png():
    """A PNG whose header says 50 000 x 50 000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def with_sizes(archive, size):
    """A zip whose entries say that they unpack to ``size`` bytes each."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        true = [each.file_size for each in opened.infolist()]
    changed = bytearray(archive)
    for found, old in zip(re.finditer(b"PK\x01\x02", archive), true, strict=True):
        assert changed[found.start() + 24 : found.start() + 28] == struct.pack("<I", old)
        changed[found.start() + 24 : found.start() + 28] = struct.pack("<I", size)
    return bytes(changed)


def test_an_image_alone_in_a_form_and_in_a_zip_have_the_same_predictions(client, picture, zipped, predictor):
    images = [picture(0), picture(1, (64, 96), "JPEG")]
    alone = [client.post("/predict?threshold=0", content=each).json() for each in images]
    assert [each["images"] for each in alone] == [
        [{"id": 1, "file_name": "image", "width": 96, "height": 64}],
        [{"id": 1, "file_name": "image", "width": 64, "height": 96}],
    ]
    assert alone[0]["categories"] == predictor.describe()["categories"]
    assert len(alone[0]["predictions"]) == 25
    assert set(alone[0]["predictions"][0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    in_form = client.post("/predict?threshold=0", files=[("file", ("a.png", images[0])), ("file", ("b.jpg", images[1]))]).json()
    files = {"a.png": images[0], "__MACOSX/._a.png": b"x", ".hidden": b"x", "sub/b.jpg": images[1]}
    in_zip = client.post("/predict?threshold=0", content=zipped(files)).json()
    assert [each["file_name"] for each in in_form["images"]] == ["a.png", "b.jpg"]
    assert [each["file_name"] for each in in_zip["images"]] == ["a.png", "sub/b.jpg"]
    assert in_form["predictions"] == in_zip["predictions"]
    assert [each for each in in_zip["predictions"] if each["image_id"] == 1] == alone[0]["predictions"]
    assert [each | {"image_id": 1} for each in in_zip["predictions"] if each["image_id"] == 2] == alone[1]["predictions"]
    nested = client.post("/predict?threshold=0", files=[("file", ("both.zip", zipped(files)))]).json()
    assert nested["predictions"] == in_zip["predictions"]


def test_without_a_threshold_the_checkpoints_own_hold(client, picture):
    every = client.post("/predict?threshold=0", content=picture()).json()["predictions"]
    lowest = {3: 0.35, 7: 0.5}
    kept = [each for each in every if each["score"] >= lowest[each["category_id"]]]
    assert client.post("/predict", content=picture()).json()["predictions"] == kept
    assert 0 < len(kept) < len(every)


def test_a_broken_image_among_others_is_left_out(client, picture, zipped):
    answer = client.post("/predict", content=zipped({"bad.png": picture()[:100], "good.png": picture()}))
    assert answer.status_code == 200
    assert [each["file_name"] for each in answer.json()["images"]] == ["good.png"]
    (line,) = answer.json()["left_out"]
    assert line.startswith("bad.png: broken or truncated image")


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("status", "says", "content"),
    [
        (400, "there is no image", lambda _picture, _zipped: b""),
        (415, "image: not an image file", lambda _picture, _zipped: b"text"),
        (415, "it is a web page", lambda _picture, _zipped: b"<!doctype html>"),
        (415, "image: broken or truncated image", lambda picture, _zipped: picture()[:200]),
        (413, "larger than the 1 MB", lambda _picture, _zipped: bytes(MEGABYTE + 1)),
        (413, "larger than the 1 MB", lambda _picture, _zipped: iter([bytes(MEGABYTE), b"1"])),  # without a length in its header
        (413, "more than the 2 megapixels", lambda _picture, _zipped: gigantic_png()),
        (
            413,
            "image: the zip unpacks to 12,885 MB",
            lambda _picture, zipped: with_sizes(zipped({f"{n}": b"1" for n in range(3)}), 0xFFFFFFFE),
        ),
        (400, "broken zip", lambda _picture, zipped: with_sizes(zipped({"a": bytes(50 * MEGABYTE)}), 100)),
        (413, "4 files in the zip, more than the 3", lambda picture, zipped: zipped({f"{n}.png": picture() for n in range(4)})),
        (413, "too many files", lambda _picture, zipped: zipped({f"d{n}/": b"" for n in range(3 * MOST_ENTRIES + 1)})),
        (400, "the zip has no images", lambda _picture, zipped: zipped({"folder/": b""})),
        (400, "broken zip", lambda _picture, _zipped: b"PK\x03\x04 and nothing else"),
        (400, "broken zip", lambda picture, zipped: zipped({"a.png": picture()})[:-30]),
        (415, "packed by an unusual method", lambda picture, zipped: zipped({"a.png": picture()}, zipfile.ZIP_LZMA)),
    ],
)
def test_bad_uploads_are_answered_in_one_line(client, picture, zipped, status, says, content):
    answer = client.post("/predict", content=content(picture, zipped))
    assert answer.status_code == status, answer.text
    assert says in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert "/tmp" not in answer.text


def test_a_small_zip_of_much_is_not_unpacked(client, zipped):
    archive = zipped({str(number): bytes(UNPACKED * MEGABYTE // 2 + 1) for number in range(2)})
    assert len(archive) < 20_000
    answer = client.post("/predict", content=archive)
    assert (answer.status_code, answer.json()["detail"]) == (413, "image: the zip unpacks to 4 MB, this server takes 4 MB")


@pytest.mark.parametrize(
    ("status", "says", "files"),
    [
        (400, "there is no image", {"data": {"file": "text"}}),
        (400, "Too many files", {"files": [("file", (f"{n}.png", b"1")) for n in range(4)]}),
        (413, "larger than the 1 MB", {"files": [("file", ("a.png", bytes(MEGABYTE)))]}),
        (415, "a.png: not an image file", {"files": [("file", ("a.png", b"1"))]}),
    ],
)
def test_bad_forms_are_answered_in_one_line(client, status, says, files):
    boundary = {"Content-Type": "multipart/form-data; boundary=x"} if "data" in files else {}
    body = {"content": b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n'} if boundary else files
    answer = client.post("/predict", headers=boundary, **body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["detail"]


@pytest.mark.parametrize("threshold", ["2", "-0.1", "nan", "high"])
def test_a_threshold_is_from_0_to_1(client, picture, threshold):
    answer = client.post(f"/predict?threshold={threshold}", content=picture())
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("threshold: ")


def test_a_token_is_asked_for_predictions_alone(backend, picture):
    client = TestClient(build_app(backend, OPTIONS, token_digest("secret")))

    def status(**headers):
        return client.post("/predict", content=picture(), headers=headers).status_code

    assert status(Authorization="Bearer secret") == 200
    assert [status(), status(Authorization="Bearer wrong"), status(Authorization="Basic secret")] == [401, 401, 401]
    refused = client.post("/predict", content=picture())
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer TOKEN" in refused.json()["detail"]
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    assert 'id="token"' in client.get("/").text
    assert "secret" not in client.get("/").text + client.get("/openapi.json").text


def test_more_requests_than_the_queue_holds_are_told_when_to_come_back(backend, picture):
    options = OPTIONS.model_copy(update={"batch_size": 1, "queue": 1})
    waiting, go = [], asyncio.Event()

    async def predict(uploads, threshold):
        waiting.append(uploads)
        await go.wait()
        return await backend.predict(uploads, threshold)

    async def run():
        app = build_app(Backend(predict, backend.health, backend.model), options)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            taken = [asyncio.create_task(client.post("/predict", content=picture())) for _ in range(options.most_requests)]
            while len(waiting) < options.most_requests:
                await asyncio.sleep(0.001)
            refused = await client.post("/predict", content=picture())
            healthy = await client.get("/healthz")
            go.set()
            later = await asyncio.gather(*taken)
            return refused, healthy, [*later, await client.post("/predict", content=picture())]

    refused, healthy, later = asyncio.run(run())
    assert options.most_requests == 3 * 1 + 1
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert healthy.status_code == 200
    assert [each.status_code for each in later] == [200] * 5


def test_a_prediction_and_an_upload_end_in_time(backend, picture):
    options = OPTIONS.model_copy(update={"timeout_s": 0.05})

    async def never(*_):
        await asyncio.Event().wait()

    slow = TestClient(build_app(Backend(never, backend.health, backend.model), options))
    answer = slow.post("/predict", content=picture())
    assert (answer.status_code, answer.json()["detail"]) == (504, "the prediction took more than 0.05 s")
    request = Request({"type": "http", "method": "POST", "headers": []}, never)
    with pytest.raises(HTTPException, match="the upload took more than") as raised:
        asyncio.run(read_uploads(request, options))
    assert raised.value.status_code == 408


def test_a_client_that_leaves_gives_its_place_to_others(backend, picture):
    options = OPTIONS.model_copy(update={"batch_size": 1, "queue": 0})
    begun, ended = asyncio.Event(), asyncio.Event()

    async def never(*_):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    body = [{"type": "http.request", "body": picture()}]

    async def receive():
        if body:
            return body.pop()
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(_message):
        pass

    async def run():
        app = build_app(Backend(never, backend.health, backend.model), options)
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
        async with asyncio.timeout(10):
            await app(scope, receive, send)
            await ended.wait()

    asyncio.run(run())


def test_the_page_needs_nothing_else_and_escapes_names(client):
    answer = client.get("/")
    assert answer.status_code == 200
    page, policy = answer.text, answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    (nonce,) = set(re.findall(r"nonce-([\w-]+)'", policy))
    assert page.count(f'nonce="{nonce}"') == 2
    assert nonce not in client.get("/").text
    assert "&lt;/script&gt;&lt;b&gt;oblong" in page
    assert re.findall(r"(?:src|href)=(\S+)>", page) == ['"data:,"']
    assert "http://" not in page
    assert "https://" not in page
    assert "raydetr: first" in page


def test_openapi_describes_predictions_and_no_page_loads_scripts_from_elsewhere(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/healthz"}
    post = described["paths"]["/predict"]["post"]
    assert set(post["requestBody"]["content"]) == {"image/*", "application/zip", "multipart/form-data"}
    assert {"400", "401", "408", "413", "415", "422", "503", "504"} <= set(post["responses"])
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_health_says_what_is_wrong(backend):
    async def ill():
        return "model: no replica"

    answer = TestClient(build_app(Backend(backend.predict, ill, backend.model), OPTIONS)).get("/healthz")
    assert (answer.status_code, answer.json()) == (503, {"status": "model: no replica"})
