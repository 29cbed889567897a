"""What keys make wrong together: contradictions, and keys that are set although the choice of another leaves them without
effect. Pure functions of a configuration; refuses to know how many ranks there are (batches.py does)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lejepa_scale.config import schema  # whose Config calls these checks: its names are looked up when they are needed
from lejepa_scale.config.keys import as_text, keys_of, values_of


@dataclass(frozen=True)
class Use:
    """When keys have an effect. A section stands for all of its keys."""

    keys: tuple[str, ...]
    condition: str
    holds: Callable[[schema.Config], bool]
    decided_by: str | None = None  # the key whose value is named in the error


def _engine(*names: str) -> tuple[str, Callable[[schema.Config], bool], str]:
    return f"engine.name is {' or '.join(names)}", lambda config: config.engine.name in names, "engine.name"


_JITTER = tuple(f"data.augment.{name}" for name in ("brightness", "contrast", "saturation", "hue"))
# Where a key has two conditions the outer one comes first, since it alone is named.
USES = (
    Use(("engine.shard_degree",), *_engine("fsdp")),
    Use(("engine.prefetch",), *_engine("fsdp", "zero3")),
    Use(("engine.cpu_offload",), *_engine("fsdp", "zero1", "zero2", "zero3")),
    Use(
        ("engine.activation_budget",),
        "engine.activation_checkpointing is budget",
        lambda config: config.engine.activation_checkpointing == "budget",
        "engine.activation_checkpointing",
    ),
    Use(("engine.fp8_recipe",), "engine.fp8 is true", lambda config: config.engine.fp8, "engine.fp8"),
    Use(("data.prefetch",), "data.workers is not 0", lambda config: config.data.workers > 0, "data.workers"),
    Use(
        ("data.cache_dir", "data.retries"),
        "data.shards names a URL or a pipe: command",
        lambda config: any(config.data.remote_shards()),
    ),
    Use(
        ("data.read_timeout",),
        "data.shards names a URL or a pipe: command, or data.workers is not 0",
        lambda config: config.data.workers > 0 or any(config.data.remote_shards()),
    ),
    Use(
        ("data.cache_gb",),
        "data.shards names a pipe: command, or a URL with data.cache_dir set",
        lambda config: any(config.data.cache_dir or s.startswith("pipe:") for s in config.data.remote_shards()),
    ),
    Use(_JITTER, "data.augment.jitter is not 0", lambda config: config.data.augment.jitter > 0, "data.augment.jitter"),
    Use(
        ("model.drop_path_uniform",),
        "model.drop_path is not 0",
        lambda config: config.model.drop_path > 0,
        "model.drop_path",
    ),
    Use(
        ("model.patch_drop.local",),
        "data.views.local.count is not 0",
        lambda config: config.data.views.local.count > 0,
        "data.views.local.count",
    ),
    Use(
        ("model.projector.hidden", "model.projector.activation"),
        "model.projector.layers is more than 1",
        lambda config: config.model.projector.layers > 1,
        "model.projector.layers",
    ),
    Use(
        ("objective.sigreg",),
        "objective.regularizer is sigreg",
        lambda config: config.objective.regularizer == "sigreg",
        "objective.regularizer",
    ),
    Use(
        ("objective.sigreg.tf32",),
        "objective.sigreg.backend is auto, fused or triton",
        lambda config: config.objective.sigreg.backend not in ("reference", "native"),
        "objective.sigreg.backend",
    ),
    Use(
        ("objective.weak_sigreg",),
        "objective.regularizer is weak_sigreg",
        lambda config: config.objective.regularizer == "weak_sigreg",
        "objective.regularizer",
    ),
    Use(
        ("objective.visreg.num_slices",),
        "objective.regularizer is visreg",
        lambda config: config.objective.regularizer == "visreg",
        "objective.regularizer",
    ),
    Use(
        ("objective.sigreg.reference_n",),
        "objective.sigreg.scale is reference",
        lambda config: config.objective.sigreg.scale == "reference",
        "objective.sigreg.scale",
    ),
    Use(
        ("log.wandb.project", "log.wandb.name"),
        "log.wandb.enabled is true",
        lambda config: config.log.wandb.enabled,
        "log.wandb.enabled",
    ),
    Use(
        ("optim.warmup_start_ratio",),
        "optim.warmup_steps is not 0",
        lambda config: config.optim.warmup_steps != 0,
        "optim.warmup_steps",
    ),
    Use(
        ("optim.decay",),
        "optim.weight_decay or optim.final_weight_decay is not 0",
        lambda config: bool(config.optim.weight_decay or config.optim.final_weight_decay),
        "optim.weight_decay",
    ),
    Use(("optim.muon",), "optim.name is muon", lambda config: config.optim.name == "muon", "optim.name"),
    Use(
        ("optim.cooldown_steps",),
        "optim.schedule is wsd",
        lambda config: config.optim.schedule == "wsd",
        "optim.schedule",
    ),
    Use(
        ("average.every", "average.start"),
        "average.kind is ema or swa",
        lambda config: config.average.kind != "none",
        "average.kind",
    ),
    Use(("average.decay",), "average.kind is ema", lambda config: config.average.kind == "ema", "average.kind"),
    Use(
        tuple(f"evaluation.{name}" for name in ("test", "train", "images", "view_images", "k", "time_share")),
        "evaluation.every is set",
        lambda config: config.evaluation.every is not None,
        "evaluation.every",
    ),
    Use(("probe.lr",), "probe.enabled is true", lambda config: config.probe.enabled, "probe.enabled"),
)


def ignored(config: schema.Config) -> Iterator[tuple[Use, list[str]]]:
    """What has no effect, with the keys of it that differ from their defaults. A default says nothing of what was meant:
    every dumped configuration has it in full, and a recipe may write it out for the reader."""
    values, defaults = dict(values_of(config)), {key.path: key.default for key in keys_of(type(config))}
    named: set[str] = set()
    for use in USES:
        if use.holds(config):
            continue
        found = [
            path
            for path, value in values.items()
            if any(path == key or path.startswith(f"{key}.") for key in use.keys)
            and value != defaults[path]
            and path not in named
        ]
        named.update(found)
        if found:
            yield use, found


def ignored_keys(config: schema.Config) -> list[str]:
    """One sentence for each condition that keys were set in spite of."""
    values, defaults = dict(values_of(config)), {key.path: key.default for key in keys_of(type(config))}
    faults = []
    for use, paths in ignored(config):
        have, them, plural = ("have", "them", "defaults") if len(paths) > 1 else ("has", "it", "default")
        shown = " and ".join(f"{path} = {as_text(values[path])}" for path in paths)
        here = f" with {use.decided_by} = {as_text(values[use.decided_by])}" if use.decided_by else ""
        reset = " ".join(f"{path}={as_text(defaults[path])}" for path in paths)
        faults.append(
            f"{shown} {have} no effect{here}, only where {use.condition}: leave {them} out, or set the {plural} again "
            f"({reset})"
        )
    return faults


def contradictions(config: schema.Config) -> list[str]:
    """One sentence for each pair of keys that cannot both hold."""
    return [
        fault
        for check in (
            _engine_options,
            _channels,
            _colours,
            _waiting,
            _accumulation,
            _scale,
            _held_out,
            _cooldown,
            _patches,
            _muon,
        )
        if (fault := check(config))
    ]


def _engine_options(config: schema.Config) -> str | None:
    engine = config.engine
    if engine.activation_checkpointing == "budget" and not engine.compile:
        return "engine.activation_checkpointing=budget is torch.compile's: set engine.compile=true too"
    if engine.compile and config.model.attention == "xformers":
        return (
            "engine.compile=true cannot look into xformers: each block would fall into pieces, and run as it is under "
            "recomputation. Use model.attention=varlen (the same kernel) or engine.compile=false"
        )
    if engine.fp8 and engine.precision != "bf16":
        return "engine.fp8 needs engine.precision=bf16, in which everything else is computed"
    return None


def _channels(config: schema.Config) -> str | None:
    data = config.data
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != data.channels:
            return (
                f"data.{name} has {len(values)} value(s) for data.channels = {data.channels}: `lejepa shards statistics` "
                "prints those of your shards"
            )
    for source in data.shards:
        if source.ranges is not None and len(source.ranges) not in (1, data.channels):
            return (
                f"the range of source {', '.join(source.shards)} has {len(source.ranges)} intervals: one is for all "
                f"channels, or one for each of data.channels = {data.channels}"
            )
    return None


def _colours(config: schema.Config) -> str | None:
    """What is defined for red, green and blue alone."""
    augment = config.data.augment
    jitter = {"saturation": augment.saturation, "hue": augment.hue} if augment.jitter else {}
    asked = [name for name, value in {**jitter, "grayscale": augment.grayscale}.items() if value]
    if config.data.channels == 3 or not asked:
        return None
    return (
        f"data.augment: {', '.join(asked)} need red, green and blue, which data.channels = {config.data.channels} does not "
        f"have: set {' '.join(f'data.augment.{name}=0' for name in asked)}"
    )


def _waiting(config: schema.Config) -> str | None:
    data, minutes = config.data, config.engine.timeout_minutes
    longest = 2 * (data.retries + 1) * data.read_timeout + 30 * data.retries
    if longest <= 60 * minutes or not data.remote_shards():
        return None
    return (
        f"data.retries = {data.retries} and data.read_timeout = {data.read_timeout:g} can keep a rank waiting for "
        f"{longest / 60:.1f} minutes, longer than the others wait for it: engine.timeout_minutes = {minutes:g}"
    )


def _accumulation(config: schema.Config) -> str | None:
    objective = config.objective
    estimator = objective.sigreg.estimator
    if objective.accumulation != "unbiased" or (objective.regularizer, estimator) == ("sigreg", "u"):
        return None
    return (
        "objective.accumulation=unbiased needs objective.regularizer=sigreg and objective.sigreg.estimator=u, not "
        f"{objective.regularizer} and {estimator}"
    )


def _scale(config: schema.Config) -> str | None:
    objective = config.objective
    if objective.regularizer != "visreg" or objective.visreg.weight != 0:
        return None
    return (
        "objective.visreg.weight = 0 leaves nothing that holds the embeddings' scale against the prediction, since "
        "the rest of objective.regularizer=visreg does not depend on it: leave the weight out (1), or give a positive one"
    )


def _held_out(config: schema.Config) -> str | None:
    if config.evaluation.every is None or config.evaluation.test:
        return None
    return (
        f"evaluation.every = {config.evaluation.every} needs evaluation.test, shards of images that are held out (labels "
        "are not needed)"
    )


def _cooldown(config: schema.Config) -> str | None:
    optim, steps = config.optim, config.train.steps
    if optim.schedule != "wsd" or optim.cooldown_steps is None:
        return None
    if not all(isinstance(value, int) for value in (steps, optim.warmup_steps, optim.cooldown_steps)):
        return None  # words, which durations.py looks at again as steps
    if optim.warmup_steps + optim.cooldown_steps <= steps:
        return None
    return (
        f"optim.warmup_steps = {optim.warmup_steps} and optim.cooldown_steps = {optim.cooldown_steps} are more than "
        f"train.steps = {steps}"
    )


def _patches(config: schema.Config) -> str | None:
    drop, theirs = config.model.patch_drop, config.model.options.get("patch_drop_rate")
    if not theirs or not (drop.global_ or drop.local):
        return None
    return (
        f"model.options.patch_drop_rate = {theirs} and model.patch_drop both leave patches out: keep model.patch_drop, "
        "which knows global from local views"
    )


def _muon(config: schema.Config) -> str | None:
    engine = config.engine.name
    if config.optim.name != "muon" or not engine.startswith("zero"):
        return None
    return (
        f"optim.name=muon works on whole matrices, of which the optimizer under engine.name={engine} sees flat pieces; "
        "DeepSpeed's own Muon computes something else. Use engine.name=fsdp, which shards as much as zero3, or "
        "optim.name=adamw"
    )
