"""Whether an encoder can be trained on the views, asked of the model itself on the meta device, and which sides it can
process where it cannot. Refuses in one paragraph what would otherwise fail at the first step or the first save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.model.encoder import Encoder

GLOBAL, LOCAL = "data.views.global.size", "data.views.local.size"
_STRIDES = 32, 14  # of most networks, of DINOv2: sides that are tried are their multiples
_REACH = 3  # multiples that are tried on either side of the one asked for
_LEAST = 0.7  # of the side asked for: a model is worth little at less


def check_sizes(encoder: Encoder, sides: Mapping[str, int], rebuilt: Callable[[int], Encoder]) -> None:
    """Refuse views that this encoder, which has no memory, cannot process together: [2, C, side, side] -> [2, E] each, and a
    gradient for every parameter.

    sides: pixels by the configuration key that sets them, the one that the encoder was built for first. rebuilt: the encoder
    for another image size. Raises UserError: with a side that will do and its key, or for a model that no side helps.
    """
    patch, embed = encoder.patch_size, getattr(encoder.backbone, "patch_embed", None)
    for key, side in sides.items():
        if patch and side % patch and not getattr(embed, "dynamic_img_pad", False):
            near = max(1, round(side / patch)) * patch
            raise UserError(
                f"views of {side} px cannot be cut into patches of {patch} px ({encoder.name}); use {near} px: {key}={near}."
            )
    if (fault := _fault(encoder, list(dict.fromkeys(sides.values())))) is None:
        return
    for key, side in sides.items():
        if own := _fault(encoder, [side]):
            raise UserError(
                f"model.encoder={encoder.name} cannot process views of {side} px: {own}. "
                + _advice(encoder, key, side, rebuilt)
            )
    raise UserError(f"model.encoder={encoder.name} cannot process views of all these sides: {fault}.")


def _fault(encoder: Encoder, sides: Sequence[int]) -> str | None:
    """What ends a step on these sides. Raises UserError for what does so on all sides."""
    parameters = dict(encoder.named_parameters())
    names = [name for name, _ in encoder.named_parameters(remove_duplicate=False)]
    if shared := [name for name in names if name not in parameters]:
        raise _unfit(
            encoder, f"{len(shared)} of its parameters have two names ({shared[0]}), which no engine here cuts or saves"
        )
    try:
        device = next(encoder.parameters()).device
        features = encoder([torch.empty(2, encoder.channels, side, side, device=device) for side in sides])
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in features]
        if wrong := [shape for shape in shapes if shape != (2, encoder.embed_dim)]:
            shape = f"its features of 2 images are {wrong[0]}, not (2, {encoder.embed_dim})"
            return f"{shape}: model.options.global_pool=avg pools them where a model can"
        total = torch.stack([x.sum() for x in features]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    except Exception as error:  # whatever a model's code says of shapes that do not fit
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if unused := [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]:
        raise _unfit(encoder, f"{len(unused)} of its parameters have no part in its features ({unused[0]})")
    return None


def _unfit(encoder: Encoder, reason: str) -> UserError:
    return UserError(f"model.encoder={encoder.name} cannot be trained here: {reason}. Choose another model.encoder.")


def _advice(encoder: Encoder, key: str, side: int, rebuilt: Callable[[int], Encoder]) -> str:
    """The nearest side that will do. A global view's is the one that the encoder is built for."""
    for near in _near(encoder, side):
        try:
            other = encoder
            if key != LOCAL:
                with torch.device("meta"):
                    other = rebuilt(near)
        except UserError:
            continue
        if _fault(other, [near]) is None:
            return f"{near} px will do: set {key}={near}."
    others = " or data.views.local.count=0" if key == LOCAL else ""
    return f"No side near it will do either: choose another model.encoder{others}."


def _near(encoder: Encoder, side: int) -> Iterator[int]:
    """Sides worth a try: multiples of the patches or of the usual strides, the nearest first, then what the encoder is built
    for and what timm trained it on."""
    patch, tried = encoder.patch_size, {side}
    known = [
        encoder.timm_arguments.get("img_size", side),
        encoder.backbone.pretrained_cfg.get("input_size", (side,))[-1],
    ]
    for stride in (patch * max(1, _STRIDES[0] // patch),) if patch else _STRIDES:
        first = max(1, side // stride - _REACH + 1)
        multiples = {stride * i for i in range(first, first + 2 * _REACH)} - tried
        yield from sorted((m for m in multiples if m >= _LEAST * side), key=lambda near: (abs(near - side), near))
        tried |= multiples
    yield from (near for near in dict.fromkeys(known) if near not in tried)
