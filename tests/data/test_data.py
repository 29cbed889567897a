"""Index and loader: the same batches however they are read."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, small_views
from PIL import Image
from torchvision.transforms import Resize

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Loader, evaluation_batches, open_mixture
from lejepa_scale.data.make import synthetic
from lejepa_scale.errors import UserError


def plan(ranks: int, micro: int, accumulation: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch=micro, ranks=ranks, accumulation=accumulation)


@pytest.fixture
def data(scenes: Path) -> Data:
    return Data(shards=str(scenes), views=small_views())


def test_batches_depend_on_nothing_but_the_step(data: Data, scenes: Path) -> None:
    """Workers, ranks and the step one starts at change no pixel and no augmentation parameter."""
    sources = open_mixture(data)
    reference = list(islice(Loader(sources, data, plan(1, 12), seed=0), 10))
    assert len({key for batch in reference[:8] for key in batch.keys}) == 96  # one epoch: every sample
    resumed = islice(Loader(sources, data.model_copy(update={"workers": 2}), plan(1, 12), seed=0, first_step=7), 2)
    for ours, theirs in zip(resumed, reference[7:9], strict=True):
        assert ours.keys == theirs.keys
        assert all(
            a.equal(b) for a, b in zip(ours.views + ours.parameters, theirs.views + theirs.parameters, strict=True)
        )
    halves = [next(iter(Loader(sources, data, plan(2, 6), seed=0, rank=rank, first_step=3))) for rank in range(2)]
    for i, group in enumerate(reference[3].views):
        assert torch.cat([half.views[i] for half in halves], dim=1).equal(group)
    first, second = (next(iter(Loader(sources, data, plan(1, 12), seed=0, first_step=s))) for s in (0, 8))
    assert not first.views[0].equal(second.views[0])  # another epoch, other crops
    assert first.views[0].shape == (2, 12, 3, 32, 32)
    assert first.views[1].shape == (2, 12, 3, 16, 16)


def test_labels_and_fingerprint(data: Data, scenes: Path) -> None:
    sources = open_mixture(data)
    assert (sources.num_samples, sources.num_classes) == (96, 10)
    batch = next(iter(Loader(sources, data, plan(1, 12), seed=0)))
    assert [int(key) % 10 for key in batch.keys] == batch.labels.tolist()
    fewer = Data(shards=str(next(scenes.glob("*.tar"))))
    assert open_mixture(fewer).fingerprint != sources.fingerprint


def test_a_loader_needs_no_model(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/data.md, as they stand there."""
    text = (ROOT / "docs/data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("## Use the loader alone")[2], re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("data/photos", str(scenes)), found)
    batch = found["batch"]
    assert [x.shape for x in batch.augmented(torch.device("cpu"))] == [(2, 8, 3, 224, 224), (6, 8, 3, 98, 98)]
    assert [int(key) % 10 for key in batch.keys] == batch.labels.tolist()


def test_a_rank_that_the_plan_does_not_have_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match=r"rank = 2 of a plan for 2 rank"):
        Loader(open_mixture(data), data, plan(2, 6), seed=0, rank=2)


def test_evaluation_keeps_stored_order(scenes: Path) -> None:
    images, labels = zip(*evaluation_batches(str(scenes), image_size=24, batch_size=20, limit=50), strict=True)
    assert [len(x) for x in images] == [20, 20, 10]
    assert torch.cat(labels).tolist() == [i % 10 for i in range(50)]
    assert images[0].shape == (20, 3, 24, 24)
    assert images[0].dtype == torch.uint8
    scene = Image.fromarray(synthetic.render(7, 32, seed=0)[0])
    difference = images[0][7].permute(1, 2, 0).int() - torch.from_numpy(np.array(Resize(24)(scene))).int()
    assert difference.abs().max() <= 2
