"""Configurations as text: YAML plus dotted overrides in, YAML out, and errors that name the nearest right key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lejepa_scale.config.paths import find_config
from lejepa_scale.config.schema import Config
from lejepa_scale.errors import UserError


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file or the recipe of that name, apply `a.b=value` overrides (values are YAML), validate. Raises
    UserError."""
    path = find_config(Path(path))
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}.") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections (run, train, data, model, ...).")
    for override in overrides or []:
        _apply(tree, override)
    return validate(tree, origin=str(path))


def validate(tree: dict[str, Any], origin: str = "the configuration") -> Config:
    """Turn a nested mapping into a Config. Raises one UserError that lists every fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(dict.fromkeys(_explain(fault) for fault in error.errors()))
        raise UserError(f"{origin}: {faults}.") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every key, with the names that `load` takes."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def key_paths(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    paths: list[str] = []
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        paths.append(path)
        for kind in (field.annotation, *get_args(field.annotation)):  # Section, Section | None, list[Section]
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                paths += key_paths(kind, f"{path}.")
    return paths


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must read key.sub=value, for instance train.steps=100.")
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part} is a value, not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
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
    known = key_paths()
    parent, _, last = path.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    match = difflib.get_close_matches(path, siblings, n=1, cutoff=0.75)
    match = match or [key for key in known if key.rpartition(".")[2] == last][:1]
    match = match or difflib.get_close_matches(path, known, n=1)
    if match:
        return f", did you mean {match[0]}?"
    return f" ({parent or 'the top level'} has {', '.join(key.rpartition('.')[2] for key in siblings)})"
