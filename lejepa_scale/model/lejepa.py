"""One training forward: views -> features -> embeddings -> loss. Refuses to know about engines, data files or steps
other than the number that selects SIGReg's directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.config import Config
from lejepa_scale.model.encoder import Encoder
from lejepa_scale.model.projector import Predictor, Projector
from lejepa_scale.objective import LeJEPALoss, SIGReg


class LeJEPA(nn.Module):
    """Encoder, projector and objective; no teacher, no stop-gradient, no moving average."""

    def __init__(self, encoder: Encoder, projector: Projector, predictor: Predictor | None, loss: LeJEPALoss) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor, self.loss = encoder, projector, predictor, loss

    def forward(self, views: Sequence[Float[Tensor, "v b 3 h w"]], step: int) -> dict[str, Tensor]:
        """views: one tensor per resolution, the global views first; this rank's samples.

        Returns the scalars `loss`, `prediction`, `sigreg` (of the global batch, equal on all ranks) and, detached, the
        mean over the global views of `features` [B, E] and `embeddings` [B, D].
        """
        num_global, batch = views[0].shape[:2]
        features = self.encoder([rearrange(group, "v b c h w -> (v b) c h w") for group in views])
        z = self.projector(torch.cat(features))  # one batch of all views for the normalisation
        predicted = None if self.predictor is None else rearrange(self.predictor(z), "(v b) d -> v b d", b=batch)
        z = rearrange(z, "(v b) d -> v b d", b=batch)
        terms = self.loss(z, num_global, step=step, predicted=predicted)
        return {
            "loss": terms.loss,
            "prediction": terms.prediction.detach(),
            "sigreg": terms.sigreg.detach(),
            "features": reduce(features[0].detach(), "(v b) e -> b e", "mean", v=num_global),
            "embeddings": reduce(z[:num_global].detach(), "v b d -> b d", "mean"),
        }


def build_encoder(config: Config) -> Encoder:
    model = config.model
    return Encoder(
        model.encoder,
        image_size=config.image_size,
        patch_size=model.patch_size,
        drop_path=model.drop_path,
        attention=model.attention,
        activation_checkpointing=config.engine.activation_checkpointing,
        options=model.options,
    )


def check(config: Config) -> int:
    """Build on the meta device, pass every view size through the encoder; number of parameters. Raises UserError."""
    with torch.device("meta"):
        model = build(config)
    views = config.data.views
    model.encoder.check_sizes([config.image_size, *(g.size for g in (views.global_, views.local) if g.count)])
    return sum(p.numel() for p in model.parameters())


def build(config: Config) -> LeJEPA:
    """The whole module for a configuration, at weights drawn from torch's current generator."""
    encoder = build_encoder(config)
    head = config.model.projector
    predictor = config.model.predictor
    objective = config.objective
    return LeJEPA(
        encoder,
        Projector(encoder.embed_dim, head.hidden, head.dim, head.layers),
        Predictor(head.dim, predictor.hidden) if predictor else None,
        LeJEPALoss(
            SIGReg(
                objective.num_slices,
                objective.knots,
                objective.t_max,
                objective.estimator,
                objective.scale,
                reference_n=objective.reference_n,
                seed=config.run.seed,
            ),
            objective.lambda_,
        ),
    )
