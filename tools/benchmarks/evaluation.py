"""What an evaluation costs: images/s of the feature pass against a plain loop over a torchvision DataLoader with the same
model, and time and memory of k-NN. Wall time, in turns over the same images."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.measure import Results, Row, run_sections
from lejepa_scale.data.evaluation import labelled_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images.pixels import MEAN, STD
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.evaluation.features import Features, extract
from lejepa_scale.evaluation.knn import BLOCK, knn
from lejepa_scale.parallel.threads import cores

_CHUNK = 1024  # rows of the test set at a time, knn's default
_IMAGENET = 1_281_167, 50_000, 1024


@dataclass(frozen=True)
class Sizes:
    images: int  # at most
    scene_px: int
    rounds: int
    banks: tuple[tuple[int, int, int], ...]  # training rows, test rows, width


FULL = Sizes(334, 640, 5, ((20_000, 2_000, 1024), (100_000, 10_000, 1024)))
TOY = Sizes(8, 48, 1, ((300, 20, 16),))


def measure(sizes: Sizes, photos: Path) -> Results:
    sections = {"features": features(sizes, photos), "knn": nearest(sizes)}
    return run_sections(sections, torch.device("cpu"), minutes=60)


def features(sizes: Sizes, photos: Path) -> Iterator[Row]:
    """A model that is nearly free, where reading is what is measured, and one that is not."""
    known = photos.is_file()
    source = (
        sources.tar(photos, "", None, False) if known else sources.scenes(sizes.images, sizes.scene_px, 0, "jpg", 90)
    )
    with tempfile.TemporaryDirectory() as folder:
        shards, files = Path(folder, "shards"), Path(folder, "files", "all")
        files.mkdir(parents=True)
        kept = []
        for number, sample in enumerate(source.samples):
            if number == sizes.images:
                break
            kept.append(sample)
            (files / f"{number:06d}.{sample.extension}").write_bytes(sample.image)
        write_shards(iter(kept), shards, per_shard=1000, total=len(kept), classes=(), description={})
        for name, side in (("test_vit", 160), ("vit_tiny_patch16_224", 224)):
            yield _race(name, side, shards, files.parent, sizes.rounds, "photographs" if known else "scenes")


def _race(name: str, side: int, shards: Path, files: Path, rounds: int, what: str) -> Row:
    model: nn.Module = timm.create_model(name, num_classes=0).eval()
    indexed = index_shards(shards_of(str(shards)))
    count = int(indexed.counts.sum())

    def ours() -> int:
        batches = labelled_batches(indexed, image_size=side, batch_size=64)
        return len(extract(model, batches, torch.device("cpu")).labels)

    works: dict[str, Callable[[], int]] = {"ours": ours, "DataLoader": lambda: _plain(model, files, side)}
    seconds: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(rounds + 1):  # one to warm up
        for key, work in works.items():
            began = time.perf_counter()
            done = work()
            if turn:
                seconds[key].append(time.perf_counter() - began)
            assert done == count
    rates = {key: count / median(values) for key, values in seconds.items()}
    row: Row = {"case": f"{name} at {side} px, {count} {what}, {torch.get_num_threads()} cores"}
    row |= {f"{key} images/s": rate for key, rate in rates.items()}
    return row | {"ours/DataLoader": rates["ours"] / rates["DataLoader"]}


@torch.no_grad()
def _plain(model: nn.Module, files: Path, side: int) -> int:
    """What one writes without us: as many workers as cores."""
    transform = v2.Compose(
        [
            v2.Resize(side),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader: DataLoader[Any] = DataLoader(ImageFolder(str(files), transform), batch_size=64, num_workers=cores())
    return len(torch.cat([model(images) for images, _ in loader]))


def nearest(sizes: Sizes) -> Iterator[Row]:
    rate = 0.0
    for train, test, width in sizes.banks:
        with get_context("spawn").Pool(1) as alone:
            row = alone.apply(_knn, (train, test, width))
        rate = row["GFLOP/s"]
        yield row
    train, test, width = _IMAGENET
    flops = 2.0 * train * test * width
    chunks = -(-test // _CHUNK)
    yield {
        "case": f"on paper: {train:,} x {test:,} of {width}",
        "TFLOP": flops / 1e12,
        "hours at the rate above": flops / rate / 1e9 / 3600,
        "features GB": (train + test) * width * 4 / 1e9,
        "beside them MB": _beside(width),
        "GB to a GPU, by chunks": chunks * train * width * 4 / 1e9,
    }


def _beside(width: int) -> float:
    """Products, keys and float64 copies of a chunk and a block: what `knn` documents."""
    return (24 * _CHUNK * BLOCK + 8 * width * (_CHUNK + BLOCK) * 2) / 1e6


def _knn(train: int, test: int, width: int) -> Row:
    """In a process of its own, whose peak is that of this search alone."""
    generator = torch.Generator().manual_seed(0)
    bank = Features(torch.randn(train, width, generator=generator), torch.randint(1000, (train,), generator=generator))
    rows = Features(torch.randn(test, width, generator=generator), torch.randint(1000, (test,), generator=generator))
    before = _peak_megabytes(anew=True)
    began = time.perf_counter()
    knn(bank, rows)
    seconds = time.perf_counter() - began
    grown = _peak_megabytes() - before
    return {
        "case": f"k-NN {train:,} x {test:,} of {width}, {torch.get_num_threads()} threads",
        "seconds": seconds,
        "GFLOP/s": 2e-9 * train * test * width / seconds,
        "beside the features MB": grown,
        "documented MB": _beside(width),
    }


def _peak_megabytes(*, anew: bool = False) -> float:
    """The largest resident memory of this process, `anew` from what it is now. A child's rusage begins at its parent's."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6
