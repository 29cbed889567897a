"""One training forward: views -> features -> embeddings -> loss. Refuses to know about engines, data files or steps
other than the number that selects SIGReg's directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.config import Config
from lejepa_scale.errors import UserError
from lejepa_scale.model.encoder import Encoder
from lejepa_scale.model.norm import BatchNorm
from lejepa_scale.model.projector import Predictor, Projector
from lejepa_scale.model.sizes import GLOBAL, LOCAL, check_sizes
from lejepa_scale.objective import LeJEPALoss, Regularizer, SIGReg, VISReg, WeakSIGReg
from lejepa_scale.parallel.process_group import world_size


@dataclass(frozen=True)
class Replay:
    """What makes a micro-batch's loss that of the whole batch: the features of all micro-batches, computed without a graph
    in a first pass, in whose place at `index` this micro-batch now computes its own with a graph.

    The heads and the loss see all features each time. Their gradient is therefore whole in every micro-batch, while an
    encoder's part comes once: it is multiplied by the number of micro-batches, by which the trainer divides the loss.
    """

    features: Sequence[Float[Tensor, "v _b e"]]
    index: int

    def joined(self, own: Float[Tensor, "v b e"]) -> Float[Tensor, "v all_b e"]:
        """All micro-batches' features, this one's with the graph of `own`."""
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * len(self.features))
        return torch.cat([*self.features[: self.index], own, *self.features[self.index + 1 :]], 1)


class LeJEPA(nn.Module):
    """Encoder, projector and objective; no teacher, no stop-gradient, no moving average."""

    def __init__(self, encoder: Encoder, projector: Projector, predictor: Predictor | None, loss: LeJEPALoss) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor, self.loss = encoder, projector, predictor, loss

    def forward(
        self,
        views: Sequence[Float[Tensor, "_v b c _h _w"]],
        step: int | None,
        replay: Replay | None = None,
        lambda_: float | None = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """views: one tensor per resolution, the global views first; this rank's samples, as many as every rank's.
        lambda_: of this step, in place of the loss's own.

        Returns the scalars `loss`, `prediction`, `sigreg` (of the global batch, equal on all ranks) and, detached, the
        mean over the global views of `features` [B, E] and `embeddings` [B, D] (of all micro-batches with `replay`); in
        eval mode also `features_of_views` [V, B, E]. Without a step, the `features` [V, B, E] of all views alone.
        """
        num_global, batch = views[0].shape[:2]
        pooled = self.encoder([rearrange(group, "v b c h w -> (v b) c h w") for group in views])
        features = rearrange(torch.cat(pooled), "(v b) e -> v b e", b=batch)
        if step is None:
            return {"features": features}
        whole = features if replay is None else replay.joined(features)
        count = whole.shape[1]
        z = self.projector(whole.flatten(0, 1))  # one batch of all views for the normalization
        predicted = None if self.predictor is None else rearrange(self.predictor(z), "(v b) d -> v b d", b=count)
        z = rearrange(z, "(v b) d -> v b d", b=count)
        counts = [count] * world_size()
        terms = self.loss(z, num_global, step=step, predicted=predicted, counts=counts, lambda_=lambda_)
        out = {
            "loss": terms.loss,
            "prediction": terms.prediction.detach(),
            "sigreg": terms.sigreg.detach(),
            "features": reduce(features[:num_global].detach(), "v b e -> b e", "mean"),
            "embeddings": reduce(z[:num_global].detach(), "v b d -> b d", "mean"),
        }
        return out if self.training else {**out, "features_of_views": features.detach()}


def build_encoder(config: Config, image_size: int | None = None) -> Encoder:
    """The encoder of the model section, or the same for another image size. Raises UserError for a name or arguments that
    timm refuses."""
    model = config.model
    return Encoder(
        model.encoder,
        image_size=image_size or config.image_size,
        channels=config.data.channels,
        patch_size=model.patch_size,
        head_dim=model.head_dim,
        drop_path=model.drop_path,
        drop_path_uniform=model.drop_path_uniform,
        patch_drop=(model.patch_drop.global_, model.patch_drop.local),  # in the order of `LeJEPA.forward`'s views
        attention=model.attention,
        options=model.options,
    )


def check(config: Config) -> LeJEPA:
    """Build on the meta device and pass every view size through the encoder; the module, which has shapes and no
    memory. Raises UserError."""
    with torch.device("meta"):
        model = build(config)
    _refuse_what_needs_blocks(config, model.encoder)
    views, grid = config.data.views, config.model.image_size
    sides = {
        "model.image_size": grid,
        GLOBAL: views.global_.size,
        LOCAL: views.local.size if views.local.count else None,
    }
    check_sizes(
        model.encoder,
        {key: side for key, side in sides.items() if side},
        lambda side: build_encoder(config, grid or side),
    )
    if config.objective.accumulation == "exact" and any(isinstance(m, BatchNorm) for m in model.encoder.modules()):
        raise UserError(
            f"objective.accumulation=exact cannot be exact for model.encoder={config.model.encoder}: its batch "
            "normalization sees one micro-batch at a time. Use micro or unbiased, or an encoder without batch normalization."
        )
    return model


def _refuse_what_needs_blocks(config: Config, encoder: Encoder) -> None:
    engine, attention = config.engine, config.model.attention
    kind, ahead = engine.activation_checkpointing, engine.prefetch
    packed = {
        "engine.compile=true": engine.compile,
        "engine.fp8=true": engine.fp8,
        f"engine.activation_checkpointing={kind}": kind in ("selective", "budget"),
        f"model.attention={attention}": attention != "auto",
    }
    wanted = [key for key, asked in packed.items() if asked and not encoder.packed]
    if engine.name == "fsdp" and ahead > 1 and not encoder.blocks:
        wanted.append(f"engine.prefetch={ahead}")
    for key in wanted:
        raise UserError(
            f"{key} works on the blocks of a vision transformer, and {encoder.name} has none that are known here."
        )


def build(config: Config) -> LeJEPA:
    """The whole module for a configuration, at weights drawn from torch's current generator. Raises UserError as
    `build_encoder` does."""
    encoder = build_encoder(config)
    head = config.model.projector
    predictor = config.model.predictor
    return LeJEPA(
        encoder,
        Projector(encoder.embed_dim, head.hidden, head.dim, head.layers, head.activation),
        Predictor(head.dim, predictor.hidden) if predictor else None,
        build_loss(config),
    )


def build_loss(config: Config) -> LeJEPALoss:
    """The objective section's loss, and its regularizer."""
    objective, sigreg = config.objective, config.objective.sigreg
    regularizer: Regularizer
    if objective.regularizer == "weak_sigreg":
        regularizer = WeakSIGReg(objective.weak_sigreg.sketch, joint=objective.joint, seed=config.run.seed)
    elif objective.regularizer == "visreg":
        regularizer = VISReg(objective.visreg.num_slices, joint=objective.joint, seed=config.run.seed)
    else:
        scale, reference_n = sigreg.scale, sigreg.reference_n
        if objective.accumulation == "unbiased" and scale == "n":  # the n of the whole batch, not of a micro-batch
            views = config.data.views.global_.count + config.data.views.local.count
            scale, reference_n = "reference", config.train.global_batch * (views if objective.joint else 1)
        regularizer = SIGReg(
            sigreg.num_slices,
            sigreg.knots,
            sigreg.t_max,
            sigreg.estimator,
            scale,
            sigreg.backend,
            reference_n=reference_n,
            joint=objective.joint,
            tf32=sigreg.tf32,
            communication=sigreg.communication,
            seed=config.run.seed,
        )
    return LeJEPALoss(
        regularizer,
        objective.lambda_,
        weighting=objective.weighting,
        prediction=objective.prediction,
        scale_centre=objective.visreg.weight,
    )
