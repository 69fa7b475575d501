"""Human-like scribbles made from dense label maps: a few smooth strokes well inside each region."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy import ndimage

from raysseg.configuration import Settings
from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES, PADDING, UNLABELLED

_TURNS = tuple(math.radians(d) for d in (0, 15, -15, 30, -30, 50, -50, 75, -75, 100, -100))
"""Changes of direction that a stroke tries, in this order, when the way straight on is blocked."""

_OUTSIDE, _FREE, _DRAWN = 0, 1, 2


class ScribbleSettings(Settings):
    """How scribbles are generated from dense labels."""

    share: float = Field(
        default=0.03,
        gt=0,
        le=0.5,
        description="Share of the labelled pixels that the strokes cover. [S] ScribbleSup's cover about 3 %.",
    )
    width: int = Field(
        default=3,
        ge=1,
        le=31,
        description="Stroke width in pixels, less where a region is thinner. [S] rloss draws ScribbleSup 3 px wide.",
    )
    seed: int = Field(
        default=0, ge=0, description="Base seed; each image draws from the pair of this seed and its key. [R]"
    )

    def for_label(self, label: np.ndarray, key: str, num_classes: int) -> np.ndarray:
        """Returns the scribble map, uint8 [H, W], of the sample `key` with the dense `label`, uint8 [H, W]."""
        seed = scribble_seed(self.seed, key)
        return generate_scribbles(label, seed, num_classes=num_classes, width=self.width, share=self.share)


def scribble_seed(seed: int, key: str) -> int:
    """Returns a 63-bit seed for one sample, the same on every machine and whatever the order of the samples."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(slots=True, kw_only=True)
class _Region:
    """One connected component of one class: where it lies, and how many pixels its strokes should cover."""

    label: int
    window: tuple[slice, slice]
    mask: np.ndarray
    area: int
    budget: float = 0.0


def generate_scribbles(
    label: np.ndarray, seed: int, *, num_classes: int, width: int = 3, share: float = 0.03
) -> np.ndarray:
    """Draws human-like strokes into every class of a dense label map.

    Strokes are smooth curves that keep away from the region's border and from each other, `width` px wide or less
    where the region is thinner. They never leave the region, so they never carry a wrong class. Large components get
    more and longer strokes; the smallest get none, as from a human in a hurry; the largest component of every present
    class always gets one.

    Args:
        label: dense labels, uint8 [H, W], classes 0…K−1; 254 and 255 are left alone.
        seed: the result is a function of the label and this number.
        num_classes: K.
        width: stroke width in pixels.
        share: share of the labelled pixels to cover, 0…1; exceeded where every class needs its stroke, missed where
            regions are too thin.

    Returns:
        scribble map, uint8 [H, W], 255 = unlabelled.

    Raises:
        InputError: where `label` is not a uint8 map or holds a value that is neither a class nor 254 nor 255.

    Source: our choice; the width and the share are ScribbleSup's.
    """
    if label.ndim != 2 or label.dtype != np.uint8:
        raise InputError(f"A label map is uint8 [H, W]; this one is {label.dtype} {list(label.shape)}.")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(f"The number of classes is {num_classes}; 1 to {MAX_CLASSES} are expected.")
    wrong = label[(label >= num_classes) & (label < PADDING)]
    if wrong.size:
        raise InputError(f"A label map holds the value {wrong[0]}; 0 to {num_classes - 1}, 254 and 255 are expected.")
    random = np.random.default_rng(seed)
    scribble = np.full(label.shape, UNLABELLED, np.uint8)
    total = share * int((label < PADDING).sum())
    owed = 0.0
    # Small regions first: what they cannot hold passes on to the larger ones.
    for region in sorted(_regions(label, num_classes, total, width, random), key=lambda r: r.area):
        drawn = _draw_region(region, region.budget + owed, width, random)
        scribble[region.window][drawn] = region.label
        owed += region.budget - int(drawn.sum())
    return scribble


