"""Bytes of shards, by range or from front to back: local files, http(s), object stores through fsspec, pipes. Remote ones
with a deadline, and with retries that go on from the byte reached. Refuses to know what a shard holds."""

from __future__ import annotations

import hashlib
import os
import queue
import random
import select
import signal
import subprocess
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import urllib3
from webdataset.shardlists import expand_urls

from lejepa_scale.data.cache import Cache
from lejepa_scale.data.faults import SampleFault
from lejepa_scale.errors import UserError

T = TypeVar("T")
_PIECE = 4 << 20  # bytes that the deadline is for, and that a retry may lose the count of failures for
_OPEN_FILES = 128
_THREADS = 16  # range requests under way at once in a process
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_WORTH_A_RETRY = {408, 425, 429}  # and everything from 500 on


def expand(patterns: list[str]) -> list[str]:
    """Brace patterns, and folders of tars, to a list of shard paths or URLs. Refuses an empty outcome."""
    urls: list[str] = []
    for pattern in patterns:
        expanded = expand_urls(pattern) if pattern else []
        for url in expanded:
            if not is_remote(url) and Path(url).is_dir():
                urls += sorted(str(path) for path in Path(url).glob("*.tar"))
            elif not is_remote(url) and any(c in url for c in "*?["):
                urls += sorted(glob(url, recursive=True))
            else:
                urls.append(url)
    if not urls:
        raise UserError(
            f"data.shards = {', '.join(patterns) or 'nothing'} matches no shard. Give tar files, a folder that holds some, "
            "or a brace pattern such as shards/train-{000000..000099}.tar."
        )
    return urls


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


def shard_name(url: str) -> str:
    """Its file name, wherever it lies; of a command, a digest."""
    if url.startswith("pipe:"):
        return hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
    return (url.partition("?")[0] if is_remote(url) else url).rpartition("/")[2]


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lejepa_scale"


