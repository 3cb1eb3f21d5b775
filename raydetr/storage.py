"""Runs, searches and data sets in an object store: folders at ``s3://`` or ``gs://`` and their copies on this computer.

Every function takes a path or a URI, so that callers need not distinguish them. For a local path there is nothing to copy: functions that
copy do nothing or return the path. For a URI there are two local copies below :func:`cache_folder`: the *working copy*, which a run writes
and pushes, and the *reading copy* for processes that only read, possibly at the same time as a run on the same computer.

A file counts as unchanged if its size and modification time agree with the object's, as with rsync; fetching and pushing set both to the
same time. Files and objects are replaced atomically. ``last.pth`` is pushed after all other files and fetched before them, so that a
process that resumes from it finds everything that belongs to its epoch. If a store does not answer, requests are retried for minutes; if it
refuses, an error is reported at once.
"""

import base64
import contextlib
import errno
import fnmatch
import functools
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from raydetr.errors import UserError
from raydetr.files import one_process
from raydetr.text import count

SCHEMES = ("s3://", "gs://")
PATIENCE_S = 300  # how long a store that does not answer is retried; other workers of a run wait twice as long for rank 0
LONGEST_PAUSE_S = 10  # between two attempts
GOOGLE_PATIENCE_S = 10  # how long pyarrow itself retries with Google's store; its default is a quarter of an hour
CHUNK_BYTES = 8 << 20  # transferred at a time
THREADS = 16  # concurrent transfers, because small files spend their time waiting for answers
ANNOUNCED_BYTES = 50e6  # larger transfers are announced
LAST = "last.pth"
CONFIRM_FOLDER = "confirm"  # in a search's folder: the search of its confirmation
OWNER = ".owner"  # the file in an unfinished run with the token of the process that writes it
TOKEN = re.compile(r"[0-9a-f]{32}")
EVENTS = "*tfevents*"  # files that are only ever appended to
STAYS_HERE = ("ray",)  # never pushed: Ray's own folder in a run folder, which only the processes that made it use
ENDPOINT = "AWS_ENDPOINT_URL"  # names an S3 store other than Amazon's
# What workers on other nodes need to know about the store; each node has its own keys.
ENVIRONMENT = (ENDPOINT, "AWS_REGION", "AWS_DEFAULT_REGION")

NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found|bucket does not exist", re.IGNORECASE)
REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|SIGNATURE_DOES_NOT_MATCH|MISSING_\w+|UNRECOGNIZED_CLIENT|\w*TOKEN\w*|\w*EXPIRED\w*)"
    r"|HTTP status (30\d|40[0135])|(PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT)",
)


def is_uri(path: str | Path) -> bool:
    """Return whether a path is a URI in an object store.

    Args:
        path: Path or URI.
    """
    return str(path).startswith(SCHEMES)