def _regions(
    label: np.ndarray, num_classes: int, total: float, width: int, random: np.random.Generator
) -> list[_Region]:
    """Splits the label map into connected components and shares `total` pixels among those that get a stroke."""
    regions: list[_Region] = []
    for k in np.unique(label[label < num_classes]).tolist():
        components, _ = ndimage.label(label == k)
        areas = np.bincount(components.ravel())[1:]
        largest = int(areas.argmax()) + 1
        for index, window in enumerate(ndimage.find_objects(components), start=1):
            area = int(areas[index - 1])
            # A component of a few stroke widths squared is often overlooked; a large one never is.
            seen = random.random() < 1 - math.exp(-area / (12.0 * width * width))
            if index == largest or seen:
                mask = components[window] == index
                regions.append(_Region(label=k, window=window, mask=mask, area=area))
    # Between "by area" (objects would get next to nothing) and "by diameter" (small ones would be filled).
    weights = [region.area**0.7 for region in regions]
    for region, weight in zip(regions, weights, strict=True):
        fair = total * weight / sum(weights)
        # Whatever is seen gets at least a dab; nobody paints more than a third of a region.
        region.budget = min(max(fair, width * width), region.area / 3)
    return regions


def _draw_region(region: _Region, budget: float, width: int, random: np.random.Generator) -> np.ndarray:
    """Draws strokes into one region until about `budget` pixels are covered; returns them as bool [h, w]."""
    padded = np.pad(region.mask, width)
    depth = ndimage.distance_transform_edt(padded)
    deepest = float(depth.max())
    # The core is where the middle of a stroke may run: clear of the border, as far as the region allows it.
    core = depth >= min(max(width / 2 + 1.5, 0.2 * deepest), 0.6 * deepest)
    height, pitch = padded.shape
    state = bytearray(core.astype(np.uint8).tobytes())
    drawn = np.zeros((height, pitch), bool)
    starts = np.flatnonzero(core)
    attraction = depth.ravel()[starts] ** 2
    low, high = (width - 1) // 2, width // 2 + 1
    # Curves are as wide as the region that they fill; the last factor turns the process's spread into that of a step.
    wobble = min(0.12, 5 / math.sqrt(region.area)) * math.sqrt(1 - 0.9**2)
    covered = 0
    # At least one pixel, even where the smaller regions used up more than their part.
    limit = max(min(budget, region.area / 2), 1)
    for _ in range(64):
        left = limit - covered
        # A rest smaller than a dab is not worth another stroke.
        if left <= 0 or (covered and left < 0.5 * width * width):
            break
        free = np.frombuffer(bytes(state), np.uint8)[starts] == _FREE
        if not free.any():
            break
        odds = attraction * free
        start = int(random.choice(starts, p=odds / odds.sum()))
        # A square brush covers its own area at the end of a stroke, and 1.2 widths per step at a mean slant.
        # No single stroke goes on for ever; a big region gets several.
        length = (left - width * (width - 1)) / (1.2 * width)
        length = max(1.0, min(length, random.uniform(1.5, 3.0) * math.sqrt(region.area)))
        path = _walk(state, pitch, start, length, wobble, random)
        for y, x in path:
            drawn[y - low : y + high, x - low : x + high] = True
        drawn &= padded
        covered = int(drawn.sum())
        # The next stroke keeps its distance from this one.
        around = 2 * width
        for y, x in path:
            top, bottom = max(y - around, 0), min(y + around + 1, height)
            for row in range(top, bottom):
                first, last = row * pitch + max(x - around, 0), row * pitch + min(x + around + 1, pitch)
                state[first:last] = bytes(last - first)
    return drawn[width:-width, width:-width]


def _walk(
    state: bytearray, pitch: int, start: int, length: float, wobble: float, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Walks a smooth random curve over free pixels, both ways from `start`; returns its pixels as (y, x).

    `wobble` is the standard deviation of the change of curvature per step, in radians per pixel.
    """
    origin_y, origin_x = divmod(start, pitch)
    heading = random.uniform(0, 2 * math.pi)
    path = [(origin_y, origin_x)]
    for direction in (heading, heading + math.pi):
        y, x, angle, bend = origin_y + 0.5, origin_x + 0.5, direction, 0.0
        recent = [start]
        drift = random.normal(0, wobble, size=int(length) + 1)
        side = 1 if random.random() < 0.5 else -1
        for step in range(int(length) + 1):
            if len(path) >= length:
                break
            # Curvature drifts and decays, as a hand's does: an Ornstein-Uhlenbeck process.
            bend = 0.9 * bend + drift[step]
            angle += bend
            for turn in _TURNS:
                new_y, new_x = y + math.sin(angle + side * turn), x + math.cos(angle + side * turn)
                place = int(new_y) * pitch + int(new_x)
                if state[place] == _FREE or place in recent:
                    break
            else:
                break
            if turn:
                bend = 0.0
            y, x, angle = new_y, new_x, angle + side * turn
            if place not in recent:
                path.append((int(y), int(x)))
                state[place] = _DRAWN
                recent = [*recent[-3:], place]
    return path
