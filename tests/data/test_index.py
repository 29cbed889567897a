"""Sidecars and manifests: what they promise is checked, what is missing is made, what is wrong is named."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shardserver import serve

from lejepa_scale.cli.main import main
from lejepa_scale.data.index import shards as module
from lejepa_scale.data.index.files import MANIFEST_ROW, IndexLocation
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io.reader import Reader, expand
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    out = tmp_path / "set"
    out.mkdir()
    for path in scenes.glob("*.tar"):
        shutil.copy(path, out)
    return out


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read from front to back, in order."""
    seen: list[str] = []
    original = module.scan

    def counted(url: str, *arguments: object) -> object:
        seen.append(Path(url).name)
        return original(url, *arguments)

    monkeypatch.setattr(module, "scan", counted)
    return seen


def indexed(folder: Path, **options: object) -> Shards:
    return index_shards(expand([str(folder)]), **options)  # type: ignore[arg-type]


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return main(["shards", "index", *map(str, arguments)])


def test_the_index_finds_the_bytes(folder: Path) -> None:
    shards = indexed(folder)
    assert (len(shards), shards.counts.tolist()) == (3, [32, 32, 32])
    for shard in shards:
        for member in (0, 31):
            assert read_image(Reader(), shard, member).startswith(b"\x89PNG")
    assert shards[1].key(0) == "00000032"
    assert shards[0].labels.tolist() == [i % 10 for i in range(32)]


