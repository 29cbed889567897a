"""The attentive probe against torch's attention, and on a task that no mean of tokens can solve."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.attentive import RECIPE, AttentiveProbe, attentive
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.heads import HeadRecipe, trained, warm_cosine
from lejepa_scale.evaluation.linear_probe import linear_probe
from lejepa_scale.evaluation.metrics import Guesses, part_of
from lejepa_scale.evaluation.tokens import Tokens, normalized, stored
from lejepa_scale.parallel.process_group import rank, world_size

SHORT = HeadRecipe((1e-3, 1e-2), 64, 150, 1e-3)


def test_attention_is_torchs() -> None:
    """nn.MultiheadAttention whose query and output projections are the identity; a bias of the keys changes nothing."""
    probe = AttentiveProbe(32, 5, 4, seed=1)
    nn.init.normal_(probe.value.bias)
    nn.init.normal_(probe.classifier.bias)
    nn.init.normal_(probe.query)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(32), 40 * probe.key.weight, probe.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(32), torch.randn(32), probe.value.bias]))
        theirs.out_proj.weight.copy_(torch.eye(32))
        theirs.out_proj.bias.zero_()
        probe.key.weight.mul_(40)  # so that the attention is far from even
        tokens = torch.randn(6, 9, 32)
        expected, weights = theirs(probe.query.expand(6, 1, 32), tokens, tokens, average_attn_weights=False)
        assert float(weights.max()) > 0.4
        torch.testing.assert_close(probe.pooled(tokens), expected[:, 0])
        torch.testing.assert_close(
            probe(tokens), F.linear(expected[:, 0], probe.classifier.weight, probe.classifier.bias)
        )


def test_gradients_are_those_of_scaled_dot_product_attention() -> None:
    probe = AttentiveProbe(24, 3, 3).double()
    tokens, labels = torch.randn(5, 7, 24).double(), torch.tensor([0, 1, 2, 0, 1])

    def plain(x: Tensor) -> Tensor:
        q, k, v = (
            y.view(5, -1, 3, 8).transpose(1, 2) for y in (probe.query.expand(5, 1, 24), probe.key(x), probe.value(x))
        )
        return probe.classifier(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(5, 24))

    of_each = []
    for logits in (probe(tokens), plain(tokens)):
        of_each.append(torch.autograd.grad(F.cross_entropy(logits, labels), list(probe.parameters())))
    for a, b in zip(*of_each, strict=True):
        torch.testing.assert_close(a, b)


def test_tokens_are_normalized_as_by_layer_norm() -> None:
    tokens = 5 + 3 * torch.randn(4, 6, 16)
    torch.testing.assert_close(normalized(tokens), nn.LayerNorm(16, elementwise_affine=False)(tokens))


def hidden(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of 16 tokens one, at a random place, says that it is the one, and the class, by the sign of a feature; the others have
    random signs there. The mean over tokens knows of the class next to nothing."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=draw)
    tokens = torch.randn(count, 16, 16, generator=draw) * 0.1
    tokens[..., 1] += 4.0 * (torch.randint(0, 2, (count, 16), generator=draw) * 2 - 1)
    place = torch.randint(0, 16, (count,), generator=draw)
    tokens[torch.arange(count), place, 0] += 4.0
    tokens[torch.arange(count), place, 1] = 4.0 * (labels * 2 - 1)
    return normalized(tokens), labels


def whole(tokens: Tensor, labels: Tensor) -> Tokens:
    return Tokens(tokens, range(len(labels)), labels)


def accuracy(guesses: Guesses, labels: Tensor) -> float:
    return float((guesses.ranked[:, 0] == labels).float().mean())


def test_it_finds_the_one_token_that_a_mean_loses() -> None:
    (train, labels), (test, expected) = hidden(1500, 0), hidden(400, 1)
    found = attentive(whole(train, labels), test.split(150), SHORT)
    assert accuracy(found, expected) > 0.97
    mean = linear_probe(Features(train.mean(1), labels), Features(test.mean(1), expected), steps=400, batch=256)
    assert accuracy(mean, expected) < 0.75
    assert found.settings["tokens"] == 16
    assert found.settings["held_out_accuracy"] > 0.95
    assert found.settings["train_images"] == 1500
    assert found.settings["learning_rate"] in SHORT.learning_rates


def test_one_rate_is_torchs_adamw_on_all_rows() -> None:
    """The probe of one rate, beside a plain loop over the same batches."""
    tokens, labels = hidden(96, 2)
    recipe = HeadRecipe((3e-3,), 32, 12, 0.05)
    first = AttentiveProbe(16, 2, 1)

    def loss_of(rows: Tensor) -> Any:
        return lambda head: F.cross_entropy(head(tokens[rows]), labels[rows], reduction="sum")

    (ours,) = trained(first, [3e-3], torch.arange(96), range(96), loss_of, recipe, most=7, name="probe")
    theirs = AttentiveProbe(16, 2, 1)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    )
    draw = torch.Generator().manual_seed(0)
    for step in range(12):
        if step % 3 == 0:
            order = torch.randperm(96, generator=draw)
        rows = order[32 * (step % 3) :][:32]
        for group in optimizer.param_groups:  # a warm-up of 1.2 steps, rounded, and then a cosine
            group["lr"] = 3e-3 if step == 0 else 3e-3 * (1 + math.cos(math.pi * (step - 1) / 11)) / 2
        optimizer.zero_grad()
        F.cross_entropy(theirs(tokens[rows]), labels[rows]).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6)


def test_the_schedule_rises_and_falls() -> None:
    factors = [warm_cosine(step, steps=100) for step in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 1e-3
    assert warm_cosine(0, steps=1) == 1.0


def test_a_seed_gives_the_same_guesses_whatever_the_grid_is() -> None:
    (train, labels), (test, _) = hidden(200, 0), hidden(60, 1)
    short = replace(SHORT, steps=20)
    one, same, other = (attentive(whole(train, labels), [test], replace(short, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.ranked, same.ranked)
    assert one.settings == same.settings
    assert one.settings["accuracy_by_rate"] != other.settings["accuracy_by_rate"]
    alone = attentive(whole(train, labels), [test], replace(short, learning_rates=(one.settings["learning_rate"],)))
    assert torch.equal(one.ranked, alone.ranked)


def test_what_cannot_be_probed_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    tokens, labels = hidden(20, 0)
    with pytest.raises(UserError, match="all 20 images of the training set are of class 1"):
        attentive(whole(tokens, torch.ones(20, dtype=torch.long)), [tokens])
    with pytest.raises(UserError, match="20 of 20 evaluation images have no label"):
        attentive(whole(tokens, -torch.ones(20, dtype=torch.long)), [tokens])
    with pytest.raises(UserError, match="each of the 20 classes has 1 training image"):
        attentive(whole(tokens, torch.arange(20)), [tokens])
    with pytest.raises(UserError, match=r"all 2 heads of the attentive probe diverged, from learning rate 1e\+30"):
        attentive(whole(tokens, labels), [tokens], replace(SHORT, learning_rates=(1e30, 1e32), steps=5))
    with pytest.raises(UserError, match=r"all 1 heads"):
        attentive(whole(tokens, labels), [tokens], replace(SHORT, learning_rates=(1e30,), steps=5))
    with caplog.at_level(logging.WARNING):
        found = attentive(whole(tokens, labels), [tokens], replace(SHORT, learning_rates=(1e-3, 1e30), steps=5))
    assert "1 of 2 heads of the attentive probe diverged, from learning rate 1e+30 on" in caplog.text
    assert found.settings["diverged"] == [1e30]
    for wrong in (
        {"learning_rates": ()},
        {"learning_rates": (-1.0,)},
        {"steps": 0},
        {"batch": 0},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(UserError, match="a head needs"):
            replace(RECIPE, **wrong)  # type: ignore[arg-type]


def _batches(count: int, tokens: Tensor, labels: Tensor) -> Any:
    """This rank's part, as an encoder gives it."""
    own = part_of(count, (rank(), world_size()))
    for start in range(own.start, own.stop, 7):
        stop = min(start + 7, own.stop)
        images = torch.zeros(stop - start, 3, 4, 4)
        yield tokens[start:stop], Labelled(images, labels[start:stop], [str(i) for i in range(start, stop)])


