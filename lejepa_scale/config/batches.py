"""How a configuration meets a number of ranks: the split of the global batch, and what is refused of it."""

from __future__ import annotations

from lejepa_scale.config.schema import Config, Positive, Section
from lejepa_scale.errors import UserError


class BatchPlan(Section):
    """global_batch = micro_batch x ranks x accumulation."""

    micro_batch: Positive
    ranks: Positive = 1
    accumulation: Positive = 1

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all ranks."""
        return self.micro_batch * self.ranks * self.accumulation


def plan_batches(config: Config, ranks: int) -> BatchPlan:
    """Split the global batch over `ranks`. Raises UserError, with the arithmetic shown, where it does not divide."""
    total, micro = config.train.global_batch, config.train.micro_batch
    if micro is None:
        if total % ranks:
            raise UserError(
                f"train.global_batch = {total} cannot be split over {ranks} ranks: {total} / {ranks} = {total / ranks:g} "
                f"images each. Use a multiple of {ranks}, for instance {-(-total // ranks) * ranks}."
            )
        return BatchPlan(micro_batch=total // ranks, ranks=ranks, accumulation=1)
    if total % (micro * ranks):
        raise UserError(
            f"train.global_batch = {total} is not train.micro_batch x ranks x accumulation: {micro} x {ranks} = "
            f"{micro * ranks}, and {total} / {micro * ranks} = {total / (micro * ranks):g} is not a whole number. "
            f"Use a global batch that is a multiple of {micro * ranks}, or another micro batch."
        )
    return BatchPlan(micro_batch=micro, ranks=ranks, accumulation=total // (micro * ranks))


def check_world(config: Config, ranks: int) -> BatchPlan:
    """Everything about a configuration that depends on the number of ranks; raises UserError."""
    if config.engine.name == "single" and ranks > 1:
        raise UserError(
            f"engine.name=single runs one process, but {ranks} were started. Use ddp, fsdp or zero1/2/3, "
            "or start it with plain `python`."
        )
    degree = config.engine.shard_degree
    if degree is not None and ranks % degree:
        raise UserError(f"engine.shard_degree = {degree} does not divide the {ranks} ranks of this run.")
    plan = plan_batches(config, ranks)
    objective = config.objective
    samples = plan.micro_batch * ranks * (plan.accumulation if objective.accumulation == "exact" else 1)
    if samples < 2 and (
        objective.regularizer == "weak_sigreg" or objective.sigreg.estimator == "u" or objective.visreg.weight > 0
    ):
        raise UserError(
            "objective.sigreg.estimator=u, objective.regularizer=weak_sigreg and objective.visreg.weight need at least 2 "
            f"images per micro-batch over all ranks; this is train.micro_batch = {plan.micro_batch} on {ranks} rank(s)."
        )
    return plan
