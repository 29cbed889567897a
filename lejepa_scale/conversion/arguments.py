"""What a file may say of how its encoder is built: shapes and choices of timm's constructors, no paths or downloads."""

from __future__ import annotations

from typing import Any

_LARGEST = 1 << 16  # of a number: a width or a depth beyond it is of no model, and would ask for memory first
_ALLOWED = {
    "img_size", "dynamic_img_size", "dynamic_img_pad", "patch_size", "in_chans",
    "num_classes", "global_pool", "embed_dim", "depth", "depths",
    "dims", "num_heads", "num_kv_heads", "mlp_ratio", "qkv_bias",
    "qk_norm", "proj_bias", "init_values", "class_token", "pos_embed",
    "no_embed_class", "reg_tokens", "num_reg_tokens", "pre_norm", "final_norm",
    "fc_norm", "drop_path_rate", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "swiglu_mlp", "swiglu_align_to", "scale_mlp",
    "scale_attn_inner", "use_abs_pos_emb", "use_rot_pos_emb", "rope_type", "rope_temperature",
    "rope_grid_offset", "rope_grid_indexing", "rope_rotate_half", "use_pre_transformer_norm", "use_post_transformer_norm",
    "use_fc_norm", "ref_feat_shape", "attn_type", "qkv_fused", "output_stride",
    "stem_width", "stem_type", "stem_rep", "width_factor", "depth_factor",
    "kernel_sizes", "ls_init_value", "window_size", "strict_img_size", "always_partition",
    "head_init_scale", "head_norm_first", "conv_mlp", "use_grn", "mlp_layer",
    "norm_layer", "act_layer", "weight_init",
}  # fmt: skip


def may_be_set(argument: str, value: Any) -> bool:
    """Whether a file may hand this to a constructor."""
    return argument in _ALLOWED and _plain(value)


def _plain(value: Any, depth: int = 0) -> bool:
    """Numbers, words and lists of them. A word names a layer of timm's at most: nothing that is looked up on a disk."""
    if isinstance(value, list | tuple):
        return depth < 2 and len(value) < 1000 and all(_plain(item, depth + 1) for item in value)
    if isinstance(value, str):
        return value.replace("_", "").isalnum()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) < _LARGEST
    return value is None or isinstance(value, bool)
