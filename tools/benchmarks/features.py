"""What can be switched in a training step, and the forms that each switch has: the base is the configuration as it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import baselines
from lejepa_scale.config import Config
from lejepa_scale.engine import Engine
from lejepa_scale.errors import UserError
from lejepa_scale.model.attention import BACKENDS


@dataclass(frozen=True)
class Form:
    """One way of running the step: overrides of the configuration, or a change to the built engine."""

    name: str
    overrides: tuple[str, ...] = ()
    alter: Callable[[Engine], None] | None = None
    equal: bool = True  # the same loss and gradient as the base's, but for rounding


def forms(feature: str, config: Config) -> tuple[str, list[Form]]:
    """(name of the base's form, the others); raises UserError where the configuration leaves nothing to compare."""
    if feature not in FEATURES:
        near = difflib.get_close_matches(feature, FEATURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FEATURES)}."
        raise UserError(f"--compare {feature} is no feature of a step; {hint}")
    return FEATURES[feature](config)


def _packed(config: Config) -> tuple[str, list[Form]]:
    whole = not _left_out(config)
    equal = not config.model.drop_path  # other calls, other random numbers
    counts = [g.count for g in (config.data.views.global_, config.data.views.local) if g.count]
    return "one forward of all views", [
        Form("one forward per view group", alter=baselines.forward_per_group, equal=equal),
        Form("one forward per view", alter=partial(baselines.forward_per_view, counts=counts), equal=equal and whole),
    ]


def _attention(config: Config) -> tuple[str, list[Form]]:
    names = [name for name in BACKENDS if name != config.model.attention]
    return config.model.attention, [Form(name, (f"model.attention={name}",)) for name in names]


def _stochastic_depth(config: Config) -> tuple[str, list[Form]]:
    if not config.model.drop_path:
        raise UserError("--compare stochastic-depth: nothing is dropped at model.drop_path=0; add model.drop_path=0.3.")
    return f"batch subsets, drop_path {config.model.drop_path:g}", [
        Form("masked: all computed, some zeroed", alter=baselines.masked_depth, equal=False),
        Form("nothing dropped", ("model.drop_path=0", "model.drop_path_uniform=false"), equal=False),
    ]


def _patch_drop(config: Config) -> tuple[str, list[Form]]:
    if not _left_out(config):
        raise UserError(
            "--compare patch-drop: no patches are left out at model.patch_drop.global=0 model.patch_drop.local=0; add "
            "model.patch_drop.global=0.3."
        )
    drop = config.model.patch_drop
    return f"patches left out, global {drop.global_:g} local {drop.local:g}", [
        Form("all patches", ("model.patch_drop.global=0", "model.patch_drop.local=0"), equal=False),
    ]


def _left_out(config: Config) -> bool:
    drop = config.model.patch_drop
    return bool(drop.global_ or drop.local)


def _checkpointing(config: Config) -> tuple[str, list[Form]]:
    kept = config.engine.activation_checkpointing
    others = [
        Form(kind, (f"engine.activation_checkpointing={kind}", *_without_budget(config)))
        for kind in ("none", "full", "selective")
        if kind != kept
    ]
    if config.engine.compile and kept != "budget":
        others.append(Form("budget", ("engine.activation_checkpointing=budget",), equal=not config.model.drop_path))
    return kept, others


def _without_budget(config: Config) -> tuple[str, ...]:
    """The default again, since no other kind of checkpointing takes one."""
    return (f"engine.activation_budget={type(config.engine)().activation_budget}",)


def _compile(config: Config) -> tuple[str, list[Form]]:
    names = {True: "compiled blocks", False: "eager"}
    on = config.engine.compile
    overrides = [f"engine.compile={not on}"]
    if on and config.engine.activation_checkpointing == "budget":
        overrides += ["engine.activation_checkpointing=none", *_without_budget(config)]
    return names[on], [Form(names[not on], tuple(overrides), equal=not config.model.drop_path)]


def _optimizer(config: Config) -> tuple[str, list[Form]]:
    return "fused AdamW", [
        Form("foreach AdamW", alter=partial(baselines.unfused_adamw, foreach=True)),
        Form("for-loop AdamW", alter=partial(baselines.unfused_adamw, foreach=False)),
    ]


def _prefetch(config: Config) -> tuple[str, list[Form]]:
    if config.engine.name not in ("fsdp", "zero3"):
        raise UserError(f"--compare prefetch: engine.prefetch is for fsdp and zero3, not {config.engine.name}.")
    depth = config.engine.prefetch
    return f"{depth} blocks ahead", [
        Form(f"{n} blocks ahead", (f"engine.prefetch={n}",)) for n in (0, 1, 2) if n != depth
    ]


def _float8(config: Config) -> tuple[str, list[Form]]:
    names = {True: "float8", False: config.engine.precision}
    on = config.engine.fp8
    return names[on], [Form(names[not on], (f"engine.fp8={not on}",), equal=False)]


def _precision(config: Config) -> tuple[str, list[Form]]:
    here = config.engine.precision
    other = {"fp32": "bf16", "bf16": "fp32"}[here]
    return here, [Form(other, (f"engine.precision={other}",), equal=False)]


def _offload(config: Config) -> tuple[str, list[Form]]:
    names = {True: "states on the host", False: "states on the device"}
    on = config.engine.cpu_offload
    return names[on], [Form(names[not on], (f"engine.cpu_offload={not on}",))]


def _engine(config: Config) -> tuple[str, list[Form]]:
    names = ["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
    return config.engine.name, [Form(n, (f"engine.name={n}",)) for n in names if n != config.engine.name]


FEATURES: dict[str, Callable[[Config], tuple[str, list[Form]]]] = {
    "packed": _packed,
    "attention": _attention,
    "stochastic-depth": _stochastic_depth,
    "patch-drop": _patch_drop,
    "checkpointing": _checkpointing,
    "compile": _compile,
    "optimizer": _optimizer,
    "prefetch": _prefetch,
    "float8": _float8,
    "precision": _precision,
    "offload": _offload,
    "engine": _engine,
}


def compute_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
