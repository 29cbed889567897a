"""Plain folders of images where shards are asked for: small ones are copied into shards in the user's cache, once; for large
ones the command is named. Knows nothing of runs."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lejepa_scale.addresses import Address, is_remote
from lejepa_scale.config.paths import user_cache
from lejepa_scale.data.faults import printable
from lejepa_scale.data.index.keys import read_label
from lejepa_scale.data.index.passed import PassedOver
from lejepa_scale.data.io.kinds import COMPRESSED_TARS, IMAGES
from lejepa_scale.data.io.reader import WRITING, addresses, expand
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import Sample, write_shards
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)

MOST_FILES = 10_000  # of a folder that is copied unasked
MOST_BYTES = 2 * 10**9
_PER_SHARD = 1000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_FORMAT = b"1"  # of what is copied, and how: raise it where the same folder gives other shards


def shards_of(patterns: str | Sequence[str], *, build: bool = True) -> list[Address]:
    """`expand`, which also takes a folder of plain images of up to MOST_FILES files and MOST_BYTES bytes: its images, with
    the folders that they lie in as labels, are copied into shards in the user's cache when it is first asked for, or has
    changed. Without `build`, only what another process has copied is taken. Raises UserError where there is nothing to read,
    too much to copy, or no room."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in [pattern] if is_remote(pattern) else addresses(pattern):
            plain = not is_remote(path) and _holds_images_alone(Path(path))
            found.append(str(_copied(Path(path), build)) if plain else path)
    return expand(found)


def _holds_images_alone(folder: Path) -> bool:
    """No shards: they are what is meant wherever there are some."""
    if not folder.is_dir():
        return False
    try:
        names = [path.name.lower() for path in folder.iterdir()]
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(str(folder))}: {error.strerror}.") from error
    if WRITING in names or any(name.endswith((".tar", *COMPRESSED_TARS)) for name in names):
        return False
    return any(path.suffix[1:].lower() in IMAGES for path in islice(folder.rglob("*"), MOST_FILES))


@dataclass(frozen=True)
class _Listing:
    files: int
    nbytes: int
    digest: str


def _listed(folder: Path) -> _Listing | None:
    """Changes with every name, size and time of change below; None where there is more than is copied unasked."""
    digest, files, nbytes = hashlib.blake2b(_FORMAT, digest_size=8), 0, 0
    digest.update(str(folder.resolve()).encode())
    for name, path in sources.below(folder, PassedOver()):
        status = path.stat()
        files, nbytes = files + 1, nbytes + status.st_size
        if files > MOST_FILES or nbytes > MOST_BYTES:
            return None
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return _Listing(files, nbytes, digest.hexdigest())


def _copied(folder: Path, build: bool) -> Path:
    command = f"lejepa shards make folder {shlex.quote(str(folder))} --out SHARDS"
    listing = None if next(islice(folder.rglob("*"), MOST_FILES * 2, None), None) else _listed(folder)
    if listing is None:
        raise UserError(
            f"{printable(str(folder))} holds plain images, more than are copied into shards unasked ({MOST_FILES:,} files, "
            f"{MOST_BYTES / 1e9:g} GB). Make shards of them once: {command}, and give that folder instead."
        )
    out = user_cache() / "folders" / f"{folder.resolve().name}-{listing.digest}"
    if out.is_dir():
        return out
    if not build:
        raise UserError(
            f"{printable(str(folder))} was copied into shards in rank 0's cache; this rank does not see them ({out}) or "
            f"not the same files. Make shards on a disk that all nodes see: {command}."
        )
    logger.info(
        "%s holds plain images, %s files of %.1f MB, and no shards: they are copied into shards in %s, once. To have them "
        "where you like: %s.", printable(str(folder)), f"{listing.files:,}", listing.nbytes / 1e6, out, command,
    )  # fmt: skip
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        source = sources.folder(folder, 0, True)
        write_shards(
            _with_names(source),
            unfinished,
            per_shard=_PER_SHARD,
            total=source.total,
            classes=source.classes,
            description={"kind": "folder", "source": str(folder.resolve())},
        )
        if not out.is_dir():  # another run may have been as fast
            unfinished.rename(out)
    except OSError as error:
        elsewhere = f" Make shards elsewhere: {command}; or set XDG_CACHE_HOME to a folder with room."
        raise UserError(
            f"cannot copy {printable(str(folder))} into shards in {out}: {error}.{elsewhere * (error.errno in _NO_ROOM)}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if source.passed.notable:
        logger.warning("passed over in %s: %s", printable(str(folder)), "; ".join(source.passed.lines()))
    return out


def _with_names(source: sources.Source) -> Iterator[Sample]:
    """Labels as the names of their classes, so that two folders agree on them where one has a class more; as they are
    numbered where names cannot be told apart as labels (`1` and `01`), or are none."""
    try:
        labels = [read_label(name.encode(), ()) for name in source.classes]
    except ValueError:
        labels = []
    usable = {label for label in labels if isinstance(label, str) or (label is not None and label >= 0)}
    named = len(usable) == len(source.classes)
    for sample in source.samples:
        yield replace(sample, label=source.classes[int(sample.label)]) if named and sample.label is not None else sample
