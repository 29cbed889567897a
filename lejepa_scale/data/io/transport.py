"""Bytes from elsewhere: http(s), object stores through fsspec, commands. With a deadline, and with retries that go on from
the byte reached. Refuses to know what the bytes are."""

from __future__ import annotations

import base64
import logging
import multiprocessing
import os
import random
import select
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import urllib3

from lejepa_scale.addresses import WithoutSecrets
from lejepa_scale.data.io.address import expired, index_again, split_user
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.threads import within

logger = logging.getLogger(__name__)
for _name in ("urllib3.poolmanager", "urllib3.connectionpool"):  # which log the addresses that they ask
    logging.getLogger(_name).addFilter(WithoutSecrets())

THREADS = 16  # range requests under way at once in a process
_PIECE = 4 << 20  # bytes that the deadline is for, and that a retry may lose the count of failures for
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_WORTH_A_RETRY = {408, 425, 429}  # and everything from 500 on


# A command, whose process group is killed when standard input ends: when we close it, or are gone, however that went.
_LEASHED = """
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL -$$; } >/dev/null 2>&1 &
exec 3<&-
exec /bin/sh -c "$1"
"""


class Refused(Exception):
    """The other side answered, and its answer will be the same next time."""


class NoRanges(Refused):
    """It sends a shard whole, or not at all."""


@dataclass
class _Connections:
    """Of one process."""

    pid: int
    pools: dict[str, Any] = field(default_factory=dict)
    filesystems: dict[str, Any] = field(default_factory=dict)


