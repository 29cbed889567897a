"""Where checkpoints are kept: in a folder, which gets its name when all is written, or in an object store, which renames
nothing and shows a file once it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from upath import UPath

from lejepa_scale.addresses import Address, is_remote
from lejepa_scale.errors import Exit, UserError

Place = Path | UPath


@runtime_checkable
class Stream(Protocol):
    """An open file: of a disk or of a store, which are no subclasses of one another."""

    def read(self, size: int = ..., /) -> bytes: ...
    def readinto(self, buffer: Any, /) -> int | None: ...
    def write(self, data: Any, /) -> int: ...
    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def close(self) -> None: ...


ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # there is no file of that name
# Of botocore and google-auth, which are not everybody's.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_READ_ONLY = ("http", "https", "pipe")
_READ_BYTES = 1 << 24  # of an object asked for at once


def place(named: str | Path) -> Place:
    """A folder or an address. Raises UserError where the address is of no store that can be written, or its package is not
    installed."""
    if isinstance(named, Path) or not is_remote(str.__str__(named)):
        return Path(named).expanduser()
    address = Address(named)
    raw = str.__str__(address)
    protocol = raw.partition(":")[0]
    if protocol == "file":
        return Path(raw.partition("://")[2])
    if protocol in _READ_ONLY:
        raise UserError(f"{address} cannot hold checkpoints: name a folder, or a store as s3://bucket/folder.")
    try:
        found = UPath(raw, use_listings_cache=False)  # what other ranks have written is to be seen at once
        found.fs  # noqa: B018  # which imports its package
    except ImportError as error:
        raise UserError(f"{address} needs a package that is not here: {said(error)}.") from error
    except Exception as error:  # of many libraries
        raise UserError(f"{address} cannot be used: {said(error)}.") from error
    return found


def is_local(path: Place) -> bool:
    return isinstance(path, Path)


def said(error: Exception) -> str:
    """What the system's or a library's error says first."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")


def within(root: Place, path: Place) -> bool:
    """Whether one lies in the other, or is it."""
    return f"{path.resolve()}/".startswith(f"{root.resolve()}/")


def faults(path: Place, *others: type[Exception]) -> tuple[type[Exception], ...]:
    """What access to it may raise, and others: each store's library has errors of its own."""
    return (OSError, *others) if is_local(path) else (Exception,)


def opened(path: Place) -> Stream:
    """For reading in large pieces, in order."""
    if isinstance(path, Path):
        return path.open("rb", buffering=0)
    return path.open("rb", block_size=_READ_BYTES)  # type: ignore[return-value]


@contextmanager
def created(path: Place) -> Iterator[Stream]:
    """A new file; what was written in it has reached the disk, or the store, at the end."""
    if isinstance(path, Path):
        with path.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
    else:
        with path.open("wb") as upload:
            yield upload  # type: ignore[misc]


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Raises UserError, which names `path`, for what a disk or a store refuses: a fault, which may pass, but where it is a
    right that is lacking. That no such file is there (one of ABSENT) is for the caller."""
    try:
        yield
    except ABSENT:
        raise
    except faults(path) as error:
        raise UserError(f"{path} cannot be read: {said(error)}.", status(error)) from error


def status(error: Exception) -> Exit:
    """Whether the same may go better the next time: not where a right, or any credentials, are lacking."""
    lacking = isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS
    return Exit.MISTAKE if lacking else Exit.FAULT


def listed(folder: Place) -> dict[str, bool]:
    """The names of what lies in a folder, and whether each is a folder itself; nothing where there is none. Raises UserError
    where that cannot be read: a store's libraries answer `exists` and `is_dir` with no, then."""
    try:
        with reading(folder):
            if isinstance(folder, Path):
                return {path.name: path.is_dir() for path in folder.iterdir()}
            rows = folder.fs.ls(folder.path, detail=True)
    except ABSENT:
        return {}
    named = {PurePosixPath(row["name"].strip("/")): row["type"] == "directory" for row in rows}
    inside = PurePosixPath(folder.path.strip("/"))  # a store may list a folder in itself
    return {name.name: is_folder for name, is_folder in named.items() if name.parent == inside}


def remove(path: Place) -> None:
    """A folder with all that is in it, as far as that is possible."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.fs.rm(path.path, recursive=True)
    except Exception:  # it is not there, or stays until the next save
        return


def rename(path: Place, target: Place) -> None:
    """Of a folder without folders; a store copies its files one by one."""
    if isinstance(path, Path):
        path.rename(str(target))
    else:
        for file in path.fs.find(path.path, withdirs=False):
            path.fs.copy(file, (target / file.rpartition("/")[2]).path)  # type: ignore[union-attr]
        remove(path)


def sync(path: Place) -> None:
    """What was created, renamed or removed in a folder survives a loss of power from here on."""
    if isinstance(path, Path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
