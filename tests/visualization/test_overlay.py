from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg.errors import InputError
from raysseg.visualization.overlay import DIMMED, HATCH_DARK, HATCH_LIGHT, colour_map, overlay, save_index_png

PALETTE = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]


def test_classes_take_their_colour_padding_is_black_and_unlabelled_is_hatched() -> None:
    labels = np.full((16, 16), 255, dtype=np.uint8)
    labels[0, :4] = [0, 1, 2, 254]
    picture = colour_map(labels, PALETTE)
    assert picture.dtype == np.uint8
    assert picture.shape == (16, 16, 3)
    assert picture[0, :4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 0, 0]]
    assert {tuple(colour) for colour in picture[1:].reshape(-1, 3).tolist()} == {HATCH_LIGHT, HATCH_DARK}


def test_overlay_blends_labels_dims_the_unlabelled_and_blackens_padding() -> None:
    image = np.full((1, 3, 3), 200, dtype=np.uint8)
    labels = np.array([[1, 255, 254]], dtype=np.uint8)
    picture = overlay(image, labels, PALETTE, alpha=0.25)
    assert picture[0, 0].tolist() == [round(0.75 * 200 + 0.25 * 128), 150, 150]
    assert picture[0, 1].tolist() == [round(DIMMED * 200)] * 3
    assert picture[0, 2].tolist() == [0, 0, 0]


def test_index_png_keeps_every_index(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [254, 255, 1]], dtype=np.uint8)
    save_index_png(tmp_path / "map.png", labels, PALETTE)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), labels)
        np.testing.assert_array_equal(np.array(picture.convert("RGB"))[0], np.array(PALETTE))
    # Byte 24 of a PNG is its bit depth: readers must not meet 1, 2 or 4 bits per pixel.
    assert (tmp_path / "map.png").read_bytes()[24] == 8


@pytest.mark.parametrize("value", [3, 253])
def test_a_value_without_a_colour_is_named(value: int) -> None:
    with pytest.raises(InputError, match=rf"value {value}; expected are the classes 0…2"):
        colour_map(np.full((2, 2), value, dtype=np.uint8), PALETTE)


def test_wrong_shapes_and_alpha_are_refused() -> None:
    labels = np.zeros((2, 2), dtype=np.uint8)
    with pytest.raises(InputError, match="label map is uint8"):
        colour_map(labels.astype(np.int64), PALETTE)
    with pytest.raises(InputError, match=r"expected is uint8 \[2, 2, 3\]"):
        overlay(np.zeros((2, 3, 3), dtype=np.uint8), labels, PALETTE)
    with pytest.raises(InputError, match=r"alpha is 1\.5"):
        overlay(np.zeros((2, 2, 3), dtype=np.uint8), labels, PALETTE, alpha=1.5)
