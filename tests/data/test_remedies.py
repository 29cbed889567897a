"""Advice that works: each error's own words are followed, commands as they are printed, and then what was asked for is
done."""

from __future__ import annotations

import errno
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import small_config, small_views
from shardserver import Server, serve
from tars import shard

from lejepa_scale.addresses import Address
from lejepa_scale.cli.main import main
from lejepa_scale.config import BatchPlan, Data, load_config
from lejepa_scale.data import Loader, folders, open_mixture
from lejepa_scale.data.audit.check import read_log
from lejepa_scale.data.evaluation import evaluation_batches
from lejepa_scale.data.io.cache import Cache
from lejepa_scale.data.io.reader import WRITING, expand
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features

# What a user of a shell gives in place of a word in capitals.
Words = dict[str, str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


def png(colour: int) -> bytes:
    return cv2.imencode(".png", np.full((32, 32, 3), colour, np.uint8))[1].tobytes()


def of_images(path: Path, count: int = 8, label: str = "cls", colour: int = 0) -> Path:
    members = {f"{i:03d}.png": png(colour + i) for i in range(count)}
    return Path(shard(path, members | {f"{i:03d}.{label}": str(i % 2).encode() for i in range(count)}))


def refused(ask: Callable[[], Any], words: str) -> str:
    with pytest.raises(UserError, match=words) as caught:
        ask()
    return str(caught.value)


def run_command(message: str, **words: Any) -> None:
    """The one command that the message holds, with the words in capitals replaced."""
    (command,) = re.findall(r"lejepa (?:shards|order|train) [^`,;]+?(?=[`,;]|\.? |\.$|$)[^`,;]*", message)
    text = command.rstrip(". ")
    text = re.split(r"(?<=--out SHARDS)\b", text)[0]
    for name, value in words.items():
        text = text.replace(name, str(value))
    assert main(shlex.split(text)[1:]) == 0, text


def read(data: Data, count: int = 4) -> list[str]:
    """The keys of one batch."""
    with Loader(open_mixture(data), data, BatchPlan(micro_batch=count), seed=0) as loader:
        return next(iter(loader)).keys


def data_of(shards: Any, **options: Any) -> Data:
    return Data(shards=shards if isinstance(shards, list) else str(shards), views=small_views(), **options)


# -- what there is to read


def test_a_folder_of_images_is_made_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    for i in range(4):
        (photos / f"{i}.png").write_bytes(png(i))
    message = refused(lambda: expand([str(photos)]), "holds images")
    run_command(message, SHARDS=tmp_path / "a")
    assert len(read(data_of(tmp_path / "a"))) == 4
    monkeypatch.setattr(folders, "MOST_FILES", 2)
    message = refused(lambda: read(data_of(photos)), "more than are copied")
    run_command(message, SHARDS=tmp_path / "b")
    assert len(read(data_of(tmp_path / "b"))) == 4


def test_compressed_tars_are_made_into_shards(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(4)}
    shard(tmp_path / "packed/a.tar.gz", members, compression="gz")
    run_command(refused(lambda: read(data_of(tmp_path / "packed")), "is compressed"), SHARDS=tmp_path / "a")
    assert len(read(data_of(tmp_path / "a"))) == 4
    wrong = Path(shard(tmp_path / "b.tar", members, compression="gz"))
    run_command(refused(lambda: read(data_of(wrong)), r"is compressed \(gzip\)"), SHARDS=tmp_path / "c")
    assert len(read(data_of(tmp_path / "c"))) == 4


def test_an_image_in_place_of_a_shard_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png(1))
    message = refused(lambda: read(data_of(tmp_path / "photos/a.png")), "an image; shards are tar files")
    (folder,) = re.findall(r"lies in \((.*?)\)", message)
    assert read(data_of(folder), 1) == ["a"]
    run_command(message, SHARDS=tmp_path / "a")
    assert read(data_of(tmp_path / "a"), 1) == ["a"]


