"""Synthetic scenes, made from a seed: textured objects on textured ground, in colours that do not tell the class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from raysseg.configuration import Settings
from raysseg.data.sample import DatasetInfo, Expression, Sample, default_palette
from raysseg.data.scribbles import ScribbleSettings, scribble_seed

CLASS_NAMES = ("background", "disc", "box", "ring", "stripe")
GENERATOR_VERSION = 1
"""Rises with every change that alters a pixel, so that caches made before it are not used."""

_FREQUENCY = np.array([0.36, 0.28, 0.20, 0.16])
"""How often an object is a disc, a box, a ring, a stripe: the classes are meant to be out of balance."""

_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (190, 70, 60),
    "green": (80, 160, 75),
    "blue": (70, 95, 180),
    "yellow": (195, 175, 70),
    "purple": (145, 80, 160),
    "grey": (130, 130, 130),
}
"""One palette for objects and ground alike."""


Grid = tuple[np.ndarray, np.ndarray]
"""Row and column of every pixel, two float32 [H, W]."""


class SyntheticSettings(Settings):
    """How many scenes, how large and how hard."""

    train_images: int = Field(default=96, ge=1, description="Images of the split 'train'. [R]")
    val_images: int = Field(default=48, ge=1, description="Images of the split 'val'. [R]")
    height: int = Field(default=96, ge=32, le=2048, description="Image height in pixels. [R]")
    width: int = Field(default=96, ge=32, le=2048, description="Image width in pixels. [R]")
    objects: int = Field(
        default=6, ge=1, le=30, description="Most objects in an image; at least half as many are drawn. [R]"
    )
    noise: float = Field(default=9.0, ge=0, le=100, description="Standard deviation of the pixel noise, of 255. [R]")
    illumination: float = Field(
        default=0.35,
        ge=0,
        le=0.9,
        description="Strength of the light's change over the image and between images, 0…1. [R]",
    )
    seed: int = Field(
        default=0, ge=0, description="Base seed; each image draws from the pair of this seed and its key. [R]"
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Object:
    """One drawn object: class, words for it, and the pixels that it would cover were nothing in front of it."""

    label: int
    colour: str
    centre_x: float
    mask: np.ndarray


def synthetic_info() -> DatasetInfo:
    """Returns what holds for all synthetic scenes: five classes, class 0 the ground."""
    return DatasetInfo(
        name="synthetic",
        class_names=CLASS_NAMES,
        palette=default_palette(len(CLASS_NAMES)),
        has_background=True,
        source=f"synthetic scenes, generator version {GENERATOR_VERSION}",
    )


def synthetic_samples(
    settings: SyntheticSettings, scribbles: ScribbleSettings | None = None, splits: tuple[str, ...] = ("train", "val")
) -> Iterator[Sample]:
    """Makes the scenes of the given splits, one by one, each from its own seed.

    Args:
        settings: how many and how hard.
        scribbles: how the scribbles are drawn; the defaults where None.
        splits: out of "train" and "val".

    Yields:
        samples with key "<split>-<number, five digits>", label, scribble, tags (the foreground classes in it) and
        referring expressions with the mask of what is visible of the object.
    """
    counts = {"train": settings.train_images, "val": settings.val_images}
    for split in splits:
        for index in range(counts[split]):
            yield synthetic_sample(settings, split, index, scribbles or ScribbleSettings())


def synthetic_sample(settings: SyntheticSettings, split: str, index: int, scribbles: ScribbleSettings) -> Sample:
    """Makes one scene; a pure function of the arguments."""
    key = f"{split}-{index:05d}"
    random = np.random.default_rng(scribble_seed(settings.seed, f"scene/{key}"))
    positions: np.ndarray = np.indices((settings.height, settings.width), dtype=np.float32)
    grid: Grid = (positions[0], positions[1])
    colour, ground_colours = _ground(grid, random)
    label: np.ndarray = np.zeros((settings.height, settings.width), np.uint8)
    objects: list[_Object] = []
    for _ in range(random.integers((settings.objects + 1) // 2, settings.objects + 1)):
        drawn = _draw_object(colour, label, grid, ground_colours, random)
        objects.append(drawn)
    image = _photograph(colour, grid, settings, random)
    return Sample(
        key=key,
        image=image,
        split=split,
        label=label,
        scribble=scribbles.for_label(label, key, len(CLASS_NAMES)),
        tags=tuple(int(k) for k in np.unique(label) if k != 0),
        expressions=_expressions(objects),
    )


def _smooth_noise(grid: Grid, cell: float, random: np.random.Generator) -> np.ndarray:
    """Returns smooth random blotches about `cell` pixels wide, float32 [H, W], in −1…1."""
    rows, columns = grid[0] / cell, grid[1] / cell
    knots = random.uniform(-1, 1, (int(rows[-1, 0]) + 2, int(columns[0, -1]) + 2)).astype(np.float32)
    top, left = rows[:, 0].astype(int), columns[0].astype(int)
    fy, fx = rows[:, :1] - top[:, None], columns[:1] - left[None]
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    upper = knots[top][:, left] * (1 - fx) + knots[top][:, left + 1] * fx
    lower = knots[top + 1][:, left] * (1 - fx) + knots[top + 1][:, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def _colour(random: np.random.Generator, without: tuple[str, ...] = ()) -> tuple[str, np.ndarray]:
    """Draws a colour's name, none of `without`, and its jittered RGB value, float32 [3]."""
    names = [name for name in _COLOURS if name not in without]
    name = names[random.integers(len(names))]
    return name, (np.array(_COLOURS[name]) + random.normal(0, 12, 3)).astype(np.float32)


