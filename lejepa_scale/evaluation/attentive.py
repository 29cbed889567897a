"""An attentive probe on frozen tokens of patches: a learned query gathers them by cross-attention, a linear layer classifies
what it has gathered; one probe for each learning rate, all at once. Refuses a grid of which every probe diverges."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lejepa_scale.evaluation.features import expect_labels
from lejepa_scale.evaluation.heads import HeadRecipe, chosen, held_by, trained
from lejepa_scale.evaluation.logistic import hold_out
from lejepa_scale.evaluation.metrics import Guesses, classes_of_labels, likeliest
from lejepa_scale.evaluation.tokens import Tokens
from lejepa_scale.parallel.collectives import all_reduce_sum

# Rates, batch and steps of CAPI's attentive classification.
RECIPE = HeadRecipe((1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), 1024, 12_500, 1e-3)
_HEAD = 64  # features of a head of the attention
_STD = 0.02  # of the first weights
_AT_ONCE = 1 << 26  # values of tokens in float32 that are on the device


class AttentiveProbe(nn.Module):
    """A learned query, `heads` of attention over the tokens, a linear classifier: CAPI's, without the bias of the keys,
    which the softmax takes away. `heads` divides `width`."""

    def __init__(self, width: int, classes: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.query, self.key.weight, self.value.weight, self.classifier.weight):
            nn.init.trunc_normal_(weight, std=_STD, generator=generator)
        nn.init.zeros_(self.value.bias)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c"]:
        """Logits. One query for all images: it is multiplied by the keys' weights rather than these by every token, and the
        values' weights by the mean that attention makes; no token has a key or a value of its own in memory."""
        return self.classifier(self.pooled(tokens))

    def pooled(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        """What the query gathers."""
        size = len(self.query) // self.heads
        directions = torch.einsum(
            "ae,aed->ad", self.query.view(-1, size), self.key.weight.view(-1, size, len(self.query))
        )
        weights = (tokens @ directions.T * size**-0.5).softmax(1)  # [B, L, A]
        means = weights.mT @ tokens  # [B, A, D]
        values = torch.einsum("bad,aed->bae", means, self.value.weight.view(-1, size, len(self.query)))
        return values.flatten(1) + self.value.bias


def attentive(
    train: Tokens,
    test: Iterable[Float[Tensor, "_b l d"]],
    recipe: HeadRecipe = RECIPE,
    *,
    device: torch.device | str | None = None,
) -> Guesses:
    """Guesses of an attentive probe for this rank's part of the test images, whose tokens `test` gives once they are asked
    for; tokens are as `tokens.normalized` gives them. The rate is the one with the best accuracy on held-out
    training images, the smallest of equals; then its probe is trained anew on all. Heads of attention have 64 features, or
    the next smaller number that divides the width. Every rank calls, with its part; the numbers do not depend on how many
    ranks there are, but for rounding. device: unset, the CPU. Raises UserError for a training set of one class or with
    missing labels, where nothing can be held out, and where every probe diverged."""
    expect_labels(train.labels)
    classes = classes_of_labels(train.labels)
    targets = torch.searchsorted(classes, train.labels)
    here = targets[train.own.start : train.own.stop]
    length, width = train.values.shape[1:]
    heads = next(n for n in range(-(-width // _HEAD), width + 1) if width % n == 0)
    most = max(1, _AT_ONCE // max(1, length * width))
    probe = AttentiveProbe(width, len(classes), heads, recipe.seed).to(device or "cpu")

    def loss_of(rows: Int[Tensor, " _b"]) -> Callable[[nn.Module], Tensor]:
        tokens, labels = _loaded(train.values[rows], device), here[rows].to(device or "cpu")
        return lambda probe: F.cross_entropy(probe(tokens), labels, reduction="sum")

    def fit(rates: list[float], index: Int[Tensor, " k"]) -> list[nn.Module]:
        return trained(probe, rates, index, train.own, loss_of, recipe, most=most, name="attentive probe")

    def split() -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
        return hold_out(train.labels, recipe.held_out, recipe.seed)

    @torch.no_grad()
    def accuracies(probes: list[nn.Module], held: Int[Tensor, " h"]) -> list[float]:
        hits = torch.zeros(len(probes), dtype=torch.float64)
        for rows in held_by(held, train.own).split(most):
            tokens = _loaded(train.values[rows], device)
            for i, one in enumerate(probes):
                logits = one(tokens).cpu()
                hit = (logits.argmax(1) == here[rows]).sum().double()
                hits[i] += torch.where(logits.isfinite().all(), hit, torch.nan)
        return (all_reduce_sum(hits) / len(held)).tolist()

    chosen_probe, settings = chosen("the attentive probe", "accuracy", recipe, len(train), split, fit, accuracies)
    ranked = [torch.zeros(0, min(5, len(classes)), dtype=torch.long)]
    with torch.no_grad():
        for tokens in test:
            for some in tokens.split(most):
                ranked.append(likeliest(chosen_probe(_loaded(some, device)).cpu(), classes))
    return Guesses(torch.cat(ranked), {**settings, "tokens": length, "attention_heads": heads})


def _loaded(tokens: Float[Tensor, "b l d"], device: torch.device | str | None) -> Float[Tensor, "b l d"]:
    return tokens.to(device or "cpu").float()
