"""Index and loader: the same batches however they are read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from torchvision.transforms import Resize

from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.data import Loader, evaluation_batches, open_mixture
from lejepa_scale.data.make import synthetic


def plan(ranks: int, micro: int, accumulation: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch=micro, ranks=ranks, accumulation=accumulation)


@pytest.fixture
def config(scenes: Path, tmp_path: Path):
    return validate(small_config(tmp_path, scenes, train={"steps": 9, "global_batch": 12}))


def test_batches_depend_on_nothing_but_the_step(config, scenes: Path) -> None:
    """Workers, ranks and the step one starts at change no pixel and no augmentation parameter."""
    sources = open_mixture(config.data)
    reference = list(islice(Loader(sources, config, plan(1, 12), rank=0, first_step=0, pin_memory=False), 10))
    assert len({key for batch in reference[:8] for key in batch.keys}) == 96  # one epoch: every sample
    with_workers = validate(
        {**config.model_dump(by_alias=True), "data": {**config.data.model_dump(by_alias=True), "workers": 2}}
    )
    resumed = islice(Loader(sources, with_workers, plan(1, 12), rank=0, first_step=7, pin_memory=False), 2)
    for ours, theirs in zip(resumed, reference[7:9], strict=True):
        assert ours.keys == theirs.keys
        assert all(
            a.equal(b) for a, b in zip(ours.views + ours.parameters, theirs.views + theirs.parameters, strict=True)
        )
    halves = [
        next(iter(Loader(sources, config, plan(2, 6), rank=rank, first_step=3, pin_memory=False))) for rank in range(2)
    ]
    for i, group in enumerate(reference[3].views):
        assert torch.cat([half.views[i] for half in halves], dim=1).equal(group)
    first, second = (
        next(iter(Loader(sources, config, plan(1, 12), rank=0, first_step=s, pin_memory=False))) for s in (0, 8)
    )
    assert not first.views[0].equal(second.views[0])  # another epoch, other crops
    assert first.views[0].shape == (2, 12, 3, 32, 32)
    assert first.views[1].shape == (2, 12, 3, 16, 16)


def test_labels_and_fingerprint(config, scenes: Path) -> None:
    sources = open_mixture(config.data)
    assert (sources.num_samples, sources.num_classes) == (96, 10)
    batch = next(iter(Loader(sources, config, plan(1, 12), rank=0, first_step=0, pin_memory=False)))
    assert [int(key) % 10 for key in batch.keys] == batch.labels.tolist()
    fewer = config.data.model_copy(
        update={"shards": [config.data.shards[0].model_copy(update={"shards": [str(next(scenes.glob("*.tar")))]})]}
    )
    assert open_mixture(fewer).fingerprint != sources.fingerprint


def test_evaluation_keeps_stored_order(scenes: Path) -> None:
    images, labels = zip(*evaluation_batches(str(scenes), image_size=24, batch_size=20, limit=50), strict=True)
    assert [len(x) for x in images] == [20, 20, 10]
    assert torch.cat(labels).tolist() == [i % 10 for i in range(50)]
    assert images[0].shape == (20, 3, 24, 24)
    assert images[0].dtype == torch.uint8
    scene = Image.fromarray(synthetic.render(7, 32, seed=0)[0])
    difference = images[0][7].permute(1, 2, 0).int() - torch.from_numpy(np.array(Resize(24)(scene))).int()
    assert difference.abs().max() <= 2
