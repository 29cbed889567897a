"""Bytes of shards, by range or from front to back: local files here, others by transport.py or from the node's cache.
Refuses to know what a shard holds."""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.shardlists import expand_urls

from lejepa_scale.addresses import HIDDEN, Address, is_remote
from lejepa_scale.config.paths import user_cache
from lejepa_scale.data.faults import SampleFault, printable
from lejepa_scale.data.io.cache import Cache
from lejepa_scale.data.io.kinds import COMPRESSED_TARS, HEAD, IMAGES, compression, of_compressed
from lejepa_scale.data.io.transport import THREADS, NoRanges, Refused, Transport, expect_size
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.threads import Pool, result

_OPEN_FILES = 128
_SHOWN = 5  # endings
_LOOKED_AT = 10_000  # files of a folder without shards
WRITING = ".writing"  # a file in a folder of shards that is not finished


def addresses(pattern: str) -> list[str]:
    """What a pattern stands for: braces, and WebDataset's `a.tar::b.tar`; two colons of an IPv6 host are its own. Raises
    UserError for braces that do not match."""
    held = re.sub(r"(?<=//\[)[^]/]*(?=\])", lambda host: host[0].replace("::", "\0"), pattern)
    try:
        found = [url.replace("\0", "::") for url in expand_urls(held) if url]
    except ValueError as error:
        raise UserError(f"data.shards = {Address(pattern)}: a brace of it is not closed, or not opened.") from error
    return [_as_written(url) for url in found]


def _as_written(url: str) -> str:
    """With the home folder for `~`, and a scheme in small letters."""
    scheme, mark, rest = url.partition("://")
    if mark and not url.startswith("pipe:"):
        return f"{scheme.lower()}{mark}{rest}"
    return os.path.expanduser(url)


def expand(patterns: Sequence[str]) -> list[Address]:
    """Brace patterns, and folders of tars, to a list of shard paths or URLs, in the order given. Raises UserError
    where there is no shard among them."""
    urls: list[str] = []
    for pattern in patterns:
        if is_remote(pattern) and HIDDEN in pattern:
            raise UserError(
                f"data.shards = {pattern}: {HIDDEN} stands for a user, password or signature, which is written nowhere. "
                "Give the address as it is, on the command line or in a file of yours."
            )
        if re.match(r"[a-z]+::[a-z0-9]+://", pattern):  # fsspec's; elsewhere WebDataset's sign between several
            last = Address(pattern.rpartition("::")[2])
            raise UserError(
                f"shard {Address(pattern)}: chained addresses are not read. Give {last}, with data.cache_dir for copies "
                "on a disk of the node."
            )
        for url in addresses(pattern):
            if not is_remote(url) and Path(url).is_dir():
                urls += _in_folder(Path(url))
            elif not is_remote(url) and any(c in url for c in "*?["):
                urls += sorted(glob(url, recursive=True))
            else:
                urls.append(url)
    if images := [url for url in urls if not is_remote(url) and Path(url).suffix[1:].lower() in IMAGES]:
        parent = Path(images[0]).parent
        raise UserError(
            f"data.shards names {images[0]}, an image; shards are tar files. Give the folder that it lies in ({parent}), or "
            f"shards made of that: lejepa shards make folder {shlex.quote(str(parent))} --out SHARDS."
        )
    if not urls:
        hints = [hint for url in patterns if not is_remote(url) and Path(url).is_dir() for hint in _instead(Path(url))]
        raise UserError(
            f"data.shards = {', '.join(str(Address(p)) for p in patterns) or 'nothing'} matches no shard. "
            + (
                " ".join(hints)
                or "Give tar files, a folder that holds some, or a brace pattern such as shards/train-{000000..000099}.tar."
            )
        )
    return [Address(url) for url in urls]


