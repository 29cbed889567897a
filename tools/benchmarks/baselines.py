"""Ways of running a step that the trainer does not have, to hold its own against. Each takes a built engine and changes how
the same weights run; none has a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.engine import Engine
from lejepa_scale.errors import UserError
from lejepa_scale.model.attention import Packing, offsets
from lejepa_scale.model.packed import PackedBlock, PackedRow


def forward_per_group(engine: Engine) -> None:
    """The blocks run once for each view size, inside one forward of the root: twice for global and local views."""
    _split_forward(engine, lambda views: [[group] for group in views])


def forward_per_view(engine: Engine, counts: Sequence[int]) -> None:
    """The blocks run once for each view. counts: views of each size; a size's images come view by view, [V B, C, H, W]."""
    _split_forward(engine, lambda views: [group.chunk(n) for group, n in zip(views, counts, strict=True)])


def _split_forward(engine: Engine, cut: Callable[[Sequence[Tensor]], list[Sequence[Tensor]]]) -> None:
    encoder = engine.module.encoder
    if not encoder.packed:
        raise UserError(f"{encoder.name} runs once per view size already: there is no packed forward to compare with.")
    if getattr(engine, "stage", 0) == 3:
        raise UserError("DeepSpeed's ZeRO-3 expects one gradient of a parameter a step: a block cannot run twice.")
    whole, shares = encoder.forward, encoder.patch_drop

    def forward(images: Sequence[Float[Tensor, "b c h w"]]) -> list[Float[Tensor, "b e"]]:
        features = []
        for group, parts in enumerate(cut(images)):
            encoder.patch_drop = shares[group : group + 1]  # of the one input that it is given
            features.append(torch.cat([whole([part])[0] for part in parts]))
        encoder.patch_drop = shares
        return features

    encoder.forward = forward  # type: ignore[method-assign]


def masked_depth(engine: Engine) -> None:
    """Stochastic depth as timm has it: every branch is computed for every sequence, and multiplied by zero where it is
    dropped, by 1 / (1 - p) where not."""
    encoder = engine.module.encoder
    if not encoder.packed:
        raise UserError(f"{encoder.name} has no packed blocks: its stochastic depth is timm's own, the masked form.")
    for block in cast(list[PackedBlock], encoder.blocks):
        block.forward = partial(_masked_forward, block, block.forward)  # type: ignore[method-assign]
        block._branch = partial(_masked_branch, block, block._branch)  # type: ignore[method-assign]


def _masked_forward(
    block: PackedBlock, whole: Callable[..., Tensor], x: Float[Tensor, "t e"], row: PackedRow
) -> Float[Tensor, "t e"]:
    """The block on everything; `_masked_branch` finds there how the row is cut."""
    block.cut = row.packing  # type: ignore[assignment]
    return whole(x, row._replace(branch=row.packing, starts=offsets(row.packing, x.device), kept=None))


def _masked_branch(
    block: PackedBlock,
    whole: Callable[..., Tensor],
    x: Float[Tensor, "t e"],
    computed: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    *others: Any,
) -> Float[Tensor, "t e"]:
    """The branch on everything, whose last part is followed by the mask."""
    if block.post_norm:
        return whole(x, computed, lambda own: _masked(block, norm(own)), *others)
    return whole(x, lambda own: _masked(block, computed(own)), norm, *others)


def _masked(block: PackedBlock, own: Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
    keep = 1 - block.drop_path
    if not block.training or keep == 1:
        return own
    parts = []
    for part in cast(Packing, block.cut).split(own):  # [B_i, L_i, E]
        kept = (torch.rand(len(part), 1, 1, device=part.device) < keep).to(part.dtype)
        parts.append((part * (kept / keep)).flatten(0, 1))
    return torch.cat(parts)


def unfused_adamw(engine: Engine, *, foreach: bool) -> None:
    """torch's AdamW over lists of tensors (`foreach`), or tensor by tensor. Neither can be told to leave a step out."""
    optimizer = cast(Any, engine).optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps ours
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, foreach
    optimizer.register_step_pre_hook(lambda own, *_: setattr(own, "found_inf", None))
    for state in optimizer.state.values():  # where DeepSpeed's were made before the first step, for the fused kernel
        state["step"] = state["step"].cpu()
