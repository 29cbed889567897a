"""Durations in words: an int is a number of steps, `5 epochs`, `1.28M images` or `10%` wait for the data, whose size says
how many steps they are (durations.py). Refuses to know that size."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

_WORDS = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) ?([kMB]?) ?(%|[A-Za-z]+)")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_UNITS = ("steps", "epochs", "images", "%")
_EXAMPLES = "an int of steps, or words as in `5 epochs`, `1.28M images`, `10%` (of the run)"


class Words(NamedTuple):
    """What words say."""

    amount: Fraction
    unit: str  # one of _UNITS


def parsed(text: str) -> Words:
    """Raises ValueError, with advice, for what is no duration."""
    match = _WORDS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: {_EXAMPLES}")
    number, factor, given = match.groups()
    unit = given if given.endswith(("s", "%")) else f"{given}s"
    if unit not in _UNITS:
        near = difflib.get_close_matches(unit.lower(), _UNITS, n=1)
        hint = f", did you mean {near[0]}? Give" if near else ":"
        raise ValueError(f"{text!r} has no unit that is known{hint} {_EXAMPLES}")
    amount = Fraction(number) * _FACTORS[factor]
    if amount <= 0 or (unit == "%" and amount > 100):
        raise ValueError(f"{text!r} must be more than 0{' and at most 100 %' * (unit == '%')}")
    return Words(amount, unit)


def steps_or_words(value: Any, as_int: Callable[[Any], int]) -> int | str:
    """A pydantic validator of a duration: the int, or the words, as they will be recorded. Raises ValueError."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no whole number of steps, and no duration without a unit: {_EXAMPLES}")
    if not isinstance(value, str) or re.fullmatch(r"[+-]?\d+", value.strip()):
        return as_int(value)
    amount, unit = parsed(value)
    if unit != "steps":
        return value.strip()
    if amount.denominator != 1:
        raise ValueError(f"{value!r} is no whole number of steps")
    return as_int(int(amount))


def steps_alone(value: Any, as_int: Callable[[Any], int]) -> int | None:
    """A pydantic validator of the whole run's steps, whose other units have keys of their own. Raises ValueError."""
    if isinstance(value, str) and _WORDS.fullmatch(value.strip()):
        amount, unit = parsed(value)
        if unit in ("epochs", "images"):
            raise ValueError(f"{value!r} are {unit}, which have a key of their own: train.{unit}={float(amount):g}")
        raise ValueError(f"{value!r} is no number of steps: write an int, or train.epochs or train.images instead")
    return None if value is None else as_int(value)
