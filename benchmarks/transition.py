"""Measures what one transition of EIL takes on the wire and in the replay buffer, at 512 × 512 with 21 classes.

    python benchmarks/transition.py
    RAYSSEG_SHARED_DATA=… python benchmarks/transition.py    # also real label maps, where they are to be had

The label maps grow from scribbles through five stages of Eq. 1 and 2 (window 21, thresholds 0.5), under probabilities
made of the dense labels at stride 4 with noise, so that the borders are as ragged as a network's. Then all pixels are
labelled, the dense labels themselves. Every map is the M' of a transition, once of an episode's first step (M is the stored
map and does not travel) and once of a later step (M travels, too).

Against it stand the dense state by arithmetic, and RLlib's stock `SingleAgentEpisode` of the same two observations (the
operators' planes), pickled as an actor would send it. Sizes do not depend on the machine.
"""

from __future__ import annotations

import itertools
import os
import pickle
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from scenes import scenes
from torch.nn import functional as F

from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.settings import ReplaySettings
from raysseg.data import encode_map, generate_scribbles
from raysseg.functional import PADDING, candidates, infer_labels, plane_count

CLASSES, SIDE, CELLS, CHANNELS, STAGES = 21, 512, 128, 256, 5
IMAGES = 12
BUDGET = 20_000


def label_maps() -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
    """Returns (key, dense labels, scribbles), both uint8 [512, 512], by where they come from."""
    made = [
        (sample.key, sample.label, sample.scribble)
        for sample in scenes(IMAGES, SIDE, SIDE, CLASSES)
        if sample.label is not None and sample.scribble is not None
    ]
    sources = {"synthetic scenes": made}
    shared = Path(os.environ.get("RAYSSEG_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    for name, void in (("camvid", 11), ("acdc", None)):
        paths = sorted((shared / name / "train" / "labels").glob("*.png"))
        if not paths:
            print(f"{name}: not here, left out")
            continue
        sources[name] = [read_map(path, void) for path in paths[:: len(paths) // IMAGES][:IMAGES]]
    return sources


def read_map(path: Path, void: int | None) -> tuple[str, np.ndarray, np.ndarray]:
    """Reads a label map at 512 × 512 (nearest), and draws scribbles into it."""
    with Image.open(path) as image:
        label = np.array(image.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    if void is not None:
        label[label == void] = PADDING + 1
    return path.stem, label, generate_scribbles(label, 0, num_classes=CLASSES)


def grow(label: np.ndarray, scribble: np.ndarray, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Yields M^0 (the scribbles) to M^5, and the dense labels; uint8 [512, 512]."""
    truth = torch.from_numpy(label)[None]
    cells = truth[:, :: SIDE // CELLS, :: SIDE // CELLS].long()
    logits = 4.0 * F.one_hot(cells.clamp(max=CLASSES), CLASSES + 1)[..., :CLASSES].permute(0, 3, 1, 2)
    logits = logits + torch.randn(logits.shape, generator=generator)
    probabilities = F.interpolate(logits, (SIDE, SIDE), mode="bilinear").softmax(1)
    classes, confidence = candidates(probabilities)
    scribbles = torch.from_numpy(scribble)[None]
    labels, thresholds = scribbles, torch.full((1, CLASSES), 0.5)
    yield scribble
    for _ in range(STAGES):
        labels = infer_labels(labels, scribbles, classes, confidence, thresholds, window=21)
        yield labels[0].numpy()
    yield label


def transition(key: str, number: int, before: np.ndarray | None, after: np.ndarray) -> dict[str, list[object]]:
    """Returns the columns of one transition with the action (τ_o, τ_g)."""
    return {
        "key": [key],
        "row": [number],
        "seed": [2**61 + number],
        "stage": [1],
        "step": [0 if before is None else 1],
        "labels": [None if before is None else encode_map(before)],
        "action": [np.array([0.5, 0.5], np.float32).tobytes()],
        "next_labels": [encode_map(after)],
        "reward": [0.1],
        "reward_parts": [[0.05, 0.05]],
        "value": [0.1],
        "terminated": [False],
        "label_version": [1],
        "segmenter_version": [1],
        "policy_version": [1],
    }


def measure(maps: list[tuple[str, np.ndarray, np.ndarray]], generator: torch.Generator) -> dict[str, list[int]]:
    """Returns bytes per transition alone on the wire, for first and later steps, and in a replay buffer."""
    first, later, batches = [], [], []
    for number, (key, label, scribble) in enumerate(maps):
        stages = list(grow(label, scribble, generator))
        for before, after in itertools.pairwise(stages):
            one = transition(key, number, None, after)
            batches.append(one)
            first.append(rollout.wire_bytes(rollout.transitions(one)))
            later.append(rollout.wire_bytes(rollout.transitions(transition(key, number, before, after))))
    replay = ReplayBuffer(ReplaySettings(capacity=len(batches)))
    for start in range(0, len(batches), 8):
        part = batches[start : start + 8]
        replay.add(rollout.transitions({name: [one[name][0] for one in part] for name in part[0]}))
    return {"first": first, "later": later, "replay": [round(replay.nbytes / len(replay))]}


def dense_bytes() -> int:
    """Bytes of the dense state in half precision: F at stride 4, P and M as one plane per class."""
    return 2 * (CHANNELS * CELLS * CELLS + 2 * CLASSES * SIDE * SIDE)


def stock_bytes() -> int:
    """Bytes of RLlib's own episode of one step over the operators' planes, pickled."""
    random = np.random.default_rng(0)
    shape = (plane_count(CHANNELS, CLASSES), CELLS, CELLS)
    episode = SingleAgentEpisode()
    episode.add_env_reset(random.random(shape, dtype=np.float32))
    episode.add_env_step(random.random(shape, dtype=np.float32), np.array([0.5, 0.5], np.float32), 0.1, truncated=True)
    return len(pickle.dumps(episode))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    everything: list[int] = []
    print(f"{'bytes per transition':20s} {'mean':>8s} {'largest':>8s} {'in replay':>10s} {'later step, mean':>18s}")
    for name, maps in label_maps().items():
        found = measure(maps, generator)
        everything += found["first"]
        print(
            f"{name:20s} {statistics.mean(found['first']):8.0f} {max(found['first']):8d} {found['replay'][0]:10d} "
            f"{statistics.mean(found['later']):18.0f}"
        )
    mean, dense, stock = statistics.mean(everything), dense_bytes(), stock_bytes()
    print(f"\nall: mean {mean:.0f} of at most {BUDGET}")
    print(f"dense state (F, P, M) in half precision, one:     {dense:10d} bytes, {dense / mean:8.0f} times as much")
    print(f"dense transition (s, s'):                         {2 * dense:10d} bytes, {2 * dense / mean:8.0f} times")
    print(f"RLlib's episode of the same observations, pickled: {stock:9d} bytes, {stock / mean:8.0f} times")


if __name__ == "__main__":
    main()