def _ground(grid: Grid, random: np.random.Generator) -> tuple[np.ndarray, tuple[str, str]]:
    """Paints the ground, float32 [H, W, 3]: two colours in blotches, and a fine grain or a weave; names the colours."""
    (first_name, first), (second_name, second) = _colour(random), _colour(random)
    blotches = 0.5 + 0.5 * np.clip(1.8 * _smooth_noise(grid, random.uniform(14, 30), random), -1, 1)
    colour = first + (second - first) * blotches[..., None]
    # The ground may carry a weaker form of the objects' own textures, so that texture alone does not decide either.
    angle, period = random.uniform(0, math.pi), random.uniform(4, 9)
    wave = np.sin(2 * math.pi / period * (grid[0] * math.sin(angle) + grid[1] * math.cos(angle)))
    grain = _smooth_noise(grid, random.uniform(2, 4), random)
    colour += 14.0 * (wave if random.random() < 0.4 else grain)[..., None]
    return colour, (first_name, second_name)


def _draw_object(
    colour: np.ndarray,
    label: np.ndarray,
    grid: Grid,
    ground_colours: tuple[str, str],
    random: np.random.Generator,
) -> _Object:
    """Paints one object over `colour` and `label` in place; what comes later occludes what came before."""
    height, width = label.shape
    k = int(random.choice(4, p=_FREQUENCY)) + 1
    size = min(height, width) * random.uniform(0.13, 0.26)
    centre_y, centre_x = random.uniform(0.08, 0.92) * height, random.uniform(0.08, 0.92) * width
    angle = random.uniform(0, math.pi)
    dy, dx = grid[0] - centre_y, grid[1] - centre_x
    along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    stretch = random.uniform(0.8, 1.25)
    radius = np.hypot(along * stretch, across / stretch)
    # Any object may have any colour but the ground's: colour shows that something is there, not what it is.
    name, base = _colour(random, without=ground_colours)
    period = random.uniform(4.5, 7.0)
    contrast = random.uniform(18, 34)
    if CLASS_NAMES[k] == "disc":
        mask = radius < size
        texture = np.clip(2 * _smooth_noise(grid, period, random), -1, 1)
    elif CLASS_NAMES[k] == "box":
        mask = (np.abs(along) * stretch < 0.9 * size) & (np.abs(across) / stretch < 0.9 * size)
        texture = np.sign(np.sin(math.pi / period * along) * np.sin(math.pi / period * across))
    elif CLASS_NAMES[k] == "ring":
        mask = (radius < 1.15 * size) & (radius > 0.55 * size)
        texture = np.cos(math.pi / (0.3 * size) * (radius - 0.85 * size))
    else:
        mask = (np.abs(along) < 1.6 * size) & (np.abs(across) < max(0.42 * size, 3.5))
        texture = np.sin(2 * math.pi / period * along)
    painted = base + contrast * texture[..., None] + np.float32(random.normal(0, 8)) * (dy / size)[..., None]
    colour[mask] = painted[mask]
    label[mask] = k
    return _Object(label=k, colour=name, centre_x=centre_x, mask=mask)


def _photograph(colour: np.ndarray, grid: Grid, settings: SyntheticSettings, random: np.random.Generator) -> np.ndarray:
    """Lights the scene from one side, casts soft shadows, adds noise; returns uint8 [H, W, 3]."""
    angle = random.uniform(0, 2 * math.pi)
    slope = (grid[0] / settings.height - 0.5) * math.sin(angle) + (grid[1] / settings.width - 0.5) * math.cos(angle)
    shadow = _smooth_noise(grid, max(settings.height, settings.width) / 3, random)
    light = 1 + settings.illumination * (slope + 0.5 * shadow + random.uniform(-0.6, 0.6))
    tint = 1 + settings.illumination * random.uniform(-0.3, 0.3, 3)
    noise = random.normal(0, settings.noise, colour.shape) if settings.noise else 0.0
    return np.clip(colour * light[..., None] * tint + noise, 0, 255).astype(np.uint8)


def _expressions(objects: list[_Object]) -> tuple[Expression, ...]:
    """Names the objects that a sentence can tell apart: by colour, by side or by size among those of their class."""
    visible: list[tuple[_Object, np.ndarray]] = []
    covered = np.zeros_like(objects[0].mask)
    for item in reversed(objects):
        seen = item.mask & ~covered
        covered |= item.mask
        # What is mostly hidden or cut off is not something that anybody would point at.
        if seen.sum() >= max(25, 0.3 * item.mask.sum()):
            visible.append((item, seen))
    expressions: list[Expression] = []
    for item, seen in reversed(visible):
        name = CLASS_NAMES[item.label]
        rivals = [(other, area) for other, area in visible if other.label == item.label and other is not item]
        if all(other.colour != item.colour for other, _ in rivals):
            expressions.append(Expression(text=f"the {item.colour} {name}", mask=seen))
        if not rivals:
            continue
        gaps = [other.centre_x - item.centre_x for other, _ in rivals]
        # A side or a size is only said where it is plain to see.
        if min(gaps) > 6:
            expressions.append(Expression(text=f"the left {name}", mask=seen))
        elif max(gaps) < -6:
            expressions.append(Expression(text=f"the right {name}", mask=seen))
        sizes = [float(area.sum()) for _, area in rivals]
        if seen.sum() > 1.4 * max(sizes):
            expressions.append(Expression(text=f"the large {name}", mask=seen))
        elif 1.4 * seen.sum() < min(sizes):
            expressions.append(Expression(text=f"the small {name}", mask=seen))
    return tuple(expressions)
