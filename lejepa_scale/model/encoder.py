"""A timm backbone fed with several resolutions at once. Vision transformers run all views in one packed pass through
their blocks; every other timm model runs once per resolution. Parameter names stay timm's."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, TypeVar

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.errors import UserError
from lejepa_scale.model import dropping, packed
from lejepa_scale.model.attention import Packing, choose_backend
from lejepa_scale.model.norm import synchronized

OUR_SIZES: dict[str, dict[str, Any]] = {
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=4, patch_size=8),
    "vit_micro": dict(embed_dim=192, depth=6, num_heads=3, patch_size=8),
}

_T = TypeVar("_T")
# What timm.create_model takes besides the model's own arguments: it would open files, unpickle or download.
_NOT_OPTIONS = {
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict",
}  # fmt: skip


class Encoder(nn.Module):
    """`encoder([x_1, x_2, ...])` with x_i [B_i, C, H_i, W_i] -> [B_i, E] pooled features, one tensor per input.

    name: any timm model, or a size of ours (vit_nano, vit_micro). image_size is the side that tables of positions are made
    for; vision transformers interpolate them for others, and what else a model can process sizes.py finds out. `channels` is
    C. `drop_path`
    is the stochastic depth of the last block, rates growing linearly from the first one's 0, or with `drop_path_uniform`
    that of all. `patch_drop` are the shares of an image's patches that training leaves out: of the first input's images, of
    the second's, and so on (0 where none is given), drawn anew for each image and forward pass. `head_dim` is the width E of
    a linear layer after the pooling (timm's classifier; E is otherwise the width of what is pooled). `attention` picks the
    packed backend ("auto" measures).
    Raises UserError for an unknown name or arguments that timm refuses.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 224,
        channels: int = 3,
        patch_size: int | None = None,
        head_dim: int | None = None,
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        patch_drop: Sequence[float] = (),
        attention: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm_name, arguments = _resolve(name)
        if patch_size is not None:
            arguments["patch_size"] = patch_size
        if drop_path:
            arguments["drop_path_rate"] = drop_path
        if channels != 3:
            arguments["in_chans"] = channels
        if of_timm := sorted(_NOT_OPTIONS & {*(options or {})}):
            raise UserError(
                f"model.options.{of_timm[0]}: weights come from model.init_from, not out of timm's own loader."
            )
        arguments |= {"num_classes": head_dim or 0, **(options or {})}
        if arguments["num_classes"] != (head_dim or 0):
            raise UserError(
                "model.options.num_classes is set by model.head_dim: the width of a layer after the pooling."
            )
        if arguments.get("in_chans", 3) != channels:
            raise UserError("model.options.in_chans is set by data.channels: the bands of every image.")
        try:
            backbone, arguments = _created(timm_name, {"img_size": image_size, "dynamic_img_size": True}, arguments)
        except Exception as error:  # whatever timm's constructors make of arguments that do not go together
            raise UserError(
                f"model.encoder={name}: timm refuses these arguments: {str(error) or type(error).__name__}"
            ) from error
        _freeze(backbone)
        self.timm_arguments = {"model_name": timm_name, **arguments}  # rebuilds the backbone
        self.name, self.channels, self.embed_dim = name, channels, head_dim or int(backbone.head_hidden_size)
        self.attention, self.patch_drop = attention, tuple(patch_drop)
        self.packed = packed.packable(backbone)
        if self.packed:
            for i, block in enumerate(backbone.blocks):
                backbone.blocks[i] = packed.PackedBlock(block, drop_path if drop_path_uniform else None)
        elif drop_path_uniform and drop_path:
            raise UserError(f"model.drop_path_uniform is for vision transformers; {name} has rates of its own.")
        elif any(patch_drop):
            raise UserError(
                f"model.patch_drop={', '.join(f'{share:g}' for share in patch_drop)} leaves patches out before the blocks "
                f"of a vision transformer, and {name} has none that are known here: set model.patch_drop.global=0 and "
                "model.patch_drop.local=0."
            )
        self.backbone: Any = synchronized(backbone)

    @property
    def patch_size(self) -> int | None:
        """Pixels per token side, of which an image's side is a multiple; None for models without patches that lie side by
        side, or with patches that are not square."""
        embed: Any = getattr(self.backbone, "patch_embed", None)
        if not hasattr(embed, "feat_ratio"):  # some networks call the kernel of their first convolution patch_size
            return None
        sides = set(embed.feat_ratio(as_scalar=False))  # of a hybrid with what its network takes away before
        return sides.pop() if len(sides) == 1 else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated units that an engine shards one by one; empty where the backbone has none."""
        return list(getattr(self.backbone, "blocks", []))

    def forward(self, images: Sequence[Float[Tensor, "_b c _h _w"]]) -> list[Float[Tensor, "_b e"]]:
        """Pooled features of every resolution, in the order given."""
        if not self.packed:
            return [self.backbone(x.contiguous(memory_format=torch.channels_last)) for x in images]
        shares = self.patch_drop if self.training else ()
        return [self.backbone.forward_head(tokens) for tokens in self._packed_tokens(images, shares)]

    def patch_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rows columns e"]:
        """Normalized features of all patches, or of the last feature map, in their place: as wide as the blocks or the map,
        which some models' heads widen to `embed_dim`."""
        vit = self.backbone
        if self.packed:
            patches = self._packed_tokens([images])[0][:, vit.num_prefix_tokens :]
            return rearrange(patches, "b (h w) e -> b h w e", h=vit.patch_embed.dynamic_feat_size(images.shape[-2:])[0])
        settings = {"indices": 1, "intermediates_only": True}
        try:
            return vit.forward_intermediates(images, norm=True, **settings)[-1].movedim(1, -1)
        except AssertionError:  # networks that have no normalization after their last map say so
            return vit.forward_intermediates(images, **settings)[-1].movedim(1, -1)

    def packing(self, images: Sequence[tuple[int, int]]) -> Packing:
        """The row of tokens that (images, side in pixels) of every resolution are laid in, in training."""
        prefix, grid = self.backbone.num_prefix_tokens, self.backbone.patch_embed.dynamic_feat_size
        each = _with_shares(images, self.patch_drop)
        return Packing(
            tuple((n, prefix + dropping.staying(prod(grid((side, side))), share)) for (n, side), share in each)
        )

    def backend(self, packing: Packing, device: torch.device, dtype: torch.dtype, *, traced: bool = False) -> str:
        """The attention backend for tokens of `dtype`; measured where `attention` is auto and there is a choice. traced: in
        blocks that are compiled. Raises UserError where the one asked for cannot run here."""
        attn = self.backbone.blocks[0].attn
        return choose_backend(
            self.attention,
            packing,
            heads=attn.num_heads,
            head_dim=attn.head_dim,
            device=device,
            dtype=dtype,
            traced=traced,
        )

    def _packed_tokens(
        self, images: Sequence[Float[Tensor, "_b c _h _w"]], shares: Sequence[float] = ()
    ) -> list[Float[Tensor, "_b _l e"]]:
        """Embed each resolution, without a share of its patches, run the blocks once over all tokens, split again."""
        vit = self.backbone
        each = _with_shares(images, shares)
        embedded, ropes = zip(*(packed.embed(vit, x, share) for x, share in each), strict=True)
        packing = Packing(tuple((x.shape[0], x.shape[1]) for x in embedded))
        tokens = torch.cat([x.flatten(0, 1) for x in embedded])  # [T, E]
        device, dtype = tokens.device, tokens.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        backend = self.backend(packing, device, dtype)
        for block, row in zip(vit.blocks, packed.rows(list(vit.blocks), packing, ropes, device, backend), strict=True):
            tokens = block(tokens, row)
        return packing.split(vit.norm(tokens))


def _with_shares(inputs: Sequence[_T], shares: Sequence[float]) -> Iterator[tuple[_T, float]]:
    """Every input with its share of patches to leave out: 0 where none is given."""
    return zip(inputs, [*shares, *[0.0] * len(inputs)], strict=False)


def _created(name: str, sized: dict[str, Any], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """timm's model with those of `sized` that its class takes, and all that it was given. `arguments` come first."""
    while True:
        given = sized | arguments
        try:
            return timm.create_model(name, pretrained=False, **given), given
        except TypeError as error:
            refused = [key for key in sized.keys() - arguments if f"'{key}'" in str(error)]
            if "unexpected keyword argument" not in str(error) or not refused:
                raise
            sized = {key: value for key, value in sized.items() if key not in refused}


def _freeze(backbone: nn.Module) -> None:
    """Parameters that timm does not train become buffers of the same names: engines train every parameter there is."""
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """(timm name, arguments) of a timm model or of a size of ours."""
    if name in OUR_SIZES:
        return "vit_tiny_patch16_224", dict(OUR_SIZES[name])
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OUR_SIZES, *timm.list_models()], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "list names with timm.list_models('vit_*')."
        raise UserError(f"model.encoder={name} is neither a timm {timm.__version__} model nor a size of ours; {hint}")
    return name, {}
