"""Random numbers against published and independent arithmetic; what the data section promises, through the loader."""

from __future__ import annotations

import io
import random
import time
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms.v2.functional as reference
from conftest import small_config  # configuration keys: data.*, run.seed, train.*
from PIL import Image
from shardserver import serve
from torch import Tensor

from lejepa_scale import seeds
from lejepa_scale.config import plan_batches, validate
from lejepa_scale.data import Batch, Loader, open_mixture
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.make.writer import Sample, write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.objective import SIGReg

MASK = (1 << 64) - 1
QUIET = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}


def mixed(x: int) -> int:
    """splitmix64's finalizer, in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first five from the seed 1234567, as Java's SplittableRandom and Rosetta Code have them."""
    states = (1234567 + seeds.GAMMA * np.arange(1, 6, dtype=object)) % (1 << 64)
    assert seeds.splitmix64(states.astype(np.uint64)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 0), (0, 1), (7, 250_000)])
def test_directions_follow_from_seed_and_step_for_ever(seed: int, step: int) -> None:
    """A resumed run draws the directions that it would have drawn: a change of this is a change of format."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK
    assert seeds.of_directions(seed, step) == mixed(x) >> 1
    a = torch.randn(6, 4, generator=torch.Generator().manual_seed(mixed(x) >> 1))
    found = SIGReg(num_slices=6, seed=seed).directions(step, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(found, a / a.norm(dim=1, keepdim=True))


def test_every_micro_batch_of_every_rank_draws_its_own() -> None:
    places = [(0, s, m, r) for s in range(20) for m in range(8) for r in range(16)]
    places += [(1, s, m, r) for s in range(20) for m in range(8) for r in range(16)]
    assert len({seeds.of_micro_batch(*place) for place in places}) == len(places)


# -- the loader


def batches(folder: Path, shards: Any, count: int = 1, *, size: int = 16, seed: int = 0, **data: Any) -> list[Batch]:
    tree = small_config(folder, "u", run={"dir": str(folder), "seed": seed}, train={"steps": 9, "global_batch": size})
    tree["data"] |= {"shards": shards, "augment": QUIET, **data}
    config = validate(tree)
    plan = plan_batches(config, 1)
    with Loader(open_mixture(config.data), config.data, plan, seed=seed) as loader:
        return list(islice(loader, count))


def pixels(batch: Batch) -> list[Tensor]:
    """Augmented views, 0..1."""
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    return [view * std + mean for view in batch.augmented(torch.device("cpu"))]


@pytest.mark.parametrize(("options", "expected"), [
    ({}, lambda x: x),
    ({"flip": 1}, reference.horizontal_flip),
    ({"grayscale": 1}, lambda x: reference.rgb_to_grayscale(x, 3)),
    ({"solarize": 1}, lambda x: reference.solarize(x, 128 / 255)),
    ({"jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}, lambda x: x),
])  # fmt: skip
def test_what_is_asked_of_augmentation_arrives_in_every_view(
    scenes: Path, tmp_path: Path, options: dict, expected: Any
) -> None:
    """Probabilities of 0 and 1, against torchvision's functions."""
    (batch,) = batches(tmp_path, str(scenes), augment={**QUIET, **options})
    for cut, found in zip(batch.views, pixels(batch), strict=True):
        torch.testing.assert_close(found, expected(cut.float() / 255), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_the_strength_of_jitter_arrives(scenes: Path, tmp_path: Path, name: str) -> None:
    """One of the three: a single factor from [1 - s, 1 + s] explains each view, by torchvision's function."""
    strengths = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, name: 0.05}
    (batch,) = batches(tmp_path, str(scenes), size=4, augment={**QUIET, "jitter": 1, **strengths})
    adjust = getattr(reference, f"adjust_{name}")
    factors = torch.linspace(0.95, 1.05, 41)
    used = []
    for before, after in zip((batch.views[0][0].float() / 255), pixels(batch)[0][0], strict=True):
        errors = torch.stack([(adjust(before, float(f)) - after).abs().mean() for f in factors])
        assert errors.min() < 2e-3
        used.append(float(factors[errors.argmin()]))
    assert max(used) - min(used) > 0.01


def test_order_is_chosen_by_seed_and_mixed_in_blocks(scenes: Path, tmp_path: Path) -> None:
    """In blocks of one sample, shards keep their stored order; in one block of all, they do not."""
    shard = str(sorted(scenes.glob("*.tar"))[0])
    stored = sorted(batches(tmp_path, shard, size=32)[0].keys)
    assert batches(tmp_path, shard, size=32, shuffle_block=1)[0].keys == stored
    mixed_keys = [batches(tmp_path, shard, size=32, seed=seed)[0].keys for seed in (0, 1)]
    assert all(sorted(keys) == stored != keys for keys in mixed_keys)
    assert mixed_keys[0] != mixed_keys[1]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 7.0)])
def test_sources_are_drawn_by_their_weights(scenes: Path, tmp_path: Path, weights: tuple[float, float]) -> None:
    first, second, _ = sorted(map(str, scenes.glob("*.tar")))
    shards = [{"shards": s, "weight": w} for s, w in zip((first, second), weights, strict=True)]
    drawn = [record.source for batch in batches(tmp_path, shards, 8) for record in batch.records]
    assert len(drawn) == 128
    assert drawn.count(0) == pytest.approx(128 * weights[0] / sum(weights), abs=1)


def test_images_of_more_than_max_pixels_are_faults(scenes: Path, tmp_path: Path) -> None:
    """Scenes have 32 x 32 = 1024 pixels."""
    assert batches(tmp_path, str(scenes), max_pixels=1024)[0].skipped == []
    with pytest.raises(UserError, match=r"3 images in a row .*1024 pixels, more than data.max_pixels = 1023"):
        batches(tmp_path, str(scenes), max_pixels=1023, max_faults=3)


def test_large_photographs_are_decoded_at_a_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 pixels for views of 32 that are at least half of the image: an eighth is enough."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((2048, 2048)).save(out, "JPEG")
    write_shards([Sample("a", "jpg", out.getvalue())], tmp_path / "s", per_shard=1, total=1, classes=(), description={})
    flags, decode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: flags.append(flag) or decode(data, flag))
    batches(tmp_path, str(tmp_path / "s"), size=2)
    assert set(flags) == {cv2.IMREAD_REDUCED_COLOR_8}


# -- remote shards


def test_retries_and_deadline_are_the_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve() as server:
        server.always = "503"
        for retries, timeout in ((1, 7.0), (3, 4.5)):
            words = f"given up after {retries + 1} attempts of up to {timeout:g} s"
            with pytest.raises(UserError, match=words):
                batches(tmp_path, server.url("a.tar"), retries=retries, read_timeout=timeout)


def test_pauses_double_up_to_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    with serve() as server:
        server.always = "503"
        with pytest.raises(UserError, match="given up after 9 attempts"):
            list(Reader(retries=8, pause=0.5).stream(server.url("a.tar")))
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
