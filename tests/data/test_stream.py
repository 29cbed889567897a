"""Bytes of shards from everywhere: broken connections, deadlines, caches, several processes. What arrives is right."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import small_views
from shardserver import Server, serve

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.index.scan import ShardIndex, scan
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import Reader, expand
from lejepa_scale.data.samples import read_ahead, read_image
from lejepa_scale.errors import UserError


@pytest.fixture
def server(scenes: Path) -> Iterator[Server]:
    with serve() as running:
        for path in sorted(scenes.glob("*.tar")):
            running.files[f"set/{path.name}"] = path.read_bytes()
        yield running


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def reader(**options: Any) -> Reader:
    """Patient, for the machine may be busy; where a server falls silent, a test says for how long that is borne."""
    return Reader(**{"read_timeout": 20, "retries": 2, "pause": 0.01, **options})


def images(shards: Any, by: Reader) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for shard in shards:
        for member in range(len(shard)):
            assert shard.key(member) not in found
            found[shard.key(member)] = read_image(by, shard, member)
    return found


def truth(scenes: Path) -> dict[str, bytes]:
    """Every image by its key, as Python's own tarfile reads them."""
    found = {}
    for path in sorted(scenes.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".png"):
                    found[name.removesuffix(".png")] = tar.extractfile(name).read()  # type: ignore[union-attr]
    return found


def urls(server: Server) -> list[str]:
    return [server.url(name) for name in sorted(server.files)]


def test_patterns(scenes: Path, tmp_path: Path) -> None:
    assert expand(["a-{000..002}.tar", "http://host/{x,y}.tar"]) == [
        "a-000.tar", "a-001.tar", "a-002.tar", "http://host/x.tar", "http://host/y.tar",
    ]  # fmt: skip
    assert len(expand([str(scenes)])) == 3
    with pytest.raises(UserError, match="matches no shard"):
        expand([str(tmp_path)])


@pytest.mark.parametrize("behaviour", ["drop", "stall", "short", "503", "429", "elsewhere", "gone", "alter"])
@pytest.mark.parametrize("cached", [False, True])
def test_every_sample_arrives_over_a_bad_line(
    server: Server, scenes: Path, tmp_path: Path, behaviour: str, cached: bool
) -> None:
    stalls = {"read_timeout": 0.5, "retries": 6} if behaviour == "stall" else {}
    by = reader(cache_dir=tmp_path / "cache" if cached else None, **stalls)
    shards = index_shards(urls(server), reader=reader())
    for name, data in server.files.items():
        if cached:
            server.script[name].extend(["alter"] if behaviour == "alter" else ["drop", behaviour])
        else:
            rounds = 1 if behaviour == "stall" else 5
            server.script[name].extend([behaviour, "ok"] * rounds)
        assert data == (scenes / name.removeprefix("set/")).read_bytes()
    assert images(shards, by) == truth(scenes)
    assert not any(server.script.values()), "some trouble was never met"


def test_retries_go_on_from_the_byte_reached(server: Server) -> None:
    name = sorted(server.files)[0]
    whole = server.files[name]
    server.script[name].extend(["drop", "drop"])
    assert b"".join(reader().stream(server.url(name))) == whole
    half = len(whole) // 2
    assert [asked for _, asked in server.requests] == [
        None,
        f"bytes={half}-",
        f"bytes={half + (len(whole) - half) // 2}-",
    ]
    server.script[name].extend(["drop", "elsewhere"])  # the answer says which bytes it has
    assert b"".join(reader().stream(server.url(name))) == whole


def test_a_server_without_ranges_needs_the_cache(server: Server, scenes: Path, tmp_path: Path) -> None:
    server.always = "no-range"
    by = reader()
    shards = index_shards(urls(server), reader=by)
    with pytest.raises(UserError, match=r"shard-000000\.tar.*ignores range requests.*data\.cache_dir"):
        images(shards, by)
    assert images(shards, reader(cache_dir=tmp_path / "cache")) == truth(scenes)
    server.always = None
    name = sorted(server.files)[1]
    server.script[name].extend(["drop", "no-range"])  # resumed by passing over what was read
    assert b"".join(reader().stream(server.url(name))) == server.files[name]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("gone", "given up after 3 attempts"),
        ("503", "HTTP status 503; given up after 3 attempts"),
        ("stall", "given up after 3 attempts"),
        ("404", "HTTP status 404"),
        ("403", "credentials"),
    ],
)
def test_a_lost_shard_is_named(server: Server, behaviour: str, words: str) -> None:
    by = reader(read_timeout=0.2) if behaviour == "stall" else reader()
    (shard,) = index_shards(urls(server)[1:2], reader=reader())
    server.always = behaviour
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"shard-000001\.tar.*{words}"):
        read_image(by, shard, 0)
    assert time.monotonic() - started < 15  # not the patience of `reader`


