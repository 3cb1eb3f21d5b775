"""Runs, searches and photographs in an object store: a folder at ``s3://`` or ``gs://`` and its copies on this machine.

A *place* is a local path or such an address. For a local path every function here does nothing and hands it back, so that callers need
not ask. Of an address there are two copies below :func:`cache_folder`: a *working copy*, which a run writes and pushes, and a *reading
copy* for whoever only looks, who may do so beside a run on the same machine.

A file is the same here and there where size and time of change agree, as with rsync: fetching and pushing leave both with one time.
Files and objects appear whole or not at all. ``last.pth`` is pushed after everything else and fetched before it: whoever goes on from
it finds all of its epoch. A store that does not answer is asked again for minutes; one that refuses is told of at once.
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

SCHEMES = ("s3://", "gs://")
PATIENCE_S = 300  # with a store that does not answer; the other workers of a run wait twice that long for rank 0
LONGEST_PAUSE_S = 10  # between two questions
GOOGLE_PATIENCE_S = 10  # of pyarrow's own with Google's store, which it would otherwise ask for a quarter of an hour
CHUNK_BYTES = 8 << 20  # of a file, on its way at a time
THREADS = 16  # files on their way at a time: small ones would wait for each other's answers
TOLD_BYTES = 50e6  # more than this is said to be on its way
LAST = "last.pth"
OWNER = ".owner"  # at a place that is not finished: who writes there
EVENTS = "*tfevents*"  # files that are only ever appended to
STAYS_HERE = ("ray",)  # Ray's own folder in that of a run: of use only to the processes that made it
ENDPOINT = "AWS_ENDPOINT_URL"  # of a store that is not Amazon's
# What workers on other machines must know of the store; its keys they have of their own.
ENVIRONMENT = (ENDPOINT, "AWS_REGION", "AWS_DEFAULT_REGION")

NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found|bucket does not exist", re.IGNORECASE)
REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|SIGNATURE_DOES_NOT_MATCH|MISSING_\w+|UNRECOGNIZED_CLIENT|\w*TOKEN\w*|\w*EXPIRED\w*)"
    r"|HTTP status (30\d|40[0135])|(PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT)",
)


def is_uri(place: str | Path) -> bool:
    """Whether a place is in an object store."""
    return str(place).startswith(SCHEMES)


def store_environment() -> dict[str, str]:
    """The environment variables that say where the store is, as this process has them."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def check_place(name: str, place: str) -> None:
    """Raises UserError where ``place``, the setting or flag ``name``, is an address of another kind, or one with a key in it."""
    if is_uri(place):
        with _named(name):
            _path_of(place)
    elif "://" in place:
        raise UserError(
            f"{name}: {place.split('://')[0]}:// is not known here; it takes a folder, s3://bucket/folder or gs://bucket/folder"
        )


def absolute(place: str | Path) -> str:
    """The place for a process with another working directory."""
    return str(place) if is_uri(place) else str(Path(place).expanduser().absolute())


def join(place: str | Path, *names: str) -> str:
    """A place inside another."""
    return "/".join([str(place).rstrip("/"), *names]) if is_uri(place) else str(Path(place, *names))


def split(place: str | Path) -> tuple[str, str]:
    """The place around a place, and its name there."""
    around, _, name = str(place).rstrip("/").rpartition("/")
    return around, name


