"""Weighted nearest neighbours on cosine similarity, without training. Refuses more neighbours than there are training
images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.metrics import Guesses, classes_of, join, likeliest, part_of

KS = (10, 20, 100, 200)  # of the k-NN evaluation of dinov2 and dinov3
BLOCK = 8192  # rows of the bank at a time
_UNITS = 1 << 24  # a cosine is rounded to 2^-24, what float32 tells apart below 1


def knn(
    train: Features,
    test: Features,
    ks: Sequence[int] | None = None,
    temperature: float = 0.07,
    *,
    chunk: int = 1024,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[int, Guesses]:
    """Guesses for every k: a vote of the k nearest training rows, weighted by exp(cosine / temperature) (Wu et al. 2018; k
    and temperature of dinov2 and dinov3). All k come from one search.

    ks: unset, those of 10, 20, 100 and 200 that the training set has, or all its rows if it has fewer than 10. A class
    without a vote is ranked behind all others. chunk, block: rows of the test and training set at a time; memory: about
    24 bytes x chunk x block, and copies of so many rows. dtype: of the product. In float64, rounded to 2^-24 before it is
    compared, with ties to the smaller row, no result depends on chunk, block, threads or share. torch.float32 is much
    faster on GPUs with slow doubles (by up to 64 times); which of two neighbours with cosines within 1e-6 is nearer may
    then depend on them. device: unset, the CPU. share: (rank, world) of this process, which handles a contiguous part of
    the test rows; `merge` joins the parts. Raises UserError for a k that is larger than the training set or below 1, for
    a temperature, chunk or block that is not positive, and for sets that cannot be evaluated.
    """
    classes = classes_of(train, test)
    ks = _fitting(ks, len(train.rows))
    if temperature <= 0 or chunk < 1 or block < 1:
        raise UserError(
            f"k-NN needs a temperature, chunk and block above 0; got temperature={temperature}, chunk={chunk}, "
            f"block={block}."
        )
    targets = torch.searchsorted(classes, train.labels)
    own = part_of(len(test.rows), share)
    found: dict[int, list[Tensor]] = {k: [torch.empty(0, min(5, len(classes)), dtype=classes.dtype)] for k in ks}
    for rows in _chunks(test.rows[own.start : own.stop], chunk):
        cosines, nearest = _search(train.rows, rows, max(ks), block, dtype, device)
        weights = torch.exp((cosines - cosines[:, :1]) / temperature)  # of the nearest: 1, whatever the temperature
        votes, counted = weights.new_zeros(len(rows), len(classes)), 0
        for k in sorted(set(ks)):
            votes.scatter_add_(1, targets[nearest[:, counted:k]], weights[:, counted:k])
            found[k].append(likeliest(votes, classes))
            counted = k
    settings = {"temperature": temperature, "weights": "exp(cosine / temperature)"}
    return {k: Guesses(torch.cat(ranked), {"k": k, **settings}) for k, ranked in found.items()}


def merge(parts: list[dict[int, Guesses]]) -> dict[int, Guesses]:
    """What `knn` found for the parts of a test set, in the order of their ranks, as for the whole set. Raises UserError for
    no parts and for parts of other settings."""
    if len({tuple(part) for part in parts}) != 1:
        raise UserError(f"parts of one k-NN search have the same k; got {[list(part) for part in parts]}.")
    return {k: join([part[k] for part in parts]) for k in parts[0]}


def rounded_cosines(
    rows: Float[Tensor, "n e"], bank: Float[Tensor, "m e"], dtype: torch.dtype, device: torch.device | str | None
) -> Int[Tensor, "n m"]:
    """Cosines in units of 2^-24. The product's last bits depend on its shape; these do not, so that equal rows are equally
    near."""
    rows, bank = (F.normalize(x.to(device=device or "cpu", dtype=dtype), dim=1) for x in (rows, bank))
    return (rows @ bank.T).mul_(_UNITS).round_().long()


def _fitting(ks: Sequence[int] | None, count: int) -> list[int]:
    if ks is None:
        return [k for k in KS if k <= count] or [count]
    if not ks or min(ks) < 1:
        raise UserError(f"k-NN needs at least one k, each at least 1; got ks={list(ks)}.")
    if max(ks) > count:
        raise UserError(f"k={max(ks)} is larger than the training set, which has {count} images. Give a smaller k.")
    return list(ks)


def _chunks(rows: Float[Tensor, "n e"], size: int) -> Iterator[Float[Tensor, "_m e"]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _search(
    bank: Float[Tensor, "m e"],
    rows: Float[Tensor, "n e"],
    k: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Cosines and numbers of the k nearest rows of the bank, nearest first, ties to the smaller number."""
    last = (1 << 32) - 1
    best: Tensor | None = None
    for start in range(0, len(bank), block):
        # One integer to sort by, different for all: the cosine in the upper bits, below it the row, smaller is larger.
        keys = rounded_cosines(rows, bank[start : start + block], dtype, device).mul_(1 << 32)
        keys += last - torch.arange(start, start + keys.shape[1], device=keys.device)
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
        if best is not None:
            keys = torch.cat([best, keys], 1)
            keys = keys.topk(min(k, keys.shape[1]), dim=1).values
        best = keys
    assert best is not None  # classes_of: the bank has rows
    best = best.cpu()  # votes are added there: on a GPU, in no fixed order
    return (best >> 32).double() / _UNITS, last - (best & last)
