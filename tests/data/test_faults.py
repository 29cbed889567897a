"""The fault matrix: damaged shards, made here, and what is promised for each."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_views
from tars import link, tar_of

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Batch, Loader, evaluation_batches, open_mixture
from lejepa_scale.data.faults import Fault, append_to_quarantine
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.make import sources
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.errors import UserError

COUNT = 12


def picture(colour: int) -> bytes:
    return sources.encode(np.full((24, 24, 3), colour, np.uint8), "png", 90)


def members(count: int = COUNT) -> dict[str, bytes]:
    found = {}
    for i in range(count):
        found[f"{i:03d}.cls"] = str(i % 3).encode()
        found[f"{i:03d}.png"] = picture(10 * i)
    return found


def linking(target: str, kind: bytes = tarfile.LNKTYPE, name: str = "linked.png") -> bytes:
    """A shard whose last member is a link."""
    return tar_of(members(), [link(name, target, kind)])


def sparse(name: str) -> bytes:
    """A shard whose member is of the type that GNU tar gives to files with holes."""
    data = tar_of(members())
    at = place(data, name)
    header = bytearray(data[at : at + 512])
    header[156:157], header[148:156] = b"S", b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return replaced(data, at, bytes(header))


def place(data: bytes, name: str) -> int:
    """Byte at which the header of a member starts."""
    return tarfile.open(fileobj=io.BytesIO(data)).getmember(name).offset


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that promise many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = struct.pack(">I", 40) + b"IDAT" + bytes(44)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + pixels


GOOD = tar_of(members())
AT = place(GOOD, "005.png")


# -- found when a shard is indexed: refused, by name, with the byte where there is one

REFUSED: dict[str, tuple[bytes, str]] = {
    "cut between members": (GOOD[:AT], f"is cut short: no end-of-archive block after byte {AT}"),
    "cut inside a header": (GOOD[: AT + 100], "is cut short"),
    "cut inside an image": (GOOD[: AT + 530], "is cut short"),
    "cut inside the padding": (GOOD[: AT + 512 + len(picture(50)) + 3], "is cut short"),
    "damaged header": (replaced(GOOD, AT + 3, b"\xff\xff"), f"damaged header at byte {AT}"),
    "header of zeros": (replaced(GOOD, AT, bytes(512)), f"goes on after its end-of-archive block at byte {AT}"),
    "damaged first header": (replaced(GOOD, 0, b"\xff\xff"), "not a readable tar"),
    "joined tars": (GOOD + GOOD, "joined by cat"),
    "empty file": (b"", "is empty"),
    "empty tar": (tar_of({}), "holds no images"),
    "no images": (tar_of({"a.txt": b"hello", "b.cls": b"1"}), "holds no images"),
    "same key twice": (tar_of([*members().items(), ("003.png", picture(9))]), "holds 003.png twice"),
    "compressed": (gzip.compress(GOOD), "is compressed"),
    "link for an image": (linking("000.png", tarfile.SYMTYPE), "linked.png is a link or a device"),
    "link to what is not there": (linking("999.png"), "linked.png is a link to 999.png, which is no image before it"),
    "link for a label": (linking("000.cls", name="linked.cls"), "linked.cls is a link"),
    "sparse image": (sparse("000.png"), "000.png is a sparse file"),
    "label of bytes": (tar_of({**members(), "004.cls": b"\xff\xfe"}), "004.cls holds b'\\xff\\xfe'"),
    "label of several lines": (tar_of({**members(), "004.cls": b"a\nb"}), "not a class number or name"),
    "no label": (tar_of({**members(), "004.cls": b" "}), "not a class number or name"),
    "negative label": (tar_of({**members(), "004.cls": b"-7"}), "004.cls holds -7: class numbers begin at 0"),
    "a book for a label": (tar_of({**members(), "004.cls": b"a" * 5000}), "004.cls holds 5,000 bytes"),
    "several dots": (
        tar_of({"a.left.png": picture(0), "a.cls": b"1"}),
        "names as a.left.png have several dots, and WebDataset ends a name at the first. Set image_key=left.png",
    ),
    "a web page": (b"<html>not found</html>", "is a web page"),
    "text": (b"not found" * 100, "not a readable tar"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
    "compressed otherwise": (lzma.compress(GOOD), "is compressed (xz)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(tmp_path: Path, name: str) -> None:
    data, words = REFUSED[name]
    shard = tmp_path / "damaged.tar"
    shard.write_bytes(data)
    (tmp_path / "sound.tar").write_bytes(GOOD)
    with pytest.raises(UserError) as caught:
        index_shards([str(tmp_path / "sound.tar"), str(shard)])
    assert f"shard {shard}" in str(caught.value)
    assert words in str(caught.value)
    assert "sound.tar" not in str(caught.value)


def test_all_unusable_shards_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD)
    (tmp_path / "b.tar").write_bytes(GOOD[:AT])
    (tmp_path / "c.tar").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        index_shards([str(tmp_path / f"{name}.tar") for name in "abcd"])
    text = str(caught.value)
    assert text.startswith("3 shards cannot be used.")
    assert all(f"{name}.tar {words}" in text for name, words in
               {"b": "is cut short", "c": "is empty", "d": "does not exist"}.items())  # fmt: skip
    assert "a.tar" not in text


# -- found when a sample is read: replaced, named and counted


def opened(*shards: Path, **options: Any) -> tuple[Data, Mixture]:
    data = Data(shards=[str(shard) for shard in shards], views=small_views(), **options)
    return data, open_mixture(data)


def first_epoch(
    data: Data, known: Mixture, batch: int = COUNT, ranks: int = 1, rank: int = 0, epochs: int = 1
) -> list[Batch]:
    loader = Loader(known, data, BatchPlan(micro_batch=batch // ranks, ranks=ranks), seed=0, rank=rank)
    return list(islice(loader, epochs * known.num_samples // batch))


SAMPLES: dict[str, tuple[dict[str, bytes], str]] = {
    "image that does not decode": ({"005.png": b"not an image"}, "12 bytes that no decoder recognizes"),
    "empty image": ({"005.png": b""}, "0 bytes that no decoder recognizes"),
    "image cut after its header": ({"005.png": picture(50)[:40]}, ""),
    "oversized image": (
        {"005.png": huge_png(10_000, 8_001)},
        "10000 x 8001 = 80010000 pixels, more than data.max_pixels = 80000000",
    ),
    "decompression bomb": ({"005.png": huge_png(60_000, 60_000)}, "60000 x 60000 = 3600000000 pixels, more than"),
    "missing image": ({"005.png": None}, "holds other members of this key, but no image"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_replaced_named_and_counted(tmp_path: Path, name: str) -> None:
    changed, words = SAMPLES[name]
    shard = tmp_path / "one.tar"
    shard.write_bytes(tar_of({k: v for k, v in {**members(), **changed}.items() if v is not None}))
    data, known = opened(shard)
    assert known.num_samples == COUNT  # nothing is shortened
    (batch,) = first_epoch(data, known)
    (fault,) = batch.skipped
    index = known.shards[0][0]
    assert (fault.shard, fault.key, fault.offset) == (str(shard), "005", int(index.offsets[5]))
    assert words in fault.reason
    assert sorted(batch.keys) == sorted(["006", *(f"{i:03d}" for i in range(COUNT) if i != 5)])


def test_bytes_that_change_after_indexing_are_found(tmp_path: Path) -> None:
    shard = tmp_path / "one.tar"
    shard.write_bytes(GOOD)
    data, known = opened(shard)
    at = int(known.shards[0][0].offsets[5]) + 45
    shard.write_bytes(replaced(GOOD, at, bytes([GOOD[at] ^ 1])))
    (batch,) = first_epoch(data, known)
    (fault,) = batch.skipped
    assert fault.key == "005"
    assert "bytes changed since it was indexed" in fault.reason


def test_a_short_read_is_a_fault_until_there_are_too_many(tmp_path: Path) -> None:
    shard = tmp_path / "one.tar"
    shard.write_bytes(GOOD)
    data, known = opened(shard, max_faults=4)
    batches = iter(Loader(known, data, BatchPlan(micro_batch=1), seed=0))
    next(batches)  # the file is open now
    index = known.shards[0][0]
    with shard.open("r+b") as file:
        file.truncate(int(index.offsets[10]) + 5)  # the last two are gone
    later = list(islice(batches, COUNT - 1))
    faults = [fault for batch in later for fault in batch.skipped]
    assert {fault.key for fault in faults} <= {"010", "011"}
    assert any("bytes are there: the file was cut short" in fault.reason for fault in faults)
    with shard.open("r+b") as file:
        file.truncate(int(index.offsets[2]))
    with pytest.raises(UserError, match=r"4 images in a row of shard \S*one\.tar.*data\.max_faults = 4"):
        list(islice(batches, COUNT))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shard: shard.unlink(), "cannot open shard .*one.tar: No such file"),
        (lambda shard: shard.write_bytes(GOOD[:AT]), "has .* bytes, but its index says"),
        (lambda shard: shard.write_bytes(GOOD + bytes(1024)), "has .* bytes, but its index says"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_lost_while_training_stops_it(
    tmp_path: Path, change: Callable[[Path], Any], words: str, workers: int
) -> None:
    shard = tmp_path / "one.tar"
    shard.write_bytes(GOOD)
    data, known = opened(shard, workers=workers)
    change(shard)
    with pytest.raises(UserError, match=words):
        first_epoch(data, known)


def test_a_shard_of_nothing_but_faults_stops_the_run(tmp_path: Path) -> None:
    for count, words in ((40, "16 images in a row"), (5, "5 images in a row")):
        shard = tmp_path / f"hopeless{count}.tar"
        shard.write_bytes(tar_of({f"{i:03d}.jpg": b"no" for i in range(count)}))
        data, known = opened(shard)
        with pytest.raises(UserError, match=rf"{words} of shard \S*hopeless{count}\.tar"):
            first_epoch(data, known, batch=1)


def test_replacements_do_not_depend_on_ranks_or_workers(tmp_path: Path) -> None:
    files = {f"{i:03d}.png": picture(5 * i) if i % 4 else b"bad" for i in range(48)}
    names = list(files)
    for number in range(2):
        part = {name: files[name] for name in names[24 * number : 24 * (number + 1)]}
        (tmp_path / f"{number}.tar").write_bytes(tar_of(part))
    data, known = opened(tmp_path / "0.tar", tmp_path / "1.tar")
    with_workers, _ = opened(tmp_path / "0.tar", tmp_path / "1.tar", workers=2)
    reference = first_epoch(data, known)
    assert sum(len(batch.skipped) for batch in reference) == 12
    for ranks, using in ((2, data), (1, with_workers)):
        parts = [first_epoch(using, known, ranks=ranks, rank=rank) for rank in range(ranks)]
        for whole, pieces in zip(reference, zip(*parts, strict=True), strict=True):
            assert whole.keys == [key for piece in pieces for key in piece.keys]
            assert whole.skipped == [fault for piece in pieces for fault in piece.skipped]


def test_evaluation_names_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one.tar").write_bytes(tar_of({**members(), "005.png": b"bad"}))
    (batch,) = evaluation_batches(str(tmp_path), image_size=24, batch_size=20)
    assert len(batch[0]) == COUNT - 1
    assert "left out:" in (error := caplog.text)
    assert "sample 005 at byte" in error


def test_missing_labels_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one.tar").write_bytes(tar_of({k: v for k, v in members().items() if k != "005.cls"}))
    _, known = opened(tmp_path / "one.tar")
    assert known.num_classes == 0
    assert f"1 of {COUNT} samples have no label" in caplog.text


def test_companions_of_no_image_are_no_samples(tmp_path: Path) -> None:
    """A README in a shard is none; a caption without its image, in a shard of captioned images, is one."""
    captions = {k.replace("cls", "txt"): v for k, v in members().items()}
    for extra, count in (({"README.md": b"x"}, COUNT), ({"zzz.txt": b"a cat"}, COUNT + 1)):
        (tmp_path / "one.tar").write_bytes(tar_of({**captions, **extra}))
        assert index_shards([str(tmp_path / "one.tar")], rebuild=True).counts.tolist() == [count]


def test_quarantine_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for step in (3, 4):
        append_to_quarantine(path, [Fault("a.tar", "k", 512, "bad")], step)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"step": 4, "shard": "a.tar", "key": "k", "offset": 512, "reason": "bad"}
    assert len(lines) == 2