def test_shards_further_down_are_found_by_the_pattern(tmp_path: Path) -> None:
    of_images(tmp_path / "all/one/a.tar")
    message = refused(lambda: read(data_of(tmp_path / "all")), "further down")
    (pattern,) = re.findall(r"give '(.*?)'", message)
    assert len(read(data_of(pattern))) == 4


def test_an_interrupted_command_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "make", "synthetic", "--out", str(tmp_path / "a"), "--count", "8", "--size", "32"]
    assert main(words) == 0
    (tmp_path / "a" / WRITING).touch()
    (tmp_path / "a/dataset.json").unlink()
    refused(lambda: read(data_of(tmp_path / "a")), "or that was interrupted: wait for it, or repeat its command")
    assert main(words) == 0
    assert len(read(data_of(tmp_path / "a"))) == 4
    other = [*words[:-1], "40"]
    assert main(other) == 2
    assert main([*other, "--overwrite"]) == 0  # `or replace it with --overwrite`
    for torn in ("", '{"count": 8', "[1]", "{}"):
        (tmp_path / "a/dataset.json").write_text(torn)
        assert main(words) == 2
        assert "dataset.json is damaged" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_a_shard_to_be_drawn_more_often_has_a_weight(tmp_path: Path) -> None:
    path = str(of_images(tmp_path / "a.tar"))
    refused(
        lambda: read(data_of([path, path])), "listed twice in data.shards. To draw from it more often, raise its weight"
    )
    other = str(of_images(tmp_path / "b.tar"))
    assert len(read(data_of([{"shards": path, "weight": 2}, {"shards": other}]))) == 4


# -- keys and labels


def test_names_with_several_dots_are_chosen(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "a.tar", {f"{i}.left.png": png(i) for i in range(4)}))
    message = refused(lambda: read(data_of(path)), "have several dots")
    (key,) = re.findall(r"Set image_key=(\S+),", message)
    assert len(read(data_of([{"shards": str(path), "image_key": key}]))) == 4


def test_a_label_key_that_no_sample_has_is_checked(tmp_path: Path) -> None:
    path = of_images(tmp_path / "a.tar", label="txt")
    refused(
        lambda: read(data_of([{"shards": str(path), "label_key": "text"}])),
        r"no sample has a label at text\. Check label_key",
    )
    assert open_mixture(data_of([{"shards": str(path), "label_key": "txt"}])).num_classes == 2


def test_labels_that_are_not_those_of_the_index_are_indexed_again(tmp_path: Path) -> None:
    path = of_images(tmp_path / "a/a.tar")
    shard(path, {"0.png": png(0), "0.cls": b"cat", "1.png": png(1), "1.cls": b"dog"})
    data = data_of(path)
    assert open_mixture(data).num_classes == 2
    (names,) = path.parent.glob("labels.*.index.json")
    names.write_text(names.read_text().replace("dog", "cow"))

    def ask() -> list[str]:
        return read(data, 2)

    message = refused(ask, "the label dog of 1 .* is not among those of its shards' index")
    assert "`lejepa shards index --rebuild` on all of the source's shards" in message
    assert main(["shards", "index", "--rebuild", str(path)]) == 0
    assert sorted(ask()) == ["0", "1"]


