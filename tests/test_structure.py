"""The direction of dependence, read from the imports of every file of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lejepa_scale"
# What each room, and each file at the top, may import of the package. A name that is not here has no place yet.
MAY_IMPORT: dict[str, set[str]] = {
    "addresses": set(),
    "errors": {"addresses"},
    "seeds": set(),
    "progress": set(),
    "config": {"addresses", "errors"},
    "parallel": {"errors"},
    "cpu": {"config"},
    "data": {"addresses", "errors", "progress", "seeds", "config", "parallel", "cpu"},
    "objective": {"errors", "seeds", "config", "parallel", "cpu"},
    "model": {"errors", "config", "parallel", "cpu", "objective"},
    "engine": {"errors", "config", "parallel", "model"},
    "checkpoint": {"addresses", "errors", "config", "parallel", "model", "engine"},
    "conversion": {"errors", "progress", "config", "model", "engine", "checkpoint"},
    "evaluation": {
        "errors",
        "progress",
        "config",
        "parallel",
        "data",
        "model",
        "objective",
        "checkpoint",
        "conversion",
    },
    "cost": {"config", "errors", "objective", "model", "engine"},
}
MAY_IMPORT["training"] = {*MAY_IMPORT, "evaluation", "cost"} - {"conversion"}
MAY_IMPORT["operations"] = {*MAY_IMPORT, "training"}
MAY_IMPORT["logs"] = {
    "addresses",
    "errors",
    "parallel",
}  # after those that may not import it: who shows messages is a program's business
MAY_IMPORT["cli"] = {*MAY_IMPORT, "operations"}
MAY_IMPORT["__init__"] = {"checkpoint", "config", "data", "errors", "evaluation", "model", "objective", "training"}
MAY_IMPORT["__main__"] = {"cli"}
ALONE = {
    "deepspeed": {"engine/zero.py"},
    "xformers": {"model/attention.py"},
    "torchao": {"engine/wrap.py"},
    "wandb": {"training/wandb_run.py"},
    "matplotlib": {"evaluation/picture.py", "operations/agreement.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here, found = room(path), imports(path)
    assert here in MAY_IMPORT, f"{here} has no rule in {Path(__file__).name}: where does it stand?"
    rooms = {name.split(".")[1] for name in found if name.startswith("lejepa_scale.")} & {room(p) for p in FILES}
    assert rooms - {here} <= MAY_IMPORT[here], f"{here} imports {rooms - {here} - MAY_IMPORT[here]}"
    for library, homes in ALONE.items():
        if any(name.split(".")[0] == library for name in found):
            assert str(path.relative_to(PACKAGE)) in homes, f"{library} is imported outside {homes}"


def test_there_is_no_circle_between_rooms() -> None:
    order: list[str] = []
    rest = dict(MAY_IMPORT)
    while rest:
        ready = [name for name, allowed in rest.items() if allowed <= {*order, name}]
        assert ready, f"a circle among {sorted(rest)}"
        order += ready
        for name in ready:
            del rest[name]


def test_optional_libraries_are_imported_lazily() -> None:
    for library, homes in ALONE.items():
        for home in homes:
            top = [
                n for n in ast.parse((PACKAGE / home).read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
            ]
            assert not any(library in ast.dump(node) for node in top)
