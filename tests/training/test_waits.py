"""The real loop on CUDA tensors that hold nothing: the host waits for the device nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import waits
from conftest import mostly_slow, on_a_gpu, small_config
from ranks import run_ranks

from lejepa_scale.config import validate

pytestmark = pytest.mark.unchecked


CASES: dict[str, dict[str, Any]] = {
    "ViT": {},
    "stochastic depth": {"model": {"drop_path": 0.3, "drop_path_uniform": True}, "optim": {"clip_norm": 1.0}},
    "patches left out": {
        "model": {
            "encoder": "vit_small_patch16_dinov3",
            "options": {"depth": 1},
            "patch_size": 8,
            "drop_path": 0.3,
            "drop_path_uniform": True,
            "patch_drop": {"global": 0.5, "local": 0.5},
        }
    },
    "ResNet": {"model": {"encoder": "resnet10t", "options": {}}},
    "rotary positions": {"model": {"encoder": "vit_small_patch16_dinov3", "options": {"depth": 1}}},
    "other statistics": {"objective": {"sigreg": {"estimator": "u"}, "visreg": {"weight": 0.1}}},
    "accumulation, a predictor": {
        "train": {"steps": 6, "global_batch": 16, "micro_batch": 8},
        "model": {"predictor": {"hidden": 8}},
    },
    "Muon, layers apart": {"optim": {"name": "muon", "layer_decay": 0.5, "clip_norm": 1.0}},
    "weak": {"objective": {"regularizer": "weak_sigreg"}},
    "visreg": {"objective": {"regularizer": "visreg"}},
}


def _steps(folder: str, sections: dict[str, Any]) -> list[waits.Step]:
    tree = small_config(folder, "s", **{"train": {"steps": 6}, **sections})
    tree |= {"log": {"every": 2}, "engine": {"name": "single", "precision": "bf16"}}
    return waits.steps(validate(tree))


@pytest.mark.parametrize(
    "case", mostly_slow(CASES, "ViT", "patches left out", "accumulation, a predictor", "Muon, layers apart")
)
def test_a_step_waits_for_nothing(tmp_path: Path, case: str) -> None:
    """But the first, which makes what is kept, and the last, which is read at once."""
    (found,) = run_ranks(_steps, 1, str(tmp_path), CASES[case])
    assert len(found) == 6
    assert [line for step in found[1:-1] for line in step.waits] == []
    for step in found[1:-1]:
        assert min(step.launches[phase] for phase in waits.PHASES) > 0


@on_a_gpu
def test_on_a_gpu_torch_finds_no_wait(tmp_path: Path) -> None:
    tree = small_config(tmp_path, "s", train={"steps": 8}, optim={"warmup_steps": 0})
    tree |= {"log": {"every": 2}, "engine": {"name": "single", "precision": "bf16"}}
    found = waits.on_a_gpu(validate(tree), torch.device("cuda"))
    assert found[3:-1] == [[]] * 4


def _waiting(folder: str) -> list[waits.Step]:
    from lejepa_scale.model import norm

    def statistics(x: Any, own: Any = norm._statistics) -> Any:
        x.new_tensor([len(x)])
        return own(x)

    norm._statistics = statistics
    return _steps(folder, {})


def test_a_wait_is_found(tmp_path: Path) -> None:
    """A number of the host's made into a tensor in the middle of the forward pass, with the line that does it."""
    (found,) = run_ranks(_waiting, 1, str(tmp_path))
    for step in found[1:-1]:
        assert len(step.waits) == 2
        assert all("a copy cpu -> cuda of (1,) that is waited for" in line for line in step.waits)
