"""docs/configuration.md, written from the schema:

python -m lejepa_scale.config.reference > docs/configuration.md
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lejepa_scale.config.checks import USES
from lejepa_scale.config.files import MOVED
from lejepa_scale.config.keys import Key, as_text, keys_of
from lejepa_scale.config.schema import Config
from lejepa_scale.config.words import steps_or_words

_HEAD = """\
# Every key of a configuration

A configuration is a YAML file of sections; every key can be overridden on the command line (`train.steps=100`,
`data.views.global.size=96`). `--print-config` shows what comes of both. A key without a default is required.

Durations are integers, in steps, or words: `5 epochs`, `1.28M images` (k, M, B: 10^3, 10^6, 10^9), `10%` of the run. What
is in words becomes steps, rounded down, when the data is opened: see "Epochs" on the page of data.

This page is written from the schema: `python -m lejepa_scale.config.reference > docs/configuration.md`.
"""
_USES = """\
## Keys that have an effect only with others

A key that the choice of another leaves without effect is refused, unless it has its default value.

| key | has an effect where |
|---|---|
"""
_MOVED = """\
## Keys that have moved

A file or an override that uses an old name is refused with the new one. The `config.yaml` of a checkpoint that was written
before is read under its present names.

| old | new |
|---|---|
"""
_NAMES = {int: "integer", float: "number", bool: "true, false", str: "text", Path: "path"}


def render() -> str:
    """The page, in Markdown."""
    keys = list(keys_of(Config))
    parts = [_HEAD, *(_section(key, keys) for key in keys if key.section is not None)]
    parts.append(_USES + "".join(f"| {', '.join(f'`{k}`' for k in use.keys)} | {use.condition} |\n" for use in USES))
    parts.append(_MOVED + "".join(f"| `{old}` | `{new}` |\n" for old, new in MOVED.items()))
    return "\n".join(parts)


def _section(section: Key, keys: list[Key]) -> str:
    about = inspect.cleandoc(section.section.__doc__ or "").replace("\n", " ")
    listed = get_origin(section.field.annotation) is list  # whose entries have no dotted keys
    heading = f"entries of {section.path}" if listed else section.path
    rows = ""
    for key in keys:
        parent, _, name = key.path.rpartition(".")
        if parent == section.path:
            kind = _kind(key.field.annotation, key.field.metadata)
            rows += f"| `{name if listed else key.path}` | {kind} | {_default(key)} | {key.field.description} |\n"
    return f"## {heading}\n\n{about}\n\n| key | values | default | meaning |\n|---|---|---|---|\n{rows}"


def _default(key: Key) -> str:
    if key.default is PydanticUndefined:
        return ""
    if isinstance(key.default, BaseModel):
        return "below"
    return "unset" if key.default is None else f"`{as_text(key.default)}`"


def _kind(annotation: Any, limits: Sequence[Any]) -> str:
    """What a value may be, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [limit for part in arguments[1:] for limit in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _kind(arguments[0], [*limits, *own])
    if origin in (Union, UnionType):
        return " or ".join(_kind(argument, limits) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list or arguments[1:] == (Ellipsis,):
        return f"list: {_kind(arguments[0], ())}"
    if origin is tuple:
        return f"[{', '.join(_kind(argument, ()) for argument in arguments)}]"
    if origin is dict:
        return "mapping"
    if issubclass(annotation, BaseModel):
        return "section"
    bounds = [
        f"{sign} {getattr(limit, name):,}"
        for kind, name, sign in ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))
        for limit in limits
        if isinstance(limit, kind)
    ]
    words = any(isinstance(limit, WrapValidator) and limit.func is steps_or_words for limit in limits)
    return f"{_NAMES[annotation]}{' ' * bool(bounds)}{', '.join(bounds)}{' or words' * words}"


if __name__ == "__main__":
    print(render(), end="")