def _in_folder(folder: Path) -> list[str]:
    """Its tars, but for what systems leave beside them."""
    if (folder / WRITING).exists():
        raise UserError(
            f"{folder} is being written by `lejepa shards make`, or that was interrupted: wait for it, or repeat its "
            "command."
        )
    return sorted(str(p) for p in folder.iterdir() if p.suffix.lower() == ".tar" and not p.name.startswith("."))


def _instead(folder: Path) -> list[str]:
    """What to do with a folder without tars, by what lies in it."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.lower().endswith(COMPRESSED_TARS):
            with path.open("rb") as file:
                advice = of_compressed(compression(file.read(HEAD)) or "", str(path))
            return [f"{folder} holds {path.name}, which is compressed, and samples are read at any place: {advice}."]
    below = list(islice(folder.rglob("*"), _LOOKED_AT))
    for path in below:
        if path.suffix.lower() == ".tar":
            return [
                f"{folder} holds shards further down, as {path}: give '{folder}/**/*.tar', or the folders they lie in."
            ]
    for path in below:
        if path.suffix[1:].lower() in IMAGES:
            command = f"lejepa shards make folder {shlex.quote(str(folder))} --out SHARDS"
            return [f"{folder} holds images, as {path}: make shards of them: {command}."]
    endings = Counter(path.suffix.lower() or "without an ending" for path in below if path.is_file())
    most = sorted(endings.items(), key=lambda row: (-row[1], row[0]))[:_SHOWN]
    held = ", ".join(f"{count:,} {printable(ending)}" for ending, count in most)
    return [f"{folder} holds no tar and no image ({', '.join(sorted(IMAGES))}), but {held or 'nothing'}."]


class Reader:
    """Reads shards for one process. Connections and open files are its own: a copy in a forked process opens others.

    `read_timeout`: seconds for each piece of up to 4 MiB. `retries`: failures in a row before the shard is given up;
    the pause between them starts at `pause` seconds and doubles up to 30. `cache_dir`: where whole remote shards are
    kept; without one, samples come by range request. Commands (`pipe:`) cannot seek and are always kept.
    """

    def __init__(
        self,
        *,
        read_timeout: float = 30.0,
        retries: int = 5,
        cache_dir: Path | None = None,
        cache_gb: float | None = None,
        pause: float = 0.5,
    ) -> None:
        self._transport = Transport(read_timeout, retries, pause)
        cap = None if cache_gb is None else int(cache_gb * 1e9)
        self.cache = Cache(cache_dir, cap, self._transport.patience()) if cache_dir else None
        self._pipes = self.cache or Cache(user_cache() / "shards", cap, self._transport.patience())
        self._process: _Process | None = None

    def read(self, url: str, offset: int, size: int, *, nbytes: int, digest: str = "", fresh: bool = False) -> bytes:
        """Bytes [offset, offset + size) of a shard that its index says has `nbytes`. Raises SampleFault where a local
        file has lost them, UserError where the shard is gone, changed, or out of reach. `fresh` passes by the cache."""
        if fresh and (cache := self._cache_of(url)):
            cache.drop(url, digest)
            self._live().files.pop(url, None)
        file = None if fresh and not url.startswith("pipe:") else self._file(url, nbytes, digest)
        if file is None:
            try:
                return b"".join(self._chunks(url, offset, offset + size, nbytes))
            except NoRanges as error:
                if self._cache_of(url) is None:
                    raise UserError(f"cannot read shard {url}: {error}") from error
                file = self._file(url, nbytes, digest, wait=True)
            assert file is not None
        try:
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise SampleFault(f"cannot be read: {error}") from error
        if len(data) != size:
            raise SampleFault(f"only {len(data)} of its {size} bytes are there: the file was cut short")
        return data

    def ahead(self, url: str, offset: int, size: int, *, nbytes: int, digest: str) -> Future[bytes] | None:
        """Start reading a sample of a remote shard in the background; None where that would gain nothing. Nothing
        is raised here, but by the future."""
        if not is_remote(url):
            return None
        return self._live().pool().submit(lambda: self.read(url, offset, size, nbytes=nbytes, digest=digest))

    def awaited(self, future: Future[bytes], url: str, size: int, nbytes: int) -> bytes:
        """What `ahead` reads, once all that was begun before has come. Raises what `read` does."""
        seconds = self._transport.patience(nbytes if self._cache_of(url) else size)
        try:
            return result(future, seconds)
        except TimeoutError as error:
            raise UserError(
                f"shard {url}: {size} bytes did not come in {seconds:g} s, and no error either. Check the network; the "
                "same command goes on from the last checkpoint."
            ) from error

    def stream(self, url: str) -> Iterator[bytes]:
        """A whole shard from front to back. Raises UserError where it is out of reach."""
        return self._chunks(url, 0, None, None)

    def get(self, url: str) -> bytes | None:
        """A small file, or None where there is none (or it is not ours to read)."""
        try:
            if not is_remote(url):
                return Path(url).read_bytes()
            return b"".join(self._transport.chunks(url, 0, None, None))
        except (Refused, OSError):
            return None

    def put(self, url: str, data: bytes) -> bool:
        """Write a small file, whole or not at all; False where that is not possible."""
        try:
            if not is_remote(url):
                path = Path(url)
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
                unfinished.write_bytes(data)
                unfinished.replace(path)
            elif url.startswith(("http://", "https://")):
                return False
            else:
                filesystem, path_there = self._transport.filesystem(url)
                filesystem.pipe_file(path_there, data)
        except UserError:
            raise
        except Exception:  # whatever the store raises when it refuses
            return False
        return True

    # -- open files, one set per process

    def _live(self) -> _Process:
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process()
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def _cache_of(self, url: str) -> Cache | None:
        return self._pipes if url.startswith("pipe:") else self.cache if is_remote(url) else None

    def _file(self, url: str, nbytes: int, digest: str, *, wait: bool = False) -> BinaryIO | None:
        files = self._live().files
        file = files.get(url)
        if file is None:
            file = self._opened(url, nbytes, digest, wait)
            if file is None:
                return None
        with self._live().lock:
            files[url] = file
            files.move_to_end(url)
            if len(files) > _OPEN_FILES:
                files.popitem(last=False)  # closed when the last thread that reads it lets go
        return file

    def _opened(self, url: str, nbytes: int, digest: str, wait: bool) -> BinaryIO | None:
        cache = self._cache_of(url)
        if cache is not None:
            must = wait or url.startswith("pipe:")
            return cache.open(url, nbytes, digest, self._chunks(url, 0, None, nbytes), wait=must)
        if is_remote(url):
            return None
        try:
            file = open(url, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard {url}: {error.strerror}. It was there when it was indexed.") from error
        expect_size(url, os.fstat(file.fileno()).st_size, nbytes)
        return file  # type: ignore[return-value]

    def _chunks(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        try:
            yield from self._transport.chunks(url, start, stop, nbytes) if is_remote(url) else _local(url)
        except NoRanges:
            raise
        except Refused as error:
            raise UserError(f"cannot read shard {url}: {error}") from error


class _Process:
    """What one process has open."""

    def __init__(self) -> None:
        self.pid, self.lock = os.getpid(), threading.Lock()
        self.files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._pool: Pool | None = None

    def pool(self) -> Pool:
        """The threads that read ahead."""
        if self._pool is None:
            self._pool = Pool(THREADS)
        return self._pool


def gone(url: str) -> str:
    """What is said of a local shard that is not there."""
    return f"shard {url} does not exist. Check data.shards (and that its disk is mounted)."


def _local(url: str) -> Iterator[bytes]:
    try:
        with open(url, "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except FileNotFoundError as error:
        raise UserError(gone(url)) from error
    except OSError as error:
        raise UserError(f"cannot read shard {url}: {error.strerror}.") from error