class _Refused(Exception):
    """The other side answered, and its answer will be the same next time."""


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
        self.read_timeout, self.retries, self.pause = read_timeout, retries, pause
        cap = None if cache_gb is None else int(cache_gb * 1e9)
        self.cache = Cache(cache_dir, cap) if cache_dir else None
        self._pipes = self.cache or Cache(user_cache() / "shards", cap)
        self._forget()

    def read(self, url: str, offset: int, size: int, *, nbytes: int, digest: str = "", fresh: bool = False) -> bytes:
        """Bytes [offset, offset + size) of a shard that its index says has `nbytes`. Raises SampleFault where a local
        file has lost them, UserError where the shard is gone, changed, or out of reach. `fresh` passes by the cache."""
        if fresh and (cache := self._cache_of(url)):
            cache.drop(url, digest)
            self._live().files.pop(url, None)
        file = None if fresh and not url.startswith("pipe:") else self._file(url, nbytes, digest)
        if file is None:
            return b"".join(self._chunks(url, offset, offset + size, nbytes))
        try:
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise SampleFault(f"cannot be read: {error}") from error
        if len(data) != size:
            raise SampleFault(f"only {len(data)} of its {size} bytes are there: the file was cut short")
        return data

    def ahead(self, url: str, offset: int, size: int, *, nbytes: int, digest: str) -> Future[bytes] | None:
        """Start reading a sample of a remote shard in the background; None where that would gain nothing."""
        if not is_remote(url):
            return None
        future: Future[bytes] = Future()
        self._live().tasks().put((future, lambda: self.read(url, offset, size, nbytes=nbytes, digest=digest)))
        return future

    def stream(self, url: str) -> Iterator[bytes]:
        """A whole shard from front to back."""
        return self._chunks(url, 0, None, None)

    def get(self, url: str) -> bytes | None:
        """A small file, or None where there is none (or it is not ours to read)."""
        try:
            if not is_remote(url):
                return Path(url).read_bytes()
            return b"".join(self._retried(url, 0, None, None))
        except (_Refused, OSError):
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
                filesystem, path_there = self._filesystem(url)
                filesystem.pipe_file(path_there, data)
        except UserError:
            raise
        except Exception:  # whatever the store raises when it refuses
            return False
        return True

    # -- open files and connections, one set per process

    def _forget(self) -> None:
        self._process: _Process | None = None

    def _live(self) -> _Process:
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process()
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def _cache_of(self, url: str) -> Cache | None:
        return self._pipes if url.startswith("pipe:") else self.cache if is_remote(url) else None

    def _file(self, url: str, nbytes: int, digest: str) -> BinaryIO | None:
        files = self._live().files
        file = files.get(url)
        if file is None:
            file = self._opened(url, nbytes, digest)
            if file is None:
                return None
        with self._live().lock:
            files[url] = file
            files.move_to_end(url)
            if len(files) > _OPEN_FILES:
                files.popitem(last=False)  # closed when the last thread that reads it lets go
        return file

    def _opened(self, url: str, nbytes: int, digest: str) -> BinaryIO | None:
        cache = self._cache_of(url)
        if cache is not None:
            wait = url.startswith("pipe:")
            return cache.open(url, nbytes, digest, self._chunks(url, 0, None, nbytes), wait=wait)
        if is_remote(url):
            return None
        try:
            file = open(url, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard {url}: {error.strerror}. It was there when it was indexed.") from error
        _expect_size(url, os.fstat(file.fileno()).st_size, nbytes)
        return file  # type: ignore[return-value]

    # -- bytes as they come

    def _chunks(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        try:
            yield from self._retried(url, start, stop, nbytes)
        except _Refused as error:
            raise UserError(f"cannot read shard {url}: {error}") from error

    def _retried(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        """Attempts from the byte reached, until the end or too many failures in a row."""
        if not is_remote(url):
            yield from _local(url)
            return
        attempt = self._pipe if url.startswith("pipe:") else self._http if url.startswith("http") else self._object
        failures, position, landmark = 0, start, start
        while True:
            try:
                for chunk in attempt(url, position, stop, nbytes):
                    position += len(chunk)
                    yield chunk
                return
            except (UserError, _Refused):
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
                time.sleep(min(30.0, self.pause * 2 ** (failures - 1)) * random.uniform(0.75, 1.25))

    def _http(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self._live().pool(url).request(
            "GET", url, headers=headers, preload_content=False, timeout=self.read_timeout,
            retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5),
        )  # fmt: skip
        try:
            total = _answered(response, url, start, stop)
            if total is not None and nbytes is not None:
                _expect_size(url, total, nbytes)
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
        filesystem, path = self._filesystem(url)
        try:
            end = stop if stop is not None else nbytes
            if end is None:
                end = int(_within(self.read_timeout, lambda: filesystem.size(path)))
            while start < end:
                upto = min(start + _PIECE, end)
                data = _within(self.read_timeout, partial(filesystem.cat_file, path, start=start, end=upto))
                if not data:
                    raise EOFError(f"no bytes after byte {start} of {end}")
                yield data
                start += len(data)
        except (FileNotFoundError, PermissionError) as error:
            raise _Refused(f"{_reason(error)}. Check the address and your credentials.") from error

    def _filesystem(self, url: str) -> tuple[Any, str]:
        scheme = url.partition("://")[0]
        try:
            import fsspec

            known = self._live().filesystems
            if scheme not in known:
                known[scheme] = fsspec.filesystem(scheme)
            return known[scheme], known[scheme]._strip_protocol(url)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(scheme, "a package of fsspec for it")
            raise UserError(f"shard {url}: {scheme}:// needs {package}: pip install {package} ({error}).") from error

    def _pipe(self, url: str, start: int, stop: int | None, nbytes: int | None) -> Iterator[bytes]:
        """Standard output of a command. It cannot seek: a retry runs it again and passes over what was read."""
        process = subprocess.Popen(
            url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
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
                process.wait()
            process.stdout.close()


class _Process:
    """What one process has open."""

    def __init__(self) -> None:
        self.pid, self.lock = os.getpid(), threading.Lock()
        self.files: OrderedDict[str, BinaryIO] = OrderedDict()
        self.filesystems: dict[str, Any] = {}
        self._pools: dict[str, Any] = {}
        self._tasks: queue.SimpleQueue[Any] | None = None

    def pool(self, url: str) -> Any:
        """Kept-alive connections to the host of `url`, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        if parts.netloc not in self._pools:
            proxy = urllib.request.getproxies().get(parts.scheme)
            if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
                self._pools[parts.netloc] = urllib3.ProxyManager(proxy, maxsize=_THREADS)
            else:
                self._pools[parts.netloc] = urllib3.PoolManager(maxsize=_THREADS)
        return self._pools[parts.netloc]

    def tasks(self) -> queue.SimpleQueue[Any]:
        """The queue of threads that read ahead: daemons, so that a stalled server cannot keep the process from ending."""
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            for _ in range(_THREADS):
                threading.Thread(target=_serve, args=(self._tasks,), daemon=True).start()
        return self._tasks


def _serve(tasks: queue.SimpleQueue[Any]) -> None:
    while True:
        _settle(*tasks.get())


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError: object stores' clients have no deadline in common."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, call), daemon=True).start()
    return future.result(seconds)


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
            raise _Refused("the server ignores range requests. Set data.cache_dir, so that shards are copied whole.")
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    if status == 416:
        raise _Refused(f"it ends before byte {start}, which its index promises. Run tools/index_shards.py on it.")
    if status >= 500 or status in _WORTH_A_RETRY:
        raise OSError(f"HTTP status {status}")
    raise _Refused(f"HTTP status {status}. Check the address and your credentials.")


def _local(url: str) -> Iterator[bytes]:
    try:
        with open(url, "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except FileNotFoundError as error:
        raise UserError(f"shard {url} does not exist. Check data.shards (and that its disk is mounted).") from error
    except OSError as error:
        raise UserError(f"cannot read shard {url}: {error.strerror}.") from error


def _expect_size(url: str, size: int, nbytes: int) -> None:
    if size != nbytes:
        raise UserError(
            f"shard {url} has {size} bytes, but its index says {nbytes}. It changed: restore it, or run "
            "tools/index_shards.py on it and start again."
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
