"""Configurations as text: YAML plus dotted overrides in, YAML out, and errors that name the nearest right key. Refuses keys
that have moved, but reads what a run wrote before they did."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lejepa_scale.config import checks
from lejepa_scale.config.keys import keys_of
from lejepa_scale.config.paths import find_config
from lejepa_scale.config.schema import Config
from lejepa_scale.errors import UserError

Tree = dict[str, Any]

# Keys that had another name. A file or an override that uses it is refused with the new one.
MOVED = {
    "objective.num_slices": "objective.sigreg.num_slices",
    "objective.knots": "objective.sigreg.knots",
    "objective.t_max": "objective.sigreg.t_max",
    "objective.estimator": "objective.sigreg.estimator",
    "objective.scale": "objective.sigreg.scale",
    "objective.reference_n": "objective.sigreg.reference_n",
    "objective.communication": "objective.sigreg.communication",
    "objective.backend": "objective.sigreg.backend",
    "objective.sketch": "objective.weak_sigreg.sketch",
    "objective.scale_centre": "objective.visreg.weight",
}


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file or the recipe of that name, apply `a.b=value` overrides (values are YAML), validate. Raises
    UserError."""
    path = find_config(Path(path))
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}.") from error
    tree = parsed(text, str(path))
    _one_length(tree, overrides or [])
    for override in overrides or []:
        _apply(tree, override)
    return validate(tree, origin=f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parsed(text: str | bytes, origin: str) -> Tree:
    """What a YAML text holds, bytes as UTF-8. Raises UserError, which names `origin`, where that is no mapping."""
    try:
        tree = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: of a date that there is not
        raise UserError(f"{origin} cannot be read, it is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{origin} must hold a mapping of sections (run, train, data, model, ...).")
    return tree


def validate(tree: Tree, origin: str = "the configuration") -> Config:
    """Turn a nested mapping into a Config. Raises one UserError that lists every fault."""
    faults = [f"{old} is now {new}" for old, new in MOVED.items() if _section(tree, old)[0] is not None]
    try:
        config = Config.model_validate(migrate(tree), by_alias=True, by_name=False)
    except ValidationError as error:
        faults += dict.fromkeys(_explain(fault) for fault in error.errors())
    if faults:
        said = " ".join(fault if fault.endswith("?") else f"{fault};" for fault in faults).removesuffix(";")
        raise UserError(f"{origin}: {said}{'' if said.endswith('?') else '.'}")
    return config


def migrate(tree: Tree) -> Tree:
    """A copy in which every key has its present name."""
    tree = deepcopy(tree)
    for old, new in MOVED.items():
        before, name = _section(tree, old)
        if before is None:
            continue
        value = before.pop(name)
        *parents, last = new.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node.setdefault(last, value)
    return tree


def recorded(text: str | bytes, origin: str) -> Config:
    """The configuration that a run wrote, by whatever rules held then: keys that have moved since, or that had no effect
    and were let pass, are read as what they meant. Raises UserError."""
    tree = migrate(parsed(text, origin))
    try:
        config = Config.model_validate(tree, context={"recorded": True}, by_alias=True, by_name=False)
    except ValidationError:
        return validate(tree, origin)  # which says what is wrong
    for path in (path for _, paths in checks.ignored(config) for path in paths):
        section, name = _section(tree, path)
        if section is not None:
            del section[name]
    return validate(tree, origin)


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values of the keys at these paths, checked anew. Raises UserError."""
    tree = config.model_dump(mode="json", by_alias=True)
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return validate(tree)


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every key, with the names that `load` takes."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _section(tree: Any, path: str) -> tuple[Tree | None, str]:
    """The mapping that holds the key at `path`, None where none does; and its name there."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return (tree if isinstance(tree, dict) and last in tree else None), last


def _one_length(tree: Tree, overrides: list[str]) -> None:
    """What the file says of a run's length is left out where an override says it in another unit."""
    lengths = {f"train.{name}" for name in ("steps", "epochs", "images")}
    if lengths & {key for key, _, text in (override.partition("=") for override in overrides) if text != "null"}:
        for section, name in (_section(tree, path) for path in lengths):
            if section is not None:
                del section[name]


def _apply(tree: Tree, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key.sub=value, for instance train.steps=100.")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if isinstance(child, list) or [*parents, last][depth + 1].isdigit():
            whole = ".".join(parents[: depth + 1])
            raise UserError(
                f"override {override!r}: the entries of a list have no keys of their own. Give all of {whole} at once, as "
                "in data.shards=[{shards: a.tar, weight: 2}, {shards: b.tar}]."
            )
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part} is a value, not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value.") from error


def _explain(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"] if not isinstance(part, int))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {path}{_nearest(path)}"
    if fault["type"] == "missing":
        return f"{path} is required"
    if fault["type"] == "value_error":  # raised by a validator of ours, which names the numbers itself
        message = fault["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    return f"{path}: {fault['msg']} (got {fault['input']!r})"


def _nearest(path: str) -> str:
    """A name like it in the same section, the same name in another section, or a path like it."""
    known = {key.path: key.path for key in keys_of(Config)}
    names = known | MOVED  # what resembles an old name has a new one
    parent, _, last = path.rpartition(".")
    siblings = {name.rpartition(".")[2]: names[name] for name in names if name.rpartition(".")[0] == parent}
    match = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    match = match or [name for name in known if name.rpartition(".")[2] == last]
    match = match or [names[name] for name in difflib.get_close_matches(path, names, n=1)]
    if match:
        return f", did you mean {match[0]}?"
    here = [name for name, now in siblings.items() if now.rpartition(".")[0] == parent]
    return f" ({parent or 'the top level'} has {', '.join(here)})"
