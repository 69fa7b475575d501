"""Times one labelling step of RALIS at the paper's Cityscapes sizes, without the segmenter's own passes.

    OMP_NUM_THREADS=2 python benchmarks/regions.py [--images 210] [--rows 48] [--repeats 3]

256 pools of 100 candidates are 25,600 regions; each is compared with all of them and with 10,000 labelled regions, 911
million divergences in all. What is measured:
- the step: from the decoder's logits on (one map of smooth random ones, a quarter of the image's size, read anew for each
  image) pixels' logits, predicted classes, entropies, shares and poolings of the images that hold the candidates (200 full
  images at the least, and the 10 of the state), both histograms, the query network's values, and the labels that come back.
  Its sum is also given without the resampling to pixels, which the authors' segmenter does itself;
- both histograms against one `scipy.stats.entropy` call and one `numpy.histogram` per candidate, as the authors' code
  does it. Their side is run on a few candidates, spread over all, and its time per candidate multiplied: each of its
  candidates costs the same, since SciPy's work does not depend on the values. Both sides are timed in turns;
- ways to turn a chunk of divergences into histograms, per divergence, with the product that makes the chunk beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F

from raysseg.algorithms.ralis.config import LearningOptions, RALISOptions, RegionOptions, SetsOptions
from raysseg.algorithms.ralis.module import QueryNetwork
from raysseg.functional import (
    class_shares,
    divergence_histograms,
    entropy_map_of_logits,
    kl_matrix,
    label_shares,
    pooled_entropies,
    predicted_classes,
)
from raysseg.segmenters import upsample_logits

CLASSES, HEIGHT, WIDTH = 19, 1024, 2048
POOLS, POOL_SIZE, LABELLED, STATE_IMAGES = 256, 100, 10_000, 10
OPTIONS = RALISOptions(
    sets=SetsOptions(state=STATE_IMAGES),
    regions=RegionOptions(rows=8, columns=16),
    per_step=POOLS,
    pool_size=POOL_SIZE,
    budgets=(LABELLED - LABELLED % POOLS,),
    learning=LearningOptions(budget=15 * POOLS),
)
MIB = 1 << 20
RESAMPLING = "the logits of pixels"


def memory(name: str) -> int:
    """Returns a number of bytes from the system's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell")


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Returns the seconds that some work took, and the most bytes it held beyond what was held before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, max(0, memory("VmHWM") - before)


def shares(count: int, generator: np.random.Generator) -> Tensor:
    """Shares of a few classes, the others smoothed, as regions have them: float32 [count, C]."""
    drawn = generator.dirichlet([0.15] * CLASSES, count)
    drawn = np.where(drawn < 1e-3, OPTIONS.regions.smoothing, drawn)
    return torch.tensor(drawn / drawn.sum(1, keepdims=True), dtype=torch.float32)


def both_histograms(p: Tensor, labelled: Tensor) -> Tensor:
    """The histograms of candidates against labelled regions and against each other, [M, 2 S]."""
    bins, limit = OPTIONS.regions.divergence_bins, OPTIONS.regions.divergence_limit
    return torch.cat([divergence_histograms(p, q, bins=bins, limit=limit) for q in (labelled, p)], dim=1)


