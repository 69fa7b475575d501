"""The label evolution as in the paper's Fig. 3: image, scribbles, label maps of the stages, truth."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.visualization.overlay import Palette, colour_map, overlay

PANEL_WIDTH = 240
"""Pixels that a panel has at most after scaling up, and at least after scaling down."""

MARGIN = 12
GAP = 8
CAPTION_HEIGHT = 26
LEGEND_LINE = 26
SWATCH = 16
OVERLAY_ALPHA = 0.65
"""Weight of the class colours in maps that are laid over the image."""
OUTLINE = (255, 255, 255)
INK = (38, 38, 38)
FRAME = (190, 190, 190)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionRow:
    """One sample of an evolution sheet.

    image: uint8 `[H, W, 3]`; maps: uint8 `[H, W]` each, the scribble map first; titles: one caption per map;
    truth, prediction: uint8 `[H, W]` or None; over_image: the maps are laid over the image, dimmed where they say nothing.
    """

    image: np.ndarray
    maps: Sequence[np.ndarray]
    titles: Sequence[str]
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    over_image: bool = False

    def label_panels(self) -> list[tuple[str, np.ndarray]]:
        """Caption and label map of every panel right of the image."""
        panels = list(zip(self.titles, self.maps, strict=True))
        if self.prediction is not None:
            panels.append(("prediction", self.prediction))
        if self.truth is not None:
            panels.append(("truth", self.truth))
        return panels


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own DejaVu Sans, so that pictures look the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _check(row: EvolutionRow) -> None:
    if row.image.dtype != np.uint8 or row.image.ndim != 3 or row.image.shape[2] != 3:
        raise InputError(f"The image is {row.image.dtype} {list(row.image.shape)}; expected is uint8 [H, W, 3].")
    if len(row.titles) != len(row.maps):
        raise InputError(f"There are {len(row.maps)} label maps and {len(row.titles)} titles; expected is one per map.")
    for title, labels in row.label_panels():
        if labels.shape != row.image.shape[:2]:
            raise InputError(
                f"The label map '{title}' is {list(labels.shape)}; expected is "
                f"{list(row.image.shape[:2])}, as the image."
            )


def _scaled(picture: np.ndarray, *, labels: np.ndarray | None, palette: Palette) -> Image.Image:
    """The image (labels None) or the painted label map, scaled by an integer factor towards the panel width."""
    width = picture.shape[1]
    factor = max(1, PANEL_WIDTH // width)
    if labels is not None:
        # Enlarged before painting: the hatch of the unlabelled then has one size in all strips.
        panel = Image.fromarray(colour_map(labels.repeat(factor, axis=0).repeat(factor, axis=1), palette))
    elif factor > 1:
        panel = Image.fromarray(picture).resize((width * factor, picture.shape[0] * factor), Image.Resampling.BICUBIC)
    else:
        panel = Image.fromarray(picture)
    # Averages the colours of whole cells: thin scribbles fade a little, but none is lost.
    return panel.reduce(max(1, width // PANEL_WIDTH))


def _laid_over(image: np.ndarray, labels: np.ndarray, palette: Palette) -> np.ndarray:
    """The map over the image, with a line around what is labelled: a class may look like the dimmed image."""
    picture = overlay(image, labels, palette, alpha=OVERLAY_ALPHA)
    labelled = labels != UNLABELLED
    thickness = max(1, image.shape[1] // PANEL_WIDTH)
    picture[labelled & ~binary_erosion(labelled, iterations=thickness, border_value=1)] = OUTLINE
    return picture


def _fitting(text: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text in the largest font that fits `width` pixels; shortened where even the smallest one does not."""
    for size in range(15, 9, -1):
        font = _font(size)
        if font.getlength(text) <= width:
            return text, font
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…", font


def _paint_strip(row: EvolutionRow, palette: Palette, *, captions: bool) -> Image.Image:
    titles = ["image"] + [title for title, _ in row.label_panels()]
    panels = [_scaled(row.image, labels=None, palette=palette)]
    for index, (_, labels) in enumerate(row.label_panels()):
        if row.over_image and index < len(row.maps):
            panels.append(_scaled(_laid_over(row.image, labels, palette), labels=None, palette=palette))
        else:
            panels.append(_scaled(row.image, labels=labels, palette=palette))
    panel_width, panel_height = panels[0].size
    top = CAPTION_HEIGHT if captions else 0
    strip = Image.new("RGB", (len(panels) * (panel_width + GAP) - GAP, top + panel_height), "white")
    draw = ImageDraw.Draw(strip)
    for index, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left = index * (panel_width + GAP)
        strip.paste(panel, (left, top))
        draw.rectangle((left, top, left + panel_width - 1, top + panel_height - 1), outline=FRAME)
        if captions:
            text, font = _fitting(title, panel_width)
            draw.text((left + panel_width / 2, CAPTION_HEIGHT / 2 - 1), text, fill=INK, font=font, anchor="mm")
    return strip


