"""What a new run's encoder begins with where `model.init_from` names weights. Every name must be on both sides, with one
shape, but for those that `leave_out` names: refuses whatever would leave a weight at random without a word."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lejepa_scale.checkpoint.fitting import Fit, Target, below_prefixes, left_out, listed
from lejepa_scale.checkpoint.saved import not_finite
from lejepa_scale.checkpoint.sources import Source, read, refusal
from lejepa_scale.config import Data
from lejepa_scale.config.schema import InitFrom
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder

_CLOSE = 2e-3  # as two ways of rounding the same values, 0.485 and 0.4845, are


@dataclass(frozen=True)
class Loaded:
    """`weights` of the backbone under timm's names, on the CPU in the encoder's dtypes; a line that says what they are; mean
    and standard deviation of each channel that their inputs were standardized by, None where the source does not say."""

    weights: dict[str, Tensor]
    line: str
    standardization: tuple[list[float], list[float]] | None


def load(settings: InitFrom, encoder: Encoder) -> Loaded:
    """The weights that `model.init_from` names, for an encoder as the configuration builds it (it may be on the meta device,
    and is not changed). Raises UserError where they cannot be read, are not the encoder's or are not finite."""
    source = read(settings.source)
    sets = {k: s for k, s in source.sets.items() if settings.key in (None, k) or k.startswith(f"{settings.key}.")}
    if not sets:
        there = ", ".join(key or "no key" for key in source.sets)
        raise refusal(settings.source, f"nothing lies under model.init_from.key={settings.key}; there is {there}.")
    target = Target(encoder, settings.leave_out, source.image_size)
    names, fits = set(target.expected), list[Fit]()
    for key, tensors in sets.items():
        for prefix, inside in below_prefixes(tensors, target.expected, settings.prefix).items():
            names |= inside.keys()
            fits.append(target.fit(key, prefix, inside, len(tensors) - len(inside)))
    if not fits:
        raise refusal(settings.source, f"no tensor's name begins with model.init_from.prefix={settings.prefix}.")
    if unused := [pattern for pattern in settings.leave_out if not any(left_out(name, [pattern]) for name in names)]:
        raise refusal(
            settings.source,
            f"model.init_from.leave_out={', '.join(unused)} matches no tensor of the source or of the encoder. Take it out.",
        )
    good = [fit for fit in fits if fit.fits]
    if len(good) > 1:
        raise _ambiguous(settings, good)
    if not good:
        best = min(fits, key=lambda fit: (bool(fit.failure), fit.faults))
        raise refusal(settings.source, _misfit(source, best, encoder.name))
    fit = good[0]
    if fault := not_finite(fit.weights.items()):
        raise refusal(settings.source, f"{fault}. Use another copy of these weights.")
    notes = "; ".join([*fit.notes, "the projector starts anew"])
    counts = f"{len(fit.weights)} of {len(target.expected)} tensors of {encoder.name}"
    line = f"model.init_from: {counts} from {source.where} ({notes})."
    return Loaded(fit.weights, line, source.standardization)


def of_other_inputs(loaded: Loaded, data: Data) -> str | None:
    """What to say where the weights have learned on inputs standardized otherwise than the run's."""
    if loaded.standardization is None or len(loaded.standardization[0]) != data.channels:
        return None
    ours = [*data.mean, *data.std]
    if (
        max(abs(a - b) for a, b in zip(ours, [*loaded.standardization[0], *loaded.standardization[1]], strict=True))
        < _CLOSE
    ):
        return None
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in loaded.standardization)
    return (
        f"model.init_from: these weights have learned on other inputs than data.mean and data.std make: data.mean=[{mean}] "
        f"data.std=[{std}] give them theirs."
    )


def _ambiguous(settings: InitFrom, fits: list[Fit]) -> UserError:
    """Several sets fit: which one is meant cannot be told."""
    name = "key" if len({fit.key for fit in fits}) > 1 else "prefix"
    values = [getattr(fit, name) or "''" for fit in fits]
    return refusal(
        settings.source,
        f"{len(fits)} sets of weights in it fit. Set model.init_from.{name} to one of {', '.join(values)}.",
    )


def _misfit(source: Source, fit: Fit, encoder: str) -> str:
    holds = f"it holds {source.model}, which" if source.model else "it"
    remedy = "Set model.encoder, model.patch_size and model.options to what the source holds"
    if not fit.weights and any("embeddings.patch_embeddings" in name for name in fit.unexpected):
        return (
            f"{holds} has the names that transformers gives its own classes. `lejepa convert {source.where} encoder` makes "
            "a folder under timm's names of Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel and ViTModel: set "
            "model.init_from=encoder then."
        )
    if fit.failure:
        return f"{holds} does not fit model.encoder={encoder}: timm's conversion ended with {fit.failure}. {remedy}."
    if len(fit.weights) < len(fit.missing) / 10:
        names = listed(fit.unexpected)
        return f"{holds} is another model than model.encoder={encoder}: its names are {names}. {remedy}."
    faults = (("missing", fit.missing), ("unexpected", fit.unexpected), ("of another shape", fit.shapes))
    parts = [f"{len(names)} {kind} ({listed(names, '; ')})" for kind, names in faults if names]
    return (
        f"{holds} does not fit model.encoder={encoder}: {', '.join(parts)}. {remedy}, or name what is not to be read, and "
        "is to begin at random in the encoder, in model.init_from.leave_out (names, modules or patterns with *)."
    )
