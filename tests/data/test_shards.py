"""Writing shards: scenes, folders, tars; the same input gives the same bytes, and nothing is overwritten silently."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, Command
from torchvision.datasets import FakeData

from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.make import sources, synthetic
from lejepa_scale.data.make.writer import is_written, write_shards
from lejepa_scale.errors import UserError

MAKE = ROOT / "tools/make_shards.py"


def write(source: sources.Source, out: Path, per_shard: int = 10) -> list[Path]:
    return write_shards(
        source.samples, out, per_shard=per_shard, total=source.total, classes=source.classes, description={"a": "b"}
    )


def picture(colour: int) -> bytes:
    return sources.encode(np.full((20, 30, 3), colour, np.uint8), "png", 90)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    a, label = synthetic.render(13, 40, seed=3)
    assert a.shape == (40, 40, 3)
    assert label == 13 % len(synthetic.CLASSES)
    assert np.array_equal(a, synthetic.render(13, 40, seed=3)[0])
    assert not np.array_equal(a, synthetic.render(13, 40, seed=4)[0])
    assert not np.array_equal(a, synthetic.render(23, 40, seed=3)[0])  # the same class


def test_colour_and_place_say_nothing_of_the_class() -> None:
    """The mean colour of an image predicts its class no better than chance (nearest class mean, held out)."""
    scenes = [synthetic.render(i, 24, seed=0) for i in range(600)]
    colours = np.array([image.mean((0, 1)) for image, _ in scenes])
    labels = np.array([label for _, label in scenes])
    centres = np.array([colours[:300][labels[:300] == c].mean(0) for c in range(10)])
    found = ((colours[300:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (found == labels[300:]).mean() < 0.2


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    one = write(sources.scenes(25, 16, 7, "jpg", 90), tmp_path / "one")
    two = write(sources.scenes(25, 16, 7, "jpg", 90), tmp_path / "two")
    assert [p.name for p in one] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert json.loads((tmp_path / "one/dataset.json").read_text())["count"] == 25
    assert not list((tmp_path / "one").glob("writing-*"))
    assert [len(index) for index in index_shards([str(path) for path in one])] == [10, 10, 5]


def test_folders_and_tars_of_folders(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name, colour in {"cat/a.png": 1, "cat/a.PNG.jpg": 2, "dog/deep/b.png": 3, "dog/b.x.png": 4}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(colour))
    (root / "cat/notes.txt").write_text("not an image")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(root, "./train")
    for source in (
        sources.folder(root, None, True),
        sources.tar(tmp_path / "photos.tar", "train/", None, True),
    ):
        samples = list(source.samples)
        assert source.total == len(samples) == 4
        assert source.classes == ("cat", "dog")
        assert sorted(s.label for s in samples) == [0, 0, 1, 1]
        assert {s.image for s in samples} == {picture(c) for c in (1, 2, 3, 4)}
    shuffled = [s.key for s in sources.folder(root, 1, True).samples]
    assert sorted(shuffled) == sorted(s.key for s in sources.folder(root, None, True).samples)
    assert all(s.label is None for s in sources.folder(root, None, False).samples)


def test_images_whose_names_differ_in_the_ending_stay_apart(tmp_path: Path) -> None:
    for name in ("a.b.png", "a_b.png", "a_b.jpg"):
        (tmp_path / name).write_bytes(picture(5))
    keys = [s.key for s in sources.folder(tmp_path, None, True).samples]
    assert len(set(keys)) == 3
    (shard,) = write(sources.folder(tmp_path, None, True), tmp_path / "out")
    (index,) = index_shards([str(shard)])
    assert len(index) == 3


def test_another_dataset_is_never_overwritten_silently(tmp_path: Path) -> None:
    write(sources.scenes(5, 16, 0, "jpg", 90), tmp_path)
    assert is_written(tmp_path, {"a": "b"}, overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        is_written(tmp_path, {"a": "c"}, overwrite=False)
    assert not is_written(tmp_path, {"a": "c"}, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.tar").touch()
    with pytest.raises(UserError, match="did not write"):
        is_written(foreign, {}, overwrite=False)


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        sources.folder(tmp_path / "none", None, True)
    with pytest.raises(UserError, match="holds no image"):
        sources.folder(tmp_path, None, True)
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"x\.tar is not a readable tar"):
        sources.tar(tmp_path / "x.tar", "", None, True)
    with pytest.raises(UserError, match="no dataset CIFAR11"):
        sources.torchvision("CIFAR11", tmp_path, None, False, "png", 90)


def test_torchvision_dataset(tmp_path: Path) -> None:
    source = sources.torchvision("FakeData", tmp_path, None, False, "png", 90)
    first = next(source.samples)
    image = cv2.imdecode(np.frombuffer(first.image, np.uint8), cv2.IMREAD_COLOR_RGB)
    theirs, label = FakeData()[0]
    assert np.array_equal(image, np.array(theirs))
    assert first.label == label


def test_the_tool_writes_and_then_has_nothing_to_do(command: Command, tmp_path: Path) -> None:
    arguments = (MAKE, "synthetic", "--out", tmp_path / "s", "--count", 12, "--size", 16, "--per-shard", 5)
    assert "wrote 3 shards" in command(*arguments).stdout
    assert "holds this dataset already" in command(*arguments).stdout
    index = command(ROOT / "tools/index_shards.py", tmp_path / "s")
    assert "3 shards, 12 samples, 12 with a label of 10 classes" in index.stdout
    with tarfile.open(tmp_path / "s/shard-000000.tar") as tar:
        assert [m.name for m in tar.getmembers()][:2] == ["00000000.cls", "00000000.jpg"]
        assert io.BytesIO(tar.extractfile("00000000.cls").read()).read() == b"0"  # type: ignore[union-attr]
