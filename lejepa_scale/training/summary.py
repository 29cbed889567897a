"""What a run says of itself before its first step."""

from __future__ import annotations

import torch

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.config.batches import images_of_statistic
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.engine.optim import split
from lejepa_scale.model import LeJEPA
from lejepa_scale.model.packed import PackedBlock
from lejepa_scale.objective import SIGReg
from lejepa_scale.objective.sigreg import best_scale
from lejepa_scale.training.schedule import learning_rate
from lejepa_scale.training.start import attention_of, row_of

_FEW = 32  # embeddings, below which the V-statistic's bias is worth a word
_ROUNDED = 0.1  # relative error of stochastic depth's rate that is worth one


def summary(
    config: Config, plan: BatchPlan, mixture: Mixture, shapes: LeJEPA, device: torch.device, first_step: int
) -> str:
    """A paragraph: model, engine, batch, data, and what the views and the objective meet. shapes: on the meta device."""
    parameters = sum(p.numel() for p in shapes.parameters())
    return (
        f"{config.model.encoder}: {parameters / 1e6:.1f} M parameters (with projector), {config.engine.name} "
        f"{config.engine.precision} on {plan.ranks} x {device.type}; batch {config.train.global_batch} = "
        f"{plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation}; {mixture.num_samples:,} images in "
        f"{sum(len(s) for s in mixture.shards):,} shards; steps {first_step} to {config.train.steps}."
        + _decay_notice(config, shapes)
        + _warmup_notice(config)
        + _average_notice(config)
        + _blocks_notice(config, plan, shapes, device)
        + _draws_notice(config, plan, shapes)
        + _objective_notice(config, plan, shapes)
    )


def _decay_notice(config: Config, shapes: LeJEPA) -> str:
    """How many parameters weight decay shrinks, and how many it leaves."""
    if not config.optim.weight_decay:
        return ""
    decayed, others = (
        f"{len(group)} tensors ({sum(p.numel() for p in group.values()):,} parameters)"
        for group in split(shapes, config.optim.decay == "all")
    )
    return f"\nWeight decay {config.optim.weight_decay:g} on {decayed}, none on {others}: optim.decay={config.optim.decay}."


def _average_notice(config: Config) -> str:
    average = config.average
    if average.kind == "none":
        return ""
    how = f"decay {average.decay:g}, " if average.kind == "ema" else ""
    first = max(1, int(average.begins * config.train.steps) + 1)
    return f"\nWeights are averaged too ({average.kind}, {how}every {average.every} steps from step {first}): average.kind."


def _warmup_notice(config: Config) -> str:
    steps, warmup = config.train.steps, config.optim.warmup_steps
    if warmup <= steps:
        return ""
    reached = learning_rate(steps - 1, steps, config.optim)
    return (
        f"\nThe run ends inside its warm-up of {warmup} steps (optim.warmup_steps): the learning rate reaches "
        f"{reached:.3g}, not optim.lr = {config.optim.lr:g}."
    )


def _blocks_notice(config: Config, plan: BatchPlan, shapes: LeJEPA, device: torch.device) -> str:
    """How the views of a micro-batch go through a vision transformer. Measures attention where there is a choice."""
    encoder = shapes.encoder
    if not encoder.packed:
        return ""
    packing = row_of(config, plan, encoder)
    backend = attention_of(config, plan, encoder, device)
    branches = [block.kept(packing) for block in encoder.blocks if isinstance(block, PackedBlock)]
    notice = f"\nAttention by {backend}, {packing.tokens:,} tokens of {packing.sequences} views in a row"
    if config.model.drop_path:
        notice += f"; stochastic depth leaves a block {min(branch.tokens for branch in branches):,} of them or more"
    notice += "."
    if config.engine.compile:
        graphs = len(set(branches))
        notice += f"\nThe first step compiles {graphs} graph{'s' * (graphs > 1)} of a block; this can take minutes."
        if graphs > 1:
            notice += " model.drop_path_uniform=true needs one."
    return notice


def _draws_notice(config: Config, plan: BatchPlan, shapes: LeJEPA) -> str:
    """What stochastic depth's draws depend on, and its true rate where rounding to whole sequences changes it."""
    if not config.model.drop_path:
        return ""
    notice = (
        "\nStochastic depth draws by seed, step, micro-batch and rank: another number of ranks or another train.micro_batch "
        "is another draw."
    )
    if not shapes.encoder.packed:
        return notice
    packing, asked, given = row_of(config, plan, shapes.encoder), 0.0, 0.0
    blocks = [block for block in shapes.encoder.blocks if isinstance(block, PackedBlock)]
    for block in blocks:
        asked += block.drop_path / len(blocks)
        given += (1 - block.kept(packing).sequences / packing.sequences) / len(blocks)
    if abs(given - asked) > _ROUNDED * asked:
        notice += (
            f" Of {packing.sequences} views in a rank's micro-batch it leaves out {given:.1%} on average, not {asked:.1%}, "
            "since only whole views can be left out: train.micro_batch makes the groups larger."
        )
    return notice


def _objective_notice(config: Config, plan: BatchPlan, shapes: LeJEPA) -> str:
    """How the objective meets ranks and micro-batches, where there is more than one of either."""
    notice = ""
    accumulation, regularizer = config.objective.accumulation, shapes.loss.regularizer
    if isinstance(regularizer, SIGReg) and plan.ranks > 1:
        views = config.data.views.global_.count + config.data.views.local.count
        count = plan.micro_batch * (plan.accumulation if accumulation == "exact" else 1)
        itemsize = 2 if config.engine.precision == "bf16" else 4
        arguments = views, [count] * plan.ranks, config.model.projector.dim, itemsize
        notice += (
            f"\nSIGReg over ranks by {regularizer.mode(*arguments)} (bytes a rank sends per evaluation: "
            f"{regularizer.traffic(*arguments)})."
        )
    notice += _small_sample_notice(config, plan)
    if plan.accumulation > 1 and accumulation == "micro":
        notice += (
            f"\nThe objective is that of micro-batches of {plan.micro_batch * plan.ranks} images, not of all "
            f"{config.train.global_batch}; objective.accumulation=exact changes that for one more forward pass."
        )
    return notice


def _small_sample_notice(config: Config, plan: BatchPlan) -> str:
    """That the published statistic asks for embeddings smaller than a standard Gaussian's where it sees few of them."""
    objective, images = config.objective, images_of_statistic(config, plan)
    views = config.data.views.global_.count + config.data.views.local.count
    samples = images * (views if objective.joint else 1)
    if objective.regularizer != "sigreg" or objective.sigreg.estimator != "v" or samples >= _FEW:
        return ""
    return (
        f"\nSIGReg sees {samples} embeddings at once: of so few, its statistic is least at a standard deviation of "
        f"{best_scale(samples, objective.sigreg.knots, objective.sigreg.t_max):.2f}, not 1: a pull towards collapse. "
        f"Use {_FEW} or more (train.micro_batch, ranks, objective.accumulation=exact), or objective.sigreg.estimator=u, "
        "which is unbiased."
    )
