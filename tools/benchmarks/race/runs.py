"""One contestant's run: how fast it is, its training, and its encoders along the way. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.input import PillowViews
from benchmarks.minimal import ShardImages
from benchmarks.race.methods import METHODS, OUR_OPTIMIZER, PILLOW, Method
from lejepa_scale.config import BatchPlan, Config, Data, Optim, in_steps, load_config
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.io.reader import expand
from lejepa_scale.engine.muon import Muon
from lejepa_scale.engine.optim import groups_within, matrices_within, set_hyperparameters
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder
from lejepa_scale.model.lejepa import build_encoder
from lejepa_scale.training.schedule import learning_rate

POINTS = (0.125, 0.25, 0.5, 1.0)  # of a run's steps, at which its encoder is kept
_WARM = 3  # steps that are not timed: workers start and fill their queues
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Task:
    """A contestant on a recipe, whose encoder, data and image size are those of all. threads: of its one process."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    threads: int

    def config(self) -> Config:
        return load_config(self.recipe, list(self.overrides))

    @property
    def batch(self) -> int:
        return METHODS[self.name].batch if self.name in METHODS else self.config().train.global_batch

    def rate(self, folder: Path, seconds: float) -> float:
        """Steps/s, after the first ones."""
        if self.name in METHODS:
            return float(_apart(_rate, self, seconds))
        rows = trained(self, folder, max(4, round(4 * seconds)), 0, ["log.every=1", f"optim.warmup_steps={_WARM}"])
        return median(row["images_per_second"] for row in rows[_WARM:]) / self.batch

    def train(self, folder: Path, steps: int, seed: int) -> None:
        """Leaves an encoder of each of POINTS in `folder`, as `encoder` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.name in METHODS:
            return _apart(_train, self, folder, steps, seed)
        trained(self, folder, steps, seed, [])
        return None

    def encoder(self, folder: Path, step: int) -> Encoder | Path:
        """What `evaluate` takes."""
        if self.name not in METHODS:
            return folder / "checkpoints" / f"step_{step:08d}"
        config = self.config()
        model = config.model.model_copy(update={"head_dim": METHODS[self.name].head_dim or config.model.head_dim})
        made = build_encoder(config.model_copy(update={"model": model}))
        made.backbone.load_state_dict(torch.load(folder / f"{step}.pt"))
        return made


def points(steps: int) -> list[int]:
    """The steps after which an encoder is kept."""
    return sorted({max(1, round(share * steps)) for share in POINTS})


# --- Ours: the trainer, as a user starts it on one process


def trained(task: Task, folder: Path, steps: int, seed: int, more: Sequence[str]) -> list[dict[str, Any]]:
    """Train; the rows of metrics.jsonl."""
    every = max(1, steps // 8)  # a multiple of each point, for steps that are one of 8
    words = [
        *task.overrides, f"run.dir={folder}", f"train.steps={steps}", f"run.seed={seed}", "engine.name=single",
        f"checkpoint.every={every}", "checkpoint.keep=9", *more,
    ]  # fmt: skip
    command = [sys.executable, "-m", "lejepa_scale", "train", "--config", str(task.recipe), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"the race's run of ours failed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- The others


def _apart(function: Any, *arguments: Any) -> Any:
    """In a process whose threads, allocator and random numbers are its own."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        answer = UserError(f"the process of {arguments[0].name} ended without a result.")
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(pipe: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(arguments[0].threads)
        pipe.send(function(*arguments))
    except Exception as error:
        pipe.send(error)


def _rate(task: Task, seconds: float) -> float:
    torch.manual_seed(0)
    method = METHODS[task.name](task.config())
    steps = training(task, method, 10**6, 0)
    for _ in islice(steps, _WARM):
        pass
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or count < _WARM:
        next(steps)
        count += 1
    return count / (time.perf_counter() - started)


def _train(task: Task, folder: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    method = METHODS[task.name](task.config())
    kept = points(steps)
    for step, _ in enumerate(training(task, method, steps, seed), 1):
        if step in kept:
            torch.save(method.encoder.state_dict(), folder / f"{step}.pt")


def training(task: Task, method: Method, steps: int, seed: int) -> Iterator[float]:
    """The losses of as many steps."""
    config = task.config()
    settings = settings_of(task, method, steps)
    optimizers = _optimizers(method, settings)
    method.train()
    for step, views in enumerate(islice(batches(task, method, config, seed), steps)):
        loss = method.loss(views, step, step / steps)
        method.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if method.clip is not None:
            torch.nn.utils.clip_grad_norm_(method.parameters(), method.clip)
        for optimizer in optimizers:
            set_hyperparameters(optimizer, learning_rate(step, steps, settings), settings.weight_decay)
            optimizer.step()
        method.after((step + 1) / steps)
        yield loss.item()


def settings_of(task: Task, method: Method, steps: int) -> Optim:
    """Of the whole run, in steps: AdamW and a cosine, or those of the recipe."""
    config = task.config()
    images = open_mixture(config.data).num_samples
    if task.name in OUR_OPTIMIZER:
        length = config.train.model_copy(update={"steps": steps, "epochs": None, "images": None})
        return in_steps(config.model_copy(update={"train": length}), images).optim
    epoch = max(1, images // method.batch)
    warmup = epoch if task.name.startswith("minimal") else round(method.warmup * steps)
    plain = {"name": "adamw", "warmup_steps": min(warmup, steps // 2), "schedule": "cosine"}
    return method.optim().model_copy(update=plain)


def _optimizers(method: Method, settings: Optim) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the encoder's matrices where the settings say so."""
    own = set[str]()
    if settings.name == "muon":
        own.update(matrices_within(method, method.encoder, list(getattr(method.encoder, "blocks", []))))
    plain, muons = (groups_within(method, settings, own, {}, muons=muons) for muons in (False, True))
    adamw = torch.optim.AdamW(plain, betas=settings.betas, eps=settings.eps, fused=True)
    if not own:
        return [adamw]
    return [
        adamw,
        Muon(muons, momentum=settings.muon.momentum, adjust_lr=settings.muon.adjust_lr, lr=settings.lr),
    ]


def batches(task: Task, method: Method, config: Config, seed: int) -> Iterator[list[Tensor]]:
    """Views [B, 3, S, S], the global ones first: through torchvision on Pillow images in a DataLoader, or through ours."""
    if task.name in PILLOW:
        shards = [shard for source in config.data.shards for shard in expand(source.shards)]
        images = ShardImages(shards, PillowViews(method.views(), method.augment()))
        how = {"num_workers": task.threads, "multiprocessing_context": "fork", "persistent_workers": True}
        loader = DataLoader(images, method.batch, shuffle=True, drop_last=True, **how)  # type: ignore[arg-type]
        yield from chain.from_iterable(repeat(loader))
    data = Data(**{**config.data.model_dump(by_alias=True), "views": method.views(), "augment": method.augment()})
    for batch in Loader(open_mixture(data), data, BatchPlan(micro_batch=method.batch), seed=seed):
        yield [view for group in batch.augmented(torch.device("cpu")) for view in group]
