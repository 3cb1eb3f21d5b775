"""Download a data set that is ready to try, and convert it at once."""

import dataclasses
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from raydetr.data.formats.convert import Summary, convert
from raydetr.data.formats.output import check_new
from raydetr.downloads import FAILURES, download, is_good, reason
from raydetr.errors import UserError
from raydetr.files import one_process
from raydetr.storage import cache_folder
from raydetr.values import short

MOST_FILES = 100_000  # in an archive


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip archive of annotated images.

    Attributes:
        url: Where it is published.
        size: Its length in bytes.
        sha256: Its hash in hexadecimal digits.
        unpacked: The most bytes that its files may have together.
        folder: The folder in it with the images and annotations.
        source: Their annotation format.
        category: The category of all objects; None where the annotations name categories.
    """

    url: str
    size: int
    sha256: str
    unpacked: int
    folder: str
    source: str
    category: str | None = None


ARCHIVES = {
    "balloon": Archive(
        url="https://github.com/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip",
        size=38741381,
        sha256="053797b8a0f3c210b80d1494af99e2e65c7830c5dccca581285e61048cb0bf1c",
        unpacked=100_000_000,
        folder="balloon",
        source="via",
        category="balloon",
    ),
}


def fetch(name: str, out: str | Path) -> Summary:
    """Download a data set into the cache, unless it is there, and convert it to a COCO folder.

    An interrupted download continues where it stopped. Size and hash are checked before anything is unpacked.

    Args:
        name: A key of ``ARCHIVES``.
        out: Folder to write; it must be empty or not exist.

    Raises:
        UserError: There is no such data set or no network, the file is not the published one, or something cannot be written.
    """
    if name not in ARCHIVES:
        raise UserError(f"data fetch: there is no data set {name!r}; known are {', '.join(ARCHIVES)}")
    archive = ARCHIVES[name]
    check_new(Path(out))
    file = _downloaded(archive)
    with tempfile.TemporaryDirectory(prefix="raydetr-") as folder:
        unpack(file, Path(folder), archive.unpacked)
        return convert(Path(folder) / archive.folder, out, archive.source, archive.category, copy=True)


def _downloaded(archive: Archive) -> Path:
    file = cache_folder() / "downloads" / archive.url.rpartition("/")[2]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with one_process(file.with_name(f"{file.name}.lock"), waiting_for=f"another process that downloads {file.name}"):
            if not is_good(file, archive.sha256):
                download(archive.url, file, archive.sha256, archive.size, resume=True)
    except FAILURES as error:
        raise UserError(f"{archive.url}: not downloaded ({reason(error)}); without a network, put the file at {file}") from None
    return file


def unpack(file: Path, folder: Path, most_bytes: int) -> None:
    """Unpack a zip archive.

    Args:
        file: The archive.
        folder: The folder to write to; no file of the archive can leave it.
        most_bytes: The most bytes that the files may have together.

    Raises:
        UserError: The archive is damaged, is larger than allowed once unpacked, or has a path that leads out of the folder, or a link.
    """
    try:
        with zipfile.ZipFile(file) as opened:
            entries = opened.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > most_bytes or len(entries) > MOST_FILES:
                allowed = f"at most {most_bytes / 1e6:.0f} MB in {MOST_FILES} files are allowed"
                raise UserError(f"{file}: not unpacked: {total / 1e6:.0f} MB in {len(entries)} files; {allowed}")
            for entry in entries:
                _check_entry(entry, file)
            for entry in entries:  # zipfile reads no more than the length that the entry states
                opened.extract(entry, folder)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: not unpacked: not a sound zip archive ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise UserError(f"{file}: not unpacked: {error.strerror or error}") from None


def _check_entry(entry: zipfile.ZipInfo, file: Path) -> None:
    name = entry.filename.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        raise UserError(f"{file}: not unpacked: {short(entry.filename)} leads out of the folder")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(f"{file}: not unpacked: {short(entry.filename)} is a link")
