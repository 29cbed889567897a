"""How good the encoder is, every evaluation.every steps, within a share of the run's time: with labels a k-NN and a linear
probe, without them the spectrum, LiDAR, normality and the loss on held-out images; of the average of the weights too,
where the run keeps one. Changes nothing of the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lejepa_scale.data import Batch
from lejepa_scale.engine import Average, Engine
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.isotropy import epps_pulley
from lejepa_scale.evaluation.knn import knn
from lejepa_scale.evaluation.linear_probe import linear_probe
from lejepa_scale.evaluation.metrics import Guesses, measure
from lejepa_scale.evaluation.spectrum import Lidar, alpha_req, eigenvalues, rank_of_spectrum, rankme
from lejepa_scale.model import Replay
from lejepa_scale.objective import SIGReg
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training.held_out import HeldOut, Images, spread_images, views_of
from lejepa_scale.training.reporting import Reporter
from lejepa_scale.training.run import Run
from lejepa_scale.training.step import StepResult

logger = logging.getLogger(__name__)
PREFIX, OF_AVERAGE = "eval_", "average_"
LINEAR_STEPS = 500  # of SGD: a classifier of some thousand rows is trained after them
DIRECTIONS = 256  # along which normality is tested


class Evaluate:
    """Evaluate where it is time, and report."""

    doing = "evaluating"

    def __init__(self, run: Run, reporter: Reporter, held: HeldOut, average: Average | None = None) -> None:
        self.run, self.reporter, self.held, self.average = run, reporter, held, average
        self._found: tuple[int, dict[str, float | None]] = 0, {}
        self._images: tuple[Images, Images, list[list[Batch]]] | None = None
        self._spent = self._longest = 0.0
        self._told = False

    def __call__(self, run: Run, result: StepResult) -> None:
        every = run.config.evaluation.every
        assert every is not None
        if not (run.progress.step % every == 0 or run.last) or run.stopping:
            return
        if not collectives.on_rank_zero(partial(self._fits, run), "evaluating"):
            return
        began = time.monotonic()
        numbers = self._numbers(run)
        if self.average is not None and self.average.updates:
            with self.average.in_use():
                numbers |= {f"{OF_AVERAGE}{name}": value for name, value in self._numbers(run).items()}
        seconds = time.monotonic() - began
        self._longest = max(self._longest, seconds) if self._spent else 0.0  # the first one read the images, too
        self._spent += seconds
        run.beside += seconds
        numbers["seconds"] = seconds
        numbers["time_share"] = self._spent / (time.monotonic() - run.started)
        step = run.progress.step
        found = self.reporter.log({"step": step, **{f"{PREFIX}{name}": value for name, value in numbers.items()}})
        self._found = step, {name: value for name, value in found.items() if name != "step"}

    def now(self) -> dict[str, float | None]:
        """What was found after the step just taken; nothing where there was no evaluation."""
        step, found = self._found
        return found if step == self.run.progress.step else {}

    def _fits(self, run: Run) -> bool:
        """Whether one that takes as long as the longest, but for the first, which also reads the images, stays within the
        share of time. The first one and the last one are always done."""
        share, elapsed = run.config.evaluation.time_share, time.monotonic() - run.started
        if not self._spent or run.last or self._spent + self._longest <= share * (elapsed + self._longest):
            return True
        if not self._told:
            self._told = True
            logger.info(
                "step %d: this evaluation is put off, as others will be without a word: they have taken %.1f s of %.1f s, "
                "and evaluation.time_share = %g. Fewer of them (evaluation.every = %d), or fewer images, come in time.",
                run.progress.step,
                self._spent,
                elapsed,
                share,
                run.config.evaluation.every,
            )
        return False

    def _numbers(self, run: Run) -> dict[str, float]:
        settings, config = run.config.evaluation, run.config
        if self._images is None:
            spread = partial(spread_images, self.held, count=settings.images, side=config.image_size)
            train, test = (spread(mixture) for mixture in (self.held.train, self.held.test))
            self._images = train, test, views_of(config, run.plan, self.held)
        train, test, views = self._images
        size = run.plan.micro_batch * config.data.views.global_.count
        step, engine = run.progress.step, run.engine
        with engine.frozen():
            of_test = encoded(engine, test, size, step)
            of_train = encoded(engine, train, size, step) if self.held.labelled else None
            numbers = held_out_loss(run, views)
        work: list[Callable[[], dict[str, float]]] = [partial(without_labels, of_test, config.run.seed)]
        if of_train is not None:
            work.append(partial(_knn, of_train, of_test, settings.k))
            work.append(partial(_linear, of_train, of_test, config.run.seed, engine.device))
        own = collectives.everywhere(partial(_mine, work), "evaluating")
        for found in collectives.gather_objects(own):
            numbers |= found
        return numbers


def _mine(work: list[Callable[[], dict[str, float]]]) -> dict[str, float]:
    """This rank's part, so that the numbers are those of one process. What cannot be scored is told of, and ends nothing."""
    found: dict[str, float] = {}
    for number, piece in enumerate(work):
        if number % process_group.world_size() != process_group.rank():
            continue
        try:
            found |= piece()
        except UserError as error:
            logger.warning("evaluation while training: %s", error)
    return found


