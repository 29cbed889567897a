"""The real loop on CUDA tensors that hold nothing: the host waits for the device nowhere, and tells no other rank anything
that it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from fake_cuda import CUDA, let_backward_run, pretended
from ranks import run_ranks

from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import Config, check_world, validate
from lejepa_scale.data import Batch
from lejepa_scale.data.images import photometric
from lejepa_scale.engine.ddp import ReplicaEngine
from lejepa_scale.model import build, encoder
from lejepa_scale.training import actions, loop
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.run import Run

pytestmark = pytest.mark.unchecked


class _Batches:
    """As the loader hands them over: in page-locked memory, parameters of the colours on the host."""

    def __init__(self, config: Config, micro_batch: int) -> None:
        views = config.data.views
        self.groups, self.count = [views.global_, views.local], micro_batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        n = self.count
        views = [torch.zeros(g.count, n, 3, g.size, g.size, dtype=torch.uint8).pin_memory() for g in self.groups]
        parameters = [torch.zeros(g.count, n, photometric.WIDTH) for g in self.groups]
        labels = torch.zeros(n, dtype=torch.long).pin_memory()
        return Batch(views, parameters, labels, ["key"] * n, [], [])


def _run(config: Config, folder: Path) -> tuple[Run, list[Any]]:
    plan = check_world(config, 1)
    engine = ReplicaEngine(lambda: build(config), config, plan, CUDA)
    feed = Feed(iter(_Batches(config, plan.micro_batch)), plan, CUDA, beside=False)  # as a second stream would do it
    probe = OnlineProbe(engine.module.encoder.embed_dim, 10, 1e-3, 0, CUDA)
    run = Run(config, plan, CUDA, engine, feed, Progress(0, "shards"), probe)
    reporter: Any = SimpleNamespace(advance=lambda: None, log=lambda record: record)
    signal: Any = SimpleNamespace(asked=False)
    of_probe = actions.Probe(CUDA)
    report = actions.Report(run, reporter, gauges=[of_probe.reading])
    return run, [actions.quarantine, actions.Stop(signal), of_probe, actions.Guard(), report]


CASES: dict[str, dict[str, Any]] = {
    "ViT": {},
    "stochastic depth": {"model": {"drop_path": 0.3, "drop_path_uniform": True}, "optim": {"clip_norm": 1.0}},
    "ResNet": {"model": {"encoder": "resnet10t", "options": {}}},
    "rotary positions": {"model": {"encoder": "vit_small_patch16_dinov3", "options": {"depth": 1}}},
    "other statistics": {"objective": {"sigreg": {"estimator": "u"}, "visreg": {"weight": 0.1}}},
    "accumulation, a predictor": {
        "train": {"steps": 6, "global_batch": 16, "micro_batch": 8},
        "model": {"predictor": {"hidden": 8}},
    },
    "weak": {"objective": {"regularizer": "weak_sigreg"}},
}


def _waits(folder: str, sections: dict[str, Any]) -> list[list[str]]:
    """Of every step."""
    let_backward_run(Path(folder))
    tree = small_config(folder, "s", **{"train": {"steps": 6}, **sections})
    tree |= {"log": {"every": 2}, "engine": {"name": "single", "precision": "bf16"}}
    config, waits = validate(tree), list[list[str]]()
    with pytest.MonkeyPatch.context() as patch, pretended() as watch:
        patch.setattr(encoder, "choose_backend", lambda *_, **__: "varlen")
        patch.setattr(actions, "peak_flops", lambda device: None)
        real = _drawn(config)
        patch.setattr(photometric, "apply", lambda x, _, pixels: photometric._together(x, real[len(x)], pixels))
        run, after_step = _run(config, Path(folder))

        def mark(run: Run, result: object) -> None:
            waits.append(watch.waits[:])
            watch.waits.clear()

        loop.loop(run, [*after_step, mark])
    return waits


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(tmp_path: Path, case: str) -> None:
    (waits,) = run_ranks(_waits, 1, str(tmp_path), CASES[case])
    assert len(waits) == 6
    assert [line for step in waits[1:-1] for line in step] == []


def _drawn(config: Config) -> dict[int, Any]:
    """Parameters of the colours of so many views, which decide on the host what is launched."""
    draws = np.random.default_rng(0)
    plan = check_world(config, 1)
    counts = [group.count * plan.micro_batch for group in (config.data.views.global_, config.data.views.local)]
    return {n: photometric.draw(draws.random((n, photometric.DRAWS)), config.data.augment) for n in counts}
