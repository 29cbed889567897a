"""Which rank writes which elements of which tensor, and as which rectangles of it: arithmetic alone, the same on every
rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Int64

Box = tuple[slice, ...]  # of a tensor, a slice for each dimension


def boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """The elements start .. start + length - 1 of the flattened tensor as rectangles of it, in their order. There are as few
    as possible, at most 2 D - 1, and each is contiguous."""
    if length == 0:
        return []
    whole = tuple(slice(0, n) for n in shape)
    if (start, length) == (0, prod(shape)):
        return [whole]
    row = prod(shape[1:])
    (first, into), (last, rest) = divmod(start, row), divmod(start + length, row)

    def within(index: int, start: int, length: int) -> list[Box]:
        return [(slice(index, index + 1), *box) for box in boxes(shape[1:], start, length)]

    if first == last:
        return within(first, into, length)
    out: list[Box] = []
    if into:
        out += within(first, into, row - into)
        first += 1
    if first < last:
        out.append((slice(first, last), *whole[1:]))
    return out + (within(last, 0, rest) if rest else [])


def key(name: str, shape: Sequence[int], box: Box) -> str:
    """What a rectangle is called in a file: its tensor's name where it is all of it, else as Python would slice it."""
    if all(part == slice(0, n) for part, n in zip(box, shape, strict=True)):
        return name
    return f"{name}[{','.join(f'{part.start}:{part.stop}' for part in box)}]"


@dataclass(frozen=True)
class Part:
    """Consecutive elements of a flattened tensor, and the rank that writes them."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The parts of every parameter, which tile it; a rank that is no part's writes nothing."""

    ranks: int
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, tuple[Part, ...]]

    def of_rank(self, rank: int) -> dict[str, Part]:
        """What it writes of each parameter: one part, or none."""
        return {name: part for name, parts in self.parts.items() for part in parts if part.rank == rank}


def divided(shapes: Mapping[str, tuple[int, ...]], held: Int64[np.ndarray, "ranks parameters two"]) -> Layout:
    """Each part once, by the one of its holders that has least to write so far. held: first element and number of elements
    of every parameter on every rank. Raises RuntimeError where parts overlap or leave something out."""
    load = [0] * len(held)
    parts: dict[str, tuple[Part, ...]] = {}
    for column, (name, shape) in enumerate(shapes.items()):
        holders: dict[tuple[int, int], list[int]] = {}
        for rank, (start, length) in enumerate(held[:, column].tolist()):
            if length:
                holders.setdefault((start, length), []).append(rank)
        found, end = [], 0
        for (start, length), ranks in sorted(holders.items()):
            if start != end:
                break
            writer = min(ranks, key=load.__getitem__)
            load[writer] += length
            found.append(Part(writer, start, length))
            end = start + length
        if end != prod(shape) or len(found) != len(holders):
            raise RuntimeError(
                f"the ranks' parts of {name} do not tile it: {sorted(holders)} of {prod(shape)} elements"
            )
        parts[name] = tuple(found)
    return Layout(len(held), dict(shapes), parts)
