"""Retrieval by cosine: recall at k and mean average precision over images of the same class. Refuses a k that is larger than
the gallery, and queries of which none has an image of its class there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.knn import BLOCK, rounded_cosines
from lejepa_scale.evaluation.metrics import check, part_of

logger = logging.getLogger(__name__)

_ITSELF = -(1 << 26)  # below every cosine, in units of 2^-24
_UNITS = 1 << 40  # average precisions are added as integers, in any order: 2^-40


def retrieval(
    queries: Features,
    gallery: Features | None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """{"recall": {k: share of queries with an image of their class among the k nearest}, "map": mean average precision,
    "queries", "without_match", "sums"}; the last is what `merge` adds.

    gallery: None, the other queries (a query never finds itself). Queries of a class that the gallery does not have are in
    neither number; they are counted in `without_match` and logged. Average precision is scikit-learn's: precision at every
    distinct cosine, weighted by the recall gained there, so that the order of equal cosines does not matter; in recall at
    k, the smaller row is nearer. dtype: as of `knn`. Memory: about 80 bytes x chunk x block, or x gallery if that is
    more; with a gallery of more than `block` images, fewer queries are taken at a time. device: unset, the CPU. share:
    (rank, world) of this process, which handles a contiguous part of the queries. Raises UserError for a k below 1 or above
    the gallery, where no query of the whole set has a match, and for sets that cannot be evaluated.
    """
    check(("query", queries), *([] if gallery is None else [("gallery", gallery)]))
    alone = gallery is None
    gallery = queries if gallery is None else gallery
    found = len(gallery.rows) - alone
    if not ks or min(ks) < 1 or max(ks) > found:
        raise UserError(
            f"retrieval needs k from 1 to the {found} images that a query can find; got ks={list(ks)}. "
            + ("The gallery is the set itself, less the query." if alone else "Give a smaller k.")
        )
    if chunk < 1 or block < 1:
        raise UserError(f"retrieval needs a chunk and block above 0; got chunk={chunk}, block={block}.")
    matched = _matched(queries, gallery, alone)
    own = part_of(len(queries.rows), share)
    hits, precision, count = dict.fromkeys(ks, 0), 0, 0
    size = max(1, min(chunk, chunk * block // len(gallery.rows)))
    for start in range(own.start, own.stop, size):
        some = range(start, min(start + size, own.stop))
        relevant, ends = _ranking(queries, gallery, some, alone, block, dtype, device)
        valid = matched[some.start : some.stop].to(relevant.device)
        for k in hits:
            hits[k] += int(relevant[valid, :k].any(1).sum())
        precision += int((_average_precision(relevant[valid], ends[valid]) * _UNITS).round().long().sum())
        count += int(valid.sum())
    return _numbers({"queries": count, "without_match": len(own) - count, "hits": hits, "precision": precision})


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `retrieval` found for the parts of a set of queries, as for the whole set. Raises UserError for no parts and for
    parts of other ks."""
    sums = [part["sums"] for part in parts]
    if len({tuple(s["hits"]) for s in sums}) != 1:
        raise UserError(f"parts of one retrieval have the same ks; got {[list(s['hits']) for s in sums]}.")
    total = {name: sum(s[name] for s in sums) for name in ("queries", "without_match", "precision")}
    return _numbers(total | {"hits": {k: sum(s["hits"][k] for s in sums) for k in sums[0]["hits"]}})


def _numbers(sums: dict[str, Any]) -> dict[str, Any]:
    count = sums["queries"]
    recall = {k: hits / count if count else None for k, hits in sums["hits"].items()}  # None: a part without queries
    mean = sums["precision"] / (count * _UNITS) if count else None
    return {
        "recall": recall,
        "map": mean,
        "queries": count,
        "without_match": sums["without_match"],
        "sums": sums,
    }


def _matched(queries: Features, gallery: Features, alone: bool) -> Bool[Tensor, " n"]:
    """The queries that have an image of their class to find."""
    seen, counts = gallery.labels.unique(return_counts=True)
    matched = torch.isin(queries.labels, seen[counts > 1] if alone else seen)
    if not matched.any():
        raise UserError(
            f"none of {len(matched)} queries has an image of its class among the {len(gallery.labels)} of the gallery"
            + (" beside itself." if alone else ": do both sets number the classes alike?")
        )
    if len(seen) < 2:
        raise UserError(
            f"all {len(gallery.labels)} images of the gallery are of class {int(seen[0])}: all finds are right."
        )
    if missed := int((~matched).sum()):
        logger.warning(
            "%d of %d queries have no image of their class to find; they are left out.", missed, len(matched)
        )
    return matched


def _ranking(
    queries: Features,
    gallery: Features,
    some: range,
    alone: bool,
    block: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[Bool[Tensor, "n g"], Bool[Tensor, "n g"]]:
    """For the queries in `some`, nearest first: which images are of the query's class, and which are the last of those with
    one cosine. A query that would find itself is left out."""
    rows, labels = (x[some.start : some.stop] for x in (queries.rows, queries.labels))
    near = torch.empty(len(rows), len(gallery.rows), dtype=torch.int32, device=device or "cpu")
    for start in range(0, len(gallery.rows), block):
        near[:, start : start + block] = rounded_cosines(rows, gallery.rows[start : start + block], dtype, device)
    if alone:
        near[torch.arange(len(rows)), torch.arange(some.start, some.stop)] = _ITSELF
    cosines, order = near.sort(dim=1, descending=True, stable=True)
    if alone:
        cosines, order = cosines[:, :-1], order[:, :-1]
    relevant = gallery.labels.to(order.device)[order] == labels.to(order.device)[:, None]
    ends = torch.ones_like(relevant)
    ends[:, :-1] = cosines[:, :-1] != cosines[:, 1:]
    return relevant, ends


def _average_precision(relevant: Bool[Tensor, "n g"], ends: Bool[Tensor, "n g"]) -> Float64[Tensor, " n"]:
    """Sum over the ends of (recall there - recall at the end before) x precision there."""
    right = relevant.cumsum(1)  # [N, G]
    at_ends = torch.where(ends, right, 0)
    before = at_ends.cummax(1).values.roll(1, 1)
    before[:, :1] = 0
    places = torch.arange(1, right.shape[1] + 1, device=right.device, dtype=torch.float64)
    gained = torch.where(ends, right - before, 0)
    return (gained * right / places).sum(1) / right[:, -1]
