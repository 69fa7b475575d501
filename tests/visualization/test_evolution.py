from typing import Any

import numpy as np
import pytest

from raysseg.errors import InputError
from raysseg.visualization.evolution import CAPTION_HEIGHT, GAP, MARGIN, EvolutionRow, evolution_sheet, evolution_strip

PALETTE = [(10, 20, 30), (200, 0, 0), (0, 200, 0)]
NAMES = ["ground", "cat", "dog"]


def sample(side: int = 60, **changes: Any) -> dict[str, Any]:
    scribble = np.full((side, side), 255, dtype=np.uint8)
    scribble[:5] = 0
    grown = scribble.copy()
    grown[5:30] = 1
    truth = np.ones((side, side), dtype=np.uint8)
    image = np.full((side, side, 3), 77, dtype=np.uint8)
    return {"image": image, "maps": [scribble, grown], "titles": ["scribble", "radius 21"], "truth": truth, **changes}


def test_panels_stand_side_by_side_enlarged_by_an_integer_factor() -> None:
    parts = sample()
    strip = evolution_strip(
        parts["image"], parts["maps"], parts["titles"], PALETTE, truth=parts["truth"], class_names=NAMES
    )
    # 60 pixels fit four times into a panel of 240; image, two maps and the truth make four panels.
    assert strip.width == 2 * MARGIN + 4 * 240 + 3 * GAP
    pixels = np.array(strip)
    top, left = MARGIN + CAPTION_HEIGHT, MARGIN
    assert pixels[top + 120, left + 120].tolist() == [77, 77, 77]
    grown = left + 2 * (240 + GAP)
    assert pixels[top + 10, grown + 120].tolist() == [10, 20, 30]
    # Map row 5 begins at exactly 4 · 5 pixels: nearest, nothing blended.
    assert pixels[top + 19, grown + 120].tolist() == [10, 20, 30]
    assert pixels[top + 20, grown + 120].tolist() == [200, 0, 0]
    assert pixels[top + 120, left + 3 * (240 + GAP) + 120].tolist() == [200, 0, 0]


def test_the_legend_names_only_what_occurs() -> None:
    strip = np.array(evolution_strip(**sample(), palette=PALETTE, class_names=NAMES))
    legend = strip[MARGIN + CAPTION_HEIGHT + 240 + GAP :]
    colours = {tuple(colour) for colour in legend.reshape(-1, 3).tolist()}
    assert {(10, 20, 30), (200, 0, 0)} <= colours
    assert (0, 200, 0) not in colours


def test_large_images_are_reduced_and_no_panel_is_added_without_truth() -> None:
    parts = sample(side=960, truth=None)
    strip = evolution_strip(**parts, palette=PALETTE, class_names=NAMES)
    assert strip.width == 2 * MARGIN + 3 * 240 + 2 * GAP


def test_a_sheet_repeats_captions_only_where_they_change() -> None:
    row = EvolutionRow(**sample())
    other = EvolutionRow(**sample(titles=["scribble", "radius 41"]))
    one = evolution_sheet([row], PALETTE, class_names=NAMES).height
    same = evolution_sheet([row, row], PALETTE, class_names=NAMES).height
    different = evolution_sheet([row, other], PALETTE, class_names=NAMES).height
    assert same - one == 240 + GAP
    assert different - same == CAPTION_HEIGHT


def test_a_long_caption_is_shortened_to_its_panel() -> None:
    short = sample(titles=["scribble", "W"])
    long = sample(titles=["scribble", "W" * 200])
    pictures = [np.array(evolution_strip(**parts, palette=PALETTE, class_names=NAMES)) for parts in (short, long)]
    captions = [picture[MARGIN : MARGIN + CAPTION_HEIGHT] for picture in pictures]
    panel = slice(MARGIN + 2 * (240 + GAP) - GAP // 2, MARGIN + 3 * (240 + GAP) - GAP // 2)
    assert (captions[0][:, panel] != captions[1][:, panel]).any()
    captions[0][:, panel] = captions[1][:, panel]
    np.testing.assert_array_equal(captions[0], captions[1])


def test_disagreeing_parts_are_named() -> None:
    with pytest.raises(InputError, match="2 label maps and 1 titles"):
        evolution_strip(**sample(titles=["scribble"]), palette=PALETTE, class_names=NAMES)
    with pytest.raises(InputError, match=r"label map 'truth' is \[3, 3\]"):
        evolution_strip(**sample(truth=np.zeros((3, 3), np.uint8)), palette=PALETTE, class_names=NAMES)
    with pytest.raises(InputError, match="3 colours and 2 class names"):
        evolution_strip(**sample(), palette=PALETTE, class_names=NAMES[:2])
    with pytest.raises(InputError, match="at least one sample"):
        evolution_sheet([], PALETTE, class_names=NAMES)
