"""Files from elsewhere are believed in nothing that they cannot prove: index files, tars and images that lie."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image

from lejepa_scale.config import Data
from lejepa_scale.data import open_mixture
from lejepa_scale.data.index.files import MANIFEST_ROW, IndexLocation
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io import npy
from lejepa_scale.data.io.reader import Reader, expand

Arrays = dict[str, np.ndarray]


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    """Three indexed shards of 32 images."""
    out = tmp_path / "set"
    out.mkdir()
    for path in scenes.glob("*.tar"):
        shutil.copy(path, out)
    index_shards(expand([str(out)]))
    return out


def saved(arrays: Arrays, *, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def rewrite(path: Path, change: Callable[[Arrays], Arrays | bytes]) -> None:
    """An index file, changed; the digest that it says is made to fit."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    changed = change(arrays)
    path.write_bytes(changed if isinstance(changed, bytes) else saved(changed))


ROWS = {
    "count": [0, -1, 10**12],
    "labelled": [-1, 33],
    "classes": [-2],
    "nbytes": [-1, 0],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ROWS.items() for v in values])
def test_a_manifest_that_cannot_be_true_is_made_anew(
    field: str, value: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(arrays: Arrays) -> Arrays:
        rows = arrays["rows"].view(MANIFEST_ROW).copy()
        rows[1][field] = value
        if field == "count":
            rows[1]["labelled"] = 0
        return arrays | {"rows": rows.view(np.uint8)}

    rewrite(folder / "manifest.index.npz", change)
    mixture = open_mixture(Data.model_validate({"shards": str(folder)}))
    assert mixture.num_samples == 96
    assert "is damaged or of another version" in caplog.text


SIDECARS: dict[str, Callable[[Arrays], Arrays | bytes]] = {
    "an offset beyond the end": lambda a: a | {"offsets": a["offsets"] + 10**9},
    "an offset before the beginning": lambda a: a | {"offsets": a["offsets"] - 10**9},
    "a size of a terabyte": lambda a: a | {"sizes": a["sizes"] + 10**12},
    "a size whose end overflows": lambda a: a | {"sizes": a["sizes"] * 0 + np.iinfo(np.int64).max},
    "a size below that of none": lambda a: a | {"sizes": a["sizes"] * 0 - 2},
    "sizes that are not whole": lambda a: a | {"sizes": a["sizes"].astype(np.float64)},
    "fewer labels": lambda a: a | {"labels": a["labels"][:5]},
    "labels in rows": lambda a: a | {"labels": a["labels"][None]},
    "a label below none": lambda a: a | {"labels": a["labels"] * 0 - 2},
    "a word that is not there": lambda a: a | {"words": np.array([b"cat"])},
    "keys that are numbers": lambda a: a | {"keys": np.arange(32)},
    "no sample": lambda a: {n: x[:0] if x.shape == (32,) else x for n, x in a.items()},
    "no sizes": lambda a: {n: x for n, x in a.items() if n != "sizes"},
    "more samples than headers have room": lambda a: a | {"nbytes": np.array(31 * 512)},
    "what was passed over is no JSON": lambda a: a | {"passed": np.frombuffer(b"[[1]]", np.uint8)},
    "compressed": lambda a: saved(a, compressed=True),
    "another version": lambda a: a | {"version": np.array(1)},
    "versions": lambda a: a | {"version": np.array([2, 2])},
}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", SIDECARS)
def test_an_index_that_cannot_be_true_is_none(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its digest is that of its contents."""
    monkeypatch.setattr("lejepa_scale.data.index.scan.ShardIndex.digest", "0" * 32)
    path = folder / "shard-000001.tar.index.npz"
    rewrite(path, lambda a: a | {"digest": np.frombuffer(b"0" * 32, np.uint8)})
    home = IndexLocation(str(folder), None, Reader())
    assert home.sidecar(str(folder / "shard-000001.tar")) is not None
    rewrite(path, SIDECARS[name])
    assert home.sidecar(str(folder / "shard-000001.tar")) is None


def test_headers_ask_for_no_memory() -> None:
    """Of arrays that say they are large, and of ones that are packed small."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with pytest.raises(
        ValueError, match=r"an array 1099511627776 of float64 needs 8796093022208 bytes, and 4 are there"
    ):
        npy.read(header.getvalue() + b"1234")
    bomb = saved({"zeros": np.zeros(1 << 24, np.uint8)}, compressed=True)
    assert len(bomb) < 1 << 15
    with pytest.raises(ValueError, match="compressed"):
        npy.read_several(bomb)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as stored:
        stored.writestr("a.npy", b"no array")
    for data in (file.getvalue(), b"", b"PK\x05\x06"):
        with pytest.raises(ValueError, match=r"no file of arrays|header cannot be read"):
            npy.read_several(data)
    same = {"a": np.arange(5), "b": np.array(7), "c": np.asfortranarray(np.ones((2, 3))), "d": np.zeros((0, 4), "S3")}
    for name, found in npy.read_several(saved(same)).items():
        assert found.dtype == same[name].dtype
        np.testing.assert_array_equal(found, same[name])


def images(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"):
        Image.fromarray(pixels).save(folder / name, name)
    tifffile.imwrite(folder / "tiff", pixels.astype(np.uint16), photometric="rgb", compression="deflate", tile=(16, 16))
    Image.fromarray(pixels).save(folder / "tiff8", "TIFF")
    np.save(folder / "array.npy", pixels.astype(np.float32))


def fuzzed(counts: dict[str, int], folder: Path) -> dict[str, dict[str, Any]]:
    """What became of so many mutated files, by kind."""
    if not (folder.parent / "images").exists():
        images(folder.parent / "images")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(folder.parent)]
    words += [f"{kind}={count}" for kind, count in counts.items()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stderr.splitlines()) <= {OURS.format(folder=folder.parent / "mutated")}  # decoders name no sample
    return dict(json.loads(done.stdout.splitlines()[-1]))


OURS = "the manifest of {folder} is damaged or of another version: made anew from the shards' own index files."
FEW = {"sidecar": 150, "manifest": 150, "tar": 150, "image": 250, "keylog": 150}


@pytest.mark.unchecked
def test_a_few_mutated_files(folder: Path) -> None:
    none_does_harm(fuzzed(FEW, folder), FEW)


def none_does_harm(found: dict[str, dict[str, Any]], counts: dict[str, int]) -> None:
    print(found)
    assert found.keys() == counts.keys()
    for kind, count in counts.items():
        outcomes = found[kind]["outcomes"]
        assert set(outcomes) <= {"read", "absent", "refused"}, (kind, found)
        assert sum(outcomes.values()) == count
        assert found[kind]["largest"] < 400e6, found


@pytest.mark.unchecked
@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("kind", FEW)
def test_many_mutated_files(kind: str, folder: Path) -> None:
    counts = {kind: 40 * FEW[kind]}
    none_does_harm(fuzzed(counts, folder), counts)
