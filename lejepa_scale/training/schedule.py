"""Pure functions of the step: what the optimizer is handed. No state, no framework scheduler."""

import math

from lejepa_scale.config import Optim


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Linear warm-up over `warmup_steps` W, then cosine to `lr * final_lr_ratio` at the last step (0-based `step`).

    The warm-up's factors are 1 / W, 2 / W, ... 1 or, with `warmup_start_ratio` s, s + (1 - s) step / W, as torch's
    LinearLR has them: lr itself is then that of step W.

    A run that is cut short inside its warm-up (`train.steps=20` over a recipe) takes the same steps as the whole one."""
    if step < optim.warmup_steps:
        start = optim.warmup_start_ratio
        if start is None:
            return optim.lr * (step + 1) / optim.warmup_steps
        return optim.lr * (start + (1 - start) * step / optim.warmup_steps)
    progress = (step - optim.warmup_steps) / max(1, total - 1 - optim.warmup_steps)
    final = optim.lr * optim.final_lr_ratio
    return final + (optim.lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
