"""Generated scribbles: never wrong, nowhere missing, about as many as asked for, always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raysseg.data.readers import CamvidReader
from raysseg.data.scribbles import ScribbleSettings, generate_scribbles, scribble_seed
from raysseg.errors import InputError


def scene(size: int = 160) -> np.ndarray:
    """Ground, a large disc, a small disc and a void band."""
    y, x = np.indices((size, size))
    label: np.ndarray = np.zeros((size, size), np.uint8)
    label[np.hypot(y - 0.4 * size, x - 0.35 * size) < 0.25 * size] = 1
    label[np.hypot(y - 0.8 * size, x - 0.8 * size) < 0.1 * size] = 2
    label[:4] = 255
    return label


def test_strokes_agree_with_the_label_and_cover_the_share() -> None:
    label = scene()
    scribble = generate_scribbles(label, 3, num_classes=3, share=0.03)
    drawn = scribble != 255
    assert scribble.dtype == np.uint8
    assert (scribble[drawn] == label[drawn]).all()
    assert set(np.unique(scribble[drawn])) == {0, 1, 2}
    assert 0.025 < drawn.sum() / (label != 255).sum() < 0.035


def test_strokes_are_thin_and_clear_of_the_border() -> None:
    label = scene()
    scribble = generate_scribbles(label, 3, num_classes=3, width=3)
    # A stroke of 3 px holds no disc of radius 4, and keeps clear of its region's border where the region is wide.
    assert ndimage.distance_transform_edt(scribble == 1).max() < 4
    depth = ndimage.distance_transform_edt(label == 1)
    assert depth[scribble == 1].min() >= 2


def test_width_and_share_take_effect() -> None:
    label = scene()
    wide = generate_scribbles(label, 3, num_classes=3, width=7, share=0.1)
    assert ndimage.distance_transform_edt(wide == 0).max() > 3
    assert 0.085 < (wide != 255).sum() / (label != 255).sum() < 0.115


def test_large_components_get_more_and_small_ones_sometimes_none() -> None:
    label: np.ndarray = np.zeros((120, 120), np.uint8)
    label[10:60, 10:60] = 1
    label[90:94, 90:94] = 1
    label[100:104, 20:24] = 1
    counts = [(generate_scribbles(label, seed, num_classes=2) == 1) for seed in range(20)]
    assert min(int(c[10:60, 10:60].sum()) for c in counts) > max(int(c[90:94, 90:94].sum()) for c in counts)
    touched = sum(bool(c[90:94, 90:94].any()) + bool(c[100:104, 20:24].any()) for c in counts)
    assert 0 < touched < 40


def test_a_seed_decides_the_strokes() -> None:
    label = scene()
    first = generate_scribbles(label, 5, num_classes=3)
    assert np.array_equal(first, generate_scribbles(label, 5, num_classes=3))
    assert not np.array_equal(first, generate_scribbles(label, 6, num_classes=3))
    how = ScribbleSettings(seed=2)
    assert np.array_equal(how.for_label(label, "a", 3), generate_scribbles(label, scribble_seed(2, "a"), num_classes=3))
    assert scribble_seed(2, "a") != scribble_seed(2, "b") != scribble_seed(1, "b")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), height=st.integers(1, 40), width=st.integers(1, 40), stroke=st.integers(1, 6),
    share=st.floats(0.005, 0.5), blocks=st.integers(1, 9),
)  # fmt: skip
def test_any_map_gets_every_class_and_no_wrong_pixel(
    seed: int, height: int, width: int, stroke: int, share: float, blocks: int
) -> None:
    random = np.random.default_rng(seed)
    coarse = random.choice(np.array([0, 1, 2, 5, 254, 255], np.uint8), size=(height, width))
    label = coarse.repeat(blocks, 0).repeat(blocks, 1)[:height, :width]
    scribble = generate_scribbles(label, seed, num_classes=6, width=stroke, share=share)
    drawn = scribble != 255
    assert (scribble[drawn] == label[drawn]).all()
    assert set(np.unique(scribble[drawn])) == set(np.unique(label)) - {254, 255}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"uint8 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 7, np.uint8), "holds the value 7; 0 to 2"),
    ],
)
def test_wrong_labels_are_refused(label: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_scribbles(label, 0, num_classes=3)


def test_real_street_scenes(shared_data: Path) -> None:
    reader = CamvidReader(shared_data / "camvid")
    for files in reader.files("train")[::60]:
        label = reader.read(files).label
        assert label is not None
        scribble = ScribbleSettings().for_label(label, files.key, 11)
        drawn = scribble != 255
        assert (scribble[drawn] == label[drawn]).all()
        assert set(np.unique(scribble)) == set(np.unique(label)) | {255}
        assert 0.025 < drawn.sum() / (label != 255).sum() < 0.04
