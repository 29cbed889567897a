"""The order of samples: every one once an epoch, for any ranks and workers, over kills and restarts, at a billion."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.ports import free_port
from conftest import small_config

from lejepa_scale.config import BatchPlan, Config, plan_batches, validate
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.audit.check import faults, first_difference, order_of_steps, read_log
from lejepa_scale.data.audit.keylog import Header, KeyLog, Record, header_line, record_line
from lejepa_scale.data.order import _SHARES, Order, SourceOrder, interleave, permute, positions


def plan(ranks: int, micro: int, accumulation: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch=micro, ranks=ranks, accumulation=accumulation)


def permutation(n: int, key: int) -> list[int]:
    return permute(np.arange(n), np.full(n, n), np.full(n, key, np.uint64)).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 17, 100, 16384, 16385])
def test_permutations_are_permutations(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permutation(n, key)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 31])
def test_every_permutation_is_equally_likely_to_take_any_pair_anywhere(n: int) -> None:
    """Chi-square of where elements 0 and 1 go together, over 20,000 keys, within five standard deviations."""
    trials = 20_000
    keys = np.random.default_rng(0).integers(0, 2**63, trials).astype(np.uint64)
    first, second = (permute(np.full(trials, i), np.full(trials, n), keys) for i in (0, 1))
    count = np.bincount(first * n + second, minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]
    expected, freedom = trials / len(count), len(count) - 1
    assert ((count - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_each_epoch_visits_every_sample_once_and_epochs_differ(block: int) -> None:
    counts = [5, 1, 30, 12]
    order = SourceOrder(counts, seed=3, block=block)
    epoch, shard, member = order.locate(np.arange(3 * 48))
    everything = {(s, m) for s, n in enumerate(counts) for m in range(n)}
    epochs = [list(zip(shard[epoch == e].tolist(), member[epoch == e].tolist(), strict=True)) for e in range(3)]
    assert epoch.tolist() == [e for e in range(3) for _ in range(48)]
    for one in epochs:
        assert Counter(one) == dict.fromkeys(everything, 1)
    assert epochs[0] != epochs[1] != epochs[2]
    shuffled = np.random.default_rng(0).permutation(3 * 48)  # asked in any order, or one by one: the same answers
    assert [x.tolist() for x in order.locate(shuffled)] == [x[shuffled].tolist() for x in (epoch, shard, member)]
    assert [int(x[0]) for x in order.locate(np.array([100]))] == [2, int(shard[100]), int(member[100])]


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Runs that were started must go on: a change of this sequence is a change of format."""
    order = Order([[5, 1, 30, 12], [7, 9]], [2.0, 1.0], seed=3, block=10)
    text = repr([tuple(x) for x in order.locate(range(300))])
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "a22b2067f0334364"
    for change in ({"seed": 4}, {"block": 11}, {"weights": [1.0, 1.0]}):
        other = {"weights": [2.0, 1.0], "seed": 3, "block": 10, **change}
        assert repr([tuple(x) for x in Order([[5, 1, 30, 12], [7, 9]], **other).locate(range(300))]) != text


def test_mixtures_keep_their_weights_at_every_position() -> None:
    weights = [5.0, 0.3, 2.0, 0.001, 1.0]
    shares = [max(1, round(w / sum(weights) * _SHARES)) for w in weights]
    source, index = interleave(np.arange(100_000), shares)
    for s, weight in enumerate(weights):
        mine = source == s
        assert index[mine].tolist() == list(range(mine.sum()))  # no sample of a source skipped or repeated
        owed = np.arange(1, 100_001) * weight / sum(weights)
        assert np.abs(mine.cumsum() - owed).max() < 1 + np.log(len(weights))
    assert (source == 3).sum() >= 12  # even a share of 1 in 8000 is kept
    far = np.arange(10**15, 10**15 + 1000)
    assert interleave(far, shares)[1].min() > 10**15 / 10_000  # no overflow
    order = Order([[50], [50]], [3.0, 1.0], seed=0, block=16)
    drawn = Counter((x.source, x.epoch, x.member) for x in order.locate(range(800)))
    assert drawn == {(s, e, m): 1 for s, n in ((0, 12), (1, 4)) for e in range(n) for m in range(50)}


