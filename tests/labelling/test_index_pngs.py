"""Index PNGs as editors leave them: the values say the classes, or the colours where the values were numbered anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg.data.sample import default_palette
from raysseg.labelling.answers import Given, Refusal, read_index_png
from raysseg.visualization import save_index_png
from raysseg.visualization.overlay import HATCH_LIGHT

CLASSES = tuple("abcdefghijk")
LABEL = np.array([[1, 2, 6], [8, 10, 255]], np.uint8)
USED = (1, 2, 6, 8, 10, 255)


def colours_of(values: tuple[int, ...]) -> list[tuple[int, int, int]]:
    palette = default_palette(len(CLASSES))
    return [HATCH_LIGHT if value == 255 else palette[value] for value in values]


def paletted(values: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    picture = Image.fromarray(values)
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


def read(tmp_path: Path, picture: Image.Image) -> Given | Refusal:
    picture.save(tmp_path / "x.png")
    answer = read_index_png(tmp_path / "x.png", CLASSES)
    assert isinstance(answer, Given | Refusal)
    return answer


def test_the_pre_labels_come_back(tmp_path: Path) -> None:
    save_index_png(tmp_path / "x.png", LABEL, default_palette(len(CLASSES)))
    answer = read_index_png(tmp_path / "x.png", CLASSES)
    assert isinstance(answer, Given)
    np.testing.assert_array_equal(answer.mask, LABEL)


def test_values_that_an_editor_numbered_anew_are_read_by_their_colours(tmp_path: Path) -> None:
    anew: np.ndarray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rgb = np.array(colours_of(USED), np.uint8)[anew]
    for picture in (paletted(anew, colours_of(USED)), Image.fromarray(rgb)):
        answer = read(tmp_path, picture)
        assert isinstance(answer, Given)
        np.testing.assert_array_equal(answer.mask, LABEL)


@pytest.mark.parametrize(
    "colours",
    [
        [(value, value, value) for value in range(256)],
        [*colours_of(tuple(range(11))), *[(0, 0, 0)] * 244, (224, 224, 192)],
    ],
)
def test_the_values_count_with_a_grey_palette_and_with_another_colour_for_unlabelled(
    tmp_path: Path, colours: list[tuple[int, int, int]]
) -> None:
    answer = read(tmp_path, paletted(LABEL, colours))
    assert isinstance(answer, Given)
    np.testing.assert_array_equal(answer.mask, LABEL)


def test_what_neither_values_nor_colours_say_is_refused(tmp_path: Path) -> None:
    one = np.array([[0, 1]], np.uint8)
    foreign = read(tmp_path, paletted(one, [(0, 0, 0), (1, 2, 3)]))
    assert isinstance(foreign, Refusal)
    assert "has a palette of its own, with the colour 1,2,3 in use" in foreign.reason
    photo = read(tmp_path, Image.fromarray(np.full((2, 2, 3), 9, np.uint8)))
    assert isinstance(photo, Refusal)
    assert "is a colour image (RGB)" in photo.reason
    # The value 20 is black in the pre-labels' palette, as class 0 is; it is no class all the same.
    black = [*colours_of(tuple(range(11))), *[(0, 0, 0)] * 245]
    unknown = read(tmp_path, paletted(np.array([[0, 20]], np.uint8), black))
    assert isinstance(unknown, Refusal)
    assert "holds the value 20" in unknown.reason