def test_a_trickle_meets_the_deadline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that keep coming, too slowly, count as a failure."""
    by = reader(read_timeout=0.2, retries=0)

    class Trickle:
        def read1(self, _: int) -> bytes:
            time.sleep(0.05)
            return b"x"

    with pytest.raises(TimeoutError, match=r"bytes in 0\.2 s"):
        for _ in by._transport._before_deadline(Trickle()):
            pass


def test_a_shard_that_changes_is_refused(server: Server) -> None:
    by = reader()
    shards = index_shards(urls(server), reader=by)
    name = sorted(server.files)[0]
    server.files[name] += bytes(512)
    with pytest.raises(UserError, match=r"shard-000000\.tar has \d+ bytes, but its index says"):
        images(shards, by)


def test_connections_are_kept_and_not_shared_with_a_fork(server: Server) -> None:
    by = reader()
    (shard,) = index_shards(urls(server)[:1], reader=by)
    for member in range(8):
        read_image(by, shard, member)
    assert len(server.connections) <= 3  # the index's threads and ours
    before, expected = set(server.connections), read_image(by, shard, 0)
    child = os.fork()
    if not child:
        os._exit(0 if read_image(by, shard, 0) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(server.connections - before) == 1
    assert read_image(pickle.loads(pickle.dumps(by)), shard, 0) == expected


def test_reading_ahead_overlaps_requests(server: Server) -> None:
    by = reader()
    (shard,) = index_shards(urls(server)[:1], reader=by)
    ahead = [read_ahead(by, shard, member) for member in range(len(shard))]
    alone = [read_image(reader(), shard, member) for member in range(len(shard))]
    assert [read_image(by, shard, m, ahead=future) for m, future in enumerate(ahead)] == alone
    assert len(server.connections) > 5


def test_pipes_are_copied_and_retried(scenes: Path, tmp_path: Path) -> None:
    shard = sorted(scenes.glob("*.tar"))[0]
    flag = tmp_path / "flag"
    url = f"pipe:head -c 5000 {shard}; test -e {flag} || {{ touch {flag}; exit 3; }}; tail -c +5001 {shard}"
    by = reader(cache_dir=tmp_path / "cache")
    shards = index_shards([url], reader=by)
    assert flag.exists()
    assert len(images(shards, by)) == 32
    (copy,) = (tmp_path / "cache").glob("*.tar")
    assert copy.read_bytes() == shard.read_bytes()
    with pytest.raises(UserError, match=r"cannot read shard pipe:exit 3.*status 3.*given up"):
        scan("pipe:exit 3", by)
    with pytest.raises(UserError, match=r"no output in 0\.4 s"):
        scan("pipe:sleep 60", reader(read_timeout=0.4, retries=0))
    with pytest.raises(UserError, match="cut short"):  # a command that hides its failure
        scan(f"pipe:head -c 5000 {shard} || true", by)


def test_object_stores_through_fsspec(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in sorted(scenes.glob("*.tar")):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    there = [f"memory://bucket/{path.name}" for path in sorted(scenes.glob("*.tar"))]
    by = reader()
    failures = iter([OSError("reset"), None, b"", None, OSError("reset")] + [None] * 10_000)
    original = type(memory).cat_file

    def flaky(self: Any, path: str, **span: Any) -> bytes:
        failure = next(failures)
        if isinstance(failure, OSError):
            raise failure
        return original(self, path, **span)[: 100 if failure == b"" else None]

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    shards = index_shards(there, reader=by)
    assert memory.exists("/bucket/manifest.index.npz")  # beside the shards, where the store can be written
    assert images(shards, by) == truth(scenes)
    memory.rm("/bucket/shard-000002.tar")
    with pytest.raises(UserError, match=r"memory://bucket/shard-000002\.tar.*Check the address"):
        images(shards, by)
    memory.rm("/bucket", recursive=True)


def test_a_missing_package_is_named() -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install s3fs"):
            Reader().get("s3://bucket/key")
    with pytest.raises(UserError, match=r"shard nonsense://x\.tar"):
        Reader().get("nonsense://x.tar")


# -- the cache


def test_the_cache_keeps_its_cap_and_evicts_the_oldest(server: Server, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    size = max(map(len, server.files.values()))
    by = reader(cache_dir=folder, cache_gb=2.5 * size / 1e9)
    shards = index_shards(urls(server), reader=by)
    for turn in (0, 1, 0, 2):  # 1 is the least recently opened when 2 comes
        read_image(reader(cache_dir=folder, cache_gb=2.5 * size / 1e9), shards[turn], 0)
        time.sleep(0.01)
    assert sum(p.stat().st_size for p in folder.glob("*.tar")) <= 2.5 * size
    server.requests.clear()
    fresh = reader(cache_dir=folder, cache_gb=2.5 * size / 1e9)
    for turn in (0, 2):
        read_image(fresh, shards[turn], 1)
    assert server.requests == []
    read_image(fresh, shards[1], 1)
    assert len(server.requests) == 1
    assert images(shards, by) == truth(scenes)  # whoever has an evicted file open reads on
    with pytest.raises(UserError, match=r"more than data\.cache_gb"):
        read_image(reader(cache_dir=tmp_path / "small", cache_gb=1e-9), shards[0], 0)


def _read_all(folder: Path, shards: list[ShardIndex], start: Any, results: Any) -> None:
    start.wait()
    by = Reader(cache_dir=folder)
    results.put([[read_image(by, shard, m) for m in range(len(shard))] for shard in shards])


@pytest.mark.parametrize("scheme", ["http", "pipe"])
def test_two_processes_fetch_a_shard_once(server: Server, scenes: Path, tmp_path: Path, scheme: str) -> None:
    log, shard = tmp_path / "log", sorted(scenes.glob("*.tar"))[0]
    addresses = urls(server) if scheme == "http" else [f"pipe:echo x >> {log}; sleep 0.3; cat {shard}"]
    shards = list(index_shards(addresses, reader=Reader()))
    server.requests.clear()
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    children = [context.Process(target=_read_all, args=(tmp_path / "cache", shards, start, results)) for _ in range(2)]
    for child in children:
        child.start()
    start.set()
    first, second = (results.get(timeout=90) for _ in children)
    for child in children:
        child.join(10)
    assert first == second == [[read_image(Reader(), s, m) for m in range(len(s))] for s in shards]
    if scheme == "http":
        whole = [asked for _, asked in server.requests[: len(server.requests)] if asked is None]
        assert len(whole) == len(shards)
    else:
        assert log.read_text().count("x") == 2  # once for both, once by this process for its own cache
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_what_a_dead_process_left_is_swept(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "0123.partial").write_bytes(b"half")
    by = reader(cache_dir=folder)
    read_image(by, index_shards(urls(server)[:1], reader=by)[0], 0)
    assert not list(folder.glob("*.partial"))


# -- the loader on top


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_batches_from_a_bad_server_are_those_of_the_disk(
    server: Server, scenes: Path, tmp_path: Path, workers: int, cached: bool
) -> None:
    def batches(shards: Any, **options: Any) -> list[Any]:
        data = Data(shards=shards, views=small_views(), **options)
        return list(islice(Loader(open_mixture(data), data, BatchPlan(micro_batch=12), seed=0), 8))

    for name in server.files:
        server.script[name].extend(["ok", "drop", "503", "short"])
    cache = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    ours = batches(urls(server), workers=workers, read_timeout=20, retries=4, **cache)
    assert len({key for batch in ours for key in batch.keys}) == 96
    for a, b in zip(ours, batches(str(scenes)), strict=True):
        assert a.keys == b.keys
        assert all(x.equal(y) for x, y in zip(a.views, b.views, strict=True))
        assert a.skipped == []
