"""What weight decay applies to: timm's own lists, and what common sense adds to them."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import small_config
from timm.optim import param_groups_weight_decay
from torch import nn

from lejepa_scale.config import validate
from lejepa_scale.engine.optim import adamw, set_hyperparameters, split
from lejepa_scale.model import build


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


# A model, and what of it must not decay although it has two dimensions or more.
EXCEPTED = {
    "swin_tiny_patch4_window7_224": "relative_position_bias_table",
    "swinv2_tiny_window8_256": "logit_scale",
    "mvitv2_tiny": "rel_pos_h",
    "samvit_base_patch16": "rel_pos_w",
    "deit_tiny_distilled_patch16_224": "dist_token",
    "levit_128s": "attention_biases",
    "eva02_tiny_patch14_224": "cls_token",
    "vit_small_patch16_rope_mixed_224": "freqs",
    "xcit_nano_12_p16_224": "temperature",
    "resmlp_12_224": "alpha",
    "fastvit_t8": "gamma",
    "dm_nfnet_f0": "gain",
    "efficientvim_m1": "alpha",
    "visformer_tiny": "pos_embed1",
    "resnet50_clip": "pos_embed",
    "botnet26t_256": "height_rel",
    "lambda_resnet26rpt_256": "pos_emb",
    "pit_ti_224": "pos_embed",
    "tnt_s_patch16_224": "pixel_pos",
    "coat_tiny": "cls_token3",
}


@pytest.mark.parametrize(("name", "leaf"), EXCEPTED.items())
def test_positions_tokens_and_scales_do_not_decay_and_nothing_that_timm_excepts(name: str, leaf: str) -> None:
    model = on_meta(name)
    decayed, others = split(model)
    excepted = [other for other in others if other.rpartition(".")[2] == leaf]
    assert excepted
    assert all(others[other].ndim > 1 for other in excepted)
    names = {id(p): found for found, p in model.named_parameters()}
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=listed)
    by_timm = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed.keys() <= by_timm
    beyond = {name for name in by_timm - decayed.keys() if "weight" in name.rpartition(".")[2]}
    assert all(others[name].numel() == others[name].shape[0] for name in beyond)  # scales of single channels


def test_matrices_of_every_kind_decay() -> None:
    """Linear maps, convolutions, an LSTM's and an attention's matrices; of an embedding table nothing."""
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "conv": nn.Conv2d(4, 4, 3, groups=4),
            "scale": nn.Conv2d(4, 4, 1, groups=4),
            "lstm": nn.LSTM(3, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(5, 4),
            "norm": nn.LayerNorm([4, 4]),
        }
    )
    model["linear"].bias.requires_grad_(False)
    decayed, others = split(model)
    weights = "linear.weight conv.weight lstm.weight_ih_l0 lstm.weight_hh_l0 attention.in_proj_weight"
    assert set(decayed) == {*weights.split(), "attention.out_proj.weight"}
    assert {"table.weight", "scale.weight", "norm.weight"} < others.keys()
    assert "linear.bias" not in decayed | others  # frozen


def test_what_a_part_lists_is_left_out_and_all_leaves_nothing_out() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def no_weight_decay(self) -> set[str]:
            return {"first.*"}

    model = nn.Sequential(nn.Linear(3, 3), Part())
    assert set(split(model).decayed) == {"0.weight", "1.second.weight"}
    assert split(model, everything=True).decayed.keys() == dict(model.named_parameters()).keys()
    assert not split(model, everything=True).others


@pytest.mark.parametrize("which", ["weights", "all"])
def test_an_update_shrinks_what_is_named_and_nothing_else(which: str) -> None:
    """Without gradients AdamW is decay alone: 1 - 0.5 x 0.1 of every number, or of the matrices'."""
    config = validate(small_config("unused", "unused", optim={"decay": which, "weight_decay": 0.1}))
    module = build(config)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
        torch.nn.init.ones_(parameter)
    optimizer = adamw(module, config.optim)
    set_hyperparameters(optimizer, 0.5, 0.1)
    optimizer.step()
    everything = dict(module.named_parameters())
    shrunk = {name for name, p in everything.items() if torch.equal(p, torch.full_like(p, 0.95))}
    left = {name for name, p in everything.items() if torch.equal(p, torch.ones_like(p))}
    assert shrunk == set(split(module).decayed if which == "weights" else everything)
    assert shrunk | left == set(everything)