def cache_folder() -> Path:
    """Where this machine keeps its copies: ``RAYDETR_CACHE``, else ``raydetr`` in the user's cache folder. May be emptied between runs."""
    given = os.environ.get("RAYDETR_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "raydetr")).expanduser().absolute()


def working_folder(place: str | Path) -> Path:
    """The folder that a run writes: a local place itself, an address's working copy as it stands."""
    return _copy("work", place) if is_uri(place) else Path(place).expanduser()


def fetch(place: str | Path, *, only: str = "*", recursive: bool = True) -> Path:
    """Make the working copy what the place holds, and return it; what the place does not hold is taken out of it.

    ``only`` is a pattern for the names of files, relative to the place; ``recursive`` says whether folders inside count. Raises
    UserError where the store refuses, or does not answer for ``PATIENCE_S``, and OSError where this machine's disk does.
    """
    folder = working_folder(place)
    if is_uri(place):
        _bring(str(place), folder, only, recursive)
    return folder


def fetched(place: str | Path, *, only: str = "*", recursive: bool = True) -> Path:
    """The same for whoever only reads: the folder or file of a place, of an address the reading copy. UserError where nothing is there."""
    if not is_uri(place):
        return Path(place).expanduser()
    uri, copy = str(place).rstrip("/"), _copy("read", place)
    info = _ask(uri, lambda: _file_system(uri).get_file_info(_path_of(uri)))
    if info.is_file:
        around, name = split(uri)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _one_process(copy):
            _get_all(around, copy.parent, {name: info})
    elif info.type.name == "NotFound":
        _check_bucket(uri)
        raise UserError(f"{uri}: there is nothing at this address")
    else:
        _bring(uri, copy, only, recursive)
    return copy


def push(place: str | Path, *, only: str = "*", recursive: bool = True, patience_s: float = PATIENCE_S) -> None:
    """Bring what changed in the working copy to the place; arguments and errors are those of :func:`fetch`."""
    if not is_uri(place):
        return
    uri, folder = str(place), working_folder(place)
    with _one_process(folder):
        there = _objects(uri, recursive, patience_s)
        here = [name for name in _files(folder, recursive) if fnmatch.fnmatch(name, only)]
        changed = {name: (folder / name).stat() for name in here if not _same(folder / name, there.get(name))}
        for name in sorted(changed, key=lambda name: (PurePosixPath(name).name == LAST, name)):
            _ask(uri, functools.partial(_put, join(uri, name), folder / name), patience_s)
        if changed:
            there = _objects(uri, recursive, patience_s)
        for name, before in changed.items():
            now = (folder / name).stat()
            if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and name in there:  # else it changed meanwhile
                os.utime(folder / name, ns=(there[name].mtime_ns, there[name].mtime_ns))


def copy(source: str, target: str) -> None:
    """Put an object in the place of another, inside the store; both are addresses. Nothing where there is no ``source``."""
    system = _file_system(source)
    with contextlib.suppress(FileNotFoundError):
        _ask(target, lambda: system.copy_file(_path_of(source), _path_of(target)))


def exists(place: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether there is a file or folder at a place; raises UserError where a store refuses or does not answer."""
    if is_uri(place):
        return _ask(place, lambda: _file_system(place).get_file_info(_path_of(place)), patience_s).type.name != "NotFound"
    return Path(place).exists()


def write_token(place: str, name: str, token: str, patience_s: float = PATIENCE_S) -> None:
    """A small file at a place that says who writes there. Raises UserError of a store, OSError of a disk."""
    if is_uri(place):
        _ask(place, lambda: _write(join(place, name), token.encode()), patience_s)
    else:
        Path(place).expanduser().mkdir(parents=True, exist_ok=True)
        Path(place, name).expanduser().write_text(token)


def read_token(place: str, name: str, patience_s: float = PATIENCE_S) -> str | None:
    """What is in such a file; None where there is none. Raises as :func:`write_token`."""
    with contextlib.suppress(FileNotFoundError):
        if is_uri(place):
            return _ask(place, lambda: _read(join(place, name)).decode(), patience_s)
        return Path(place, name).expanduser().read_text()
    return None


def remove_tokens(place: str, beginning: str, patience_s: float = PATIENCE_S) -> list[str]:
    """Take the files whose names have that beginning away again; returns their names. Raises as :func:`write_token`."""
    if not is_uri(place):
        files = list(Path(place).expanduser().glob(f"{beginning}*"))
        for file in files:
            file.unlink(missing_ok=True)
        return [file.name for file in files]
    names = [name for name in _objects(place, recursive=False, patience_s=patience_s, hidden=True) if name.startswith(beginning)]
    for name in names:
        _ask(place, functools.partial(_file_system(place).delete_file, _path_of(join(place, name))), patience_s)
    return names


def become_owner(place: str | Path) -> str:
    """Be the one who writes at a place from now on, whoever did before. Returns the token for :func:`check_owner`."""
    token = secrets.token_hex(16)
    write_token(str(place), OWNER, token)
    return token


def check_owner(place: str | Path, token: str, patience_s: float = PATIENCE_S) -> None:
    """Raises UserError where another process became the owner: this one was given up for lost, or what it does was started twice."""
    if read_token(str(place), OWNER, patience_s) != token:
        raise UserError(f"another process goes on with what is in {place}; this one stops")


# ------------------------------------------------------------------------------------------------------------ copies on this machine


def _copy(kind: str, place: str | Path) -> Path:
    scheme = str(place).partition("://")[0]
    return cache_folder() / kind / scheme / _path_of(str(place))


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine fetches or pushes the folder; the lock of a killed process is free."""
    from filelock import FileLock  # loaded late, as pyarrow: every command imports this module

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


def _files(folder: Path, recursive: bool) -> Iterator[str]:
    """The names, relative to ``folder``, of the files in it that belong in the store, too."""
    for file in folder.rglob("*") if recursive else folder.glob("*"):
        name = file.relative_to(folder)
        if file.is_file() and not file.is_symlink() and not _is_hidden(name) and name.parts[0] not in STAYS_HERE:
            yield name.as_posix()


def _is_hidden(name: PurePosixPath) -> bool:
    return name.suffix in (".lock", ".new") or any(part.startswith(".") for part in name.parts)


def _same(file: Path, info: Any) -> bool:
    if info is None or not file.is_file():
        return False
    stat = file.stat()
    return (stat.st_size, stat.st_mtime_ns) == (info.size, info.mtime_ns)


def _bring(uri: str, folder: Path, only: str, recursive: bool) -> None:
    with _one_process(folder):
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
    if size > TOLD_BYTES:
        print(f"fetching {len(missing)} files, {size / 1e6:.0f} MB, from {uri} to {folder}", file=sys.stderr, flush=True)

    def get(name: str) -> None:
        _ask(uri, lambda: _get(_file_system(uri), missing[name], folder / name))

    first = [name for name in missing if PurePosixPath(name).name == LAST]
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for names in (first, [name for name in missing if name not in first]):
                list(pool.map(get, names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others would each be as patient
            raise


def _get(system: Any, info: Any, target: Path) -> None:
    """Bring an object here; what is here already of an events file, which TensorBoard may have open, is kept and gone on with."""
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
    """An object as ``file``, checked. What does not agree with the store's digest is fetched again, and believed where it comes the same
    twice: of an object that is stored encrypted the ETag looks like a digest of its content and is none."""
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
    """Whether the MD5 of the content is what the store tells of it: Google's by that name, others in an ETag, which is the content's or
    that of the one part that it was written in. True where it tells nothing of that kind."""
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
    """``bucket/folder`` of an address; raises UserError where it is none, or has a key in it, which logs and settings would repeat."""
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
    """pyarrow's FileInfo of every object below ``uri``, by its name relative to that."""
    from pyarrow.fs import FileSelector

    path = _path_of(uri)
    selector = FileSelector(path, allow_not_found=True, recursive=recursive)
    found = _ask(uri, lambda: _file_system(uri).get_file_info(selector), patience_s)
    names = {info.path.removeprefix(f"{path}/"): info for info in found if info.is_file}
    for name in names:
        if ".." in name.split("/"):
            raise UserError(f"{uri}: the object {name} has a name that leads out of the folder; take it away")
    return {name: info for name, info in names.items() if hidden or not _is_hidden(PurePosixPath(name))}


def _check_bucket(uri: str, patience_s: float = PATIENCE_S) -> None:
    """Raises UserError where the bucket is not there: to a listing it looks like an empty folder."""
    bucket = _path_of(uri).split("/")[0]
    if _ask(uri, lambda: _file_system(uri).get_file_info(bucket), patience_s).type.name == "NotFound":
        raise UserError(_no_bucket(uri))


def _no_bucket(uri: str) -> str:
    return f"{uri}: there is no bucket {_path_of(uri).split('/')[0]}; make it, or correct its name"


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
    """What ``action`` returns, tried again while the store does not answer.

    Raises UserError where that lasts longer than ``patience_s``, and at once where the store refuses; an OSError of this machine, and
    FileNotFoundError for an object that is not there, pass through.
    """
    end, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return action()
        except (OSError, ValueError) as error:  # of a transfer from Google's that broke off pyarrow says that its file is closed
            text = str(error)
            if isinstance(error, FileNotFoundError):  # Google's store says no more where the whole bucket is not there
                _check_bucket(uri, patience_s)
            if NO_BUCKET.search(text):
                raise UserError(_no_bucket(uri)) from None
            refused = REFUSED.search(text)
            if refused:
                bucket = _path_of(uri).split("/")[0]
                raise UserError(
                    f"{uri}: the store refuses this machine's access to bucket {bucket} ({refused[0]}); give its credentials leave to "
                    "list, read, write and delete there, or set others (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "GOOGLE_APPLICATION_CREDENTIALS)"
                ) from None
            if "NO_SUCH_KEY" in text:
                raise FileNotFoundError(errno.ENOENT, "there is nothing at this address", uri) from None
            if getattr(error, "errno", None) is not None:  # pyarrow gives none to an error of the store
                raise
            if time.monotonic() + pause > end:
                known = ENDPOINT if uri.startswith("s3://") else "GOOGLE_APPLICATION_CREDENTIALS"
                raise UserError(f"{uri}: the store does not answer ({_reason(text)}); is it up, and {known} right?") from None
            if pause == 1:
                print(f"{uri}: the store does not answer, it is asked again ({_reason(text)})", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _reason(text: str) -> str:
    """The telling part of an error of pyarrow's, without addresses and request ids."""
    # Google's without an account looks as one whose server of tokens is away for a while, which a run waits for.
    code = re.search("Could not create a OAuth2 access token", text) or re.search(r"AWS Error [A-Z_]+|Status\([A-Z_]+", text)
    return code[0] if code else " ".join(text.split())[:200]
