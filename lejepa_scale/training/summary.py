"""What a run says of itself before its first step."""

from __future__ import annotations

from math import prod

import torch

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.config.batches import images_of_statistic
from lejepa_scale.config.durations import told
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.engine.optim import matrices, split
from lejepa_scale.model import LeJEPA
from lejepa_scale.model.dropping import staying
from lejepa_scale.model.layers import layer_scales
from lejepa_scale.model.packed import PackedBlock
from lejepa_scale.objective import SIGReg, VISReg
from lejepa_scale.objective.sigreg import best_scale
from lejepa_scale.training.schedule import cooldown_steps, learning_rate
from lejepa_scale.training.start import attention_of, row_of

_FEW = 32  # embeddings, below which the V-statistic's bias is worth a word
_ROUNDED = 0.1  # relative error of stochastic depth's rate, or of a share of patches, that is worth one


def summary(
    config: Config,
    plan: BatchPlan,
    mixture: Mixture,
    shapes: LeJEPA,
    device: torch.device,
    first_step: int,
    given: Config | None = None,
) -> str:
    """A paragraph: model, engine, batch, data, and what the views and the objective meet. shapes: on the meta device. given:
    the configuration with its durations in words, where there are such."""
    parameters = sum(p.numel() for p in shapes.parameters())
    return (
        f"{config.model.encoder}: {parameters / 1e6:.1f} M parameters (with projector), {config.engine.name} "
        f"{config.engine.precision} on {plan.ranks} x {device.type}; batch {config.train.global_batch} = "
        f"{plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation}; {mixture.num_samples:,} images in "
        f"{sum(len(s) for s in mixture.shards):,} shards; steps {first_step} to {config.train.steps}."
        + _durations_notice(given or config, mixture)
        + _decay_notice(config, shapes)
        + _rates_notice(config, shapes)
        + _warmup_notice(config)
        + _cooldown_notice(config)
        + _average_notice(config)
        + _blocks_notice(config, plan, shapes, device)
        + _patches_notice(config, shapes)
        + _draws_notice(config, plan, shapes)
        + _objective_notice(config, plan, shapes)
    )


def _durations_notice(given: Config, mixture: Mixture) -> str:
    said = told(given, mixture.num_samples)
    return f"\n{said}" if said else ""


def _decay_notice(config: Config, shapes: LeJEPA) -> str:
    """How many parameters weight decay shrinks, and how many it leaves."""
    first, final = config.optim.weight_decay, config.optim.final_weight_decay
    if not (first or final):
        return ""
    decayed, others = (
        f"{len(group)} tensors ({sum(p.numel() for p in group.values()):,} parameters)"
        for group in split(shapes, config.optim.decay == "all")
    )
    amount = f"{first:g}" if final is None else f"{first:g} to {final:g}"
    return f"\nWeight decay {amount} on {decayed}, none on {others}: optim.decay={config.optim.decay}."


def _rates_notice(config: Config, shapes: LeJEPA) -> str:
    """What is Muon's, and how far rates of layers lie apart."""
    said, decay = "", config.optim.layer_decay
    if config.optim.name == "muon":
        own = matrices(shapes).values()
        said += f"\nMuon updates {len(own)} matrices ({sum(p.numel() for p in own):,} parameters), AdamW all else."
    if decay not in (None, 1):
        scales = layer_scales(shapes.encoder, decay).values()
        said += (
            f"\nLearning rates of the encoder are {min(scales):.2g} to {max(scales):.2g} times that of the projector: "
        )
        said += f"optim.layer_decay={decay:g}."
    return said


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


def _cooldown_notice(config: Config) -> str:
    steps = config.train.steps
    if config.optim.schedule != "wsd":
        return ""
    first = steps - cooldown_steps(steps, config.optim)
    return (
        f"\nThe learning rate falls from step {first} on (optim.schedule=wsd). To make the run longer later, keep "
        f"a checkpoint of step {first} or before (checkpoint.keep_every), and begin from it: run.resume=CHECKPOINT, another "
        "run.dir, a larger train.steps (or train.epochs, train.images)."
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


def _patches_notice(config: Config, shapes: LeJEPA) -> str:
    """How many patches of a view stay, and the true share that is left out where rounding to whole patches changes it."""
    encoder, drop, views = shapes.encoder, config.model.patch_drop, config.data.views
    parts = []
    for name, share, group in (("global", drop.global_, views.global_), ("local", drop.local, views.local)):
        if not share:
            continue
        patches = prod(encoder.backbone.patch_embed.dynamic_feat_size((group.size, group.size)))
        left_out = 1 - staying(patches, share) / patches
        rounded = f" ({left_out:.1%} left out, not {share:.1%})" if abs(left_out - share) > _ROUNDED * share else ""
        parts.append(f"{staying(patches, share)} of the {patches} patches of a {name} view{rounded}")
    return f"\nTraining sees {' and '.join(parts)}: model.patch_drop." if parts else ""


def _draws_notice(config: Config, plan: BatchPlan, shapes: LeJEPA) -> str:
    """What the draws of stochastic depth and of patches depend on, and the true rate of the former where rounding to whole
    sequences changes it."""
    drop = config.model.patch_drop
    rates = {"stochastic depth": config.model.drop_path, "patch dropping": drop.global_ or drop.local}
    drawing = [name for name, rate in rates.items() if rate]
    if not drawing:
        return ""
    notice = (
        f"\n{' and '.join(drawing).capitalize()} {'draw' if len(drawing) > 1 else 'draws'} by seed, step, micro-batch and "
        "rank: another number of ranks or another train.micro_batch is another draw."
    )
    if not shapes.encoder.packed or not config.model.drop_path:
        return notice
    packing, asked, given = row_of(config, plan, shapes.encoder), 0.0, 0.0
    blocks = [block for block in shapes.encoder.blocks if isinstance(block, PackedBlock)]
    for block in blocks:
        asked += block.drop_path / len(blocks)
        given += (1 - block.kept(packing).sequences / packing.sequences) / len(blocks)
    if abs(given - asked) > _ROUNDED * asked:
        notice += (
            f" Of {packing.sequences} views in a rank's micro-batch stochastic depth leaves out {given:.1%} on average, not "
            f"{asked:.1%}, since only whole views can be left out: train.micro_batch makes the groups larger."
        )
    return notice


def _objective_notice(config: Config, plan: BatchPlan, shapes: LeJEPA) -> str:
    """How the objective meets ranks and micro-batches, where there is more than one of either."""
    notice = ""
    accumulation, regularizer = config.objective.accumulation, shapes.loss.regularizer
    if isinstance(regularizer, SIGReg | VISReg) and plan.ranks > 1:
        views = config.data.views.global_.count + config.data.views.local.count
        count = plan.micro_batch * (plan.accumulation if accumulation == "exact" else 1)
        itemsize = 2 if config.engine.precision == "bf16" else 4
        arguments = views, [count] * plan.ranks, config.model.projector.dim, itemsize
        if isinstance(regularizer, SIGReg):
            way, sent = regularizer.mode(*arguments), str(regularizer.traffic(*arguments))
        else:
            way, sent = "distinct", f"{regularizer.traffic(*arguments) / 1e6:.2f} MB"
        notice += f"\n{type(regularizer).__name__} over ranks by {way} (bytes a rank sends per evaluation: {sent})."
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
