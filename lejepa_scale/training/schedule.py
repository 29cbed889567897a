"""Pure functions of the step: what the optimizer is handed. No state, no framework scheduler."""

import math

from lejepa_scale.config import Objective, Optim

_COOLDOWN = 0.2  # of all steps, as in arXiv 2405.18392


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Linear warm-up over `warmup_steps` W, then down to `lr * final_lr_ratio` at the last step (0-based `step`): by a
    cosine, or, with schedule "wsd", in the last `cooldown_steps` C alone, as 1 - sqrt(c / C) after c of them (arXiv
    2405.18392).

    The warm-up's factors are 1 / W, 2 / W, ... 1 or, with `warmup_start_ratio` s, s + (1 - s) step / W, as torch's
    LinearLR has them: lr itself is then that of step W.

    A run that is cut short inside its warm-up (`train.steps=20` over a recipe) takes the same steps as the whole one."""
    if step < optim.warmup_steps:
        start = optim.warmup_start_ratio
        if start is None:
            return optim.lr * (step + 1) / optim.warmup_steps
        return optim.lr * (start + (1 - start) * step / optim.warmup_steps)
    final = optim.lr * optim.final_lr_ratio
    if optim.schedule == "wsd":
        return final + (optim.lr - final) * (1 - math.sqrt(_cooled(step, total, optim)))
    progress = (step - optim.warmup_steps) / max(1, total - 1 - optim.warmup_steps)
    return final + (optim.lr - final) * _cosine(progress)


def weight_decay(step: int, total: int, optim: Optim) -> float:
    """That of every step, or by a cosine from the first one's to `final_weight_decay` at the last one, as in DINO
    (arXiv 2104.14294)."""
    if optim.final_weight_decay is None:
        return optim.weight_decay
    final = optim.final_weight_decay
    return final + (optim.weight_decay - final) * _cosine(step / max(1, total - 1))


def lambda_at(step: int, total: int, objective: Objective) -> float:
    """lambda of every step, or by the same cosine from the first one's to `final_lambda` at the last one."""
    if objective.final_lambda is None:
        return objective.lambda_
    final = objective.final_lambda
    return final + (objective.lambda_ - final) * _cosine(step / max(1, total - 1))


def cooldown_steps(total: int, optim: Optim) -> int:
    """Of schedule "wsd"."""
    return max(1, round(_COOLDOWN * total)) if optim.cooldown_steps is None else optim.cooldown_steps


def _cooled(step: int, total: int, optim: Optim) -> float:
    """The share of the cooldown that is over after this step."""
    count = cooldown_steps(total, optim)
    return min(1.0, max(0, step + 1 - (total - count)) / count)


def _cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