def both_histograms_row_by_row(rows: list[int], p: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """The same of some candidates, one call of each function per candidate and set; `others` are [C, L], contiguous."""
    bins, limit = OPTIONS.regions.divergence_bins, OPTIONS.regions.divergence_limit
    found = []
    for row in rows:
        for q in others:
            divergences = scipy.stats.entropy(p[row][:, None], q, axis=0)
            counts, _ = np.histogram(np.minimum(divergences, limit), bins=bins, range=(0.0, limit))
            found.append(counts / q.shape[1])
    return np.array(found).reshape(len(rows), -1)


def step(images: int, p: Tensor, labelled: Tensor, generator: torch.Generator) -> dict[str, tuple[float, int]]:
    """Returns the seconds and bytes of each part of one step."""
    regions, smoothing = OPTIONS.regions, OPTIONS.regions.smoothing
    grid = (regions.rows, regions.columns)
    smooth = 4 * torch.randn(1, CLASSES, HEIGHT // 32, WIDTH // 32, generator=generator)
    coarse = F.interpolate(smooth, (HEIGHT // 4, WIDTH // 4), mode="bilinear")
    logits = upsample_logits(coarse, (HEIGHT, WIDTH))
    classes, entropy = predicted_classes(logits), entropy_map_of_logits(logits)
    network = QueryNetwork(**OPTIONS.network(CLASSES)).eval()
    features = torch.randn(POOLS, POOL_SIZE, regions.action_features(CLASSES), generator=generator)
    state = torch.randn(1, STATE_IMAGES * regions.count, regions.state_features(CLASSES), generator=generator)
    answers = torch.randint(0, CLASSES, (POOLS, HEIGHT // 8, WIDTH // 16), generator=generator).to(torch.uint8)

    def of_all_images(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(images):
                work()

        return run

    def choose() -> Tensor:
        with torch.inference_mode():
            return network(state, features).argmax(1)

    return {
        RESAMPLING: timed(of_all_images(lambda: upsample_logits(coarse, (HEIGHT, WIDTH)))),
        f"predicted classes of {images} images": timed(of_all_images(lambda: predicted_classes(logits))),
        "their entropies": timed(of_all_images(lambda: entropy_map_of_logits(logits))),
        "their regions' class shares": timed(of_all_images(lambda: class_shares(classes, CLASSES, *grid, smoothing))),
        "their regions' pooled entropies": timed(
            of_all_images(lambda: pooled_entropies(entropy, *grid, regions.entropy_cells, regions.entropy_poolings))
        ),
        "histograms against labelled regions and each other": timed(lambda: both_histograms(p, labelled)),
        "the query network's values and choice": timed(choose),
        "class shares of the new labels": timed(lambda: label_shares(answers, CLASSES, smoothing)),
    }


def ways_to_count(p: Tensor, repeats: int) -> dict[str, float]:
    """Returns the nanoseconds per divergence of a chunk's product, and of ways to make histograms of it."""
    bins, rows, columns = OPTIONS.regions.divergence_bins, 256, 4096
    divergences = (kl_matrix(p[:rows], p[:columns]) * (bins / OPTIONS.regions.divergence_limit)).clamp_max(bins - 1)
    across = divergences.T.contiguous()
    first = torch.arange(0, rows * bins, bins)
    one = torch.ones(1, dtype=torch.int64)

    def flat(values: Tensor, dtype: torch.dtype, offset: Tensor) -> Tensor:
        index = values.to(dtype).add_(offset.to(dtype))
        return torch.bincount(index.view(-1), minlength=rows * bins).view(rows, bins)

    def scattered() -> Tensor:
        empty = torch.zeros(rows, bins, dtype=torch.int64)
        return empty.scatter_add_(1, divergences.long(), one.expand(rows, columns))

    def edge_by_edge() -> Tensor:
        small = divergences.to(torch.uint8)
        below = [(small < edge).sum(1) for edge in range(bins + 1)]
        return torch.stack(below, 1).diff(dim=1)

    factor, logs = p[:rows].T.contiguous(), p[:columns].log()
    ways: dict[str, Callable[[], Tensor]] = {
        "q by q, int16, bincount (kept)": lambda: flat(across, torch.int16, first),
        "p by p, int16, bincount": lambda: flat(divergences, torch.int16, first[:, None]),
        "p by p, int64, bincount": lambda: flat(divergences, torch.int64, first[:, None]),
        "p by p, scatter_add_": scattered,
        "p by p, uint8, below each edge": edge_by_edge,
    }
    expected = scattered()
    for name, way in ways.items():
        if not torch.equal(way(), expected):
            raise SystemExit(f"'{name}' counts otherwise")
    # Candidates that are much alike, as most of a street's are, put most divergences into one bin.
    alike = torch.where(torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.95, bins - 1.0, 3.0)
    alike_across = alike.T.contiguous()
    ways |= {
        "  the first, 95 % in one bin": lambda: flat(alike_across, torch.int16, first),
        "  the second, 95 % in one bin": lambda: flat(alike, torch.int16, first[:, None]),
    }
    times: dict[str, list[float]] = {}
    for _ in range(4 * repeats):
        for name, way in {"the product": lambda: logs @ factor, **ways}.items():
            start = time.perf_counter()
            way()
            times.setdefault(name, []).append(1e9 * (time.perf_counter() - start) / (rows * columns))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one labelling step of RALIS at the paper's Cityscapes sizes.")
    parser.add_argument("--images", type=int, default=210, help="full images of the step (default: 210)")
    parser.add_argument("--rows", type=int, default=48, help="candidates per turn that SciPy does (default: 48)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the comparison with SciPy (default: 3)")
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    p, labelled = shares(POOLS * POOL_SIZE, generator), shares(LABELLED, generator)
    terms = len(p) * (len(p) + len(labelled))
    print(
        f"torch {torch.__version__}, SciPy {scipy.__version__}, NumPy {np.__version__}; CPU, "
        f"{torch.get_num_threads()} threads; {len(p)} candidates, {len(labelled)} labelled regions, {CLASSES} classes, "
        f"{terms / 1e6:.0f} million divergences"
    )
    both_histograms(p[:512], labelled)
    parts = step(options.images, p, labelled, torch.Generator().manual_seed(0))
    for name, (seconds, size) in parts.items():
        print(f"{name:52s} {seconds:8.2f} s   at most {size / MIB:6.0f} MiB beyond its input")
    total = sum(seconds for seconds, _ in parts.values())
    print(f"{'one step':52s} {total:8.2f} s, without {RESAMPLING} {total - parts[RESAMPLING][0]:.2f} s")

    others = [np.ascontiguousarray(q.double().numpy().T) for q in (labelled, p)]
    wide = p.double().numpy()
    ours, theirs, disagreement = [], [], 0.0
    for turn in range(options.repeats):
        rows = list(range(turn, len(p), len(p) // options.rows))[: options.rows]
        start = time.perf_counter()
        found = both_histograms(p, labelled)
        middle = time.perf_counter()
        expected = both_histograms_row_by_row(rows, wide, others)
        end = time.perf_counter()
        ours.append(middle - start)
        theirs.append((end - middle) / len(rows) * len(p))
        disagreement = max(disagreement, float(np.abs(found[rows].numpy() - expected).max()))
    if disagreement > 1e-3:
        raise SystemExit(f"the histograms differ by {disagreement} from those of SciPy and NumPy")
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"\nhistograms {statistics.median(ours):.2f} s; row by row {statistics.median(theirs):.0f} s, extrapolated from "
        f"{options.repeats} turns of {options.rows} of {len(p)} candidates; ratio {ratio:.0f}"
    )
    print(f"largest difference of a bin's share: {disagreement:.1e}\n")
    for name, nanoseconds in ways_to_count(p, options.repeats).items():
        print(f"{name:52s} {nanoseconds:8.2f} ns per divergence")


if __name__ == "__main__":
    main()
