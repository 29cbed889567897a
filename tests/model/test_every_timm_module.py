"""A model of every module of timm trains, saves and exports, or is refused with advice that helps: see docs/encoders.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import encoders

REFUSED = {"coat": "two names", "gemma4_vit": "no numbers"}


def test_no_module_is_forgotten() -> None:
    assert encoders.modules() == encoders.MODELS.keys()


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize("module", encoders.MODELS)
def test_it_trains_and_exports_or_says_why_not(module: str, scenes: Path, tmp_path: Path) -> None:
    row = encoders.attempt(encoders.MODELS[module], scenes, tmp_path)
    assert row["outcome"] == ("refused" if module in REFUSED else "trained"), row["said"]
    assert REFUSED.get(module, "") in row["said"]
