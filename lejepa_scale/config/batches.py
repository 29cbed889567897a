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
    if images_of_statistic(config, plan) < 2:
        raise UserError(
            f"the regularizer would see 1 image at a time: train.micro_batch = {plan.micro_batch} on {ranks} rank(s), and "
            "one embedding is no sample of a distribution (SIGReg is then least where all embeddings are 0). Use 32 or more "
            "over all ranks: train.micro_batch, ranks, or objective.accumulation=exact, which joins the micro-batches."
        )
    return plan


def images_of_statistic(config: Config, plan: BatchPlan) -> int:
    """Images whose embeddings the regularizer meets at once: those of a micro-batch over all ranks, or of a whole step."""
    return plan.micro_batch * plan.ranks * (plan.accumulation if config.objective.accumulation == "exact" else 1)
