"""From a configuration to a run that stands at its next step, everything done once: the model is checked without memory
before anything starts, rank 0 fetches and indexes the shards and reads the newest checkpoint, every rank gets its part."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from lejepa_scale.checkpoint import CanonicalState, Progress, Saved, Store, pretrained, restore, restore_average, spread
from lejepa_scale.checkpoint.encoder import PREFIX
from lejepa_scale.checkpoint.saved import CONFIG, not_finite
from lejepa_scale.config import BatchPlan, Config, check_world, recorded
from lejepa_scale.data import Loader, Mixture, open_mixture
from lejepa_scale.data.audit.keylog import KeyLog
from lejepa_scale.data.index.classes import MOST
from lejepa_scale.engine import Average, Engine, Factory, build_engine
from lejepa_scale.engine.optim import expect_matrices
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, LeJEPA, build, check
from lejepa_scale.model.attention import Packing
from lejepa_scale.parallel import collectives, launch, process_group
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.run import Run

logger = logging.getLogger(__name__)


def check_everything(config: Config) -> tuple[BatchPlan, LeJEPA]:
    """What can be wrong before a process group or a download starts; the batch plan, and the module on the meta device.
    Raises UserError, on every rank alike."""
    try:
        plan, shapes = check_world(config, launch.ranks()), check(config)
        if config.optim.name == "muon":
            expect_matrices(shapes)
        return plan, shapes
    except UserError as error:
        error.everywhere = True
        raise


def open_together(config: Config) -> Mixture:
    """The indexed sources: rank 0 indexes what has no index, the others read it. Raises UserError, also for names in
    train.skip_samples that are no samples."""
    collectives.on_rank_zero(lambda: open_mixture(config.data).expect(config.train.skip_samples), "indexing the shards")
    return collectives.everywhere(lambda: open_mixture(config.data, build=False), "reading the index")


def start_engine(
    config: Config,
    plan: BatchPlan,
    device: torch.device,
    saved: Saved | None = None,
    *,
    state: CanonicalState | None = None,
    begin: Mapping[str, Tensor] | None = None,
    factory: Factory | None = None,
    shapes: LeJEPA | None = None,
) -> Engine:
    """An engine at a checkpoint, of which every rank reads its part, or, for a new run, at the seed's weights: the same for
    every engine and number of ranks, drawn once on rank 0's CPU and spread. Raises UserError.

    state: rank 0's, in place of the seed's weights. begin: what `first_weights` gave; takes the place of the seed's
    weights. factory: builds the module in place of the configuration. shapes: the module on the meta device, where it
    is at hand.
    """
    factory = factory or (lambda: build(config))
    engine = build_engine(config, plan, factory, device, shapes)
    encoder = engine.module.encoder
    if encoder.packed and device.type == "cuda":  # one rank measures: each for itself would choose by noise
        chosen = collectives.on_rank_zero(lambda: attention_of(config, plan, encoder, device), "measuring attention")
        encoder.attention = chosen
        if shapes is not None:
            shapes.encoder.attention = chosen
    if saved is not None:
        restore(saved, engine)
        return engine
    held = [state]

    def draw() -> None:
        if held[0] is not None:
            return
        first = initial_state(config.run.seed, factory)
        first.model |= begin or {}
        if fault := not_finite(first.model.items()):
            raise UserError(
                f"model.encoder={config.model.encoder} begins with values that are no numbers ({fault}), which no "
                "checkpoint may hold. Choose another model.encoder."
            )
        held[0] = first

    collectives.on_rank_zero(draw, "drawing the first weights")
    spread(held[0], engine)
    return engine


def row_of(config: Config, plan: BatchPlan, encoder: Encoder) -> Packing:
    """The row of tokens of a rank's micro-batch."""
    views = config.data.views
    groups = [(group.count * plan.micro_batch, group.size) for group in (views.global_, views.local) if group.count]
    return encoder.packing(groups)


def attention_of(config: Config, plan: BatchPlan, encoder: Encoder, device: torch.device) -> str:
    """The backend for a rank's micro-batch; measured where there is a choice, on this rank alone. Raises UserError."""
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    return encoder.backend(row_of(config, plan, encoder), device, dtype, traced=config.engine.compile)


