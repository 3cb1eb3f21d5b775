"""Download files of weights: once per node, verified, and never in part."""

import hashlib
import re
import urllib.parse
from pathlib import Path

import torch

from raydetr.downloads import FAILURES, is_good, reason
from raydetr.downloads import download as fetch
from raydetr.errors import UserError
from raydetr.files import one_process

HASHED_NAME = re.compile(r"[\w.-]+-([0-9a-f]{8,64})\.\w+")  # torch.hub's convention: a file name ends with the start of its sha256


def download(url: str) -> Path:
    """Download a file into torch.hub's folder (``TORCH_HOME``) unless it is there already.

    If the file name states the beginning of the file's sha256, as in ``detr-r50-e632da11.pth``, it is checked, also for a file that is
    there already. If several processes call this, one of them downloads and the others wait.

    Args:
        url: An http or https URL.

    Returns:
        The path of the file.

    Raises:
        UserError: There is no network, the answer is not a file, its sha256 is wrong, or the disk is full. No partial file is left.
    """
    shown = url.split("?")[0]  # the query may hold a secret
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        file, digest = folder / _file_name(url), _promised_digest(url)
    except ValueError as error:
        raise UserError(f"{shown}: not a URL ({error})") from None
    try:
        if not is_good(file, digest):
            folder.mkdir(parents=True, exist_ok=True)
            with one_process(Path(f"{file}.lock"), waiting_for=f"another process that downloads {file.name}"):
                if not is_good(file, digest):
                    fetch(url, file, digest)
    except FAILURES as error:
        raise UserError(f"{shown}: not downloaded ({reason(error)}); without a network, put the file at {file}") from None
    return file


def _url_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def _promised_digest(url: str) -> str | None:
    promise = HASHED_NAME.fullmatch(_url_name(url))
    return promise[1] if promise else None


def _file_name(url: str) -> str:
    name = _url_name(url)
    if _promised_digest(url):
        return name
    # Two servers may both have a best.pth, so the URL's hash tells them apart.
    url_hash = hashlib.sha256(url.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', Path(name).stem)[:80]}.{url_hash}.pth"
