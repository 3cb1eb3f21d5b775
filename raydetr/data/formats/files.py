"""Find the image that an annotation file means, which often names it as another computer knew it."""

import difflib
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from raydetr.data.images import IMAGE_SUFFIXES, image_path
from raydetr.errors import UserError
from raydetr.values import plain, short

_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")  # Label Studio puts it in front of the name of an uploaded file


def list_files(folder: Path) -> list[str]:
    """Return all files in and below ``folder``, relative with forward slashes, sorted.

    Links are followed, each folder is visited once. Hidden files and folders and macOS's archive leftovers are passed over.
    """
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        relative = Path(parent).relative_to(folder)
        found += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


class ImageFinder:
    """The image files in and below a folder, found by the names that annotation files give them.

    Attributes:
        folder: The folder.
        names: Its image files, relative with forward slashes, sorted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [name for name in list_files(folder) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        self._exact = set(self.names)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            *_, last = _parts(name)
            self._by_name[last].append(name)
            self._by_stem[_stem(last)].append(name)

    def candidates(self, name: object) -> list[str]:
        """Return the files that ``name`` may mean: one where it is clear, none where it is missing, several where it is ambiguous.

        The exact relative path wins. Otherwise the file name decides, whatever the case of its letters and its folder on another
        computer; among several files of that name the one that shares the most parent folders. A name may be a URL, an absolute path, have
        back slashes or percent signs. Last, the name without its suffix decides. Only files below the folder are ever returned.
        """
        if not isinstance(name, str) or not name.strip():
            return []
        as_path = PurePosixPath(name).as_posix()
        if as_path in self._exact:
            return [as_path]
        variants = [parts for parts in map(_parts, _readings(name)) if parts]
        for index, key in ((self._by_name, str), (self._by_stem, _stem)):
            for parts in variants:
                if found := _closest(index.get(key(parts[-1]), []), parts):
                    return found
        stripped = [(*parts[:-1], parts[-1][9:]) for parts in variants if _UPLOAD_PREFIX.match(parts[-1])]
        return next((found for parts in stripped if (found := self._by_name.get(parts[-1]))), [])

    def find(self, name: object, source: str | Path) -> str:
        """Return the one file that ``name`` means, as :meth:`candidates` does.

        Args:
            name: The name in the annotation file.
            source: The annotation file, for error messages.

        Raises:
            UserError: No file or several files fit; the message names the nearest.
        """
        found = self.candidates(name)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{source}: image {short(name)} is ambiguous in {self.folder}: {', '.join(map(plain, found[:3]))}; keep one")
        self.check_name(name, source)
        near = difflib.get_close_matches(PurePosixPath(str(name)).name, [PurePosixPath(each).name for each in self.names[:20_000]], 1)
        hint = f"; the nearest name is {plain(near[0])}" if near else ""
        raise UserError(f"{source}: No such file: image {short(name)} is not in {self.folder}{hint}")

    def check_name(self, name: object, source: str | Path) -> None:
        """Raise UserError, starting with ``source``, where ``name`` is no file name or leads out of the folder."""
        try:
            image_path(self.folder, name)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def is_exact(self, name: str) -> bool:
        """Return whether ``name`` is the relative path of a file."""
        return PurePosixPath(name).as_posix() in self._exact


def _readings(name: str) -> list[str]:
    """The name as it is and, where they differ, as a URL and without percent signs."""
    readings = [name]
    if "://" in name or name.startswith("/data/"):  # "/data/..." is how Label Studio serves files
        url = urlsplit(name)
        readings = [parse_qs(url.query).get("d", [url.path])[0], name]
    return list(dict.fromkeys(each for reading in readings for each in (reading, unquote(reading))))


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file name, comparable: Unicode composed, letters folded, without drive and dots."""
    parts = unicodedata.normalize("NFC", name).casefold().replace("\\", "/").split("/")
    parts = [part.strip() for part in parts]
    return tuple(part for part in parts if part not in ("", ".", "..") and not part.endswith(":"))


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix in IMAGE_SUFFIXES else name


def _closest(names: list[str], parts: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that share the most trailing folders with ``parts``."""
    if len(names) < 2:
        return names

    def shared(name: str) -> int:
        ours = _parts(name)[-2::-1]
        theirs = parts[-2::-1]
        return next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))

    best = max(map(shared, names))
    return [name for name in names if shared(name) == best]