def test_evaluation_without_labels_takes_a_folder_per_class(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/a", "dog/a")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(i))
    bare = Path(shard(tmp_path / "bare.tar", {"a.png": png(0), "b.png": png(1)}))

    def features(shards: str) -> Any:
        batches = evaluation_batches(shards, image_size=32, batch_size=2)
        ((_, labels),) = batches
        return Features(torch.zeros(len(labels), 4), labels)

    refused(
        lambda: features(str(bare)),
        "`lejepa shards make` writes it for images that lie in one folder per class",
    )
    assert main(["shards", "make", "folder", str(tmp_path / "photos"), "--out", str(tmp_path / "made")]) == 0
    assert sorted(features(str(tmp_path / "made")).labels.tolist()) == [0, 1]


# -- indexes


@pytest.mark.parametrize("with_index_dir", [False, True])
def test_an_index_that_is_lost_is_made_by_the_command(tmp_path: Path, with_index_dir: bool) -> None:
    path = of_images(tmp_path / "my shards/a.tar")
    options = {"index_dir": tmp_path / "my index"} if with_index_dir else {}
    data = data_of(path, **options)
    mixture = open_mixture(data)
    for sidecar in tmp_path.rglob("a.tar.index.npz"):
        sidecar.unlink()
    message = refused(lambda: mixture.shards[0][0], "is missing, damaged, or not the one that its manifest names")
    run_command(message)
    assert len(mixture.shards[0][0]) == 8
    assert len(list((tmp_path / "my index" if with_index_dir else path.parent).rglob("a.tar.index.npz"))) == 1


def test_a_shard_that_is_gone_with_its_index_is_said_to_be_gone(tmp_path: Path) -> None:
    """As when a disk is unmounted under a run: there is nothing to index."""
    path = of_images(tmp_path / "shards/a.tar")
    mixture = open_mixture(data_of(path))
    path.parent.rename(tmp_path / "elsewhere")
    refused(lambda: mixture.shards[0][0], f"shard {path} does not exist")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("with_index_dir", [False, True])
@pytest.mark.parametrize("size", ["longer", "shorter"])
def test_a_replaced_shard_is_indexed_again(
    tmp_path: Path, server: Server, cached: bool, with_index_dir: bool, size: str
) -> None:
    """On a web server, where its size is met while it is read."""
    server.files["set/a.tar"] = of_images(tmp_path / "a.tar", 8).read_bytes()
    (tmp_path / "copies").mkdir()
    options = {"index_dir": tmp_path / "index"} if with_index_dir else {}
    data = data_of(
        server.url("set/a.tar"), retries=0, **options, **({"cache_dir": tmp_path / "copies"} if cached else {})
    )
    open_mixture(data)
    server.files["set/a.tar"] = of_images(tmp_path / "a.tar", 40 if size == "longer" else 4, colour=9).read_bytes()
    message = refused(lambda: read(data), r"It changed: restore it, or run `lejepa shards index --rebuild")
    (command,) = re.findall(r"`lejepa (.*?)`, with --out where data\.index_dir is set", message)
    assert main([*shlex.split(command), *(["--out", str(tmp_path / "index")] if with_index_dir else [])]) == 0
    assert len(read(data)) == 4


def test_an_index_that_cannot_be_written_goes_elsewhere(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["set/a.tar"] = of_images(tmp_path / "a.tar").read_bytes()
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    refused(lambda: read(data_of(server.url("set/a.tar"))), r"cannot write the index .* Set data.index_dir .* --out")
    assert len(read(data_of(server.url("set/a.tar"), index_dir=tmp_path / "index"))) == 4


# -- elsewhere


@pytest.mark.parametrize("already", [False, True])
def test_a_server_without_ranges_is_copied(tmp_path: Path, server: Server, already: bool) -> None:
    """Also where a cache is set, and another process makes the copy."""
    server.files["set/a.tar"] = of_images(tmp_path / "a.tar").read_bytes()
    data = data_of(server.url("set/a.tar"), retries=0)
    open_mixture(data)
    server.always = "no-range"
    if not already:
        refused(lambda: read(data), r"ignores range requests\. Set data\.cache_dir")
    (tmp_path / "copies").mkdir()
    assert len(read(data.model_copy(update={"cache_dir": tmp_path / "copies"}))) == 4


def test_a_cache_that_is_too_small_is_raised_and_a_full_disk_left(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = of_images(tmp_path / "a.tar").read_bytes()
    server.files["set/a.tar"] = tar
    for folder in ("copies", "others"):
        (tmp_path / folder).mkdir()
    small = data_of(server.url("set/a.tar"), cache_dir=tmp_path / "copies", cache_gb=len(tar) / 2e9)
    refused(lambda: read(small), r"more than data\.cache_gb = .*\. Raise it")
    assert len(read(small.model_copy(update={"cache_gb": len(tar) / 1e9}))) == 4

    filled = Cache._filled

    def full(self: Cache, *rest: Any) -> Any:
        if self.folder.name == "copies":
            raise OSError(errno.ENOSPC, "No space left on device")
        return filled(self, *rest)

    shutil.rmtree(tmp_path / "copies")
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(Cache, "_filled", full)
    refused(lambda: read(small.model_copy(update={"cache_gb": None})), r"choose another data\.cache_dir")
    assert len(read(small.model_copy(update={"cache_gb": None, "cache_dir": tmp_path / "others"}))) == 4


def test_an_address_is_signed_anew(tmp_path: Path, server: Server) -> None:
    past, future = (
        f"set/a.tar?X-Amz-Date={d}T000000Z&X-Amz-Expires=60&X-Amz-Signature=s" for d in ("20200101", "29000101")
    )
    server.files[future] = of_images(tmp_path / "a.tar").read_bytes()
    refused(
        lambda: read(data_of(server.url(past), retries=0)),
        r"its signature ended on 2020-01-01 .* Sign the address anew",
    )
    assert len(read(data_of(server.url(future), retries=0))) == 4


def test_a_chained_or_hidden_address_is_given_as_it_is(tmp_path: Path, server: Server) -> None:
    server.files["set/a.tar"] = of_images(tmp_path / "a.tar").read_bytes()
    message = refused(lambda: expand([f"simplecache::{server.url('set/a.tar')}"]), "chained addresses are not read")
    (address,) = re.findall(r"Give (\S+), with data\.cache_dir", message)
    (tmp_path / "copies").mkdir()
    assert len(read(data_of(address, cache_dir=tmp_path / "copies"))) == 4

    signed = server.url("set/a.tar?token=secret")
    server.files["set/a.tar?token=secret"] = server.files["set/a.tar"]
    refused(
        lambda: read(data_of(str(Address(signed)))),
        "Give the address as it is, on the command line or in a file of yours",
    )
    assert len(read(data_of(signed))) == 4


def test_a_damaged_shard_is_removed(tmp_path: Path) -> None:
    good = of_images(tmp_path / "good.tar")
    bad = Path(shard(tmp_path / "bad.tar", {f"{i}.png": b"no picture" for i in range(30)}))
    message = refused(
        lambda: read(data_of([str(bad), str(good)]), 8), r"A shard that is damaged is to be written again, or removed"
    )
    assert f"shard {bad} " in message
    assert len(read(data_of([str(good)]), 8)) == 8
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:3000])
    refused(lambda: read(data_of([str(cut), str(good)])), r"Copy or write it again")
    shutil.copy(good, cut)
    assert len(read(data_of([str(cut), str(good)]))) == 4


def test_a_key_log_comes_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        lambda: read_log(tmp_path), r"holds no key log\. Give a run directory .* or a file that `lejepa order` printed"
    )
    import yaml

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(small_config(tmp_path / "run", of_images(tmp_path / "a.tar", 32))))
    capsys.readouterr()
    assert main(["order", "--config", str(config), "--steps", "0:2"]) == 0
    (tmp_path / "order.tsv").write_text(capsys.readouterr().out)
    assert len(read_log(tmp_path / "order.tsv").records) == 32


def test_a_key_without_effect_is_left_out_or_set_to_its_default(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(small_config(tmp_path / "run", of_images(tmp_path / "a.tar"))))
    message = refused(lambda: load_config(config, ["data.retries=3"]), "has no effect")
    (default,) = re.findall(r"set the default again \((.*?)\)", message)
    assert load_config(config, [default]) == load_config(config, [])
