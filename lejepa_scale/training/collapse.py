"""Whether embeddings have collapsed: told of once, with what to do, and once more when it is over. Refuses to stop a run."""

from __future__ import annotations

import logging
import math

from lejepa_scale.config import Config
from lejepa_scale.parallel import process_group

logger = logging.getLogger(__name__)
_IN_A_ROW = 2  # records, before anything is said
_OVER = 2.0  # times the floors: what it takes to be out of a collapse


class CollapseWatch:
    """Looks at every record after the warm-up. samples: embeddings that a record's numbers are of."""

    def __init__(self, config: Config, samples: int) -> None:
        self.config, self.most, self.lowest = config, highest_rank(config, samples), lowest_rank(config, samples)
        self.collapsed, self._in_a_row = False, 0

    def look(self, step: int, rank: float, std: float) -> None:
        """rank, std: effective rank and standard deviation of the embeddings; NaN says nothing."""
        settings = self.config.evaluation
        if step <= self.config.optim.warmup_steps or math.isnan(rank) or math.isnan(std):
            return
        factor = _OVER if self.collapsed else 1.0
        low = rank < factor * self.lowest or std < factor * settings.std_floor
        self._in_a_row = self._in_a_row + 1 if low is not self.collapsed else 0
        if self._in_a_row < _IN_A_ROW:
            return
        self.collapsed, self._in_a_row = low, 0
        if low:
            _tell(self._said(step, rank, std))
        else:
            _tell(
                f"step {step}: the embeddings are no longer collapsed: effective rank {rank:.1f}, deviation {std:.2f}."
            )

    def _said(self, step: int, rank: float, std: float) -> str:
        objective, optim = self.config.objective, self.config.optim
        weights = f"objective.lambda (now {objective.lambda_:g})"
        if objective.final_lambda is not None:
            weights += f" and objective.final_lambda (now {objective.final_lambda:g})"
        advice = [f"raise {weights}", f"lower optim.lr (now {optim.lr:g})"]
        if self.config.train.global_batch < 128:
            advice.append(
                f"use a larger batch (now {self.config.train.global_batch} images; the paper's is 128 or more)"
            )
        return (
            f"step {step}: the embeddings have collapsed: effective rank {rank:.1f} of {self.most} that it could be (floor "
            f"{self.lowest:.1f}: evaluation.rank_floor), standard deviation {std:.2g} (floor "
            f"{self.config.evaluation.std_floor:g}: evaluation.std_floor; SIGReg's target is 1). The encoder learns next to "
            f"nothing from here on. What helps: {'; '.join(advice)}. The run goes on."
        )


def highest_rank(config: Config, samples: int) -> int:
    """The effective rank that as many embeddings can have."""
    return min(config.model.projector.dim, samples - 1)


def lowest_rank(config: Config, samples: int) -> float:
    """The effective rank below which as many embeddings have collapsed; a single direction has 1. 0 without a floor."""
    floor = config.evaluation.rank_floor
    return 1 + floor * (highest_rank(config, samples) - 1) if floor else 0.0


def _tell(message: str) -> None:
    """Once, of what every rank knows."""
    if process_group.rank() == 0:
        logger.warning("%s", message)