def test_ranks_partition_each_micro_batch() -> None:
    """The same micro-batches for any split of micro_batch x ranks, and no sample on two ranks."""
    for step, micro in product((0, 5), (0, 1)):
        whole = list(positions(step, micro, 0, plan(1, 12, 2)))
        for ranks in (2, 3, 4):
            parts = [positions(step, micro, rank, plan(ranks, 12 // ranks, 2)) for rank in range(ranks)]
            assert [p for part in parts for p in part] == whole
    assert list(positions(1, 0, 0, plan(1, 4))) == [4, 5, 6, 7]


def displacement(counts: np.ndarray, block: int) -> float:
    """Mean |stored place - place in the epoch| over the samples of an epoch, as a share of their number."""
    order = SourceOrder(counts, seed=0, block=block)
    _, shard, member = order.locate(np.arange(order.total))
    stored = (np.cumsum(counts) - counts)[shard] + member
    return float(np.abs(stored - np.arange(order.total)).mean()) / order.total


def test_displacement_is_that_of_a_true_permutation() -> None:
    """A third of the samples, to which a permutation of 400 shards has a standard deviation of 0.011."""
    counts = np.random.default_rng(0).integers(100, 300, 400)
    few, all_of_them = displacement(counts, block=500), displacement(counts, block=10**9)
    print(f"mean displacement / n: {few:.4f} in blocks of 500, {all_of_them:.4f} in one block; 0.3333 expected")
    assert few == pytest.approx(1 / 3, abs=0.04)
    assert all_of_them == pytest.approx(1 / 3, abs=0.005)
    assert displacement(np.array([50_000]), block=10**9) == pytest.approx(
        1 / 3, abs=0.01
    )  # one shard: one block mixes it


def test_a_billion_samples_in_100_000_shards() -> None:
    """Correct at scale; tools/bench.py order measures time and memory."""
    counts = np.random.default_rng(0).integers(5_000, 15_000, 100_000)
    counts[-1] += 10**9 - counts.sum()
    order = SourceOrder(counts, seed=0, block=16384)
    last_block = order.total // order.block * order.block
    for epoch, start in product((0, 7), (0, 16384 * 30_000, last_block)):
        inside = np.arange(start, min(start + 16384, order.total))
        found, shard, member = order.locate(epoch * order.total + inside)
        assert (found == epoch).all()
        assert (member >= 0).all()
        assert (member < counts[shard]).all()
        shards, starts = order._permuted_shards(epoch)
        assert np.array_equal(np.sort(shards), np.arange(100_000))
        place = starts[np.argsort(shards)][shard] + member
        assert np.array_equal(np.sort(place), inside)  # a block is permuted within itself, so epochs are whole
    assert len(order._epochs) <= 4


@pytest.fixture
def tree(tmp_path: Path, scenes: Path) -> dict[str, Any]:
    """12 steps of 16 samples: two epochs of 96."""
    train = {"steps": 12, "global_batch": 16}
    return small_config(tmp_path / "run", scenes, train=train, data={"log_keys": True}, checkpoint={"every": 3})


def changed(tree: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return validate({**tree, **{name: {**tree.get(name, {}), **values} for name, values in sections.items()}})


def steps_of(config: Config, ranks: int = 1, first: int = 0, last: int = 12) -> list[tuple[int, list[Record]]]:
    sources, split = open_mixture(config.data), plan_batches(config, ranks)
    return list(order_of_steps(sources, config.data, split, seed=config.run.seed, first=first, last=last))


def header_of(config: Config, *, decoded: bool) -> Header:
    sources, batch = open_mixture(config.data), config.train.global_batch
    return sources.key_log_header(config.data, seed=config.run.seed, global_batch=batch, decoded=decoded)


def test_ranks_workers_and_micro_batches_do_not_change_the_order(tree: dict[str, Any]) -> None:
    """At every position the same sample, for any micro batch x ranks x accumulation that makes the global batch."""
    expected = steps_of(validate(tree))
    first, second = ([r for _, step in expected[i : i + 6] for r in step] for i in (0, 6))
    assert {r.sample for r in first} == {r.sample for r in second}
    assert len({r.sample for r in first}) == len(first) == 96
    assert [r.sample for r in first] != [r.sample for r in second]
    for ranks, micro, workers in [(1, None, 1), (1, 4, 3), (2, None, 3), (2, 2, 0), (4, None, 0), (4, 2, 1)]:
        config = changed(tree, train={"micro_batch": micro}, data={"workers": workers})
        assert steps_of(config, ranks) == expected, (ranks, micro, workers)
    assert steps_of(changed(tree, data={"workers": 2}), 2, 5, 9) == expected[5:9]


def expected_log(tree: dict[str, Any], path: Path) -> Path:
    config = validate(tree)
    lines = [header_line(header_of(config, decoded=False))]
    for step, records in steps_of(config, last=config.train.steps):
        lines += [record_line(step, record) for record in records]
    path.write_text("".join(lines))
    return path


def is_clean(run: Path, expected: Path) -> int:
    """The run's log is whole and as computed; how many samples were taken again."""
    log = read_log(run)
    assert faults(log) == []
    assert first_difference(log, read_log(expected)) is None
    return log.repeated


def ended(process: Any, seconds: float = 120) -> int | None:
    """The exit code, without waiting for the workers that a killed process leaves: they see it within five seconds."""
    deadline = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.exitcode


def consume(tree: dict[str, Any], ranks: int, kill_at: int | None) -> None:
    """What the trainer does with data, without a model: `ranks` loaders in step, the step number saved every third one.
    Dies of SIGKILL after taking `kill_at` micro-batches, in the middle of the next line."""
    config = validate(tree)
    sources, split = open_mixture(config.data), plan_batches(config, ranks)
    saved = config.run.dir / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    logs = [KeyLog(config.run.dir, rank, header_of(config, decoded=True)) for rank in range(ranks)]
    streams = [
        iter(Loader(sources, config.data, split, seed=config.run.seed, rank=rank, first_step=first))
        for rank in range(ranks)
    ]
    taken = 0
    for step in range(first, config.train.steps):
        for _, rank in product(range(split.accumulation), range(ranks)):
            logs[rank].write(step, next(streams[rank]).records)
            taken += 1
            if taken == kill_at:
                logs[rank]._append(f"{step}\t12")
                os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % 3 == 0:
            saved.write_text(str(step + 1))


def test_ten_kills_of_the_loader_lose_and_repeat_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL after a random number of micro-batches; restarted with other ranks, workers and micro-batches each time."""
    rng = random.Random(0)
    context = multiprocessing.get_context("fork")
    tree["train"] |= {"steps": 60}
    for kill in [True] * 10 + [False]:
        ranks, micro, workers = rng.choice([1, 2, 4]), rng.choice([2, 4]), rng.choice([0, 0, 1])
        tree |= {"train": {**tree["train"], "micro_batch": micro}, "data": {**tree["data"], "workers": workers}}
        kill_at = rng.randint(1, 4 * 16 // micro) if kill else None
        process = context.Process(target=consume, args=(tree, ranks, kill_at))
        process.start()
        assert ended(process) == (-signal.SIGKILL if kill else 0)
    run = tmp_path / "run"
    assert "\n60\t" not in (run / "keys/rank00000.tsv").read_text()
    assert is_clean(run, expected_log(tree, tmp_path / "expected.tsv")) > 0


def _train_rank(tree: dict[str, Any], environment: dict[str, str], kill_at: int | None) -> None:
    import torch

    from lejepa_scale.training.loop import train

    multiprocessing.set_start_method(
        "fork", force=True
    )  # for the loader's workers; a fork server hands down its own way
    os.environ |= environment
    torch.set_num_threads(1)
    write, taken = KeyLog.write, 0

    def counted(log: KeyLog, step: int, records: Any) -> None:
        nonlocal taken
        write(log, step, records)
        taken += 1
        if taken == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    KeyLog.write = counted  # type: ignore[method-assign]
    train(validate(tree))


def trainer() -> Callable[..., None]:
    """`start(tree, ranks, kill_at)` trains on real ranks, each a fork of one server that has done the imports. With
    `kill_at` the last rank dies of SIGKILL after that many micro-batches, and then the others, as under any launcher."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lejepa_scale.training.loop"])

    def start(tree: dict[str, Any], ranks: int, kill_at: int | None) -> None:
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            context.Process(
                target=_train_rank,
                args=(
                    tree,
                    {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {},
                    kill_at if rank == ranks - 1 else None,
                ),
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        codes = [ended(processes[-1])]
        for process in processes[:-1]:
            if kill_at is not None:
                process.kill()
            codes.append(ended(process))
        assert set(codes) == {0 if kill_at is None else -signal.SIGKILL}

    return start


def test_training_killed_on_four_ranks_then_two_then_four(tree: dict[str, Any], tmp_path: Path) -> None:
    start = trainer()
    tree["engine"]["name"] = "ddp"
    tree["data"]["workers"] = 1
    start(tree, 4, kill_at=5)  # after the checkpoint of step 3
    assert len(list((tmp_path / "run/keys").iterdir())) == 4
    start(tree, 2, kill_at=5)  # in step 8, after that of step 6
    start(tree, 4, kill_at=None)
    assert is_clean(tmp_path / "run", expected_log(tree, tmp_path / "expected.tsv")) > 0


@pytest.mark.slow
def test_training_killed_ten_times_at_random_steps(tree: dict[str, Any], tmp_path: Path) -> None:
    start, rng = trainer(), random.Random(1)
    tree["train"] |= {"steps": 48, "micro_batch": 8}
    for _ in range(10):
        start(tree, 1, kill_at=rng.randint(3, 12))
    start(tree, 1, kill_at=None)
    assert is_clean(tmp_path / "run", expected_log(tree, tmp_path / "expected.tsv")) > 0
