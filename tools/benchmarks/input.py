"""Images/s of the input pipeline on one core against torchvision's on Pillow, and the memory of loader workers. Times are
CPU time of this process, and the pipelines take turns over the same images: a busy machine falls on all alike."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.measure import Results, Row, run_sections
from lejepa_scale.config import Augment, BatchPlan, Data, ViewGroup, Views
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.pixels import MEAN, STD
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards

TARGETS = {"worker": 5.0, "whole": 2.5}  # times the Pillow pipeline, on photographs
_LETTERS = {"pillow": "a", "worker": "b", "whole": "c", "decode": "d"}
_GROWTH_MB = 8.0  # what a worker may gain in the second half and still be called flat


@dataclass(frozen=True)
class Sizes:
    views: Views
    batch: int
    photographs: int  # at most
    scenes: int
    scene_px: int
    passes: int
    workers: int
    epochs: int


FULL = Sizes(Views(), batch=32, photographs=1000, scenes=96, scene_px=256, passes=2, workers=2, epochs=20)
TOY = Sizes(
    Views(
        global_=ViewGroup(count=2, size=32, scale=(0.3, 1.0)),
        local=ViewGroup(count=2, size=16, scale=(0.05, 0.3)),
    ),
    batch=4, photographs=4, scenes=8, scene_px=48, passes=1, workers=1, epochs=6,
)  # fmt: skip


def measure(sizes: Sizes, photos: Path) -> Results:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "photographs": photographs(sizes, photos, Path(folder, "photographs")),
            "scenes": scenes(sizes, Path(folder, "scenes")),
            "memory": memory(sizes, Path(folder, "memory")),
        }
        return run_sections(sections, torch.device("cpu"), minutes=60)


def photographs(sizes: Sizes, photos: Path, folder: Path) -> Iterator[Row]:
    if not photos.is_file():
        yield {"case": "full-size photographs", "not measured": f"{photos} is absent"}
        return
    source = sources.tar(photos, "", None, False)
    row = _race(sizes, _written(islice(source.samples, sizes.photographs), folder), folder)
    if sizes is FULL:
        row["ok"] = all(row[f"{_LETTERS[name]}/a"] >= target for name, target in TARGETS.items())
        row |= {f"target {_LETTERS[name]}/a": target for name, target in TARGETS.items()}
    yield row


def scenes(sizes: Sizes, folder: Path) -> Iterator[Row]:
    source = sources.scenes(sizes.scenes, sizes.scene_px, 0, "jpg", 90)
    yield _race(sizes, _written(source.samples, folder), folder)


def memory(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Private memory of the workers after each epoch of a dataset that is small, so that epochs are many."""
    source = sources.scenes(sizes.scenes, sizes.scene_px, 1, "jpg", 90)
    _written(source.samples, folder)
    batches = iter(_loader(sizes, folder, workers=sizes.workers))
    by_epoch = []
    for _ in range(sizes.epochs):
        for _ in range(sizes.scenes // sizes.batch):
            next(batches)
        by_epoch.append(max(private_megabytes(child.pid) for child in multiprocessing.active_children()))
    half = sizes.epochs // 2  # by then the allocators hold what they need
    growth = by_epoch[-1] - by_epoch[half - 1]
    yield {
        "case": f"largest of {sizes.workers} workers, {sizes.epochs} epochs of {sizes.scenes}",
        "ok": growth < _GROWTH_MB,
        f"MB after epoch {half}": by_epoch[half - 1],
        f"MB after epoch {sizes.epochs}": by_epoch[-1],
        "growth MB": growth,
        "MB by epoch": [round(x, 1) for x in by_epoch],
    }


def private_megabytes(pid: int | None) -> float:
    """Resident memory that a process shares with no other."""
    try:
        import psutil
    except ImportError:
        resident, shared = (int(x) for x in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        return (resident - shared) * 4096 / 2**20
    info = psutil.Process(pid).memory_info()
    return (info.rss - getattr(info, "shared", 0)) / 2**20


def _race(sizes: Sizes, images: dict[str, bytes], folder: Path) -> Row:
    """Each pipeline on the same batches, one after the other. (b) is what a worker does: bytes from the shard, decoding,
    crops, parameters. (c) adds the colours, as the training process does where there is no GPU."""
    seconds = dict.fromkeys(_LETTERS, 0.0)
    pillow = PillowViews(sizes.views)
    batches = iter(_loader(sizes, folder, workers=0))
    done, steps = 0, max(1, sizes.passes * len(images) // sizes.batch)
    for step in range(-1, steps):  # one to warm up
        started = time.process_time()
        batch = next(batches)
        cut = time.process_time()
        batch.augmented(torch.device("cpu"))
        coloured = time.process_time()
        encoded = [images[key] for key in batch.keys]
        for data in encoded:
            pillow(data)
        reference = time.process_time()
        for data in encoded:
            decode(data)
        decoded = time.process_time()
        if step >= 0:
            seconds["worker"] += cut - started
            seconds["whole"] += coloured - started
            seconds["pillow"] += reference - coloured
            seconds["decode"] += decoded - reference
            done += len(batch.keys)
    rates = {name: done / max(s, 1e-9) for name, s in seconds.items()}
    views = " + ".join(f"{g.count} x {g.size}" for g in (sizes.views.global_, sizes.views.local))
    row: Row = {"case": f"{len(images)} images, {views}, one core", "images": done}
    row |= {f"{_LETTERS[name]} {name} images/s": rate for name, rate in rates.items()}
    return row | {f"{_LETTERS[name]}/a": rates[name] / rates["pillow"] for name in ("worker", "whole", "decode")}


class PillowViews:
    """torchvision's transforms on Pillow images, as LeJEPA's experiments (arXiv 2511.08544) put them together."""

    def __init__(self, views: Views, augment: Augment | None = None) -> None:
        self.transforms = [
            (self._transform(g, augment or Augment()), g.count) for g in (views.global_, views.local) if g.count
        ]

    @staticmethod
    def _transform(group: ViewGroup, augment: Augment) -> Any:
        a = augment
        return v2.Compose(
            [
                v2.RandomResizedCrop(group.size, scale=group.scale),
                v2.RandomHorizontalFlip(a.flip),
                v2.RandomApply([v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter),
                v2.RandomGrayscale(a.grayscale),
                v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], a.blur),
                v2.RandomSolarize(128, a.solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [transform(image) for transform, count in self.transforms for _ in range(count)]


def _written(samples: Iterator[Any], folder: Path) -> dict[str, bytes]:
    """Write shards; the encoded images by key."""
    held = list(samples)
    write_shards(iter(held), folder, per_shard=128, total=len(held), classes=(), description={})
    return {sample.key: sample.image for sample in held}


def _loader(sizes: Sizes, folder: Path, workers: int) -> Loader:
    data = Data(shards=str(folder), workers=workers, views=sizes.views)
    return Loader(open_mixture(data), data, BatchPlan(micro_batch=sizes.batch), seed=0)