def _legend(values: Sequence[int], class_names: Sequence[str], palette: Palette, width: int) -> Image.Image:
    """Colour and name of every value (in the given order), wrapped to `width` pixels."""
    reserved = {UNLABELLED: "unlabelled", PADDING: "padding"}
    font = _font(14)
    places: list[tuple[int, int, int, str]] = []
    left, line = 0, 0
    for value in values:
        name = reserved.get(value) or class_names[value]
        entry = SWATCH + 6 + int(font.getlength(name)) + 18
        if left and left + entry > width:
            left, line = 0, line + 1
        places.append((left, line, value, name))
        left += entry
    legend = Image.new("RGB", (width, (line + 1) * LEGEND_LINE), "white")
    draw = ImageDraw.Draw(legend)
    for left, line, value, name in places:
        top = line * LEGEND_LINE + (LEGEND_LINE - SWATCH) // 2
        swatch = colour_map(np.full((SWATCH, SWATCH), value, dtype=np.uint8), palette)
        legend.paste(Image.fromarray(swatch), (left, top))
        draw.rectangle((left, top, left + SWATCH - 1, top + SWATCH - 1), outline=FRAME)
        draw.text((left + SWATCH + 6, top + SWATCH / 2), name, fill=INK, font=font, anchor="lm")
    return legend


def evolution_sheet(rows: Sequence[EvolutionRow], palette: Palette, *, class_names: Sequence[str]) -> Image.Image:
    """Stacks the strips of several samples over one legend of the classes that occur.

    Captions stand above a strip whose titles or size differ from the strip above it. Images narrower than a panel are
    enlarged by an integer factor (label maps: nearest), wider ones reduced by one.

    Args:
        rows: the samples, at least one.
        palette: one RGB colour per class.
        class_names: one name per class.

    Returns:
        The RGB picture.

    Raises:
        InputError: for no rows, shapes that do not agree, unknown label values, or fewer names than colours.
    """
    if not rows:
        raise InputError("An evolution sheet needs at least one sample; none was given.")
    if len(class_names) != len(palette):
        raise InputError(
            f"There are {len(palette)} colours and {len(class_names)} class names; expected is one name each."
        )
    strips: list[Image.Image] = []
    shown: tuple[tuple[str, ...], tuple[int, ...]] | None = None
    for row in rows:
        _check(row)
        head = (tuple(title for title, _ in row.label_panels()), row.image.shape[:2])
        strips.append(_paint_strip(row, palette, captions=head != shown))
        shown = head
    values = sorted({int(v) for row in rows for _, labels in row.label_panels() for v in np.unique(labels)})
    width = max(strip.width for strip in strips)
    legend = _legend(values, class_names, palette, width)
    height = sum(strip.height for strip in strips) + GAP * (len(strips) - 1) + GAP + legend.height
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    top = MARGIN
    for strip in strips:
        sheet.paste(strip, (MARGIN, top))
        top += strip.height + GAP
    sheet.paste(legend, (MARGIN, top))
    return sheet


def evolution_strip(
    image: np.ndarray,
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    palette: Palette,
    *,
    truth: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
    class_names: Sequence[str],
) -> Image.Image:
    """Paints one sample's label evolution: image, label maps of the stages, truth, legend. Source: EIL, Fig. 3.

    Args:
        image: uint8 `[H, W, 3]`.
        maps: uint8 `[H, W]` each; the scribble map first, then one per stage. 255 is hatched in grey.
        titles: one caption per map.
        palette: one RGB colour per class.
        truth: uint8 `[H, W]`, or None.
        prediction: uint8 `[H, W]`, or None.
        class_names: one name per class.

    Returns:
        The RGB picture.

    Raises:
        InputError: as `evolution_sheet`.
    """
    row = EvolutionRow(image=image, maps=maps, titles=titles, truth=truth, prediction=prediction)
    return evolution_sheet([row], palette, class_names=class_names)
