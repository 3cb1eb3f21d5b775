"""What users send: an image, several images of a form, or a zip of images, read within limits of size, number and time."""

import asyncio
import io
import struct
import zipfile
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from raydetr.serving.options import MOST_ENTRIES, UNPACKED, Options
from raydetr.text import count, one_line

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # of a zip with files, and of an empty one
ENTRY = b"PK\x01\x02"  # before each entry in the list of a zip's files
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the other methods may ask for gigabytes of memory
ENCRYPTED = 1  # the bit of an entry's flags
# What zipfile raises for broken files.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, LookupError, RuntimeError, NotImplementedError)


class Upload(NamedTuple):
    """An encoded image with the name of its file."""

    name: str
    content: bytes


async def read_uploads(request: Request, options: Options) -> list[Upload]:
    """Return the images of a request, whose body is an image, a zip of images, or a form (``multipart/form-data``) of either.

    Args:
        request: The request, whose body nobody has read.
        options: The limits.

    Raises:
        HTTPException: Nothing is sent, a limit is exceeded (408, 413), or a zip cannot be read (400, 415).
    """
    try:
        async with asyncio.timeout(options.timeout_s):
            files = await _read_files(request, options)
    except TimeoutError:
        raise HTTPException(408, f"the upload took more than {options.timeout_s:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the upload ended early") from None
    uploads = await asyncio.to_thread(_unpacked, files, options)
    if len(uploads) > options.max_images:
        raise HTTPException(413, f"{count(len(uploads), 'image')}, more than the {options.max_images} that one request may have")
    return uploads


async def _read_files(request: Request, options: Options) -> list[Upload]:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > options.max_bytes:
        raise _too_large(options)
    limited = Request(request.scope, _limited(request.receive, options))
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        async with limited.form(max_files=options.max_images) as form:
            files = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
            found = [Upload(each.filename or "image", await each.read()) for each in files]
    else:
        found = [Upload("image", await limited.body())]
    if not any(each.content for each in found):
        raise HTTPException(400, "there is no image: send one as the body, or in a form as a file")
    return found


def _limited(receive: Callable[[], Awaitable[Any]], options: Options) -> Callable[[], Awaitable[Any]]:
    """Return ``receive`` that stops at the largest upload, because a body need not have the length that its header says."""
    received = 0

    async def limited() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > options.max_bytes:
            raise _too_large(options)
        return message

    return limited


def _too_large(options: Options) -> HTTPException:
    return HTTPException(413, f"the upload is larger than the {options.max_megabytes} MB that this server takes")


def _unpacked(files: list[Upload], options: Options) -> list[Upload]:
    uploads = []
    for each in files:
        uploads += _unzip(each, options) if each.content.startswith(ZIP_STARTS) else [each]
    return uploads


def _unzip(upload: Upload, options: Options) -> list[Upload]:
    if upload.content.count(ENTRY) > MOST_ENTRIES * options.max_images:  # known before Python makes an object of each
        raise HTTPException(413, f"{upload.name}: the zip has too many files; one request may have {count(options.max_images, 'image')}")
    try:
        with zipfile.ZipFile(io.BytesIO(upload.content)) as archive:
            return _read_entries(archive, upload.name, options)
    except _BROKEN as error:
        raise HTTPException(400, f"{upload.name}: broken zip ({one_line(error, 100) or type(error).__name__})") from None


def _read_entries(archive: zipfile.ZipFile, name: str, options: Options) -> list[Upload]:
    entries = [each for each in archive.infolist() if not each.is_dir() and not _is_hidden(each.filename)]
    if not entries:
        raise HTTPException(400, f"{name}: the zip has no images")
    if len(entries) > options.max_images:
        raise HTTPException(413, f"{name}: {count(len(entries), 'file')} in the zip, more than the {options.max_images} of one request")
    left, said = UNPACKED * options.max_bytes, sum(each.file_size for each in entries)
    if said > left:
        raise _unpacks_to(name, f"{said / 1e6:,.0f} MB", options)
    uploads = []
    for each in entries:
        if each.compress_type not in PACKED or each.flag_bits & ENCRYPTED:
            raise HTTPException(415, f"{name}: {each.filename} is encrypted or packed by an unusual method; use deflate")
        with archive.open(each) as file:
            content = file.read(left + 1)  # what a zip says of its sizes need not be true
        left -= len(content)
        if left < 0:
            raise _unpacks_to(name, "more", options)
        uploads.append(Upload(each.filename, content))
    return uploads


def _unpacks_to(name: str, size: str, options: Options) -> HTTPException:
    most = UNPACKED * options.max_megabytes
    return HTTPException(413, f"{name}: the zip unpacks to {size}, this server takes {most} MB")


def _is_hidden(path: str) -> bool:
    parts = path.split("/")
    return parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts)
