"""A timm backbone fed with several resolutions at once. Vision transformers run all views in one packed pass through
their blocks; every other timm model runs once per resolution. Parameter names stay timm's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lejepa_scale.errors import UserError
from lejepa_scale.model.attention import Packing, attend
from lejepa_scale.model.norm import synchronised

OUR_SIZES: dict[str, dict[str, Any]] = {
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=4, patch_size=8),
    "vit_micro": dict(embed_dim=192, depth=6, num_heads=3, patch_size=8),
}
_TOKEN_MODELS = ("vision_transformer", "deit", "eva")  # timm modules whose models take img_size and dynamic_img_size


class Encoder(nn.Module):
    """`encoder([x_1, x_2, ...])` with x_i [B_i, 3, H_i, W_i] -> [B_i, E] pooled features, one tensor per input.

    name: any timm model, or a size of ours (vit_nano, vit_micro). image_size sets the position-embedding grid; other
    sizes are interpolated. `attention` picks the packed backend ("auto" probes at the first forward on a device).
    Raises UserError for an unknown name or arguments that timm refuses.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 224,
        patch_size: int | None = None,
        drop_path: float = 0.0,
        attention: str = "auto",
        activation_checkpointing: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm_name, arguments = _resolve(name)
        if patch_size is not None:
            arguments["patch_size"] = patch_size
        if _is_token_model(timm_name):
            arguments |= dict(img_size=image_size, dynamic_img_size=True)
        if drop_path:
            arguments["drop_path_rate"] = drop_path
        arguments |= options or {}
        try:
            backbone: Any = timm.create_model(timm_name, pretrained=False, num_classes=0, **arguments)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"model.encoder={name}: timm refuses these arguments: {error}") from error
        self.timm_arguments = {"model_name": timm_name, "num_classes": 0, **arguments}  # rebuilds the backbone
        self.name, self.embed_dim = name, int(backbone.num_features)
        self.activation_checkpointing = activation_checkpointing
        self.packed = _is_packable(backbone)
        if self.packed:
            for i, block in enumerate(backbone.blocks):
                backbone.blocks[i] = PackedBlock(block, attention)
        elif activation_checkpointing:
            backbone.set_grad_checkpointing()
        self.backbone: Any = synchronised(backbone)

    @property
    def patch_size(self) -> int | None:
        """Pixels per token side; None for models without patches."""
        embed = getattr(self.backbone, "patch_embed", None)
        return embed.patch_size[0] if embed is not None and hasattr(embed, "patch_size") else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated units that an engine shards one by one; empty where the backbone has none."""
        return list(getattr(self.backbone, "blocks", []))

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuse image sides that this encoder cannot process. Meant for an encoder built on the meta device."""
        for size in sizes:
            if self.patch_size and size % self.patch_size:
                near = max(1, round(size / self.patch_size)) * self.patch_size
                raise UserError(
                    f"views of {size} px cannot be cut into patches of {self.patch_size} px ({self.name}); use {near} px."
                )
            device = next(self.parameters()).device
            try:
                self([torch.empty(2, 3, size, size, device=device)])
            except RuntimeError as error:
                raise UserError(f"{self.name} cannot process views of {size} px: {error}") from error

    def forward(self, images: Sequence[Float[Tensor, "b 3 h w"]]) -> list[Float[Tensor, "b e"]]:
        if not self.packed:
            return [self.backbone(x.contiguous(memory_format=torch.channels_last)) for x in images]
        return [self.backbone.forward_head(tokens, pre_logits=True) for tokens in self._packed_tokens(images)]

    def patch_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w e"]:
        """Normalised features of the patches (or of the last feature map) in their place."""
        features = self._packed_tokens([images])[0] if self.packed else self.backbone.forward_features(images)
        if features.ndim == 4:
            return features.movedim(1, -1)
        patches = features[:, self.backbone.num_prefix_tokens :]
        rows = images.shape[-2] // self.backbone.patch_embed.patch_size[0]
        return rearrange(patches, "b (h w) e -> b h w e", h=rows)

    def _packed_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embed each resolution, run the blocks once over all tokens, split again: [B_i, L_i, E] each."""
        vit = self.backbone
        embedded = [vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x)))) for x in images]
        packing = Packing(tuple((x.shape[0], x.shape[1]) for x in embedded))
        tokens = torch.cat([x.flatten(0, 1) for x in embedded])  # [T, E]
        for block in vit.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, packing, use_reentrant=False)
            else:
                tokens = block(tokens, packing)
        return packing.split(vit.norm(tokens))


class PackedBlock(nn.Module):
    """timm's pre-norm transformer block over a packed row of tokens, with the same parameters under the same names."""

    def __init__(self, block: Any, attention: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, PackedAttention(block.attn, attention), block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.drop_path = float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0)

    def forward(self, x: Float[Tensor, "t e"], packing: Packing) -> Float[Tensor, "t e"]:
        x = x + self._drop(self.ls1(self.attn(self.norm1(x), packing)), packing)
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))), packing)

    def _drop(self, x: Tensor, packing: Packing) -> Tensor:
        """Stochastic depth: a branch is dropped for whole sequences, the kept ones scaled to keep the mean."""
        if not self.training or self.drop_path == 0.0:
            return x
        keep = 1 - self.drop_path
        sequences = sum(count for count, _ in packing.groups)
        kept = torch.rand(sequences, device=x.device) < keep
        return x * packing.expand(kept.to(x.dtype) / keep)


class PackedAttention(nn.Module):
    """timm's multi-head attention over a packed row of tokens, with the same parameters under the same names."""

    def __init__(self, attn: Attention, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.norm, self.proj, self.proj_drop = attn.norm, attn.proj, attn.proj_drop

    def forward(self, x: Float[Tensor, "t e"], packing: Packing) -> Float[Tensor, "t e"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, H, D] each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x = attend(q, k, v, packing, self.backend).flatten(1)
        return self.proj_drop(self.proj(self.norm(x)))


def _is_packable(backbone: nn.Module) -> bool:
    return type(backbone) is VisionTransformer and all(
        type(block) is Block
        and type(block.attn) is Attention
        and block.attn.gate is None
        and not block.attn.attn_drop.p
        for block in backbone.blocks
    )


def _is_token_model(timm_name: str) -> bool:
    return timm.model_entrypoint(timm_name).__module__.rpartition(".")[2] in _TOKEN_MODELS


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """(timm name, arguments) of a timm model or of a size of ours."""
    if name in OUR_SIZES:
        return "vit_tiny_patch16_224", dict(OUR_SIZES[name])
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OUR_SIZES, *timm.list_models()], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list names with timm.list_models('vit_*')."
        raise UserError(f"model.encoder={name} is neither a timm {timm.__version__} model nor a size of ours; {hint}")
    return name, {}