def store_environment() -> dict[str, str]:
    """Return the environment variables of this process that tell where the object store is."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def check_path(name: str, path: str) -> None:
    """Check a path or URI that was given as a setting or a flag.

    Args:
        name: Name of the setting or flag, for the error message.
        path: Path or URI.

    Raises:
        UserError: It is a URI with an unknown scheme, is not of the form ``s3://bucket/folder``, or has a key in it.
    """
    if is_uri(path):
        with _named(name):
            _path_of(path)
    elif "://" in path:
        raise UserError(f"{name}: {path.split('://')[0]}:// is not known here; it takes a folder, s3://bucket/folder or gs://bucket/folder")


def absolute(path: str | Path) -> str:
    """Return a path or URI in a form that is valid in any working directory.

    Args:
        path: Path or URI. ``~`` is expanded, and symbolic links are kept.
    """
    return str(path) if is_uri(path) else str(Path(path).expanduser().absolute())


def join(path: str | Path, *names: str) -> str:
    """Return the path or URI of something below a folder.

    Args:
        path: Path or URI of the folder.
        *names: Names of subfolders and of the file, from the outside in.
    """
    return "/".join([str(path).rstrip("/"), *names]) if is_uri(path) else str(Path(path, *names))


def split(path: str | Path) -> tuple[str, str]:
    """Split a path or URI into its parent and its name in that parent.

    Args:
        path: Path or URI; slashes at its end do not count.

    Returns:
        The parent and the name. The parent of a name alone is empty.
    """
    parent, slash, name = str(path).rstrip("/").rpartition("/")
    return parent or slash, name


def cache_folder() -> Path:
    """Return the folder of local copies: ``RAYDETR_CACHE``, else ``raydetr`` in the user's cache folder.

    It may be emptied when no run uses it.
    """
    given = os.environ.get("RAYDETR_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "raydetr")).expanduser().absolute()


def working_folder(path: str | Path) -> Path:
    """Return the local folder that a run writes: the path itself, or the working copy of a URI as it is now.

    Nothing is fetched, and the folder need not exist.

    Args:
        path: Path or URI of the folder.
    """
    return _copy("work", path) if is_uri(path) else Path(path).expanduser()


def fetch(path: str | Path, *, only: str = "*", recursive: bool = True) -> Path:
    """Update the working copy of a folder to what the store holds, and return it.

    Files that the store does not hold are deleted. Nothing happens for a local path.

    Args:
        path: Path or URI of the folder.
        only: A pattern, such as ``*.pth``, for the names of the files to fetch, relative to the folder.
        recursive: Whether to include subfolders.

    Returns:
        The local folder.

    Raises:
        UserError: The store refuses, or does not answer for ``PATIENCE_S``.
        OSError: The local disk fails.
    """
    folder = working_folder(path)
    if is_uri(path):
        _bring(str(path), folder, only, recursive)
    return folder


def fetched(path: str | Path, *, only: str = "*", recursive: bool = True) -> Path:
    """Update the reading copy of a folder or a file to what the store holds, and return it.

    Args:
        path: Path or URI of the folder or file.
        only: As for :func:`fetch`.
        recursive: As for :func:`fetch`.

    Returns:
        The local folder or file.

    Raises:
        UserError: There is nothing at the URI, or the store refuses or does not answer.
        OSError: The local disk fails.
    """
    if not is_uri(path):
        return Path(path).expanduser()
    uri, copy = str(path).rstrip("/"), _copy("read", path)
    info = _ask(uri, lambda: _file_system(uri).get_file_info(_path_of(uri)))
    if info.is_file:
        around, name = split(uri)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(copy):
            _get_all(around, copy.parent, {name: info})
    elif info.type.name == "NotFound":
        _check_bucket(uri)
        raise UserError(f"{uri}: there is nothing at this address")
    else:
        _bring(uri, copy, only, recursive)
    return copy


def file_sizes(path: str) -> dict[str, int]:
    """Return the size of each file in a folder and its subfolders.

    Args:
        path: Path or URI of the folder.

    Returns:
        The sizes in bytes, by the files' names relative to the folder.

    Raises:
        UserError: There is no such local folder, or the store refuses or does not answer. An empty URI has no files.
    """
    if is_uri(path):
        return {name: info.size for name, info in _objects(path, recursive=True, hidden=True).items()}
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such folder")
    return {file.relative_to(folder).as_posix(): file.lstat().st_size for file in folder.rglob("*") if file.is_file()}


def push(path: str | Path, *, only: str = "*", recursive: bool = True, patience_s: float = PATIENCE_S) -> None:
    """Push the changed files of a working copy to its store. Nothing happens for a local path.

    Files that only the store holds stay there.

    Args:
        path: Path or URI of the folder.
        only: A pattern for the names of the files to push, relative to the folder.
        recursive: Whether to include subfolders.
        patience_s: How long to retry while the store does not answer, in seconds.

    Raises:
        UserError: The store refuses, or does not answer for ``patience_s``.
        OSError: The local disk fails.
    """
    if not is_uri(path):
        return
    uri, folder = str(path), working_folder(path)
    with _exclusive(folder):
        there = _objects(uri, recursive, patience_s)
        here = [name for name in _files(folder, recursive) if fnmatch.fnmatch(name, only)]
        changed = {name: (folder / name).stat() for name in here if not _same(folder / name, there.get(name))}
        for name in sorted(changed, key=lambda name: (PurePosixPath(name).name == LAST, name)):
            _ask(uri, functools.partial(_put, join(uri, name), folder / name), patience_s)
        if changed:
            there = _objects(uri, recursive, patience_s)
        for name, before in changed.items():
            now = (folder / name).stat()
            if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and name in there:  # else it changed during the push
                os.utime(folder / name, ns=(there[name].mtime_ns, there[name].mtime_ns))


def copy(source: str, target: str) -> None:
    """Copy an object within its store, replacing ``target``. Nothing happens if there is no ``source``.

    Args:
        source: URI of the object to copy.
        target: URI to copy it to, in the same store.

    Raises:
        UserError: The store refuses or does not answer.
    """
    system = _file_system(source)
    with contextlib.suppress(FileNotFoundError):
        _ask(target, lambda: system.copy_file(_path_of(source), _path_of(target)))


def exists(path: str, patience_s: float = PATIENCE_S) -> bool:
    """Return whether a file or folder exists.

    Args:
        path: Path or URI.
        patience_s: How long to retry while the store does not answer, in seconds.

    Raises:
        UserError: The store refuses or does not answer.
    """
    if is_uri(path):
        return _ask(path, lambda: _file_system(path).get_file_info(_path_of(path)), patience_s).type.name != "NotFound"
    return Path(path).exists()


def write_token(path: str, name: str, token: str, patience_s: float = PATIENCE_S) -> None:
    """Write a token, a short text by which processes recognize each other, to a file.

    Args:
        path: Path or URI of the folder.
        name: Name of the file.
        token: The text.
        patience_s: How long to retry while the store does not answer, in seconds.

    Raises:
        UserError: The store refuses or does not answer.
        OSError: The disk of a local folder cannot be written.
    """
    if is_uri(path):
        _ask(path, lambda: _write(join(path, name), token.encode()), patience_s)
    else:
        Path(path).expanduser().mkdir(parents=True, exist_ok=True)
        Path(path, name).expanduser().write_text(token)


def read_token(path: str, name: str, patience_s: float = PATIENCE_S) -> str | None:
    """Read a token that :func:`write_token` wrote.

    Args:
        path: Path or URI of the folder.
        name: Name of the file.
        patience_s: How long to retry while the store does not answer, in seconds.

    Returns:
        The content of the file, or None if there is no file.

    Raises:
        UserError: The store refuses or does not answer.
        OSError: The file cannot be read.
    """
    with contextlib.suppress(FileNotFoundError):
        if is_uri(path):
            return _ask(path, lambda: _read(join(path, name)).decode(errors="replace"), patience_s)
        return Path(path, name).expanduser().read_text(errors="replace")
    return None


def remove_tokens(path: str, beginning: str, patience_s: float = PATIENCE_S) -> list[str]:
    """Delete the files of a folder whose names begin with a text, without subfolders.

    Args:
        path: Path or URI of the folder.
        beginning: The beginning of the names.
        patience_s: How long to retry while the store does not answer, in seconds.

    Returns:
        The names of the deleted files.

    Raises:
        UserError: The store refuses or does not answer.
        OSError: A file cannot be deleted.
    """
    if not is_uri(path):
        files = list(Path(path).expanduser().glob(f"{beginning}*"))
        for file in files:
            file.unlink(missing_ok=True)
        return [file.name for file in files]
    names = [name for name in _objects(path, recursive=False, patience_s=patience_s, hidden=True) if name.startswith(beginning)]
    for name in names:
        _ask(path, functools.partial(_file_system(path).delete_file, _path_of(join(path, name))), patience_s)
    return names


def become_owner(path: str | Path) -> str:
    """Make this process the only one that may write a run, whichever did before.

    Args:
        path: Path or URI of the run.

    Returns:
        This process's token, for :func:`check_owner`.

    Raises:
        UserError: The store refuses or does not answer.
        OSError: The disk of a local folder cannot be written.
    """
    token = secrets.token_hex(16)
    write_token(str(path), OWNER, token)
    return token


def stamp(path: str | Path, name: str, patience_s: float = PATIENCE_S) -> tuple[int, int] | None:
    """Return the size and the modification time of a file, which together tell whether it has changed.

    Args:
        path: Path or URI of the folder.
        name: Name of the file, relative to the folder.
        patience_s: How long to retry while the store does not answer, in seconds.

    Returns:
        The size in bytes and the modification time in nanoseconds, or None if there is no such file.

    Raises:
        UserError: The store refuses or does not answer.
    """
    if is_uri(path):
        info = _ask(str(path), lambda: _file_system(str(path)).get_file_info(_path_of(join(path, name))), patience_s)
        return (info.size, info.mtime_ns) if info.is_file else None
    with contextlib.suppress(FileNotFoundError):
        found = Path(path, name).expanduser().stat()
        return found.st_size, found.st_mtime_ns
    return None


def check_owner(path: str | Path, token: str, patience_s: float = PATIENCE_S, is_unchanged: Callable[[], bool] = lambda: True) -> None:
    """Check that this process is still the one that may write a run.

    If the token in the run folder is that of another process, it is not. If there is no token, there are two possibilities: it was deleted
    by mistake, and is written again; or another process has finished the run, in which case ``is_unchanged`` returns False. If the store
    answers anything else, the question is repeated.

    Args:
        path: Path or URI of the run.
        token: What :func:`become_owner` returned.
        patience_s: How long to retry, in seconds.
        is_unchanged: Called if the token is missing; returns whether the run is as this process left it.

    Raises:
        UserError: Another process took over the run, because this one was believed lost or the run was started twice; or the store does not
            answer properly for ``patience_s``.
    """
    end, pause, was_missing, wrote = time.monotonic() + patience_s, 1.0, False, False
    while (found := read_token(str(path), OWNER, patience_s)) != token:
        missing_twice = found is None and was_missing  # once may just be a wrong answer
        if (found is not None and TOKEN.fullmatch(found)) or (missing_twice and not is_unchanged()):
            raise UserError(f"another process has taken over {path}; this one stops")
        if missing_twice and not wrote:
            write_token(str(path), OWNER, token, patience_s)
            wrote = True
        elif (found is not None or wrote) and time.monotonic() + pause > end:
            answer = " ".join((found or "").split())[:60]
            raise UserError(f"{join(path, OWNER)}: reads {answer!r} instead of a token; is the store, or a proxy before it, in order?")
        was_missing = found is None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


# ------------------------------------------------------------------------------------------------------------------- local copies


def _copy(kind: str, path: str | Path) -> Path:
    scheme = str(path).partition("://")[0]
    return cache_folder() / kind / scheme / _path_of(str(path))


def _exclusive(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Wait until no other process of this computer fetches or pushes the folder."""
    return one_process(Path(f"{folder}.lock"))