def test_a_start_reads_the_manifest_and_nothing_else(
    folder: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed(folder)
    assert len(scans) == 3
    read: list[str] = []
    original = Reader.get
    monkeypatch.setattr(Reader, "get", lambda self, url: read.append(Path(url).name) or original(self, url))
    shards = indexed(folder)
    assert read == ["manifest.index.npz"]
    assert len(shards[2]) == 32
    assert read[1:] == ["shard-000002.tar.index.npz"]
    assert len(scans) == 3


def test_memory_for_sidecars_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_SAMPLES", 70)
    shards = indexed(folder)
    for number in (0, 1, 0, 2, 1):
        assert len(shards[number]) == 32
        assert sum(map(len, shards._held.values())) <= 70
    assert list(shards._held) == [2, 1]


def test_a_changed_shard_is_indexed_again(folder: Path, scans: list[str]) -> None:
    before = indexed(folder).fingerprint
    scans.clear()
    first, second = sorted(folder.glob("*.tar"))[:2]
    first.write_bytes(second.read_bytes() + bytes(512))
    shards = indexed(folder)
    assert scans == [first.name]
    assert shards[0].key(0) == "00000032"
    assert shards.fingerprint != before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    shutil.copy(path.with_name("shard-000001.tar.index.npz"), path)


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink, swap])
def test_a_damaged_sidecar_is_refused_by_training_and_mended_by_the_tool(
    folder: Path, scans: list[str], damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = indexed(folder)
    scans.clear()
    damage(folder / "shard-000000.tar.index.npz")
    with pytest.raises(UserError, match=r"index of shard \S*shard-000000\.tar is missing, damaged, or not the one"):
        indexed(folder)[0]
    assert run_tool(monkeypatch, folder) == 0
    assert scans == ["shard-000000.tar"]
    assert indexed(folder)[0].digest == whole[0].digest


@pytest.mark.parametrize("damage", [flip, halve])
def test_a_damaged_manifest_is_named_and_made_anew(
    folder: Path, scans: list[str], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before = indexed(folder)
    scans.clear()
    manifest = folder / "manifest.index.npz"
    sound = manifest.read_bytes()
    damage(manifest)
    after = indexed(folder)
    assert "manifest of" in caplog.text
    assert scans == []  # from the sidecars
    assert after.fingerprint == before.fingerprint
    assert manifest.read_bytes() == sound


def test_a_wrong_count_is_refused(folder: Path) -> None:
    """A manifest that is whole, but says another number than the sidecar."""
    shards = indexed(folder)
    rows = {path.name: row for path, row in zip(sorted(folder.glob("*.tar")), shards.rows.copy(), strict=True)}
    rows["shard-000001.tar"]["count"] += 1
    home = IndexLocation(str(folder), None, Reader())
    home.write_manifest(rows)
    wrong = indexed(folder)
    assert wrong.counts.tolist() == [32, 33, 32]
    assert len(wrong[0]) == 32
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        wrong[1]


def test_jobs_and_a_merge_equal_one_job(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(out: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((tmp_path / out).rglob("*.npz"))}

    assert run_tool(monkeypatch, folder, "--out", tmp_path / "one") == 0
    for part in range(2):
        assert run_tool(monkeypatch, folder, "--out", tmp_path / "many", "--job", f"{part}/2") == 0
    assert "manifest.index.npz" not in files("many")
    with monkeypatch.context() as patch:
        patch.setattr(module, "scan", None)  # the merge reads no shard
        assert run_tool(patch, folder, "--out", tmp_path / "many") == 0
    assert files("one") == files("many")
    assert len(files("one")) == 4
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, folder, "--job", "2/2")


def test_interrupted_indexing_goes_on_where_it_was(
    folder: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = module.scan

    def interrupted(url: str, *arguments: object) -> object:
        if url.endswith("2.tar"):
            raise KeyboardInterrupt
        return counted(url, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            indexed(folder, workers=1)
    assert scans == ["shard-000000.tar", "shard-000001.tar"]
    assert not (folder / "manifest.index.npz").exists()
    assert indexed(folder).counts.sum() == 96
    assert scans[2:] == ["shard-000002.tar"]


def test_a_subset_and_a_growing_folder_share_a_manifest(folder: Path, scans: list[str]) -> None:
    paths = expand([str(folder)])
    index_shards(paths[:1])
    index_shards(paths[1:])
    assert len(scans) == 3
    backwards = index_shards(paths[::-1])
    assert len(scans) == 3
    assert backwards[0].key(0) == "00000064"
    assert backwards.fingerprint != indexed(folder).fingerprint
    with pytest.raises(UserError, match="listed twice"):
        index_shards([paths[0], paths[0]])


def test_verify_finds_one_changed_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = indexed(folder)
    assert run_tool(monkeypatch, folder, "--verify") == 0
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[int(shards[1].offsets[7]) + 20] ^= 4
    path.write_bytes(data)
    assert run_tool(monkeypatch, folder, "--verify") == 2
    errors = capsys.readouterr().err
    assert f"shard {path} differs from its index: checksums of 1 samples, first 00000039" in errors


def test_remote_indexes_lie_in_the_cache_or_where_one_says(folder: Path, tmp_path: Path) -> None:
    with serve() as server:
        for path in folder.glob("*.tar"):
            server.files[f"set/{path.name}"] = path.read_bytes()
        urls = [server.url(name) for name in sorted(server.files)]
        local = indexed(folder)
        assert index_shards(urls).fingerprint == local.fingerprint
        assert len(list((tmp_path / "user").rglob("*.npz"))) == 4
        server.requests.clear()
        assert len(index_shards(urls)[0]) == 32
        assert not any(path.endswith(".tar") for path, _ in server.requests)
        index_shards(urls, index_dir=tmp_path / "mine")
        assert len(list((tmp_path / "mine").rglob("*.npz"))) == 4
        with pytest.raises(UserError, match=r"does not see the index.*data\.index_dir"):
            index_shards(urls, index_dir=tmp_path / "elsewhere", build=False)
        for path in folder.glob("*.npz"):  # the indexes were uploaded with the shards
            server.files[f"set/{path.name}"] = path.read_bytes()
        server.requests.clear()
        shutil.rmtree(tmp_path / "user")
        assert len(index_shards(urls)[0]) == 32
        assert not any(path.endswith(".tar") for path, _ in server.requests)
        assert index_shards(
            ["http://127.0.0.1:9/set/" + Path(u).name for u in urls[:1]], index_dir=_copy(tmp_path)
        ).rows


def _copy(tmp_path: Path) -> Path:
    """The index files of one address, where those of another are looked for."""
    (written,) = (tmp_path / "mine").iterdir()
    target = Path(IndexLocation("http://127.0.0.1:9/set", tmp_path / "moved", Reader()).written[0])
    shutil.copytree(written, target)
    return tmp_path / "moved"


def test_an_index_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write the index of"):
        indexed(folder, index_dir=tmp_path / "file")


@pytest.mark.unchecked
def test_a_start_on_a_billion_samples(tmp_path: Path) -> None:
    """100,000 shards that nobody serves: under 5 s and 200 MB, and no request."""
    base = "http://127.0.0.1:9/large"
    rows = np.zeros(100_000, MANIFEST_ROW)
    rows["count"], rows["nbytes"], rows["digest"] = 10_000, 10**9, b"0123456789abcdef0123456789abcdef"
    named = {f"{number:06d}.tar": row for number, row in enumerate(rows)}
    home = IndexLocation(base, tmp_path, Reader())
    home.write_manifest(named)
    del named
    parent, child = os.pipe()
    if not os.fork():  # its memory is its own
        before, started = _resident(), time.perf_counter()
        shards = index_shards(expand([base + "/{000000..099999}.tar"]), index_dir=tmp_path, build=False)
        shards.fingerprint  # noqa: B018
        report = f"{int(shards.counts.sum())} {time.perf_counter() - started} {_resident() - before}"
        os.write(child, report.encode())
        os._exit(0)
    os.close(child)
    samples, seconds, grown = map(float, os.read(parent, 100).split())
    print(f"{seconds:.2f} s, {grown / 1e6:.0f} MB")
    assert samples == 1e9
    assert seconds < 5
    assert grown < 200e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
