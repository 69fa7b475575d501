"""Measures RALIS' replay with 100,000 transitions of the paper's two datasets: memory, draws, and checkpoints.

    python benchmarks/region_replay.py [--transitions 100000] [--only camvid]

The numbers in states and candidates are random, so that nothing but sharing saves memory. "Unshared" is what the same
transitions take if each holds its own two states, action and next candidates, as a list of tuples does.

A run needs about 3 GiB of memory and, in the temporary folder, 1.5 GiB of disk.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from raysseg.algorithms.ralis.replay import StepReplay
from raysseg.algorithms.ralis.steps import StepShapes, step_records
from raysseg.core.settings import ReplaySettings

DRAWN, DRAWS = 320, 15
GIB, MIB = 1 << 30, 1 << 20

CASES = {
    "camvid": (20, StepShapes(state=(240, 203), candidates=(24, 20, 267))),
    "cityscapes": (15, StepShapes(state=(1280, 211), candidates=(256, 20, 275))),
}
"""Steps of an episode and the shapes of one, with 20 candidates in a pool as in played episodes."""


def episode(number: int, steps: int, shapes: StepShapes) -> pa.RecordBatch:
    """Returns the records of one episode of random numbers."""
    source = np.random.default_rng(number)
    pools, size, _ = shapes.candidates
    return step_records(
        {
            "episode": [number] * steps,
            "step": range(steps),
            "terminated": [False] * (steps - 1) + [True],
            "reward": source.normal(size=steps),
            "miou": [0.5] * steps,
            "epsilon": [0.1] * steps,
            "mean_q": [0.0] * steps,
            "rows": source.integers(0, 150, (steps, pools)),
            "regions": source.integers(0, 128, (steps, pools)),
            "chosen": source.integers(0, size, (steps, pools)),
            "state": source.random((steps, *shapes.state), np.float32),
            "candidates": source.random((steps, *shapes.candidates), np.float32),
            "segmenter_version": [0] * steps,
            "policy_version": [number] * steps,
        }
    )


def resident() -> int:
    """Returns the bytes of memory that this process has to itself."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell")


def unshared(count: int, shapes: StepShapes) -> int:
    """Returns the bytes of transitions in half precision that share nothing."""
    regions, features = shapes.state
    _, size, numbers = shapes.candidates
    return count * 2 * (2 * regions * features + (1 + size) * numbers)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(name: str, count: int, exponent: float) -> None:
    """Prints everything about one dataset's sizes."""
    steps, shapes = CASES[name]
    settings = ReplaySettings(capacity=count, priority_exponent=exponent)
    buffer, source = StepReplay(settings, shapes=shapes), np.random.default_rng(0)
    each = steps * shapes.per_step
    episode(0, steps, shapes)
    gc.collect()
    before, seconds, episodes = resident(), 0.0, -(-count // each)
    for number in range(episodes):
        records = episode(number, steps, shapes)
        start = time.perf_counter()
        buffer.add(records)
        seconds += time.perf_counter() - start
        del records
    gc.collect()
    held, memory = buffer.nbytes, resident() - before
    alone = unshared(len(buffer), shapes)
    print(
        f"\n{name}: {len(buffer)} transitions of {episodes} episodes, S, d {shapes.state}, K, N, d {shapes.candidates}"
    )
    print(
        f"  bytes held:        {held / GIB:8.3f} GiB; unshared they were {alone / GIB:.1f} GiB, {alone / held:.0f} times"
    )
    print(f"  process grew by:   {memory / GIB:8.3f} GiB; is now {resident() / GIB:.3f} GiB")
    print(f"  adding an episode: {1e3 * seconds / episodes:8.1f} ms")
    for more in range(3):
        buffer.add(episode(episodes + more, steps, shapes))
    print(
        f"  and three more:    {buffer.nbytes / GIB:8.3f} GiB held, process {(resident() - before) / GIB:.3f} GiB more"
    )

    times = []
    for _ in range(DRAWS):
        start = time.perf_counter()
        draw = buffer.sample(DRAWN, source)
        drawn = time.perf_counter()
        buffer.update_priorities(draw.records.column("id").to_numpy(), source.random(DRAWN))
        times.append((drawn - start, time.perf_counter() - drawn))
    seconds_drawn, seconds_learned = np.median(times, axis=0)
    size = draw.states.nbytes + draw.records.nbytes
    start = time.perf_counter()
    draw.states.copy()
    copied = time.perf_counter() - start
    print(
        f"  drawing {DRAWN}:       {1e3 * seconds_drawn:8.1f} ms for {size / MIB:.0f} MiB with {len(draw.states)} states, "
        f"{seconds_drawn / copied:.1f} times one copy of these; errors {1e3 * seconds_learned:.2f} ms"
    )
    del draw

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        buffer.save(folder)
        full_seconds, full = time.perf_counter() - start, size_of(folder)
        print(f"  first checkpoint:  {full / MIB:8.1f} MiB in {full_seconds:.2f} s")
        present = {path.name for path in folder.iterdir()}
        buffer.add(episode(episodes + 3, steps, shapes))
        start = time.perf_counter()
        state = buffer.save(folder)
        seconds = time.perf_counter() - start
        new = sum(path.stat().st_size for path in folder.iterdir() if path.name not in present)
        print(f"  one more episode:  {new / MIB:8.1f} MiB in {seconds:.2f} s: {new / full:.4f} of the first")
        buffer.close()
        gc.collect()
        copy = StepReplay(settings, shapes=shapes)
        start = time.perf_counter()
        copy.load(folder, state)
        print(f"  loading all:       {len(copy):8d} transitions in {time.perf_counter() - start:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--exponent", type=float, default=0.6, help="of the priorities; 0 draws uniformly")
    options = parser.parse_args()
    for name in CASES:
        if options.only in (None, name):
            measure(name, options.transitions, options.exponent)


if __name__ == "__main__":
    main()
