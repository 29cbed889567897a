"""Retrieval against scikit-learn's average precision and a search by brute force."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blobs import blobs
from sklearn.metrics import average_precision_score

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.retrieval import merge, retrieval

QUERIES, GALLERY = blobs(90, 1, classes=8), blobs(211, 2, classes=8)


def brute_force(
    queries: Features, gallery: Features, alone: bool, ks: tuple[int, ...]
) -> tuple[dict[int, float], float]:
    hits, precisions = dict.fromkeys(ks, 0), []
    cosines = (F.normalize(queries.rows.double(), dim=1) @ F.normalize(gallery.rows.double(), dim=1).T).numpy()
    for i, row in enumerate(cosines.round(9)):
        others = np.array([j for j in range(len(row)) if not (alone and i == j)])
        relevant = (gallery.labels[others] == queries.labels[i]).numpy()
        if not relevant.any():
            continue
        precisions.append(average_precision_score(relevant, row[others]))
        nearest = relevant[np.argsort(-row[others], kind="stable")]
        for k in ks:
            hits[k] += bool(nearest[:k].any())
    return {k: hits[k] / len(precisions) for k in ks}, float(np.mean(precisions))


@pytest.mark.parametrize("alone", [False, True])
def test_numbers_equal_brute_force(alone: bool) -> None:
    ks = (1, 2, 5)
    found = retrieval(QUERIES, None if alone else GALLERY, ks=ks)
    recall, precision = brute_force(QUERIES, QUERIES if alone else GALLERY, alone, ks)
    assert found["recall"] == pytest.approx(recall, abs=1e-12)
    assert found["map"] == pytest.approx(precision, abs=1e-9)
    assert (found["queries"], found["without_match"]) == (90, 0)
    assert 0.2 < found["map"] < found["recall"][1] < found["recall"][5] < 1


@pytest.mark.parametrize("alone", [False, True])
def test_images_with_equal_cosines_count_in_any_order(alone: bool) -> None:
    """Features on a coarse grid: most cosines are shared."""
    coarse = [Features((f.rows[:, :3] / 3).round(), f.labels) for f in (QUERIES, GALLERY)]
    _, precision = brute_force(coarse[0], coarse[0] if alone else coarse[1], alone, (1,))
    assert retrieval(coarse[0], None if alone else coarse[1])["map"] == pytest.approx(precision, abs=1e-9)
    order = torch.randperm(90)
    mixed = Features(coarse[0].rows[order], coarse[0].labels[order])
    assert retrieval(mixed, None if alone else coarse[1])["map"] == pytest.approx(precision, abs=1e-9)


def test_a_collapsed_encoder_is_at_chance() -> None:
    labels = torch.arange(4).repeat_interleave(10)
    found = retrieval(Features(torch.ones(40, 5), labels), None)
    assert found["map"] == pytest.approx(9 / 39)
    assert found["recall"][1] == pytest.approx(10 / 40)  # the first row, and for itself the second


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (7, 50), (90, 211), (64, 10)])
def test_blocks_change_nothing(chunk: int, block: int, alone: bool) -> None:
    gallery = None if alone else GALLERY
    assert retrieval(QUERIES, gallery, chunk=chunk, block=block) == retrieval(QUERIES, gallery)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, 100])
def test_shares_change_nothing(world: int, alone: bool) -> None:
    gallery = None if alone else GALLERY
    parts = [retrieval(QUERIES, gallery, share=(rank, world)) for rank in range(world)]
    assert merge(parts) == retrieval(QUERIES, gallery)
    assert sum(part["queries"] for part in parts) == 90


def test_queries_without_a_match_are_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    labels = QUERIES.labels.clone()
    labels[:3] = torch.tensor([100, 101, 102])
    odd = Features(QUERIES.rows, labels)
    for gallery in (None, GALLERY):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = retrieval(odd, gallery, ks=(1, 5))
        assert "3 of 90 queries have no image of their class" in caplog.text
        assert (found["queries"], found["without_match"]) == (87, 3)
        recall, precision = brute_force(odd, gallery or odd, gallery is None, (1, 5))
        assert found["recall"] == pytest.approx(recall, abs=1e-12)
        assert found["map"] == pytest.approx(precision, abs=1e-9)


def test_what_cannot_be_retrieved_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 to the 211 images .* ks=\[1, 212\]"):
        retrieval(QUERIES, GALLERY, ks=(1, 212))
    with pytest.raises(UserError, match=r"1 to the 89 images .* less the query"):
        retrieval(QUERIES, None, ks=(90,))
    assert retrieval(QUERIES, None, ks=(89,))["recall"] == {89: 1.0}
    for ks in ((), (0,)):
        with pytest.raises(UserError, match="k from 1"):
            retrieval(QUERIES, GALLERY, ks=ks)
    with pytest.raises(UserError, match="chunk=0"):
        retrieval(QUERIES, GALLERY, chunk=0)
    with pytest.raises(UserError, match="none of 90 queries has an image of its class among the 211"):
        retrieval(Features(QUERIES.rows, QUERIES.labels + 1), GALLERY)
    with pytest.raises(UserError, match=r"none of 90 queries .* beside itself"):
        retrieval(Features(QUERIES.rows, torch.arange(90)), None)
    with pytest.raises(UserError, match="query 12 and gallery 5"):
        retrieval(QUERIES, blobs(30, 1, width=5))
    with pytest.raises(UserError, match="the gallery set has 0 images"):
        retrieval(QUERIES, Features(GALLERY.rows[:0], GALLERY.labels[:0]))
    with pytest.raises(UserError, match="of class 0: all finds are right"):
        retrieval(Features(QUERIES.rows, torch.zeros(90, dtype=torch.long)), None)
    with pytest.raises(UserError, match="share"):
        retrieval(QUERIES, GALLERY, share=(2, 2))
    with pytest.raises(UserError, match="same ks"):
        merge([retrieval(QUERIES, GALLERY, ks=(1,)), retrieval(QUERIES, GALLERY, ks=(2,))])
