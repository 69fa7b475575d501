"""Times the functional package against the obvious version of the same work, in one process on the same data.

    python benchmarks/functional.py            # OMP_NUM_THREADS sets the threads
    python benchmarks/functional.py --device cuda

What is compared:
- label inference (EIL, Eq. 1 and 2) with a window of 101 against one of 21: the cost should hardly grow with the window;
- the window test as it is against max-pooling of one map per class, at 43 × 43;
- label pixels per feature cell against one-hot maps that are average-pooled;
- the passes over memory that a dilation costs, in units of one OR of two maps of its words.
The two sides of a ratio are timed in turns, so that a busy machine slows both; a ratio is that of the two medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from raysseg.functional import (
    UNLABELLED,
    candidates,
    cell_counts,
    dilate_classes,
    infer_labels,
    operator_planes,
    reliability,
    within_window,
)

BATCH, CLASSES, SIDE, CELLS, CHANNELS = 4, 21, 512, 128, 256


def make_scene(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth probabilities [B, K, H, W], a label map with scribbles on 3 % of the pixels, and features [B, D, h, w]."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(BATCH, CLASSES, 16, 16, generator=generator)
    probabilities = F.interpolate(logits, (SIDE, SIDE), mode="bilinear").softmax(1)
    labels = probabilities.argmax(1).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) > 0.03] = UNLABELLED
    features = torch.randn(BATCH, CHANNELS, CELLS, CELLS, generator=generator)
    return probabilities.to(device), labels.to(device), features.to(device)


def measure(work: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each piece of work, run in turns after one run of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, run in work.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def pool_window(labels: Tensor, classes: Tensor, window: int) -> Tensor:
    """The window test by max-pooling of one map per class."""
    maps = torch.stack([labels == k for k in range(CLASSES)], dim=1).float()
    near = F.max_pool2d(maps, window, stride=1, padding=window // 2)
    return near.gather(1, classes[:, None].long())[:, 0] > 0


def pool_window_by_sides(labels: Tensor, classes: Tensor, window: int) -> Tensor:
    """The same with the square's two sides pooled one after the other, the stronger opponent."""
    maps = torch.stack([labels == k for k in range(CLASSES)], dim=1).float()
    near = F.max_pool2d(maps, (1, window), stride=1, padding=(0, window // 2))
    near = F.max_pool2d(near, (window, 1), stride=1, padding=(window // 2, 0))
    return near.gather(1, classes[:, None].long())[:, 0] > 0


def pool_counts(labels: Tensor) -> Tensor:
    """Label pixels per feature cell by average-pooling of one map per class."""
    maps = torch.stack([labels == k for k in range(CLASSES)], dim=1).float()
    return F.avg_pool2d(maps, SIDE // CELLS, divisor_override=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the functional package against its obvious versions.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=21, help="timed turns of each comparison (default: 21)")
    options = parser.parse_args()
    device, repeats = torch.device(options.device), options.repeats

    probabilities, labels, features = make_scene(device)
    classes, confidence = candidates(probabilities)
    thresholds = torch.full((BATCH, CLASSES), 0.5, device=device)
    counts = cell_counts(labels, CLASSES, (CELLS, CELLS))
    words = dilate_classes(labels, 1, CLASSES)

    def infer(window: int) -> Tensor:
        return infer_labels(labels, labels, classes, confidence, thresholds, window=window)

    def infer_all(window: int) -> Tensor:
        return infer_labels(labels, labels, *candidates(probabilities), thresholds, window=window)

    def test_window(window: int) -> Tensor:
        return within_window(labels, classes, window=window, num_classes=CLASSES)

    if not torch.equal(test_window(43), pool_window(labels, classes, 43)):
        raise SystemExit("the window test and max-pooling disagree")
    if not torch.equal(counts, pool_counts(labels)):
        raise SystemExit("the counts per cell and average-pooling disagree")

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {name}; {BATCH} maps of {SIDE} x {SIDE}, {CLASSES} classes; medians of {repeats}"
    )

    found = measure(
        {
            "label inference, window 21": lambda: infer(21),
            "label inference, window 101": lambda: infer(101),
            "  with candidates, window 21": lambda: infer_all(21),
            "  with candidates, window 101": lambda: infer_all(101),
            "dilation alone, window 21": lambda: dilate_classes(labels, 21, CLASSES),
            "dilation alone, window 101": lambda: dilate_classes(labels, 101, CLASSES),
            "window test, window 43": lambda: test_window(43),
            "one OR of two maps": lambda: words | words,
            "label pixels per cell": lambda: cell_counts(labels, CLASSES, (CELLS, CELLS)),
            "  by average-pooling": lambda: pool_counts(labels),
            "operator planes": lambda: operator_planes(features, probabilities, labels),
            "reliability of one map": lambda: reliability(features, counts),
        },
        repeats,
        device,
    )
    found |= measure(
        {
            "  by max-pooling, window 43": lambda: pool_window(labels, classes, 43),
            "  by max-pooling side by side": lambda: pool_window_by_sides(labels, classes, 43),
        },
        1,
        device,
    )
    for work, milliseconds in found.items():
        print(f"{work:32s} {milliseconds:10.3f} ms")

    def ratio(text: str, over: str, under: str) -> None:
        print(f"{text:52s} {found[over] / found[under]:10.2f}")

    print()
    ratio("label inference, 101 : 21", "label inference, window 101", "label inference, window 21")
    ratio("label inference with candidates, 101 : 21", "  with candidates, window 101", "  with candidates, window 21")
    ratio("dilation alone, 101 : 21", "dilation alone, window 101", "dilation alone, window 21")
    ratio("max-pooling : window test, 43", "  by max-pooling, window 43", "window test, window 43")
    ratio("max-pooling side by side : window test, 43", "  by max-pooling side by side", "window test, window 43")
    ratio("dilation 21 in passes of one OR (10 in theory)", "dilation alone, window 21", "one OR of two maps")
    ratio("dilation 101 in passes of one OR (14 in theory)", "dilation alone, window 101", "one OR of two maps")
    ratio("average-pooling : label pixels per cell", "  by average-pooling", "label pixels per cell")


if __name__ == "__main__":
    main()
