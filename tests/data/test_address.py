"""What makes two addresses one shard, and what servers say of them."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import small_config
from shardserver import Server, serve

from lejepa_scale.config import validate
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io import transport
from lejepa_scale.data.io.address import expired, folder_of, identity, shard_name
from lejepa_scale.data.io.reader import Reader, expand
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError

HOST = "https://h.example/d/a.tar"
AWS = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=K%2F20261127&X-Amz-Date=20261127T000000Z&X-Amz-Expires=3600"
SIGNED = {
    "AWS, version 4": AWS + "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=t%2F&X-Amz-Signature=ab12",
    "AWS, version 2": "AWSAccessKeyId=K&Signature=a%2Bb&Expires=1764201600",
    "Google Cloud": AWS.replace("X-Amz", "X-Goog") + "&X-Goog-Signature=1",
    "Azure": "sv=2024-11-04&st=2026-11-26T00%3A00Z&se=2026-11-27T01%3A00%3A00Z&sr=b&sp=r&sig=x%3D",
    "CloudFront": "Expires=1764201600&Signature=x&Key-Pair-Id=K",
    "CloudFront with a policy": "Policy=eyJ&Signature=x&Key-Pair-Id=K&Hash-Algorithm=SHA256",
    "headers of the answer": AWS + "&X-Amz-Signature=1&response-content-disposition=attachment",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signature_is_no_part_of_a_shard(kind: str) -> None:
    signed = f"{HOST}?{SIGNED[kind]}"
    assert identity(signed) == HOST
    assert (shard_name(signed), folder_of(signed)) == ("a.tar", "https://h.example/d")
    both = f"{HOST}?file=b.tar&{SIGNED[kind]}&part=2"
    assert identity(both) == f"{HOST}?file=b.tar&part=2"
    assert shard_name(both) == shard_name(f"{HOST}?file=b.tar&part=2") != shard_name(signed)


def test_other_parameters_are() -> None:
    one, two = f"{HOST}?file=a.tar", f"{HOST}?file=b.tar"
    assert len({identity(one), identity(two), identity(HOST)}) == 3
    assert shard_name(one).startswith("a.tar.")
    assert len({shard_name(one), shard_name(two), shard_name(HOST)}) == 3
    assert (
        identity(f"{HOST}?versionId=3&st=1") == f"{HOST}?versionId=3&st=1"
    )  # of Azure's names only beside its signature
    for plain in ("data/what?.tar", "pipe:curl 'http://h/a.tar?Signature=1'"):
        assert identity(plain) == plain
    assert shard_name("data/what?.tar") == "what?.tar"


def test_signatures_that_have_ended() -> None:
    after, before = datetime(2026, 11, 27, 1, 0, 1, tzinfo=UTC), datetime(2026, 11, 27, 0, 59, tzinfo=UTC)
    for kind in ("AWS, version 4", "Google Cloud", "Azure"):
        assert expired(f"{HOST}?{SIGNED[kind]}", after) == datetime(2026, 11, 27, 1, tzinfo=UTC), kind
        assert expired(f"{HOST}?{SIGNED[kind]}", before) is None, kind
    assert expired(f"{HOST}?{SIGNED['AWS, version 2']}", after) == datetime.fromtimestamp(1764201600, UTC)
    for url in (
        HOST,
        f"{HOST}?Expires=soon",
        f"{HOST}?Expires=99999999999999",
        f"{HOST}?se=never",
        f"{HOST}?X-Amz-Date=x",
    ):
        assert expired(url, after) is None


@pytest.fixture
def server(scenes: Path) -> Iterator[Server]:
    with serve() as running:
        for number, path in enumerate(sorted(scenes.glob("*.tar"))[:2]):
            running.files[f"get?file={number}.tar"] = path.read_bytes()
        yield running


def test_shards_that_a_query_tells_apart(server: Server, scenes: Path) -> None:
    urls = [server.url(f"get?file={number}.tar") for number in range(2)]
    first, second = index_shards(urls)
    local = [index.digest for index in index_shards([str(path) for path in sorted(scenes.glob("*.tar"))[:2]])]
    assert [first.digest, second.digest] == local
    assert [index.digest for index in index_shards(urls)] == local  # from their index files
    with pytest.raises(UserError, match="is listed twice"):
        index_shards([urls[0], f"{urls[0]}&Signature=1"])


def test_an_ended_signature_is_named(server: Server) -> None:
    with pytest.raises(UserError, match=r"HTTP status 404: its signature ended on 2026-01-01 at 01:00 UTC"):
        index_shards([server.url("none.tar?X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600")])


def test_a_new_signature_finds_the_copy(server: Server, tmp_path: Path) -> None:
    plain = "get?file=0.tar"
    for signature in ("1", "2"):
        server.files[f"{plain}&Signature={signature}"] = server.files[plain]
    by = Reader(cache_dir=tmp_path / "cache")
    for signature in ("1", "2"):
        (index,) = index_shards([server.url(f"{plain}&Signature={signature}")], reader=by)
        read_image(by, index, 0)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_a_copy_is_waited_for_where_a_server_knows_no_ranges(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache, also while another process makes the copy."""
    by = Reader(cache_dir=tmp_path / "cache")
    (index,) = index_shards([server.url("get?file=0.tar")], reader=by)
    server.always = "no-range"
    asked: list[bool] = []
    opened = by.cache.open  # type: ignore[union-attr]

    def busy_at_first(*arguments: object, wait: bool) -> object:
        asked.append(wait)
        return opened(*arguments, wait=wait) if wait else None  # type: ignore[arg-type]

    monkeypatch.setattr(by.cache, "open", busy_at_first)
    data = read_image(by, index, 0)
    assert asked == [False, True]
    server.always = None
    monkeypatch.undo()
    assert data == read_image(Reader(), index, 0)


