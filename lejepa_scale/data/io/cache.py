"""Copies of whole shards on a node's own disk: each is fetched by one process of the node, appears whole or not at all,
and the least recently opened give way to new ones. Refuses to know where bytes come from."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

from lejepa_scale.data.io.address import identity, index_again
from lejepa_scale.errors import UserError

_POLL_SECONDS = 0.1


class Cache:
    """Files of one folder, `cap` bytes at most with those being fetched. A file in use may be evicted: POSIX keeps its
    bytes for whoever has it open. `patience`: seconds that another process may hold us up without a sign of life."""

    def __init__(self, folder: Path, cap: int | None, patience: float) -> None:
        self.folder, self.cap, self.patience = folder, cap, patience

    def open(self, url: str, nbytes: int, digest: str, chunks: Iterator[bytes], *, wait: bool) -> BinaryIO | None:
        """The copy of a shard, made from `chunks` if there is none. While another process makes it, or while all room
        is taken by copies in the making: None, or with `wait` the copy once it is there. The digest of the index is
        part of the name, so that a shard that was written anew is fetched anew. Raises UserError where the shard is
        larger than the cache may be, or cannot be written."""
        if self.cap is not None and nbytes > self.cap:
            raise UserError(
                f"shard {url} has {nbytes / 1e9:.3g} GB, more than data.cache_gb = {self.cap / 1e9:g}. Raise it."
            )
        target = self._target(url, digest)
        life, since = 0, time.monotonic()
        while True:
            try:
                file = target.open("rb", buffering=0)
                os.utime(target)
                return file  # type: ignore[return-value]
            except FileNotFoundError:
                pass
            try:
                partial = self._claim(target)
                if partial is not None:
                    with partial:
                        if self._reserve(partial, nbytes):
                            return self._filled(partial, target, url, nbytes, chunks)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "Lower data.cache_gb or choose another data.cache_dir." if full else "Check data.cache_dir."
                raise UserError(f"cannot keep a copy of shard {url} in {self.folder}: {error}. {advice}") from error
            if not wait:
                return None
            if (now := self._last_write()) != life:
                life, since = now, time.monotonic()
            self._refuse_to_wait(since, f"other copies in {self.folder} to be written, for shard {url}")
            time.sleep(_POLL_SECONDS)

    def drop(self, url: str, digest: str) -> None:
        """Forget a copy whose bytes proved to be wrong."""
        self._target(url, digest).unlink(missing_ok=True)

    def _target(self, url: str, digest: str) -> Path:
        return self.folder / (
            hashlib.blake2b(f"{identity(url)} {digest}".encode(), digest_size=12).hexdigest() + ".tar"
        )

    def _last_write(self) -> int:
        """When any copy in the making, which are what one waits for, was last written to."""
        times = [0]
        for path in self.folder.glob("*.partial"):
            with suppress(FileNotFoundError):
                state = path.stat()
                times.append(state.st_mtime_ns if state.st_size else 0)  # without a size it waits for room itself
        return max(times)

    def _refuse_to_wait(self, since: float, what: str) -> None:
        if time.monotonic() - since > self.patience:
            raise UserError(
                f"waited {self.patience:g} s for {what}, and nothing moved. Another process of this node holds the lock: "
                f"find it (fuser -v {self.folder}/*) and end it, or choose another data.cache_dir."
            )

    def _claim(self, target: Path) -> BinaryIO | None:
        """The locked partial file, or None while another process holds it. The lock goes with the process that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _partial(target)
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # else it was finished or evicted in between
                if not target.exists():
                    return file  # type: ignore[return-value]
                path.unlink()
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        return None

    def _filled(
        self, partial: BinaryIO, target: Path, url: str, nbytes: int, chunks: Iterator[bytes]
    ) -> BinaryIO | None:
        position = 0
        try:
            for chunk in chunks:
                position += os.pwrite(partial.fileno(), chunk, position)
            if position != nbytes:
                raise UserError(
                    f"shard {url} gave {position} bytes, but its index says {nbytes}. It changed, or its command failed "
                    f"quietly: restore it, or run {index_again(url)}, and start again."
                )
            file = _partial(target).open("rb", buffering=0)
            _partial(target).rename(target)
        except BaseException:
            _partial(target).unlink(missing_ok=True)
            raise
        return file  # type: ignore[return-value]

    def _reserve(self, partial: BinaryIO, nbytes: int) -> bool:
        """Give the partial file its final size, which others count, once that fits under the cap; evict for it."""
        with (self.folder / "lock").open("ab") as lock:
            self._lock(lock)
            total, held = nbytes, []
            for path in self.folder.iterdir():
                try:
                    state = path.stat()
                    if path.suffix == ".partial" and _remove_abandoned(path):
                        continue
                except FileNotFoundError:
                    continue
                if state.st_ino != os.fstat(partial.fileno()).st_ino:
                    total += state.st_size
                if path.suffix == ".tar":
                    held.append((state.st_mtime_ns, state.st_size, path))
            for _, size, path in sorted(held):
                if self.cap is None or total <= self.cap:
                    break
                path.unlink(missing_ok=True)
                total -= size
            fits = self.cap is None or total <= self.cap
            os.ftruncate(partial.fileno(), nbytes if fits else 0)
            return fits

    def _lock(self, file: IO[bytes]) -> None:
        """Held for the time that it takes to list a folder, unless its process was stopped."""
        since = time.monotonic()
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse_to_wait(since, f"the lock {self.folder / 'lock'}")
                time.sleep(_POLL_SECONDS / 10)


def _partial(target: Path) -> Path:
    return target.with_suffix(".partial")


def _remove_abandoned(path: Path) -> bool:
    """A partial file that nobody has locked was left by a process that died."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
