"""Where files lie apart from those that a configuration names: a user's cache, and the package's recipes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from lejepa_scale.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def user_cache() -> Path:
    """Folder for what can be made again: index files, copies of shards, built kernels. Follows XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lejepa_scale"


def recipes() -> dict[str, Path]:
    """The recipes by name: in a wheel they lie in the package, in a checkout in configs/ beside it."""
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(named: Path) -> Path:
    """The file that --config means: that file, or else the recipe of that name. Raises UserError, with the nearest name."""
    if named.is_file():
        return named
    known = recipes()
    name = str(named)
    if name in known:
        return known[name]
    if named.parent == Path() and not named.suffix:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f", did you mean {near[0]}?" if near else "."
        raise UserError(
            f"--config {name}: there is no such file, and no recipe of that name{meant} Recipes: {', '.join(known)}."
        )
    if named.stem in known and not named.exists():
        raise UserError(
            f"cannot read the configuration {named}: there is no such file. The recipe is --config {named.stem}."
        )
    return named


def recipe_table() -> str:
    """The recipes and, from the head of each, what it runs on."""
    rows = []
    for name, path in recipes().items():
        lines = path.read_text().splitlines()
        hardware = next((text for line in lines if (text := line.partition("# Hardware:")[2].strip())), "")
        rows.append(f"  {name:<18}{hardware}".rstrip())
    return "\n".join(rows)
