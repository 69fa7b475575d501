"""Encoded label maps: lossless, small, and refused where damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_strategies
from PIL import Image

from raysseg.data.codec import decode_map, encode_map
from raysseg.errors import InputError

MAPS = np_strategies.arrays(np.uint8, np_strategies.array_shapes(min_dims=2, max_dims=2, max_side=40))


@settings(deadline=None)
@given(MAPS)
def test_any_map_comes_back(label_map: np.ndarray) -> None:
    assert np.array_equal(decode_map(encode_map(label_map)), label_map)


@settings(deadline=None)
@given(MAPS)
def test_a_view_of_a_larger_array_comes_back(label_map: np.ndarray) -> None:
    assert np.array_equal(decode_map(encode_map(label_map[::-1, ::2])), label_map[::-1, ::2])


def test_the_result_may_be_written_to() -> None:
    decoded = decode_map(encode_map(np.zeros((3, 5), np.uint8)))
    decoded[1, 2] = 7
    assert decoded.sum() == 7


@pytest.mark.parametrize(("dataset", "count"), [("camvid", 20), ("acdc", 20)])
def test_real_label_maps_take_a_few_kilobytes(shared_data: Path, dataset: str, count: int) -> None:
    paths = sorted((shared_data / dataset / "val" / "labels").iterdir())[:: 101 // count]
    sizes = []
    for path in paths:
        with Image.open(path) as picture:
            label_map = np.asarray(picture.resize((512, 512), Image.Resampling.NEAREST)).astype(np.uint8)
        encoded = encode_map(label_map)
        assert np.array_equal(decode_map(encoded), label_map)
        sizes.append(len(encoded))
    assert len(sizes) >= count
    assert np.mean(sizes) < 4000


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3), np.int64), np.zeros((2, 3), bool), np.zeros((2, 3, 1), np.uint8), np.zeros((0, 3), np.uint8)],
    ids=["int64", "bool", "three dimensions", "no pixels"],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"uint8 \[H, W\]"):
        encode_map(array)


@settings(deadline=None)
@given(MAPS, st.data())
def test_a_cut_map_is_refused(label_map: np.ndarray, data: st.DataObject) -> None:
    encoded = encode_map(label_map)
    length = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(InputError):
        decode_map(encoded[:length])


def test_a_shape_that_does_not_fit_the_content_is_refused() -> None:
    encoded = encode_map(np.zeros((4, 6), np.uint8))
    body = encoded[12:]
    for height in (3, 5, 1_000_000):
        wrong = encoded[:4] + height.to_bytes(4, "little") + (6).to_bytes(4, "little") + body
        with pytest.raises(InputError):
            decode_map(wrong)
