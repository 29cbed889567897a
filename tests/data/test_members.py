"""What becomes of the members of a shard: the image and the label of a sample, by which names, and what is passed over."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import small_config
from ranks import run_ranks
from tars import Members, link, shard

from lejepa_scale.cli.main import main
from lejepa_scale.config import BatchPlan, Data, validate
from lejepa_scale.data import Loader, Mixture, evaluation_batches, open_mixture
from lejepa_scale.data.index import classes as class_module
from lejepa_scale.data.index import passed
from lejepa_scale.data.index.classes import class_numbers
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import evaluate
from lejepa_scale.training.loop import train


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def only(path: str, image_key: str = "", label_key: str = "cls") -> ShardIndex:
    (index,) = index_shards([path], keys=SampleKeys.parsed(image_key, label_key))
    return index


def labels(index: ShardIndex) -> list[int | str | None]:
    return [index.label(member) for member in range(len(index))]


MESSY: Members = {
    **{f"a{i}.png": png(i) for i in range(4)},
    **{f"a{i}.cls": str(i).encode() for i in range(3)},
    "a0.json": b"{}",
    "a1.JPG": png(10),
    "a2.left.png": png(11),
    "dir.with.dots/e.png": png(12),
    "b.v2.jpg": png(13),
    "c.jxl": b"x",
    "d.cls": b"5",
    "._a0.png": b"x",
    ".hidden": b"x",
    "__index__/f.png": png(14),
    "README": b"x",
    "ev\x1b[31mil.txt": b"x",
}


def test_what_is_passed_over_is_counted_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard(tmp_path / "s.tar", MESSY)
    found = only(path).passed.kinds
    assert found == {
        (passed.HIDDEN, ""): (3, "._a0.png"),
        (passed.NO_ENDING, ""): (1, "README"),
        (passed.COMPANION, "json"): (1, "a0.json"),
        (passed.SECOND, "jpg"): (1, "a1.jpg"),
        (passed.COMPANION, "left.png"): (1, "a2.left.png"),
        (passed.SEVERAL_DOTS, "v2.jpg"): (1, "b.v2.jpg"),
        (passed.OTHER, "jxl"): (1, "c.jxl"),
        (passed.NO_IMAGE, ""): (1, "d"),
        (passed.OTHER, "txt"): (1, "ev\x1b[31mil.txt"),
    }
    for arguments in (["--rebuild"], []):  # from the shard, and from its index
        assert main(["shards", "index", path, *arguments]) == 0
        out = capsys.readouterr().out
        assert out.startswith("1 shards, 6 samples, 4 with a label of 6 classes\npassed over:\n")
        assert "  1 .v2.jpg images whose names have several dots" in out
        assert "for instance ev\\x1b[31mil.txt" in out
        assert "\x1b" not in out


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    """Its own reader on the same tar: the keys, and the image of each."""
    path = shard(tmp_path / "s.tar", MESSY)
    index = only(path)
    theirs: dict[str, dict[str, Any]] = {}
    for sample in wds.WebDataset(path, shardshuffle=False, empty_check=False):
        theirs.setdefault(sample["__key__"], {}).update(sample)  # it joins neighbours alone
    with_image = {key for key, sample in theirs.items() if {"png", "jpg"} & sample.keys()}
    ours = {index.key(m): read_image(Reader(), index, m) for m in range(len(index)) if index.sizes[m] >= 0}
    assert ours.keys() == with_image
    for key, data in ours.items():
        assert data == theirs[key]["png"], key


def test_a_start_names_what_may_have_been_meant_as_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = shard(tmp_path / "plain.tar", {"a.png": png(0), "a.json": b"{}", "a.cls": b"0"})
    open_mixture(Data.model_validate({"shards": plain}))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    open_mixture(Data.model_validate({"shards": shard(tmp_path / "other.tar", {"a.png": png(0), "b.jxl": b""})}))
    assert "1 .jxl of another ending than images have, for instance b.jxl" in caplog.text


def test_kinds_are_bounded() -> None:
    found = passed.PassedOver()
    for i in range(1000):
        found.add(passed.OTHER, f"x.{i}", str(i))
    assert len(found.kinds) <= 65
    assert sum(count for count, _ in found.kinds.values()) == 1000
    both = passed.PassedOver()
    both.update([found, passed.PassedOver.unpacked(found.packed())])
    assert sum(count for count, _ in both.kinds.values()) == 2000


def test_the_image_of_several_is_chosen(tmp_path: Path) -> None:
    pairs = {f"{i}.{side}.png": png(2 * i + (side == "right")) for i in range(3) for side in ("left", "right")}
    path = shard(tmp_path / "s.tar", {**pairs, "3.right.jpg": png(9), "4.LEFT.png": png(8)})
    right = only(path, "right.png;right.jpg")
    assert [read_image(Reader(), right, m) for m in range(4)] == [png(1), png(3), png(5), png(9)]
    left = only(path, "Left.PNG")
    assert [left.key(m) for m in range(len(left))] == ["0", "1", "2", "4"]  # 3 has nothing that is of a sample here
    assert only(path, "right.png;right.jpg").digest == right.digest  # each choice has index files of its own
    with pytest.raises(UserError, match=r"Set image_key=left\.png"):
        only(path)
    mixture = open_mixture(Data.model_validate({"shards": [{"shards": path, "image_key": "left.png"}]}))
    assert mixture.num_samples == 4


def test_a_preferred_image_wins_wherever_it_stands(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"0.b": png(0), "0.a": png(1), "1.a": png(2), "1.b": png(3), "2.b": png(4)})
    index = only(path, "a;b")
    assert [read_image(Reader(), index, m) for m in range(3)] == [png(1), png(2), png(4)]
    assert index.passed.kinds == {(passed.SECOND, "b"): (2, "0.b")}


def test_arrays_are_no_images_beside_pictures(tmp_path: Path) -> None:
    """Wherever they stand."""
    index = only(shard(tmp_path / "s.tar", {"0.npy": b"x", "1.png": png(1), "2.png": png(2), "3.npy": b"x"}))
    assert [read_image(Reader(), index, m) for m in range(len(index))] == [png(1), png(2)]
    assert index.passed.kinds == {(passed.BESIDE, "npy"): (2, "0.npy")}
    both = only(shard(tmp_path / "t.tar", {"1.npy": b"x", "1.png": png(1), "2.png": png(2), "2.npy": b"x"}))
    assert [read_image(Reader(), both, m) for m in range(len(both))] == [png(1), png(2)]
    assert both.passed.kinds == {(passed.COMPANION, "npy"): (2, "1.npy")}


def test_hard_links_are_the_image_they_name(tmp_path: Path) -> None:
    index = only(
        shard(tmp_path / "s.tar", {"0.png": png(0), "1.png": png(1)}, [link("2.png", "0.png"), link("3.png", "2.png")])
    )
    assert [read_image(Reader(), index, m) for m in range(4)] == [png(0), png(1), png(0), png(0)]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (["0", " 3\n", "+2", "-1"], [0, 3, 2, None]),
        (["\ufeff0", "\ufeffcat", "1", "2"], ["0", "cat", "1", "2"]),  # Windows marks its texts so
        (["cat", "dog", "cat", "Zürich"], ["cat", "dog", "cat", "Zürich"]),
        (["1", "cat", "-1", "2"], ["1", "cat", None, "2"]),
        (["4000000000", "1440764", "0", "7"], [4000000000, 1440764, 0, 7]),
        (["99999999999999999999", "1", "1", "1"], ["99999999999999999999", "1", "1", "1"]),
        (["1.5", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "0x1"], ["1.5", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "0x1"]),
    ],
)
def test_labels_are_numbers_or_words(stored: list[str], expected: list[int | str | None], tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.cls": text.encode() for i, text in enumerate(stored)}
    index = only(shard(tmp_path / "s.tar", members))
    assert labels(index) == expected
    assert labels(only(str(tmp_path / "s.tar"))) == expected  # from its sidecar
    numbers = class_numbers([index_shards([str(tmp_path / "s.tar")])])
    there = sorted({e for e in expected if e is not None})
    dense = all(isinstance(e, int) and e < class_module.MOST for e in there)
    for member, label in enumerate(expected):
        truth = -1 if label is None else label if dense else there.index(label)
        assert numbers.of(index, member) == truth
    assert numbers.count == (max(there) + 1 if dense else len(there))
    if None in expected:
        assert index.passed.kinds[passed.NO_LABEL, "cls"][0] == expected.count(None)


def test_labels_in_json_documents(tmp_path: Path) -> None:
    documents: list[Any] = [
        {"a": {"b": [{"c": 7}]}}, {"a": {"b": [{"c": "seven"}]}}, {"a": {"b": [{"c": None}]}}, {"a": {"b": []}}, [],
    ]  # fmt: skip
    members = {f"{i}.png": png(i) for i in range(5)} | {
        f"{i}.json": json.dumps(d).encode() for i, d in enumerate(documents)
    }
    path = shard(tmp_path / "s.tar", members)
    index = only(path, label_key="json:a.b.0.c")
    assert labels(index) == ["7", "seven", None, None, None]
    assert index.passed.kinds[passed.NO_VALUE, "json"] == (3, "2.json")
    assert labels(only(path)) == [None] * 5
    with pytest.raises(UserError, match=r"no sample has a label at json:a\.x\. Check label_key"):
        only(path, label_key="json:a.x")
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for wrong, words in (
        (deep, "not a class number or name at a"),
        (b"{", "not a class number or name at a"),
        (b'{"a": 1.5}', "not a class"),
        (b'{"a": true}', "not a"),
    ):
        with pytest.raises(UserError, match=words):
            only(shard(tmp_path / f"{len(wrong)}.tar", {"0.png": png(0), "0.json": wrong}), label_key="json:a")
    txt = shard(tmp_path / "t.tar", {"0.png": png(0), "0.txt": b"cat"})
    assert labels(only(txt, label_key="txt")) == ["cat"]


def named(folder: Path, words: list[list[str]]) -> str:
    """Shards of one image for each word, whose quarter is lit where the word's first letter says."""
    for number, texts in enumerate(words):
        members: Members = {}
        for i, text in enumerate(texts):
            pixels = np.random.default_rng(i).integers(0, 20, (16, 16, 3), np.uint8)
            pixels.reshape(2, 8, 2, 8, 3)[ord(text[0]) % 2, :, ord(text[0]) // 2 % 2] += 200
            members |= {f"{i:03d}.png": cv2.imencode(".png", pixels)[1].tobytes(), f"{i:03d}.cls": text.encode()}
        shard(folder / f"{number}.tar", members)
    return str(folder)


def test_words_are_numbered_alike_in_all_sources(tmp_path: Path) -> None:
    first, second = named(tmp_path / "a", [["dog", "cat"], ["emu"]]), named(tmp_path / "b", [["bee", "dog", "7"]])
    mixture = open_mixture(Data.model_validate({"shards": [{"shards": first}, {"shards": second}]}))
    assert mixture.num_classes == 5
    assert mixture.classes.labels == ("7", "bee", "cat", "dog", "emu")
    found = [[mixture.classes.of(index, m) for index in source for m in range(len(index))] for source in mixture.shards]
    assert found == [[3, 2, 4], [1, 3, 0]]
    (written,) = Path(first).glob("labels.*.index.json")
    assert json.loads(written.read_text()) == {"labels": ["cat", "dog", "emu"]}
    again = open_mixture(Data.model_validate({"shards": [{"shards": first}, {"shards": second}]}), build=False)
    assert again.classes == mixture.classes
    written.write_text("[")
    with pytest.raises(UserError, match="this rank does not see the labels"):
        open_mixture(Data.model_validate({"shards": [{"shards": first}]}), build=False)
    assert open_mixture(Data.model_validate({"shards": [{"shards": first}]})).num_classes == 3
    written.write_text('{"labels": ["cat"]}')
    lost = open_mixture(Data.model_validate({"shards": [{"shards": first}]}))
    with pytest.raises(UserError, match=r"the label dog of 000 in shard .*: run `lejepa shards index --rebuild`"):
        lost.classes.of(lost.shards[0][0], 0)
    assert main(["shards", "index", first, "--rebuild"]) == 0
    assert open_mixture(Data.model_validate({"shards": [{"shards": first}]})).num_classes == 3


def _classes(shards: str) -> tuple[Any, int]:
    mixture: Mixture = open_mixture(Data.model_validate({"shards": shards}), build=False)
    return mixture.classes.labels, mixture.num_classes


def test_ranks_number_classes_alike(tmp_path: Path) -> None:
    shards = named(tmp_path / "a", [["n02", "n01"], ["n03"]])
    open_mixture(Data.model_validate({"shards": shards}))
    assert run_ranks(_classes, 2, shards) == [(("n01", "n02", "n03"), 3)] * 2


def test_a_run_and_its_evaluation_on_words(tmp_path: Path) -> None:
    """Classes that lie in other orders, and in part alone, in the shards of training and of the test."""
    kinds = ["ant", "bee", "cat", "dog"]
    training = named(tmp_path / "train", [kinds * 6, kinds[::-1] * 6])
    test = named(tmp_path / "test", [["dog", "cat"] * 6])
    config = validate(small_config(tmp_path / "run", training, train={"steps": 2, "global_batch": 16}))
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("probe" in key for key in lines[-1])
    assert evaluate(tmp_path / "run", training, test).value("raw pixels", "knn") == 1.0
    both = class_numbers([index_shards([f"{training}/0.tar"]), index_shards([f"{test}/0.tar"])])
    (_, found), *_ = evaluation_batches(test, image_size=16, batch_size=12, classes=both)
    assert found.tolist() == [3, 2] * 6
    (_, alone), *_ = evaluation_batches(test, image_size=16, batch_size=12)
    assert alone.tolist() == [1, 0] * 6


def test_a_probe_of_too_many_classes_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("lejepa_scale.training.start.MOST", 3)
    shards = named(tmp_path / "train", [["ant", "bee", "cat", "dog"] * 4])
    train(validate(small_config(tmp_path / "run", shards, train={"steps": 1, "global_batch": 16})))
    assert "the online probe is off: 4 classes are more than the 3" in caplog.text


def test_ids_far_apart_cost_no_memory(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.cls": str(4 * 10**9 + i % 2).encode() for i in range(4)}
    path = shard(tmp_path / "s.tar", members)
    (_, found), *_ = evaluation_batches(path, image_size=16, batch_size=4)
    assert torch.equal(found, torch.tensor([0, 1, 0, 1]))
    assert open_mixture(Data.model_validate({"shards": path})).num_classes == 2


def test_keys_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the run where it has one kind; else they must be said."""
    members = {f"{i}.left.png": png(i) for i in range(16)} | {
        f"{i}.json": json.dumps({"id": i % 2}).encode() for i in range(16)
    }
    path = shard(tmp_path / "s/s.tar", members)
    source = {"shards": path, "image_key": "left.png", "label_key": "json:id"}
    config = small_config(tmp_path / "run", path, data={"shards": [source]}, train={"steps": 1, "global_batch": 16})
    train(validate(config))
    assert Counter(evaluate(tmp_path / "run", path, path).features.labels.tolist()) == {0: 8, 1: 8}
    words = ["evaluate", str(tmp_path / "run"), "--train", path, "--test", path]
    assert main([*words, "--label-key", "json:none"]) == 2
    assert "no sample has a label at json:none" in capsys.readouterr().err
    plain = shard(
        tmp_path / "plain.tar",
        {**{f"{i}.png": png(i) for i in range(8)}, **{f"{i}.cls": b"%d" % (i % 2) for i in range(8)}},
    )
    assert main([*words[:3], plain, "--test", plain, "--image-key", "png", "--label-key", "cls"]) == 0
    assert main(["picture", str(tmp_path / "run"), "--shards", path, "--out", str(tmp_path / "p.png")]) == 0
    assert main(["shards", "statistics", path, "--image-key", "left.png"]) == 0


def test_names_in_messages_hold_no_control_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "evil\x1b[31m\nname"
    path = shard(tmp_path / "s.tar", {f"{name}{i}.png": b"no image" for i in range(4)})
    data = Data.model_validate({"shards": path, "workers": 0, "max_faults": 2})
    loader = Loader(open_mixture(data), data, BatchPlan(micro_batch=1, ranks=1, accumulation=1), seed=0)
    with pytest.raises(UserError, match=r"evil\\x1b\[31m\\nname") as caught:
        next(iter(loader))
    assert str(caught.value).isprintable()
    with pytest.raises(UserError) as caught:
        list(evaluation_batches(path, image_size=16, batch_size=2))
    assert str(caught.value).isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)
