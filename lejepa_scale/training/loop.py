"""The training loop, read from top to bottom: check, join, resume, then step after step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from lejepa_scale import seeds
from lejepa_scale.checkpoint import Progress, Store
from lejepa_scale.config import BatchPlan, Config, check_world, dump
from lejepa_scale.cost import peak_flops, step_flops
from lejepa_scale.data import Batch, Loader, ahead, open_mixture
from lejepa_scale.data.audit.keylog import KeyLog
from lejepa_scale.data.faults import Fault, append_to_quarantine
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.engine import Engine, build_engine
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.model import Replay, build, check
from lejepa_scale.parallel import collectives, launch, process_group
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.reporting import Means, Reporter
from lejepa_scale.training.resume import resume
from lejepa_scale.training.schedule import learning_rate
from lejepa_scale.training.summary import greeting


def train(config: Config) -> Path:
    """Run (or go on with) the training that `config` describes; the run directory.

    Called on every rank, under `python`, torchrun or the deepspeed launcher. Raises UserError.
    """
    # 1. Everything that can be wrong is found before a process group or a download starts.
    try:
        plan = check_world(config, launch.ranks())
        check(config)
    except UserError as error:
        error.everywhere = True
        raise

    # 2. Join the other ranks; rank 0 fetches and indexes shards and reads the newest checkpoint.
    device = process_group.join(timedelta(minutes=config.engine.timeout_minutes))
    collectives.on_rank_zero(lambda: open_mixture(config.data).num_samples)
    sources = open_mixture(config.data, build=False)
    store = Store(config.run.dir, config.checkpoint.keep)
    state, probe_state, progress = resume(config, store, sources)
    if progress.step >= config.train.steps:
        if process_group.rank() == 0:
            print(f"{config.run.dir} is trained to step {progress.step} already; raise train.steps to go on.")
        process_group.leave()
        return config.run.dir

    # 3. Model, data and probe, at the state of `progress`.
    engine = build_engine(config, plan, lambda: build(config), device, state)
    del state
    loader = Loader(
        sources,
        config.data,
        plan,
        seed=config.run.seed,
        rank=process_group.rank(),
        timeout=50.0 * config.engine.timeout_minutes,  # before the other ranks give up on this one
        first_step=progress.step,
        pin_memory=device.type == "cuda",
    )
    probe = _build_probe(config, engine, sources, device, probe_state)

    # 4. Steps.
    reporter = Reporter(config, progress.step, active=process_group.rank() == 0)
    reporter.info(greeting(config, plan, sources, engine, device, progress))
    run = _Run(config, plan, engine, probe, store, reporter, sources, progress, device)
    batches = iter(loader)
    if plan.accumulation == 1 or config.objective.accumulation != "exact":  # which holds a step's batches, as bytes
        batches = ahead(batches, device)
    with _StopSignal() as stop, closing(reporter), loader:
        run.steps(batches, stop)
    collectives.barrier()
    process_group.leave()
    return config.run.dir


class _Run:
    """The state of a running loop; `steps` is the loop."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        engine: Engine,
        probe: OnlineProbe | None,
        store: Store,
        reporter: Reporter,
        sources: Mixture,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.config, self.plan, self.engine, self.probe = config, plan, engine, probe
        self.store, self.reporter, self.device = store, reporter, device
        self.fingerprint = sources.fingerprint
        self.key_log: KeyLog | None = None
        if config.data.log_keys:
            header = sources.key_log_header(
                config.data, seed=config.run.seed, global_batch=config.train.global_batch, decoded=True
            )
            self.key_log = KeyLog(config.run.dir, process_group.rank(), header)
        self.nonfinite, self.skipped = progress.nonfinite, progress.skipped_images
        self.elapsed_before, self.started = progress.seconds, time.monotonic()
        self.first_step, self.waited = progress.step, 0.0
        peak = peak_flops(device)
        self.seconds_at_peak = step_flops(config, plan).total / peak if peak else None

    def steps(self, batches: Iterator[Batch], stop: _StopSignal) -> None:
        config, plan, reporter = self.config, self.plan, self.reporter
        means, window_start, window_steps, nonfinite_run = Means(), time.monotonic(), 0, 0
        hits = torch.zeros(2, dtype=torch.float64, device=self.device)
        for step in range(self.first_step, config.train.steps):
            # forward and backward, micro-batch by micro-batch
            keys: list[str] = []
            for micro, (batch, replay) in enumerate(self._micro_batches(batches, step)):
                keys += batch.keys
                seed_step(config.run.seed, step, micro)
                out = self.engine.forward(batch.augmented(self.device), step, replay)
                self.engine.backward(out["loss"] / plan.accumulation, micro == plan.accumulation - 1)
                means.add(loss=out["loss"], loss_prediction=out["prediction"], loss_sigreg=out["sigreg"])
                if self.probe is not None:
                    hits += self.probe.step(out["features"], batch.labels.to(self.device, non_blocking=True))

            # update; a non-finite step changes nothing on any rank
            lr = learning_rate(step, config.train.steps, config.optim)
            norm = self.engine.step(lr, config.optim.weight_decay)
            means.add(grad_norm=norm)
            window_steps += 1
            finite = bool(torch.isfinite(norm))
            nonfinite_run = 0 if finite else nonfinite_run + 1
            if not finite:
                self._note_nonfinite(step, nonfinite_run, keys)

            # report
            done = step + 1
            reporter.advance()
            last = done == config.train.steps
            if done % config.log.every == 0 or last:
                seconds = time.monotonic() - window_start
                record = {"step": done, **means.read(), "lr": lr, "samples": done * config.train.global_batch}
                record["loss_normalized"] = record["loss"] / config.objective.lambda_**0.4
                record["images_per_second"] = window_steps * config.train.global_batch / seconds
                record["data_wait_fraction"] = self.waited / seconds
                record["effective_rank"] = effective_rank(out["embeddings"])
                record |= {"nonfinite_steps": self.nonfinite, "skipped_images": self.skipped}
                if self.seconds_at_peak is not None:
                    record["mfu"] = window_steps * self.seconds_at_peak / seconds
                if self.probe is not None:
                    record["probe_accuracy"] = float(hits[0] / hits[1])
                    hits.zero_()
                reporter.log(record)
                self.waited, window_start, window_steps = 0.0, time.monotonic(), 0

            # save, and stop where asked to
            stopping = collectives.any_rank(stop.asked, torch.device("cpu")) and not last
            if done % config.checkpoint.every == 0 or last or stopping:
                path = self._save(done)
                if stopping:
                    reporter.info(
                        f"stopped by a signal after step {done}; saved {path}. The same command goes on from here."
                    )
                    return

    def _micro_batches(self, batches: Iterator[Batch], step: int) -> Iterator[tuple[Batch, Replay | None]]:
        """A step's micro-batches. For an exact objective all of them are read and encoded without a graph first, with the
        random numbers that the second pass will draw again."""
        count = self.plan.accumulation
        if count == 1 or self.config.objective.accumulation != "exact":
            for _ in range(count):
                yield self._next(batches, step), None
            return
        held = [self._next(batches, step) for _ in range(count)]
        features = []
        for micro, batch in enumerate(held):
            seed_step(self.config.run.seed, step, micro)
            features.append(self.engine.encode(batch.augmented(self.device)))
        for micro, batch in enumerate(held):
            yield batch, Replay(features, micro)

    def _next(self, batches: Iterator[Batch], step: int) -> Batch:
        """The next micro-batch. A rank that cannot read stops all of them, with its own words."""
        asked = time.monotonic()
        batch, failure = None, None
        try:
            batch = next(batches)
        except UserError as error:
            failure = error
        self.waited += time.monotonic() - asked
        faults = batch.skipped if batch is not None else []
        noted = collectives.all_reduce_sum(torch.tensor([len(faults), int(failure is not None)]))
        if noted[1]:
            messages = [text for text in collectives.gather_objects(str(failure or "")) if text]
            raised = UserError(" ".join(dict.fromkeys(messages)))
            raised.everywhere = True
            raise raised
        if noted[0]:
            self._note_skipped(collectives.gather_objects(faults), step)
        assert batch is not None
        if self.key_log is not None:
            self.key_log.write(step, batch.records)
        return batch

    def _save(self, step: int) -> Path:
        state = self.engine.save()
        progress = Progress(
            step,
            self.fingerprint,
            updates=state.updates if state else 0,
            nonfinite=self.nonfinite,
            skipped_images=self.skipped,
            seconds=self.elapsed_before + time.monotonic() - self.started,
        )
        probe = self.probe.state_dict() if self.probe is not None else {}

        def write() -> Path:
            assert state is not None
            return self.store.save(state, probe, progress, dump(self.config))

        return collectives.on_rank_zero(write)

    def _note_skipped(self, by_rank: list[list[Fault]], step: int) -> None:
        faults = [fault for faults in by_rank for fault in faults]
        self.skipped += len(faults)
        for fault in faults:
            self.reporter.info(f"step {step + 1}: replaced {fault}")
        if process_group.rank() == 0:
            append_to_quarantine(self.config.run.dir / "quarantine.jsonl", faults, step + 1)

    def _note_nonfinite(self, step: int, in_a_row: int, keys: list[str]) -> None:
        self.nonfinite += 1
        shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
        self.reporter.info(f"step {step + 1}: the gradient is not finite; skipped on every rank. Samples here: {shown}")
        limit = self.config.train.max_nonfinite
        if in_a_row >= limit:
            error = UserError(
                f"{limit} non-finite steps in a row up to step {step + 1} (train.max_nonfinite = {limit}). "
                f"Lower optim.lr = {self.config.optim.lr:g} or set optim.clip_norm; the last checkpoint is untouched."
            )
            error.everywhere = True
            raise error


def _build_probe(
    config: Config, engine: Engine, sources: Mixture, device: torch.device, state: dict[str, Tensor]
) -> OnlineProbe | None:
    classes = sources.num_classes
    if not config.probe.enabled or classes < 2:
        return None
    probe = OnlineProbe(engine.module.encoder.embed_dim, classes, config.probe.lr, config.run.seed, device)
    if state:
        probe.load_state_dict(state)
    return probe


def seed_step(seed: int, step: int, micro: int) -> None:
    torch.manual_seed(seeds.of_micro_batch(seed, step, micro, process_group.rank()))


class _StopSignal:
    """SIGTERM and SIGINT raise a flag; the loop saves and leaves at the next step. A second signal acts as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopSignal:
        self._before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self._before:
            signal.signal(s, self._ask)
        return self

    def _ask(self, signum: int, _: object) -> None:
        self.asked = True
        signal.signal(signum, self._before[signal.Signals(signum)])

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