def initial_state(seed: int, factory: Factory) -> CanonicalState:
    """The weights that a new run begins with."""
    torch.manual_seed(seed)
    return CanonicalState(dict(factory().state_dict()))


def first_weights(config: Config, store: Store, shapes: LeJEPA) -> dict[str, Tensor]:
    """The tensors that `model.init_from` gives a new run, under the module's names, on rank 0; empty on other ranks, without
    that key, and for a run that has a checkpoint, where nothing is opened. Every rank calls. Raises UserError.

    shapes: the module on the meta device.
    """
    settings, held = config.model.init_from, dict[str, Tensor]()
    if settings is None:
        return held

    def read() -> None:
        if (latest := store.latest()) is not None or config.run.resume not in ("auto", "never"):
            logger.info("model.init_from is not used: the run goes on from %s.", latest or config.run.resume)
            return
        loaded = pretrained.load(settings, shapes.encoder)
        held.update({f"{PREFIX}{name}": tensor for name, tensor in loaded.weights.items()})
        logger.info(loaded.line)
        if notice := pretrained.of_other_inputs(loaded, config.data):
            logger.warning(notice)

    collectives.on_rank_zero(read, "reading model.init_from")
    return held


@contextmanager
def started(
    config: Config, plan: BatchPlan, mixture: Mixture, engine: Engine, probe: OnlineProbe | None, progress: Progress
) -> Iterator[Run]:
    """A run at its next step; its loader and engine are let go of at the end, whatever ends it."""
    rank, device = process_group.rank(), engine.device
    seed, pin = config.run.seed, device.type == "cuda"
    key_log = None
    if config.data.log_keys:
        header = mixture.key_log_header(config.data, seed=seed, global_batch=plan.global_batch, decoded=True)
        key_log = KeyLog(config.run.dir, rank, header)
    loader = Loader(
        mixture,
        config.data,
        plan,
        seed=seed,
        rank=rank,
        first_step=progress.step,
        pin_memory=pin,
        timeout=50.0 * config.engine.timeout_minutes,  # an error of ours, before the other ranks give up on this one
        skip=config.train.skip_samples,
    )
    with closing(engine), loader:
        feed = Feed(iter(loader), plan, device, key_log, beside=views_ahead(config, plan))
        yield Run(config, plan, device, engine, feed, progress, probe)
        feed.close()


def views_ahead(config: Config, plan: BatchPlan) -> bool:
    """Whether the next views may be made while the device trains: an exact objective holds a step of batches, as bytes."""
    return plan.accumulation == 1 or config.objective.accumulation != "exact"


def start_average(config: Config, engine: Engine, saved: Saved | None) -> Average | None:
    """The average of the weights, as a checkpoint holds it or about to begin; None where the run keeps none. Every rank
    calls. Raises UserError where that of the checkpoint cannot be read."""
    settings, kept = config.average, "none"
    if saved is not None and saved.averaged:
        origin = str(saved.path / CONFIG)
        kept = recorded(saved.config_text(), origin).average.kind
    if kept not in ("none", settings.kind):
        logger.info("average.kind is %s, not %s as before: that average is given up.", settings.kind, kept)
    if settings.kind == "none":
        return None
    average = Average(engine, settings.kind, settings.decay, settings.every)
    if saved is not None and kept == settings.kind:
        restore_average(saved, average)
    return average


def start_probe(config: Config, engine: Engine, classes: int, state: dict[str, Tensor]) -> OnlineProbe | None:
    """The online probe, at `state` where it is not empty; None where it is off or there are no classes to tell apart."""
    if not config.probe.enabled or classes < 2:
        return None
    if classes > MOST:
        logger.info("the online probe is off: %d classes are more than the %d that it is for.", classes, MOST)
        return None
    width = engine.module.encoder.embed_dim
    probe = OnlineProbe(width, classes, config.probe.lr, config.run.seed, engine.device)
    if state:
        probe.load_state_dict(state)
    return probe