def test_chained_addresses_are_refused_with_what_is_read() -> None:
    with pytest.raises(UserError, match=r"chained addresses are not read\. Give s3://b/a\.tar, with data\.cache_dir"):
        expand(["simplecache::s3://b/a.tar"])


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_addresses_of_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = transport.Transport(1.0, 0, 0.0)
    assert expand(["http://[::1]:9/{a,b}.tar", "c.tar::d.tar"]) == [
        *("http://[::1]:9/a.tar", "http://[::1]:9/b.tar"),
        *("c.tar", "d.tar"),
    ]
    with pytest.raises(UserError, match=r"cannot read shard http://\[::1\]:9/a\.tar beyond byte 0: .*refused"):
        list(connections.chunks("http://[::1]:9/a.tar", 0, None, None))


# -- patterns


def test_a_pattern_is_read_as_a_shell_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand(["~/{a,b}.tar", "HTTP://Host/A.tar", "Pipe.tar"]) == [
        *(f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"),
        *("http://Host/A.tar", "Pipe.tar"),
    ]
    for pattern in ("a{0..1.tar", "a}.tar"):
        with pytest.raises(UserError, match=rf"data\.shards = {re.escape(pattern)}: a brace of it is not closed"):
            expand([pattern])


def test_paths_of_a_configuration_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves the tilde of run.dir=~/run as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"index_dir": "~/index", "cache_dir": "~/copies", "shards": "http://h/a.tar"}
    config = validate(small_config("~/run", "", data=data, model={"init_from": "~/weights.pth"}))
    assert (config.run.dir, config.data.index_dir, config.data.cache_dir) == (
        *(tmp_path / "run", tmp_path / "index", tmp_path / "copies"),
    )
    assert config.model.init_from is not None
    assert config.model.init_from.source == f"{tmp_path}/weights.pth"


def test_a_scheme_that_nobody_reads_is_named() -> None:
    with pytest.raises(UserError, match=r"no package here reads ttp:// \(.*\)\. Check the address"):
        Reader(retries=0).get("ttp://h/a.tar")
