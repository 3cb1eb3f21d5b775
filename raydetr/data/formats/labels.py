"""What every reader of a labelled set (VIA, VOC, YOLO) hands over, and what all of them need to make it."""

import dataclasses
from pathlib import Path, PurePosixPath

from raydetr.data.formats import shapes
from raydetr.data.images import Header, image_path, read_header
from raydetr.data.values import plain
from raydetr.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VAL_FOLDERS = ("val", "valid", "validation")  # names that the folder of validation pictures goes by


@dataclasses.dataclass
class Object:
    """One labelled object: box xywh and area in pixels; segmentation as COCO's list of flat polygons, empty where only a box is known."""

    category: str
    box: list[float]
    area: float
    segmentation: list[list[float]]


@dataclasses.dataclass
class Picture:
    """A picture on disk, its name in the converted set (relative, with /) and what is labelled on it."""

    path: Path
    name: str
    width: int
    height: int
    objects: list[Object] = dataclasses.field(default_factory=list)


class Notes(dict[str, list[str]]):
    """Counted warnings: what happened, and each place where it did."""

    def add(self, text: str, place: str) -> None:
        """Count one more ``place`` under ``text``."""
        self.setdefault(text, []).append(place)

    def lines(self) -> list[str]:
        """One line a warning, e.g. ``2 x shape without area, left out: a.jpg region 1, b.jpg region 4``."""
        return [
            f"{len(places)} × {text}: {', '.join(map(plain, places[:3]))}{', ...' if len(places) > 3 else ''}"
            for text, places in self.items()
        ]


def open_picture(folder: Path, name: str, source: Path, notes: Notes, extent: tuple[float, float] = (0, 0)) -> Picture:
    """The picture ``name`` in ``folder``, with its size as the file says it.

    ``extent``: the farthest that its labels reach to the right and down. A picture that its EXIF tag lays on its side has the size of
    the upright picture, as today's browsers and tools show it, unless only the stored one holds the labels.
    Raises UserError naming ``source`` (what speaks of the picture) where the name leaves the folder or there is no picture there.
    """
    try:
        path = image_path(folder, name)
        header = read_header(path)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    width, height = header.upright
    is_held, is_held_stored = (extent[0] <= w and extent[1] <= h for w, h in ((width, height), header[:2]))
    if is_held_stored and not is_held:
        width, height = header[:2]
    if header.orientation != 1:
        notes.add(f"picture turned by its EXIF tag, labels taken as drawn on it {_seen(header, (width, height))}", name)
    return Picture(path, PurePosixPath(name).as_posix(), width, height)


def _seen(header: Header, size: tuple[int, int]) -> str:
    return "as stored" if size == header[:2] else "as shown upright"


def add_object(picture: Picture, category: str, shape: shapes.Shape, place: str, notes: Notes, outline: bool = True) -> None:
    """Label ``shape`` on the picture, cut at its edges; one without area is left out. Both are noted under ``place``."""
    seen = shapes.clip(shape, picture.width, picture.height)
    if not shape.area:
        notes.add("shape without area, left out", place)
    elif not seen.area or not min(seen.box[2:]) > 0:
        notes.add("shape outside the picture, left out", place)
    else:
        x, y, w, h = shape.box
        if max(-x, -y, x + w - picture.width, y + h - picture.height) >= 0.5:  # less is the rounding of some format
            notes.add("shape beyond the picture, cut at its edge", place)
        segmentation = [[value for corner in seen.polygon for value in corner]] if outline else []
        picture.objects.append(Object(category, list(seen.box), seen.area, segmentation))


def read_text(file: Path) -> str:
    """The text of a file; raises UserError naming it where it cannot be read or is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def read_lines(file: Path) -> list[str]:
    """Its lines without the space around them, empty ones too; raises UserError as :func:`read_text`."""
    return [line.strip() for line in read_text(file).splitlines()]


def split_folders(src: Path) -> dict[str, Path]:
    """``SRC/train`` and ``SRC/val`` (or valid, validation) by split; ``SRC`` alone, as train, where it has no train folder."""
    if not (src / "train").is_dir():
        return {"train": src}
    val = next((src / name for name in VAL_FOLDERS if (src / name).is_dir()), None)
    return {"train": src / "train"} | ({"val": val} if val else {})


def pictures_in(folder: Path) -> list[str]:
    """Names of the picture files in ``folder`` itself (not below it), sorted."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
