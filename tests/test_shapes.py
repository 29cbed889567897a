"""Shapes are checked where they are said to be: under CHECK_SHAPES=1, here, in child processes and on ranks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import shape_checks
import torch
from jaxtyping import TypeCheckError
from ranks import run_ranks

import lejepa_scale
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.model.norm import BatchNorm
from lejepa_scale.objective import SIGReg

checked = pytest.mark.skipif(not shape_checks.wanted(), reason="for CHECK_SHAPES=1 (`make shapes`)")


@checked
def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TypeCheckError, match=r"parameter 'z'"):
        SIGReg(num_slices=2)(torch.randn(4), step=0)
    with pytest.raises(TypeCheckError, match=r"parameter 'x'"):
        BatchNorm(3)(torch.randn(4))


@checked
def test_a_wrong_kind_of_number_is_refused() -> None:
    with pytest.raises(TypeCheckError, match=r"parameter 'images'"):
        normalize(torch.ones(1, 3, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeCheckError, match=r"parameter 'knots'"):
        SIGReg(knots=17.5)  # type: ignore[arg-type]


@checked
def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lejepa_scale.objective.sigreg")
    monkeypatch.setattr(
        module, "_draw", lambda seed, step, rows, columns, device, dtype: torch.zeros(rows, columns + 1)
    )
    with pytest.raises(TypeCheckError, match=r"return value of lejepa_scale\.objective\.sigreg\.normal"):
        module.normal(0, 0, 3, 5, torch.device("cpu"), torch.float32)


@checked
def test_fields_that_disagree_are_refused() -> None:
    rows = np.zeros(3, np.int64)
    fields = {"keys": np.zeros(3, "S4"), "offsets": rows, "sizes": rows, "labels": rows}
    ShardIndex("a.tar", **fields, checksums=np.zeros(3, np.uint32), nbytes=0)
    with pytest.raises(TypeCheckError, match=r"parameter 'checksums'"):
        ShardIndex("a.tar", **fields, checksums=np.zeros(4, np.uint32), nbytes=0)


def _refused() -> bool:
    try:
        SIGReg(num_slices=2)(torch.randn(4), step=0)
    except TypeCheckError:
        return True
    return False


@checked
def test_child_processes_check_too(command: Any, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("import torch; from lejepa_scale.objective import SIGReg; SIGReg()(torch.randn(4), step=0)")
    found = [command(script), subprocess.run([sys.executable, script], capture_output=True, text=True)]
    assert ["TypeCheckError" in result.stderr for result in found] == [True, True]
    assert run_ranks(_refused, 1) == [True]


def _modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(lejepa_scale.__path__, "lejepa_scale."):
        if found.name not in shape_checks.UNCHECKED:
            yield importlib.import_module(found.name)


def _functions(holder: Any, module: str) -> Iterator[Any]:
    for value in vars(holder).values():
        if getattr(value, "__module__", None) != module and not isinstance(
            value, (staticmethod, classmethod, property)
        ):
            continue
        if inspect.isclass(value):
            yield from _functions(value, module)
        value = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
        if inspect.isfunction(value):
            yield value


def test_every_annotation_can_be_resolved() -> None:
    """One that cannot, such as a name imported for type checkers alone, would be passed over in silence."""
    count = 0
    for module in _modules():
        for function in _functions(module, module.__name__):
            typing.get_type_hints(function, vars(module), include_extras=True)
            count += 1
    assert count > 400, count


def test_the_switch_changes_nothing_when_it_is_off() -> None:
    if shape_checks.wanted():
        pytest.skip("it is on")
    assert not any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path)
    assert Path(inspect.unwrap(SIGReg.forward).__code__.co_filename).name == "regularizer.py"
    assert not hasattr(SIGReg.forward, "__wrapped__")
