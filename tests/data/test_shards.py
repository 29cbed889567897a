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

from lejepa_scale.cli.main import main
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import WRITING, expand
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


def messy(root: Path) -> Path:
    """A folder as people have them: 6 images of two classes, one of them behind a link, and what lies beside."""
    for name in (
        "cat/a.png", "cat/b.JPG", "cat/deep/c.png", "stray.png", ".ipynb_checkpoints/a-checkpoint.png",
        "__MACOSX/cat/._a.png", "cat/.hidden.png", "cat/._a.png",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(len(name)))
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    for i in range(3):
        (elsewhere / f"{i}.png").write_bytes(picture(100 + i))
    for name in ("cat/a.jxl", "cat/d.jxl", "cat/mask.npy", "README", "cat/notes.txt"):
        (root / name).write_text("x")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat/loop").symlink_to(root)
    (root / "cat/self").symlink_to(root / "cat")
    (root / "cat/gone.png").symlink_to(root / "nothing")
    return root


def test_a_messy_folder_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = messy(tmp_path / "photos"), tmp_path / "shards"
    words = ["shards", "make", "folder", str(root), "--shuffle", "-1", "--out"]
    assert main([*words, str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote 1 shards to {out}: 6 images of 2 classes",
        "passed over:",
        "  4 hidden, or what systems and WebDataset keep for themselves, for instance .ipynb_checkpoints/",
        "  2 links or devices, not files, for instance cat/loop",
        "  2 .jxl of another ending than images have, for instance cat/a.jxl",
        "  1 .npy arrays beside pictures, for instance cat/mask.npy",
        "  1 .png beside the folders of the classes (--no-labels takes all images, without labels), for instance stray.png",
        "  1 .png links or devices, not files, for instance cat/gone.png",
        "  1 .txt of another ending than images have, for instance cat/notes.txt",
        "  1 without an ending, for instance README",
    ]
    (index,) = index_shards([str(out / "shard-000000.tar")])
    assert [index.key(m) for m in range(6)] == ["cat_a", "cat_b", "cat_deep_c", "dog_0", "dog_1", "dog_2"]
    assert index.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert main([*words, str(tmp_path / "all"), "--no-labels"]) == 0
    assert ": 7 images\n" in capsys.readouterr().out


def test_folders_are_classes_where_most_images_lie_in_them(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "raw/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    source = sources.folder(tmp_path, None, True)
    assert (source.total, source.classes, source.passed.kinds) == (4, (), {})


@pytest.mark.parametrize("method", ["gz", "bz2", "xz"])
def test_compressed_tars_are_those_they_hold(method: str, tmp_path: Path) -> None:
    root = messy(tmp_path / "photos")
    for name in (f"a.tar.{method}", "a.tar"):
        with tarfile.open(tmp_path / name, f"w:{method if name.endswith(method) else ''}") as tar:  # type: ignore[call-overload]
            tar.add(root, ".")
    packed, plain = (sources.tar(tmp_path / name, "", 3, True) for name in (f"a.tar.{method}", "a.tar"))
    assert list(packed.samples) == list(plain.samples)
    assert (packed.total, packed.classes) == (3, ("cat",))  # a link to a folder holds nothing in a tar
    assert packed.passed.kinds == plain.passed.kinds
    data = (tmp_path / f"a.tar.{method}").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut is not a readable tar file"):
        sources.tar(tmp_path / "cut", "", None, True)


def test_folders_without_shards_say_what_to_do(tmp_path: Path) -> None:
    root = messy(tmp_path / "photos")
    with pytest.raises(UserError, match=rf"holds images, as .*: lejepa shards make folder {root} --out SHARDS"):
        expand([str(root)])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tgz").touch()
    with pytest.raises(UserError, match=r"a\.tgz, which is compressed.* lejepa shards make tar .*a\.tgz --out SHARDS"):
        expand([str(tmp_path / "packed")])
    shards = tmp_path / "shards"
    write(sources.scenes(5, 16, 0, "jpg", 90), shards)
    (shards / "._shard-000000.tar").touch()
    (shards / "shard-000000.tar").rename(shards / "shard-000000.TAR")
    assert expand([str(shards)]) == [str(shards / "shard-000000.TAR")]
    (shards / WRITING).touch()
    with pytest.raises(UserError, match="is being written by `lejepa shards make`, or that was interrupted"):
        expand([str(shards)])


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
    (tmp_path / "y.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="run `git lfs pull`"):
        sources.tar(tmp_path / "y.tar", "", None, True)
    with pytest.raises(UserError, match="CIFAR10 has the splits train and test, not training"):
        sources.torchvision("CIFAR10", tmp_path, "training", False, "png", 90)
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


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"\x28\xb5\x2f\xfd", r"is compressed \(zstd\).* unpack it \(unzstd\)\."),
        (b"\x04\x22\x4d\x18", r"is compressed \(lz4\).* unpack it \(unlz4\)\."),
        (b"\x1f\x9d", r"is compressed \(compress\).* unpack it \(uncompress\)\."),
        (
            b"\x1f\x8b",
            r"is compressed \(gzip\).* or make shards of it: lejepa shards make tar '\S* x\.tar' --out SHARDS",
        ),
        (
            b"PK\x03\x04",
            "is a zip file: unpack it, and make shards of what was in it: lejepa shards make folder FOLDER",
        ),
        (b"PAR1", "is a Parquet file"),
        (b"\x89HDF\r\n", "is an HDF5 file"),
        (b"\xff\xd8\xff\xe0", "is an image, not a tar of some"),
        (b"\x89PNG\r\n", "is an image, not a tar of some"),
        (b'<?xml version="1.0"?><Error>', "is an XML document, as stores answer where they refuse"),
        (b'{"error": 403}', "is a JSON document"),
    ],
)
def test_what_is_no_tar_is_named(head: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / " x.tar"
    path.write_bytes(head + bytes(range(256)) * 8)
    with pytest.raises(UserError, match=says):
        index_shards([str(path)])
    if b"\x1f\x8b" not in head:
        with pytest.raises(UserError, match=says.partition(r".*")[0]):
            sources.tar(path, "", None, False)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "holds no tar and no image .*, but nothing"),
        (("a.zip", "b.zip", "c.heic", "README"), r"but 2 \.zip, 1 \.heic, 1 without an ending"),
        (("a.tar.zst",), r"a\.tar\.zst, which is compressed, and samples are read at any place: unpack it \(unzstd\)"),
    ],
)
def test_a_folder_without_anything_to_read_says_what_it_holds(
    names: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=says):
        expand([str(tmp_path)])
