"""The direction of dependence, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lejepa_scale"
FORBIDDEN = {
    "config": ("distributed", "data", "model", "objective", "engine", "train", "checkpoint", "evaluation"),
    "distributed": ("data", "model", "objective", "engine", "train", "checkpoint", "evaluation"),
    "data": ("model", "objective", "engine", "train", "checkpoint", "evaluation"),
    "objective": ("model", "data", "engine", "train", "checkpoint", "evaluation"),
    "model": ("data", "engine", "train", "checkpoint", "evaluation"),
    "evaluation": ("engine", "train"),
    "engine": ("data", "train", "evaluation"),
    "checkpoint": ("engine", "train", "evaluation"),
}
ALONE = {"deepspeed": {"engine/zero.py"}, "xformers": {"model/attention.py"}, "wandb": {"metrics.py"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = imports(path)
    for other in FORBIDDEN.get(room, ()):
        assert not any(f"{name}.".startswith(f"lejepa_scale.{other}.") for name in found), f"{room} imports {other}"
    for library, homes in ALONE.items():
        if any(name.split(".")[0] == library for name in found):
            assert str(path.relative_to(PACKAGE)) in homes, f"{library} is imported outside {homes}"


def test_optional_libraries_are_imported_lazily() -> None:
    for library, homes in ALONE.items():
        for home in homes:
            top = [
                n for n in ast.parse((PACKAGE / home).read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
            ]
            assert not any(library in ast.dump(node) for node in top)
