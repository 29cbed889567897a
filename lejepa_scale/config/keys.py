"""The tree of keys: dotted paths, fields and defaults, read from the sections of a pydantic model. Knows no key by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Key(NamedTuple):
    """One key of a configuration."""

    path: str
    field: FieldInfo
    default: Any  # PydanticUndefined where the key is required
    section: type[BaseModel] | None  # what is below it, where it is a section (or a list of them, or may be absent)


def keys_of(model: type[BaseModel], prefix: str = "", default: Any = None) -> Iterator[Key]:
    """Every key from the top down. default: what `model` itself is by default, which may differ from its fields'."""
    for name, field in model.model_fields.items():
        path, kinds = f"{prefix}{field.alias or name}", (field.annotation, *get_args(field.annotation))
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        own = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        yield Key(path, field, own, section)
        if section is not None:  # Section, Section | None, list[Section]
            yield from keys_of(section, f"{path}.", own if isinstance(own, BaseModel) else None)


def values_of(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key that is no section."""
    for name, field in type(section).model_fields.items():
        path, value = f"{prefix}{field.alias or name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from values_of(value, f"{path}.")
        else:
            yield path, value


def as_text(value: Any) -> str:
    """A value as an override takes it."""
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')
