"""Plain folders of images in place of shards: small ones are copied into shards once, and of others the command is named."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT, Command, small_config

from lejepa_scale.config import Data
from lejepa_scale.config.paths import user_cache
from lejepa_scale.data import folders, open_mixture
from lejepa_scale.data.evaluation import evaluation_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.index.classes import class_numbers
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.make import sources, writer
from lejepa_scale.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return user_cache() / "folders"


def photos(root: Path, *names: str) -> Path:
    """A PNG of one colour for each name: that of its number."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.full((40, 40, 3), number, np.uint8))[1].tobytes())
    return root


def test_a_small_folder_is_copied_once_and_says_so(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = photos(tmp_path / "photos", "cat/a.png", "cat/b.png", "dog/a.png")
    (root / "notes.txt").touch()
    with caplog.at_level(logging.INFO):
        first = shards_of(str(root))
    assert first == [str(next(cache.iterdir()) / "shard-000000.tar")]
    assert [path.name for path in cache.iterdir()] == [Path(first[0]).parent.name]  # nothing unfinished is left
    assert f"{root} holds plain images, 4 files of 0.0 MB, and no shards" in caplog.text
    assert f"lejepa shards make folder {root} --out SHARDS" in caplog.text
    assert "1 .txt of another ending than images have, for instance notes.txt" in caplog.text
    caplog.clear()
    assert shards_of([str(root)]) == first
    assert shards_of([str(root)], build=False) == first
    assert not caplog.text

    ((pixels, labels),) = evaluation_batches(str(root), image_size=40, batch_size=8)
    names = class_numbers([index_shards(first)]).labels or ()
    found = {(int(x[0, 0, 0]), names[int(label)]) for x, label in zip(pixels, labels, strict=True)}
    assert found == {(0, "cat"), (1, "cat"), (2, "dog")}


def test_two_folders_agree_on_their_classes(tmp_path: Path) -> None:
    """Not by their numbers: one of them has a class that sorts before the others."""
    one = photos(tmp_path / "one", "cat/a.png", "dog/a.png")
    two = photos(tmp_path / "two", "ant/a.png", "cat/a.png", "dog/a.png")
    sets = [index_shards(shards_of(str(root))) for root in (one, two)]
    numbers = class_numbers(sets)
    assert numbers.labels == ("ant", "cat", "dog")
    assert sorted(numbers.of(sets[0][0], i) for i in range(2)) == [1, 2]


@pytest.mark.parametrize(
    "names", [("01", "1"), ("-1", "cat"), ("-2", "cat"), ("a\tb", "cat"), ("7", "cat"), ("3", "4")]
)
def test_every_folder_is_a_class_of_its_own(tmp_path: Path, names: tuple[str, str]) -> None:
    """Also where its name, as a label, would be another's, or none."""
    shards = index_shards(shards_of(str(photos(tmp_path / "photos", *(f"{name}/a.png" for name in names)))))
    numbers = class_numbers([shards])
    found = [numbers.of(shards[0], member) for member in range(2)]
    assert len(set(found)) == 2
    assert min(found) >= 0


@pytest.mark.parametrize("change", ["more", "less", "other", "renamed"])
def test_a_folder_that_changed_is_copied_again(tmp_path: Path, cache: Path, change: str) -> None:
    root = photos(tmp_path / "photos", "a.png", "b.png")
    before = shards_of(str(root))
    held = Path(before[0]).read_bytes()
    if change == "more":
        photos(root, "c.png")
    elif change == "less":
        (root / "a.png").unlink()
    elif change == "other":
        os.utime(root / "a.png", ns=(0, 0))
    else:
        (root / "a.png").rename(root / "a2.png")
    with pytest.raises(UserError, match="does not see them"):
        shards_of(str(root), build=False)
    after = shards_of(str(root))
    assert after != before
    assert Path(before[0]).read_bytes() == held  # a run may be reading it
    assert len(list(cache.iterdir())) == 2


def test_shards_are_what_is_meant_where_there_are_some(tmp_path: Path, cache: Path) -> None:
    root = photos(tmp_path / "photos", "a.png")
    shard = root / "a.tar"
    Path(shards_of(str(root))[0]).rename(shard)
    assert shards_of(str(root)) == [str(shard)]
    shard.rename(root / "a.tar.gz")
    with pytest.raises(UserError, match="is compressed"):
        shards_of(str(root))
    (root / "a.tar.gz").unlink()
    (root / writer.WRITING).touch()
    with pytest.raises(UserError, match="is being written"):
        shards_of(str(root))
    others = ["x-{0..1}.tar", "http://[::1]/{a,b}.tar", "pipe:cat a", ""]
    assert shards_of(others) == ["x-0.tar", "x-1.tar", "http://[::1]/a.tar", "http://[::1]/b.tar", "pipe:cat a"]
    with pytest.raises(UserError, match="chained addresses are not read"):
        shards_of("simplecache::s3://bucket/a.tar")


@pytest.mark.parametrize(("limit", "most"), [("MOST_FILES", 2), ("MOST_BYTES", 200)])
def test_a_large_folder_is_offered_the_command(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    root = photos(tmp_path / "photos", "a.png", "b.png", "c.png")
    monkeypatch.setattr(folders, limit, most)
    with pytest.raises(
        UserError, match=rf"more than are copied .* once: lejepa shards make folder {root} --out SHARDS"
    ):
        shards_of(str(root))
    assert not cache.exists()


def test_no_room_leaves_nothing_and_names_another_place(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos", "a.png")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.wds.TarWriter, "write", full)
    with pytest.raises(UserError, match=r"No space left on device\. Make shards elsewhere: .*XDG_CACHE_HOME"):
        shards_of(str(root))
    assert not list(cache.iterdir())


def test_an_image_or_a_folder_above_the_shards_says_what_to_give(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", "a.png", "deep/b.png")
    with pytest.raises(
        UserError, match=rf"names {root}/a\.png, an image; .* Give the folder that it lies in \({root}\)"
    ):
        shards_of(f"{root}/*.png")
    (shard,) = shards_of(str(root))
    above = Path(shard).parents[1]
    with pytest.raises(UserError, match=rf"holds shards further down, as {shard}: give '{above}/\*\*/\*\.tar'"):
        shards_of(str(above))
    assert shards_of(f"{above}/**/*.tar") == [shard]  # the advice


def test_training_on_a_folder_on_two_ranks_and_going_on(tmp_path: Path, command: Command) -> None:
    root = photos(tmp_path / "photos", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(16)))
    tree = small_config(tmp_path / "run", root)
    tree["engine"]["name"] = "ddp"
    script = (ROOT / "launchers/train.py", "--config", command.config(tree))
    done = command(*script, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("holds plain images") == 1
    assert "32 images in 1 shards" in done.stderr
    more = command(*script, "train.steps=5", ranks=2)
    assert more.returncode == 0, more.stderr
    assert "holds plain images" not in more.stderr
    (root / "cat/0.png").unlink()
    changed = command(*script, "train.steps=6", ranks=2)
    assert changed.returncode == 1
    assert "Restore them, or start a new run.dir" in changed.stderr


def test_the_order_is_that_of_shards_made_by_hand(tmp_path: Path) -> None:
    """The copy has what `lejepa shards make folder` makes, but for the names of the classes."""
    root = photos(tmp_path / "photos", *(f"{i}.png" for i in range(30)))
    source = sources.folder(root, 0, True)
    by_hand = writer.write_shards(
        source.samples, tmp_path / "out", per_shard=1000, total=30, classes=(), description={}
    )
    fingerprints = [open_mixture(Data(shards=str(x))).fingerprint for x in (root, by_hand[0].parent)]
    assert fingerprints[0] == fingerprints[1]
