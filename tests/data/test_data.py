"""Index, order, loader: every sample once, the same batches however they are read."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.data import Loader, evaluation_batches, open_sources
from lejepa_scale.data.order import Order, SourceOrder, positions


def plan(ranks: int, micro: int, accumulation: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch=micro, ranks=ranks, accumulation=accumulation)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_each_epoch_visits_every_sample_once_and_epochs_differ(block: int) -> None:
    counts = [5, 1, 30, 12]
    order = SourceOrder(counts, seed=3, block=block)
    epochs = [[order.locate(i) for i in range(e * 48, (e + 1) * 48)] for e in range(3)]
    everything = {(shard, member) for shard, n in enumerate(counts) for member in range(n)}
    for number, epoch in enumerate(epochs):
        assert {location[0] for location in epoch} == {number}
        assert Counter(location[1:] for location in epoch) == dict.fromkeys(everything, 1)
    assert [x[1:] for x in epochs[0]] != [x[1:] for x in epochs[1]]
    assert order.locate(100) == SourceOrder(counts, seed=3, block=block).locate(100)


def test_mixture_keeps_its_weights_everywhere() -> None:
    order = Order([[50], [50]], [3.0, 1.0], seed=0, block=16)
    sources = [order.locate(i).source for i in range(4000)]
    for start in range(0, 4000, 400):
        assert abs(sum(sources[start : start + 400]) - 100) <= 1
    drawn = [order.locate(i) for i in range(200) if sources[i] == 1]
    assert Counter(drawn).most_common(1)[0][1] == 1  # the second source's first epoch has no repeats


def test_ranks_partition_each_micro_batch() -> None:
    """The same micro-batches for any split of micro_batch x ranks, and no sample on two ranks."""
    for step in (0, 5):
        for micro in (0, 1):
            whole = list(positions(step, micro, 0, plan(1, 12, 2)))
            for ranks in (2, 3, 4):
                parts = [positions(step, micro, rank, plan(ranks, 12 // ranks, 2)) for rank in range(ranks)]
                assert [p for part in parts for p in part] == whole
    assert list(positions(1, 0, 0, plan(1, 4))) == [4, 5, 6, 7]


@pytest.fixture
def config(scenes: Path, tmp_path: Path):
    return validate(small_config(tmp_path, scenes, train={"steps": 9, "global_batch": 12}))


def test_batches_depend_on_nothing_but_the_step(config, scenes: Path) -> None:
    """Workers, ranks and the step one starts at change no pixel and no augmentation parameter."""
    sources = open_sources(config.data)
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
    sources = open_sources(config.data)
    assert (sources.num_samples, sources.num_classes) == (96, 10)
    batch = next(iter(Loader(sources, config, plan(1, 12), rank=0, first_step=0, pin_memory=False)))
    assert [int(key) % 10 for key in batch.keys] == batch.labels.tolist()
    fewer = config.data.model_copy(
        update={"shards": [config.data.shards[0].model_copy(update={"shards": [str(next(scenes.glob("*.tar")))]})]}
    )
    assert open_sources(fewer).fingerprint != sources.fingerprint


def test_evaluation_keeps_stored_order(scenes: Path) -> None:
    images, labels = zip(*evaluation_batches(str(scenes), image_size=24, batch_size=20, limit=50), strict=True)
    assert [len(x) for x in images] == [20, 20, 10]
    assert torch.cat(labels).tolist() == [i % 10 for i in range(50)]
    assert images[0].shape == (20, 3, 24, 24)
    assert images[0].dtype == torch.uint8
    assert np.isfinite(images[0].float().mean())