def _files(folder: Path, recursive: bool) -> Iterator[str]:
    """Yield the names, relative to ``folder``, of the files in it that belong in the store."""
    for file in folder.rglob("*") if recursive else folder.glob("*"):
        name = file.relative_to(folder)
        if file.is_file() and not file.is_symlink() and not _is_hidden(PurePosixPath(name)) and name.parts[0] not in STAYS_HERE:
            yield name.as_posix()


def _is_hidden(name: PurePosixPath) -> bool:
    return name.suffix in (".lock", ".new") or any(part.startswith(".") for part in name.parts)


def _same(file: Path, info: Any) -> bool:
    if info is None or not file.is_file():
        return False
    stat = file.stat()
    return (stat.st_size, stat.st_mtime_ns) == (info.size, info.mtime_ns)


def _bring(uri: str, folder: Path, only: str, recursive: bool) -> None:
    with _exclusive(folder):
        there = {name: info for name, info in _objects(uri, recursive).items() if fnmatch.fnmatch(name, only)}
        if not there:
            _check_bucket(uri)
        for name in list(_files(folder, recursive)):
            if name not in there and fnmatch.fnmatch(name, only):
                (folder / name).unlink()
        _get_all(uri, folder, there)


def _get_all(uri: str, folder: Path, there: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    missing = {name: info for name, info in there.items() if not _same(folder / name, info)}
    size = sum(info.size for info in missing.values())
    if size > ANNOUNCED_BYTES:
        print(f"fetching {count(len(missing), 'file')}, {size / 1e6:.0f} MB, from {uri} to {folder}", file=sys.stderr, flush=True)

    def get(name: str) -> None:
        _ask(uri, lambda: _get(_file_system(uri), missing[name], folder / name))

    first = [name for name in missing if PurePosixPath(name).name == LAST]
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for names in (first, [name for name in missing if name not in first]):
                list(pool.map(get, names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # each other transfer would retry for as long
            raise


def _get(system: Any, info: Any, target: Path) -> None:
    """Fetch an object. A local events file, which TensorBoard may have open, is only appended to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = target.stat().st_size if target.is_file() else 0
    if fnmatch.fnmatch(target.name, EVENTS) and 0 < begun < info.size:
        with system.open_input_file(info.path) as source, target.open("ab") as out:
            source.seek(begun)
            shutil.copyfileobj(source, out, CHUNK_BYTES)
    else:
        partial = target.with_name(f".{target.name}.partial")
        try:
            _download(system, info.path, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    os.utime(target, ns=(info.mtime_ns, info.mtime_ns))


def _download(system: Any, path: str, file: Path) -> None:
    """Fetch an object as ``file`` and check it against the store's digest.

    If the content does not agree with the digest, it is fetched again, and accepted if it is the same twice: the ETag of an encrypted
    object looks like a digest of its content, but is not.
    """
    before = None
    while True:
        digest = hashlib.md5(usedforsecurity=False)
        with system.open_input_file(path) as source, file.open("wb") as out:
            size, told = source.size(), source.metadata() or {}
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
            done = out.tell()
        if done != size:
            raise OSError(f"{path} ended after {done} of {size} bytes")
        if before == digest.digest() or _agrees(told, digest):
            return
        before = digest.digest()


def _agrees(told: Mapping[str, bytes], digest: Any) -> bool:
    """Return whether the MD5 of the content agrees with the store's; True if the store gives none.

    Google's store gives it as ``md5Hash``. Other stores give it in the ETag, which is the MD5 of the content or, for an upload of one part,
    of the MD5 of that part.
    """
    if "md5Hash" in told:
        return base64.b64decode(told["md5Hash"]) == digest.digest()
    etag = told.get("ETag", b"").decode().strip('"')
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        return etag == digest.hexdigest()
    if re.fullmatch(r"[0-9a-f]{32}-1", etag):
        return etag == f"{hashlib.md5(digest.digest(), usedforsecurity=False).hexdigest()}-1"
    return True


# --------------------------------------------------------------------------------------------------------------------------- the store


def _path_of(uri: str) -> str:
    """Return ``bucket/folder`` of a URI. Raises a UserError if it is not valid, or has a key in it, which logs would repeat."""
    scheme, _, path = uri.partition("://")
    bucket = path.split("/")[0]
    if set("@:") & set(bucket) or set("?#") & set(path):
        raise UserError(
            f"{scheme}://... names more than a bucket and a folder, and settings and logs would repeat it; keys and options belong in the "
            f"environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, {ENDPOINT}, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    parts = path.rstrip("/").split("/")
    if not all(parts) or {".", ".."} & set(parts):
        raise UserError(f"{uri}: not an address such as s3://bucket/folder")
    return "/".join(parts)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _file_system(uri: str) -> Any:
    bucket = uri.partition("://")[0] + "://" + _path_of(uri).split("/")[0]
    return _connected(bucket, os.environ.get(ENDPOINT))


@functools.lru_cache(maxsize=8)
def _connected(bucket: str, _endpoint: str | None) -> Any:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(f"{bucket}?retry_limit_seconds={GOOGLE_PATIENCE_S}" if bucket.startswith("gs://") else bucket)[0]


def _objects(uri: str, recursive: bool, patience_s: float = PATIENCE_S, hidden: bool = False) -> dict[str, Any]:
    """Return pyarrow's FileInfo of every object below ``uri`` by its relative name."""
    from pyarrow.fs import FileSelector

    path = _path_of(uri)
    selector = FileSelector(path, allow_not_found=True, recursive=recursive)
    found = _ask(uri, lambda: _file_system(uri).get_file_info(selector), patience_s)
    names = {info.path.removeprefix(f"{path}/"): info for info in found if info.is_file}
    for name in names:
        if ".." in name.split("/"):
            raise UserError(f"{uri}: the object {name} has a name that leads out of the folder; delete it")
    return {name: info for name, info in names.items() if hidden or not _is_hidden(PurePosixPath(name))}


def _check_bucket(uri: str, patience_s: float = PATIENCE_S) -> None:
    """Raise a UserError if the bucket does not exist; in a listing it looks like an empty folder."""
    bucket = _path_of(uri).split("/")[0]
    if _ask(uri, lambda: _file_system(uri).get_file_info(bucket), patience_s).type.name == "NotFound":
        raise UserError(_no_bucket(uri))


def _no_bucket(uri: str) -> str:
    return f"{uri}: there is no bucket {_path_of(uri).split('/')[0]}; create it, or correct its name"


def _put(uri: str, file: Path) -> None:
    with file.open("rb") as source, _file_system(uri).open_output_stream(_path_of(uri)) as out:
        shutil.copyfileobj(source, out, CHUNK_BYTES)


def _write(uri: str, content: bytes) -> None:
    with _file_system(uri).open_output_stream(_path_of(uri)) as out:
        out.write(content)


def _read(uri: str) -> bytes:
    with _file_system(uri).open_input_stream(_path_of(uri)) as source:
        return source.read()


def _ask(uri: str, action: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Return what ``action`` returns, retrying while the store does not answer.

    Raises:
        UserError: The store does not answer for ``patience_s``, or refuses.
        FileNotFoundError: The object does not exist.
        OSError: This computer, not the store, has a problem.
    """
    end, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return action()
        except (OSError, ValueError) as error:  # ValueError: a broken transfer from Google's store closes the file
            text = str(error)
            if isinstance(error, FileNotFoundError):  # Google's store also raises it if the bucket does not exist
                _check_bucket(uri, patience_s)
            if NO_BUCKET.search(text):
                raise UserError(_no_bucket(uri)) from None
            refused = REFUSED.search(text)
            if refused:
                bucket = _path_of(uri).split("/")[0]
                raise UserError(
                    f"{uri}: the store refuses access to bucket {bucket} ({refused[0]}); allow its credentials to "
                    "list, read, write and delete there, or set others (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "GOOGLE_APPLICATION_CREDENTIALS)"
                ) from None
            if "NO_SUCH_KEY" in text:
                raise FileNotFoundError(errno.ENOENT, "there is nothing at this address", uri) from None
            if getattr(error, "errno", None) is not None:  # errors of the store have no errno
                raise
            if time.monotonic() + pause > end:
                known = ENDPOINT if uri.startswith("s3://") else "GOOGLE_APPLICATION_CREDENTIALS"
                raise UserError(f"{uri}: the store does not answer ({_reason(text)}); is it up, and {known} right?") from None
            if pause == 1:
                print(f"{uri}: the store does not answer, retrying ({_reason(text)})", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _reason(text: str) -> str:
    """Return the informative part of an error of pyarrow, without addresses and request ids."""
    # A missing Google account looks like a token server that is down, for which a run waits.
    code = re.search("Could not create a OAuth2 access token", text) or re.search(r"AWS Error [A-Z_]+|Status\([A-Z_]+", text)
    return code[0] if code else " ".join(text.split())[:200]
