"""Write a folder of images and annotations so that it appears complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raydetr.errors import UserError


def check_new(folder: Path) -> None:
    """Raise UserError where a folder to write exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; delete it or choose another")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder inside of ``folder`` whose content is moved out at the end, annotations after images.

    Raises:
        UserError: The folder cannot be written. Nothing is left behind then.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            yield Path(partial)
            for part in sorted(Path(partial).iterdir(), key=lambda part: (part.is_file() or part.name.lower() == "annotations", part.name)):
                part.replace(folder / part.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}{f' ({error.filename})' if error.filename else ''}") from None
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def put_image(image: Path, target: Path, copy: bool) -> str:
    """Put an image file at ``target``, as a link or as a copy.

    Args:
        image: The image file.
        target: The path to create.
        copy: Whether to copy; otherwise the file is copied only where the file system has no links.

    Returns:
        ``"hard links"``, ``"symbolic links"`` or ``"copies"``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        for link, kind in ((os.link, "hard links"), (os.symlink, "symbolic links")):
            try:
                link(image, target)
                return kind
            except OSError:  # another file system, or one without such links
                target.unlink(missing_ok=True)
    shutil.copyfile(image, target)
    return "copies"