def _on_ranks(count: int, folder: str) -> tuple[Tensor, Any]:
    (tokens, labels), (test, _) = hidden(count, 0), hidden(50, 1)
    own = len(part_of(count, (rank(), world_size())))
    kept = stored(_batches(count, tokens, labels), own, count, folder=Path(folder))
    assert len(kept) == count
    assert len(kept.own) == own
    mine = part_of(50, (rank(), world_size()))
    found = attentive(kept, [test[mine.start : mine.stop]], replace(SHORT, steps=40, batch=16))
    return found.ranked, found.settings


def test_a_rank_without_an_image_agrees_with_the_others(tmp_path: Path) -> None:
    """Of 3 images and 4 ranks. More images: test_protocol.py."""
    expected, settings = _on_ranks(3, str(tmp_path))
    results = run_ranks(_on_ranks, 4, 3, str(tmp_path))
    assert torch.equal(torch.cat([ranked for ranked, _ in results]), expected)
    assert all(of_rank == settings for _, of_rank in results)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_tokens_are_kept_in_half_precision_and_bounded(tmp_path: Path) -> None:
    tokens, labels = hidden(20, 0)
    kept = stored(_batches(20, tokens, labels), 24, 24, folder=tmp_path / "new")
    assert kept.values.dtype == torch.float16
    assert torch.equal(kept.values, tokens.half())  # four images less than there might have been
    assert torch.equal(kept.labels, labels)
    assert kept.masks is None
    message = r"1,000,000,000 training images need 512 GB \(16 tokens x 16 x 2 bytes an image\), more than --disk-l"
    with pytest.raises(UserError, match=message):
        stored(_batches(20, tokens, labels), 1, 10**9, folder=tmp_path)
    assert stored(_batches(20, tokens, labels), 20, 10**9, folder=tmp_path, limit=600).values.shape == (20, 16, 16)
    with pytest.raises(UserError, match=r"no room for 5,120,000.0 GB of tokens in"):
        stored(_batches(20, tokens, labels), 10**13, 1, folder=tmp_path)


@pytest.mark.parametrize("value", [math.nan, 7e4])
def test_tokens_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    tokens, labels = hidden(20, 0)
    tokens[3, 5, 1] = value
    with pytest.raises(UserError, match=r"the tokens of 1 of 20 images are not finite"):
        stored(_batches(20, tokens, labels), 20, 20, folder=tmp_path)
