"""Find the image files that an annotation file names, also where a tool or a file system spells them in another way.

Names in annotation files carry back slashes (Windows), a folder that is the image folder itself, percent-encoding, white space at the
end, other upper and lower case, or another Unicode composition than the files on disk (macOS). A file is only ever chosen from a listing
of the image folder, and only where it is the one possible file of the one image.
"""

import contextlib
import difflib
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from raydetr.data.images import image_path
from raydetr.values import plain

HINTS = 3  # missing names for which a hint is looked for


class Located(NamedTuple):
    """Where the named files are: see :func:`locate_files`."""

    found: dict[str, str]  # by name as written: the path relative to the folder; the same text where the file is there as written
    missing: dict[str, str]  # by name as written: a hint such as "the nearest name there is 'a.jpg'", or ""

    @property
    def respelled(self) -> dict[str, str]:
        """Those of ``found`` whose file has another name than written."""
        return {name: file for name, file in self.found.items() if name != file}


def locate_files(folder: Path, names: Iterable[str]) -> Located:
    """Find the files of ``folder`` that the names of an annotation file mean.

    A file that is there as written is taken. For the other names the files below the folder are compared without regard to the
    spelling (see the module), and one is taken if it is the only one that fits, and no other name means it.

    Args:
        folder: The image folder.
        names: File names that :func:`raydetr.data.images.image_path` accepts.
    """
    names = list(dict.fromkeys(names))
    there = _existing(folder, names)
    missing = [name for name in names if name not in there]
    found = {name: name for name in names if name in there}
    if not missing:
        return Located(found, {})
    files = _files_below(folder)
    fitting = _fitting(missing, files)
    claims = Counter(file for fits in fitting.values() for file in fits)
    taken = {PurePosixPath(name).as_posix() for name in there}
    found |= {name: fits[0] for name, fits in fitting.items() if len(fits) == 1 and claims[fits[0]] == 1 and fits[0] not in taken}
    lost = [name for name in missing if name not in found]
    hints = {name: _hint(name, fitting[name], files) for name in lost[:HINTS]}
    return Located(found, {name: hints.get(name, "") for name in lost})


def _existing(folder: Path, names: list[str]) -> set[str]:
    listings: dict[Path, set[str]] = {}  # one listing of a folder is quicker than a question for each of 100 000 files
    there = set()
    for name in names:
        file = image_path(folder, name)
        if file.parent not in listings:
            with os.scandir(file.parent) if file.parent.is_dir() else contextlib.nullcontext(()) as entries:
                listings[file.parent] = {entry.name for entry in entries if entry.is_file()}
        if file.name in listings[file.parent] or os.path.isfile(file):  # the second where upper and lower case are one
            there.add(name)
    return there


def _files_below(folder: Path) -> list[str]:
    return sorted(
        Path(parent, file).relative_to(folder).as_posix()
        for parent, _, files in os.walk(folder)
        for file in files
        if not file.startswith(".")
    )


def _fitting(names: list[str], files: list[str]) -> dict[str, list[str]]:
    """For each name the files that fit it best: the end of one path is the whole other path, spelling aside."""
    by_base: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for file in files:
        parts = _folded_parts(file)
        by_base.setdefault(parts[-1], []).append((parts, file))
    fitting = {}
    for name in names:
        parts = _folded_parts(name)
        fits = [
            (min(len(parts), len(other)), file)
            for other, file in by_base.get(parts[-1], [])
            if parts[-len(other) :] == other or other[-len(parts) :] == parts
        ]
        most = max((shared for shared, _ in fits), default=0)
        fitting[name] = [file for shared, file in fits if shared == most]
    return fitting


def _folded_parts(name: str) -> tuple[str, ...]:
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    path = unicodedata.normalize("NFC", urllib.parse.unquote(path)).casefold()
    parts = tuple(part.strip() for part in path.replace("\\", "/").split("/"))
    return tuple(part for part in parts if part not in ("", ".")) or ("",)


def _hint(name: str, fits: list[str], files: list[str]) -> str:
    if len(fits) > 1:
        return f"both {plain(fits[0])} and {plain(fits[1])} could be meant"
    bases = {_folded_parts(file)[-1]: file for file in reversed(files)}
    near = fits or [bases[base] for base in difflib.get_close_matches(_folded_parts(name)[-1], bases, n=1, cutoff=0.75)]
    return f"the nearest name there is {plain(near[0])}" if near else ""
