"""How durations in epochs, images and per cent meet the data: a configuration in words in, one in steps out, once the number
of samples is known. Nothing that trains sees words. Pure functions."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

from lejepa_scale.config import checks
from lejepa_scale.config.keys import values_of
from lejepa_scale.config.schema import Config
from lejepa_scale.config.words import parsed
from lejepa_scale.errors import UserError

_KEPT, _SAVED = "checkpoint.keep_every", "checkpoint.every"
_TOGETHER = ("evaluation.every", _SAVED, _KEPT)  # which are to fall on the same steps
_WARM = "optim.warmup_steps"
KEYS = (_WARM, "optim.cooldown_steps", "average.every", "log.every", *_TOGETHER)


def length_of(config: Config) -> tuple[str, str]:
    """The key that says how long the run is, and in words how long."""
    train = config.train
    if train.epochs is not None:
        return "train.epochs", f"{train.epochs:,g} epoch{'s' * (train.epochs != 1)}"
    if train.images is not None:
        return "train.images", f"{train.images:,} images"
    return "train.steps", f"{train.steps:,} steps"


def in_words(config: Config) -> dict[str, str]:
    """The durations that are no steps yet, by key; the whole run's is not among them."""
    values = dict(values_of(config))
    return {key: values[key] for key in KEYS if isinstance(values[key], str)}


def steps_of(config: Config) -> dict[str, int]:
    """All durations of a configuration in steps, by key."""
    values = dict(values_of(config))
    return {key: values[key] for key in ("train.steps", *KEYS) if values[key] is not None}


def in_steps(config: Config, samples: int) -> Config:
    """`config` with every duration in steps. An epoch is `samples` images: as many as all sources of a mixture have
    together, whatever their weights. train.epochs and train.images stay as they are, beside train.steps.

    All are rounded down to whole steps, so that a run of n epochs meets no image more than n times (of one source). A
    period of checkpoint.every, evaluation.every and checkpoint.keep_every that is a multiple of another one in words is
    the same multiple of its steps; checkpoint.keep_every is a multiple of checkpoint.every in any case. What is less than a
    step, in a trial of a few, is one, but for a warm-up, which is none. Raises UserError for a whole run of less than a
    step, and where durations that have become steps contradict one another.
    """
    words, (length, said) = in_words(config), length_of(config)
    if not words and length == "train.steps":
        return config
    batch = config.train.global_batch
    total = floor(_whole(config, samples))
    if total == 0:
        raise UserError(
            f"{length} = {said.split()[0]} is less than a step: {float(_whole(config, samples)):.3g} of a batch of "
            f"train.global_batch = {batch}, where an epoch has {samples:,} images. Ask for more, or give train.steps."
        )
    of_unit = {"epochs": Fraction(samples, batch), "images": Fraction(1, batch), "%": Fraction(total, 100)}
    exact = {key: amount * of_unit[unit] for key, (amount, unit) in ((k, parsed(w)) for k, w in words.items())}
    exact = {key: steps if key == _WARM else max(Fraction(1), steps) for key, steps in exact.items()}
    found = {"train.steps": total, **{key: floor(steps) for key, steps in exact.items()}}
    found |= _multiples({key: steps for key, steps in exact.items() if key in _TOGETHER})
    if _KEPT in exact:
        every = found.get(_SAVED, config.checkpoint.every)
        found[_KEPT] = max(1, found[_KEPT] // every) * every
    for path, steps in found.items():
        section, name = path.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: steps})})
    if faults := checks.contradictions(config):
        raise UserError(f"with {said} as {total:,} steps: {'; '.join(faults)}.")
    return config


def told(given: Config, samples: int) -> str:
    """How the durations of `given` have become steps, in a sentence; empty where all of them were. Raises UserError as
    `in_steps` does."""
    config, (length, said) = in_steps(given, samples), length_of(given)
    parts = []
    if length != "train.steps":
        images = ceil(_whole(given, samples) * given.train.global_batch)
        of = f" ({images:,} images)" if length == "train.epochs" else ""
        parts.append(f"{said} = {config.train.steps:,} steps of {given.train.global_batch:,}{of}")
    steps = steps_of(config)
    parts += [f"{key} {words} = {steps[key]:,} steps" for key, words in in_words(given).items()]
    return f"{'; '.join(parts)}; an epoch is {samples:,} images." if parts else ""


def _whole(config: Config, samples: int) -> Fraction:
    """The run's steps, exactly."""
    train = config.train
    if train.epochs is not None:  # as it was written: 0.29 is 29/100
        return Fraction(str(train.epochs)) * samples / train.global_batch
    return Fraction(train.steps) if train.images is None else Fraction(train.images, train.global_batch)


def _multiples(exact: dict[str, Fraction]) -> dict[str, int]:
    """Whole steps of periods, from the shortest on: a multiple of a shorter one stays one."""
    whole: dict[Fraction, int] = {}
    for period in sorted(set(exact.values())):
        base = next((shorter for shorter in reversed(whole) if (period / shorter).denominator == 1), None)
        whole[period] = floor(period) if base is None else int(period / base) * whole[base]
    return {key: whole[period] for key, period in exact.items()}