class Transport:
    """`read_timeout`: seconds for each piece of up to 4 MiB. `retries`: failures in a row before a shard is given up; the
    pause between them starts at `pause` seconds and doubles up to 30. A copy in a forked process connects anew."""

    def __init__(self, read_timeout: float, retries: int, pause: float) -> None:
        self.read_timeout, self.retries, self.pause = read_timeout, retries, pause
        self._held: _Connections | None = None
        self._told: set[tuple[str, str]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def patience(self, nbytes: int = 0) -> float:
        """Seconds after which `nbytes` have come, or been given up: each piece with all its attempts and pauses."""
        a_piece = 2 * (self.retries + 1) * self.read_timeout + _LONGEST_PAUSE * self.retries
        return (1 + nbytes // _PIECE) * a_piece

    def _connections(self) -> _Connections:
        if self._held is None or self._held.pid != os.getpid():
            self._held = _Connections(os.getpid())
        return self._held

    def _pool(self, url: str) -> Any:
        """Kept-alive connections to the host of `url`, through the proxy that the environment names for it."""
        parts, pools = urlsplit(url), self._connections().pools
        if parts.netloc not in pools:
            proxy, user = split_user(urllib.request.getproxies().get(parts.scheme) or "")
            if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
                headers = {"proxy-authorization": _basic(user)} if user else None
                pools[parts.netloc] = urllib3.ProxyManager(proxy, maxsize=THREADS, proxy_headers=headers)
            else:
                pools[parts.netloc] = urllib3.PoolManager(maxsize=THREADS)
        return pools[parts.netloc]

    def chunks(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        """Bytes [start, stop) of a shard, to its end without `stop`; `nbytes` is its size, where known. Attempts go on from
        the byte reached, until the end or too many failures in a row. Raises Refused, UserError."""
        attempt = self._pipe if url.startswith("pipe:") else self._http if url.startswith("http") else self._object
        failures, position, landmark = 0, start, start
        while True:
            try:
                for chunk in attempt(url, position, stop, nbytes):
                    position += len(chunk)
                    yield chunk
                return
            except (UserError, Refused):
                raise
            except Exception as error:  # every library has its own for a connection that breaks
                failures = 1 if position - landmark >= _PIECE else failures + 1
                landmark = position
                if failures > self.retries:
                    raise UserError(
                        f"cannot read shard {url} beyond byte {position}: {_reason(error)}; given up after "
                        f"{failures} attempts of up to {self.read_timeout:g} s (data.retries = {self.retries}, "
                        "data.read_timeout). Check the network; the same command goes on from the last checkpoint."
                    ) from error
                time.sleep(min(_LONGEST_PAUSE, self.pause * 2 ** (failures - 1)) * random.uniform(0.75, 1.25))

    def _http(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}
        address, user = split_user(url)
        if user:  # sent to this host alone: not to one that it redirects to
            headers["Authorization"] = _basic(user)
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self._pool(address).request(
            "GET", address, headers=headers, preload_content=False, timeout=self.read_timeout,
            retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5),
        )  # fmt: skip
        self._tell_of_redirects(urlsplit(address).netloc, urlsplit(split_user(response.geturl() or address)[0]).netloc)
        try:
            total = _answered(response, url, start, stop)
            if total is not None and nbytes is not None:
                expect_size(url, total, nbytes)
            end = stop if stop is not None else nbytes if nbytes is not None else total
            skip = start if response.status == 200 else 0
            position = start - skip
            for chunk in self._before_deadline(response):
                piece = chunk[max(0, start - position) : None if end is None else max(0, end - position)]
                position += len(chunk)
                if piece:
                    yield piece
                if end is not None and position >= end:
                    break
            if end is not None and position < end:
                raise EOFError(f"the connection ended after byte {position} of {end}")
        finally:
            if response.length_remaining == 0:
                response.release_conn()
            else:  # what is left of the body would be taken for the next answer
                response.close()

    def _tell_of_redirects(self, asked: str, answered: str) -> None:
        """Once for two hosts in a process, and once for all its workers where it was met before they began."""
        if answered not in ("", asked) and (asked, answered) not in self._told:
            self._told.add((asked, answered))
            if multiprocessing.parent_process() is None:
                logger.info("%s sends requests on to %s, which the bytes of its shards come from.", asked, answered)

    def _before_deadline(self, response: Any) -> Iterator[bytes]:
        since, got = time.monotonic(), 0
        while chunk := response.read1(1 << 18):
            yield chunk
            got += len(chunk)
            if got >= _PIECE:
                since, got = time.monotonic(), 0
            elif time.monotonic() - since > self.read_timeout:
                raise TimeoutError(f"{got} bytes in {self.read_timeout:g} s")

    def _object(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        filesystem, path = self.filesystem(url)
        try:
            end = stop if stop is not None else nbytes  # object stores' clients have no deadline in common
            if end is None:
                end = int(within(self.read_timeout, lambda: filesystem.size(path)))
            while start < end:
                upto = min(start + _PIECE, end)
                data = within(self.read_timeout, partial(filesystem.cat_file, path, start=start, end=upto))
                if not data:
                    raise EOFError(f"no bytes after byte {start} of {end}")
                yield data
                start += len(data)
        except (FileNotFoundError, PermissionError) as error:
            raise Refused(f"{_reason(error)}. Check the address and your credentials.") from error

    def filesystem(self, url: str) -> tuple[Any, str]:
        """fsspec's filesystem for an address, and the path in it. Raises UserError where its package is not
        installed, or has no use for the user that the address names."""
        scheme = url.partition("://")[0]
        try:
            import fsspec

            kind, known = fsspec.get_filesystem_class(scheme), self._connections().filesystems
            options = kind._get_kwargs_from_urls(url)
            if split_user(url)[1] and not {"user", "username", "password", "token"} & options.keys():
                raise UserError(
                    f"shard {url}: {scheme}:// takes no user or password from an address. Give them as {kind.__module__} "
                    "expects, in the environment or its own files, and leave them out of the address."
                )
            place = repr((scheme, sorted(options.items())))
            if place not in known:
                known[place] = fsspec.filesystem(scheme, **options)
            return known[place], kind._strip_protocol(url)
        except (ImportError, ValueError) as error:
            if package := _PACKAGES.get(scheme):
                raise UserError(
                    f"shard {url}: {scheme}:// needs {package}: pip install {package} ({error})."
                ) from error
            raise UserError(f"shard {url}: no package here reads {scheme}:// ({error}). Check the address.") from error

    def _pipe(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        """Standard output of a command. It cannot seek: a retry runs it again and passes over what was read."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", _LEASHED, "sh", url.removeprefix("pipe:")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            position = 0
            while True:
                if not select.select([process.stdout], [], [], self.read_timeout)[0]:
                    raise TimeoutError(f"no output in {self.read_timeout:g} s")
                chunk = os.read(process.stdout.fileno(), 1 << 20)
                if not chunk:
                    break
                if position + len(chunk) > start:
                    yield chunk[max(0, start - position) :]
                position += len(chunk)
            if code := process.wait(self.read_timeout):
                raise OSError(f"the command ended with status {code} after {position} bytes")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # in a call that a signal does not end
                    process.wait(self.read_timeout)
            process.stdin.close()
            process.stdout.close()


def _basic(user: str) -> str:
    """RFC 7617, for `user:password` as it stands in an address (RFC 3986): percent-encoded."""
    both = user if ":" in user else f"{user}:"
    return "Basic " + base64.b64encode(unquote_to_bytes(both)).decode()


def _answered(response: Any, url: str, start: int, stop: int | None) -> int | None:
    """Size of the whole shard as the server states it; raises for every answer but the bytes that were asked for."""
    status = response.status
    if status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if not span.startswith(f"{start}-"):
            raise OSError(f"asked for bytes from {start}, the server sent {span or 'an unnamed range'}")
        return int(total) if total.isdigit() else None
    if status == 200:
        if start and stop is not None:
            raise NoRanges("the server ignores range requests. Set data.cache_dir, so that shards are copied whole.")
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    if status == 416:
        raise Refused(f"it ends before byte {start}, which its index promises. Restore it, or run {index_again(url)}.")
    if status >= 500 or status in _WORTH_A_RETRY:
        raise OSError(f"HTTP status {status}")
    if ended := expired(url):
        raise Refused(
            f"HTTP status {status}: its signature ended on {ended:%Y-%m-%d at %H:%M} UTC. Sign the address anew."
        )
    raise Refused(f"HTTP status {status}. Check the address and your credentials.")


def expect_size(url: str, size: int, nbytes: int) -> None:
    """Raises UserError for a shard that is not as long, in bytes, as its index says."""
    if size != nbytes:
        raise UserError(
            f"shard {url} has {size} bytes, but its index says {nbytes}. It changed: restore it, or run "
            f"{index_again(url)}, and start again."
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
