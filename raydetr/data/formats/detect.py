"""Find out which annotation format a folder or file has."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from raydetr.data.formats.coco import is_coco
from raydetr.data.formats.files import IMAGE_SUFFIXES, list_files
from raydetr.data.formats.labels import read_json, read_text
from raydetr.data.formats.via import is_via
from raydetr.errors import UserError

EXAMINED = 20  # files of one suffix that are opened; the formats with a file per image are told by the first ones
HEADER_COLUMNS = {"xmin", "ymin", "xmax", "ymax"}


class Found(NamedTuple):
    """An annotation format and the file that shows it, relative to the folder."""

    source: str
    file: str


def find_formats(src: Path) -> list[Found]:
    """Return every annotation format of which there are files in and below ``src`` (or that ``src`` itself is), each once."""
    names = [src.name] if src.is_file() else list_files(src)
    folder = src.parent if src.is_file() else src
    stems = {PurePosixPath(name).stem for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES}
    found: dict[str, Found] = {}
    for suffix, kind in ((".json", _json_kind), (".csv", _csv_kind), (".xml", _xml_kind), (".yaml", _yaml_kind), (".yml", _yaml_kind)):
        for name in [name for name in names if name.lower().endswith(suffix)][:EXAMINED]:
            if source := kind(folder / name):
                found.setdefault(source, Found(source, name))
    texts = [name for name in names if name.lower().endswith(".txt") and PurePosixPath(name).stem in stems]
    for name in texts[:EXAMINED]:
        if _is_yolo(folder / name):
            found.setdefault("yolo", Found("yolo", name))
    return list(found.values())


def detect_format(src: Path) -> Found:
    """Return the one annotation format of ``src``; raise UserError where there is none, or several."""
    found = find_formats(src)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{each.source} ({each.file})" for each in found)
        raise UserError(f"{src}: annotations of several formats: {names}; choose one with --from")
    names = [src.name] if src.is_file() else list_files(src)
    suffixes = sorted({PurePosixPath(name).suffix.lower() for name in names} - {""})
    there = f"only files {', '.join(suffixes[:8])}" if suffixes else "no files"
    raise UserError(f"{src}: no known annotation format, {there}; choose one with --from")


def _content(file: Path) -> object:
    try:
        return read_json(file)
    except UserError:
        return None


def _json_kind(file: Path) -> str | None:
    content = _content(file)
    if isinstance(content, dict):
        if is_coco(content):
            return "coco"
        if "shapes" in content and ("imagePath" in content or "imageData" in content):
            return "labelme"
        if is_via(content) and (content or file.name.startswith("via")):
            return "via"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        first = content[0]
        if isinstance(first.get("annotations"), list) and ("image" in first or "imagefilename" in first):
            return "createml"
        if "data" in first and ("annotations" in first or "completions" in first or "result" in first):
            return "labelstudio"
    return None


def _csv_kind(file: Path) -> str | None:
    try:
        columns = {column.strip().strip('"').lower() for column in (read_text(file).splitlines() or [""])[0].replace(";", ",").split(",")}
    except UserError:
        return None
    if "region_shape_attributes" in columns:
        return "via"
    return "csv" if columns >= HEADER_COLUMNS else None


def _xml_kind(file: Path) -> str | None:
    try:
        return "voc" if "<annotation>" in file.read_text(encoding="utf-8", errors="replace")[:1000] else None
    except OSError:
        return None


def _yaml_kind(file: Path) -> str | None:
    try:
        keys = {line.split(":")[0].strip() for line in read_text(file).splitlines() if ":" in line}
    except UserError:
        return None
    return "yolo" if "names" in keys or {"train", "val"} <= keys else None


def _is_yolo(file: Path) -> bool:
    try:
        line = next((line for line in read_text(file).splitlines() if line.strip()), "")
        return len([float(word) for word in line.split()]) >= 5
    except (UserError, ValueError):
        return False


def conversion_hint(folder: Path) -> str:
    """Return the command that converts the annotations in ``folder``, or that such a command exists where their format is not known."""
    found = find_formats(folder) if folder.is_dir() else []
    if len(found) == 1:
        return (
            f"{found[0].file} is in the format {found[0].source}: convert with raydetr data convert {folder} DST --from {found[0].source}"
        )
    return "convert with raydetr data convert"
