"""Find out which annotation format a folder or file has."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from raydetr.data.formats.coco import is_coco
from raydetr.data.formats.createml import is_createml
from raydetr.data.formats.csv_table import check_header, is_csv_table, lacks_header
from raydetr.data.formats.files import list_files
from raydetr.data.formats.labelme import is_labelme
from raydetr.data.formats.labels import Options, read_json, read_text
from raydetr.data.formats.labelstudio import is_labelstudio
from raydetr.data.formats.via import is_via
from raydetr.data.images import IMAGE_SUFFIXES
from raydetr.errors import UserError

EXAMINED = 20  # files of one suffix that are opened; the formats with a file per image are told by the first ones


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
    for name in [name for name in names if name.lower().endswith(".json")][:EXAMINED]:
        read_json(src if src.is_file() else src / name)  # a broken file has an error of its own
    for file in [src if src.is_file() else src / name for name in names if name.lower().endswith(".csv")][:EXAMINED]:
        if lacks_header(file):
            check_header(file, Options())
    raise UserError(f"{src}: no known annotation format, {there}; choose one with --from")


def _json_kind(file: Path) -> str | None:
    try:
        content = read_json(file)
    except UserError:
        return None
    kinds = {"coco": is_coco, "labelme": is_labelme, "createml": is_createml, "labelstudio": is_labelstudio}
    if source := next((source for source, is_kind in kinds.items() if is_kind(content)), None):
        return source
    return "via" if is_via(content) and (content or file.name.startswith("via")) else None


def _csv_kind(file: Path) -> str | None:
    if is_csv_table(file):
        return "csv"
    try:
        return "via" if "region_shape_attributes" in read_text(file).partition("\n")[0] else None
    except UserError:
        return None


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


def conversion_hint(folder: Path) -> str | None:
    """Return the command that converts the annotations in ``folder``; None where they have no or several known formats."""
    found = find_formats(folder) if folder.is_dir() else []
    if len(found) != 1:
        return None
    return f"{found[0].file} is in the format {found[0].source}: raydetr data convert {folder} NEW_FOLDER --from {found[0].source}"
