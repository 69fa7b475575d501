"""Randomness is a function of the seed and of the place in the run."""

from __future__ import annotations

import itertools

import numpy as np

from raysseg.core.seeding import draw_order, draw_seeds, generator


def test_the_same_place_draws_the_same() -> None:
    for draw in (draw_seeds, draw_order):
        np.testing.assert_array_equal(draw(3, "explore", 7, count=20), draw(3, "explore", 7, count=20))
    assert generator(1, "a").integers(2**62) == generator(1, "a").integers(2**62)


def test_other_places_and_seeds_draw_otherwise() -> None:
    places = [
        (0, "explore", 1),
        (0, "explore", 2),
        (0, "infer", 1),
        (1, "explore", 1),
        (0, "explore"),
        (0, 1, "explore"),
    ]
    for one, other in itertools.combinations(places, 2):
        assert not np.array_equal(draw_seeds(*one, count=4), draw_seeds(*other, count=4)), (one, other)


def test_what_is_drawn_does_not_depend_on_what_was_drawn_before() -> None:
    expected = draw_order(0, "segmenter", 5, count=30)
    np.random.default_rng(0).normal(size=100)
    draw_seeds(0, "segmenter", 4, count=1000)
    np.testing.assert_array_equal(draw_order(0, "segmenter", 5, count=30), expected)


def test_an_order_holds_every_row_once_and_is_shuffled() -> None:
    order = draw_order(0, "explore", 0, count=50)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(50))
    assert list(order) != list(range(50))


def test_item_seeds_are_in_range_and_all_different() -> None:
    seeds = draw_seeds(0, "segmenter", 0, count=10_000)
    assert seeds.dtype == np.int64
    assert seeds.min() >= 0
    assert seeds.max() < 2**62
    assert len(np.unique(seeds)) == 10_000