@dataclass(frozen=True)
class Encoded:
    """What the network makes of a set, on the CPU: all ranks' images."""

    features: Float[Tensor, "n e"]
    embeddings: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]  # -1 where unknown

    @property
    def labelled(self) -> Features:
        """Raises UserError as Features does."""
        return Features(self.features, self.labels)


def encoded(engine: Engine, held: Images, size: int, step: int) -> Encoded:
    """Of the images of every rank, `size` at a time. The projector, whose normalization is that of its batch, sees all of
    them at once. Every rank calls."""
    *first, last = held.batches(size, engine.device)
    features = [engine.encode([views]) for views in first]
    itself = last.new_empty(1, 0, engine.module.encoder.embed_dim)  # in whose place the last batch comes
    out = engine.forward([last], step, Replay([*features, itself], len(features)))
    rows = torch.cat([*(part[0] for part in features), out["features_of_views"][0]])
    return Encoded(
        *(_in_order(x).cpu() for x in (rows.float(), out["embeddings"].float(), held.labels.to(rows.device)))
    )


def _in_order(own: Shaped[Tensor, " n *rest"]) -> Shaped[Tensor, " all_n *rest"]:
    """Rows of all ranks as they are in the set, of which rank r has every W-th from the r-th on."""
    return collectives.all_gather(own).transpose(0, 1).flatten(0, 1)


def held_out_loss(run: Run, steps: list[list[Batch]]) -> dict[str, float]:
    """The loss of held-out images under training's views, as a training step computes it, and LiDAR of their features."""
    if not steps:
        return {}
    sums: dict[str, Tensor] = {}
    lidar, exact = Lidar(), run.config.objective.accumulation == "exact"
    for batches in steps:
        views = [batch.augmented(run.device) for batch in batches]
        features = [run.engine.encode(each) for each in views] if exact and len(views) > 1 else None
        for number, each in enumerate(views):
            replay = Replay(features, number) if features is not None else None
            out = run.engine.forward(each, run.progress.step, replay, run.lambda_)
            lidar.add(out["features_of_views"].float())
            for name in ("loss", "prediction", "sigreg"):
                sums[name] = sums.get(name, 0) + out[name].double()
    count = sum(len(batches) for batches in steps)
    loss, prediction, regularizer = (float(sums[name]) / count for name in ("loss", "prediction", "sigreg"))
    return {
        "loss": loss,
        "loss_prediction": prediction,
        "loss_sigreg": regularizer,
        "loss_normalized": loss / run.lambda_**0.4,
        "lidar": lidar.value(),
    }


def without_labels(found: Encoded, seed: int) -> dict[str, float]:
    """Spectrum and ranks of features and embeddings, and the objective's own statistic of the embeddings along random
    directions, 1.05 at a standard Gaussian. Raises UserError for what is not finite."""
    if not (found.features.isfinite().all() and found.embeddings.isfinite().all()):
        raise UserError("some features or embeddings of held-out images are not finite; they are not scored.")
    numbers: dict[str, float] = {}
    for name, rows in (("", found.features), ("embedding_", found.embeddings)):
        spectrum = eigenvalues(rows)
        numbers[f"{name}effective_rank"] = rank_of_spectrum(spectrum)
        numbers[f"{name}std"] = float(spectrum.mean().sqrt())
        if name == "":
            numbers["rankme"], numbers["alpha_req"] = rankme(rows), alpha_req(spectrum)
            total = spectrum.sum().clamp_min(1e-30)
            numbers |= {
                f"spectrum_{2**i}": float(spectrum[2**i - 1] / total) for i in range(len(spectrum).bit_length())
            }
    rows = found.embeddings.double()
    directions = SIGReg(num_slices=DIRECTIONS, seed=seed).directions(0, rows.shape[1], rows.device, rows.dtype)
    statistics = epps_pulley(rows @ directions.T)
    return {**numbers, "normality": float(statistics.mean()), "normality_worst": float(statistics.max())}


def _knn(train: Encoded, test: Encoded, k: int) -> dict[str, float]:
    k = min(k, len(train.labels))
    return {"knn": _top1(knn(train.labelled, test.labelled, [k])[k], train, test)}


def _linear(train: Encoded, test: Encoded, seed: int, device: torch.device) -> dict[str, float]:
    guesses = linear_probe(train.labelled, test.labelled, steps=LINEAR_STEPS, norm="batch", seed=seed, device=device)
    return {"linear": _top1(guesses, train, test)}


def _top1(guesses: Guesses, train: Encoded, test: Encoded) -> float:
    return measure(guesses, test.labels, int(torch.cat([train.labels, test.labels]).max()) + 1).top1
