"""Measures the replay buffer with transitions of EIL at 512 × 512 with 21 classes: memory, rates, and checkpoints.

    python benchmarks/replay.py [--transitions 100000] [--shards 4]

The label maps are those of `transition.py` (synthetic scenes, scribbles grown through five stages), encoded once and
then used again and again under new rows and seeds, so that every transition has its real size and its own memory.

Each row is one of two things that were measured in this run on the same work: memory against the bytes on the wire,
adding to a full buffer against adding to an empty one, drawing by priority against uniform drawing, shards against one
process, and what a second checkpoint writes after n new transitions against the first one, which writes all of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from transition import grow, label_maps, transition

from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.replay_shards import Replay, ShardedReplay
from raysseg.core.settings import ReplaySettings

BATCH, DRAWS = 8, 300
GIB, MIB = 1 << 30, 1 << 20


def encoded() -> list[dict[str, list[object]]]:
    """Returns the columns of one transition for each stage of each synthetic scene."""
    generator = torch.Generator().manual_seed(0)
    return [
        transition(key, number, None, after)
        for number, (key, label, scribble) in enumerate(label_maps()["synthetic scenes"])
        for after in list(grow(label, scribble, generator))[1:]
    ]


def rollouts(kinds: list[dict[str, list[object]]]) -> Iterator[pa.RecordBatch]:
    """Yields batches of eight transitions for ever, each with its own seeds and with policies that grow newer."""
    order = itertools.cycle(np.random.default_rng(0).permutation(len(kinds)).tolist())
    for first in itertools.count(step=BATCH):
        part = [kinds[next(order)] for _ in range(BATCH)]
        columns = {name: [one[name][0] for one in part] for name in part[0]}
        yield rollout.transitions(
            columns | {"seed": np.arange(first, first + BATCH), "policy_version": np.full(BATCH, first // BATCH)}
        )


def resident(process: int | str = "self") -> int:
    """Returns the bytes of memory that a process has to itself, or its part of what it shares."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell")


def fill(buffer: Replay, source: Iterator[pa.RecordBatch], count: int) -> tuple[float, int]:
    """Adds batches made beforehand, in portions; returns the mean seconds per batch, and the bytes on the wire."""
    portion, seconds, size = 125, 0.0, 0
    for _ in range(count // (portion * BATCH)):
        batches = [next(source) for _ in range(portion)]
        size += sum(rollout.wire_bytes(one) for one in batches)
        start = time.perf_counter()
        for one in batches:
            buffer.add(one)
        seconds += time.perf_counter() - start
    return seconds / (count / BATCH), size


def draw_and_learn(buffer: Replay, generator: np.random.Generator) -> tuple[float, float]:
    """Returns the median seconds of a draw of eight after a change, and of taking over the errors of what was drawn."""
    seconds = []
    for _ in range(DRAWS):
        start = time.perf_counter()
        ids = buffer.sample(BATCH, generator).column("id").to_numpy()
        drawn = time.perf_counter()
        buffer.update_priorities(ids, generator.random(BATCH))
        seconds.append((drawn - start, time.perf_counter() - drawn))
    draw, update = np.median(seconds, axis=0)
    return float(draw), float(update)


def checkpoints(buffer: Replay, source: Iterator[pa.RecordBatch], counts: tuple[int, ...]) -> None:
    """Prints what the first checkpoint writes, and what later ones write after some new transitions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        buffer.save(folder)
        full_seconds, full = time.perf_counter() - start, sum(path.stat().st_size for path in folder.iterdir())
        print(f"  first checkpoint: {full / MIB:8.1f} MiB in {full_seconds:6.2f} s")
        for count in counts:
            before = {path.name for path in folder.iterdir()}
            for _ in range(count // BATCH):
                buffer.add(next(source))
            start = time.perf_counter()
            state = buffer.save(folder)
            seconds = time.perf_counter() - start
            new = sum(path.stat().st_size for path in folder.iterdir() if path.name not in before)
            print(
                f"  after {count:5d} more:  {new / MIB:8.1f} MiB in {seconds:6.2f} s: {new / full:.4f} of a full rewrite, "
                f"{seconds / full_seconds:.4f} of its time"
            )
        start = time.perf_counter()
        buffer.load(folder, state)
        print(f"  loading all:      {time.perf_counter() - start:6.2f} s")


def measure(name: str, buffer: Replay, kinds: list[dict[str, list[object]]], count: int) -> float:
    """Prints everything about one kind of buffer; returns the seconds of a draw."""
    source, generator, before = rollouts(kinds), np.random.default_rng(0), resident()
    filling, size = fill(buffer, source, count)
    held = len(buffer)
    print(f"\n{name}: {held} transitions, {size / held:.0f} bytes each on the wire")
    memory = resident() - before
    if isinstance(buffer, ShardedReplay):
        shards = ray.get([shard.__ray_call__.remote(lambda _: os.getpid()) for shard in buffer._shards])
        memory += sum(resident(shard) for shard in shards)
    print(f"  memory:           {memory / GIB:8.2f} GiB: {memory / size:.2f} of the bytes on the wire")
    tenth, _ = fill(buffer, source, count // 10)
    print(f"  adding {BATCH}:         {1e3 * filling:8.3f} ms; when it is full: {1e3 * tenth:.3f} ms")
    draw, update = draw_and_learn(buffer, generator)
    print(f"  drawing {BATCH}:        {1e3 * draw:8.3f} ms; taking over {BATCH} errors: {1e3 * update:.3f} ms")
    checkpoints(buffer, source, (160, 1600))
    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--only", choices=["uniform", "prioritised", "sharded"], help="one kind of buffer alone")
    options = parser.parse_args()
    kinds, count = encoded(), options.transitions
    draws: dict[str, float] = {}
    for name, exponent, shards in (
        ("uniform", 0.0, 0),
        ("prioritised", 0.6, 0),
        ("sharded", 0.6, options.shards),
    ):
        if options.only not in (None, name):
            continue
        settings = ReplaySettings(capacity=count, priority_exponent=exponent, shards=shards)
        if shards:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * MIB)
        buffer: Replay = ShardedReplay(settings) if shards else ReplayBuffer(settings)
        draws[name] = measure(name, buffer, kinds, count)
        buffer.close()
        del buffer
    for one, other in (("prioritised", "uniform"), ("sharded", "prioritised")):
        if one in draws and other in draws:
            print(f"\ndrawing {BATCH}, {one} : {other}: {draws[one] / draws[other]:.1f}")


if __name__ == "__main__":
    main()
