"""RALIS' sets: disjoint, of the sizes asked for, with every class where it must be, and found again by their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raysseg.algorithms.ralis.config import SetsOptions
from raysseg.algorithms.ralis.sets import NAMES, RegionSets, split_sets
from raysseg.errors import InputError


def options(**changes: int) -> SetsOptions:
    return SetsOptions(**{"state": 5, "play": 20, "start": 6, "reward": 10, **changes})


def scenes(count: int = 80, rare: tuple[int, ...] = (8, 4), seed: int = 0) -> np.ndarray:
    """Six classes in half of the images each, and after them rare ones in exactly so many."""
    source = np.random.default_rng(seed)
    presence = source.random((count, 6 + len(rare))) < 0.5
    presence[:, 0] = True
    for number, occurring in enumerate(rare):
        presence[:, 6 + number] = False
        presence[source.choice(count, occurring, replace=False), 6 + number] = True
    return presence


def sizes(sets: RegionSets) -> dict[str, int]:
    return {name: len(getattr(sets, name)) for name in NAMES}


def test_every_image_is_in_one_set_of_the_size_asked_for() -> None:
    sets = split_sets(scenes(), options(), 0)
    assert sizes(sets) == {"state": 5, "start": 6, "play": 14, "reward": 10, "pool": 45}
    rows = np.concatenate([getattr(sets, name) for name in NAMES])
    assert sorted(rows) == list(range(80))
    assert rows.dtype == np.int64
    assert all((np.diff(getattr(sets, name)) > 0).all() for name in NAMES)
    assert sets.labelled.tolist() == sorted([*sets.start, *sets.play])


@pytest.mark.parametrize("seed", range(20))
def test_a_class_in_four_images_is_in_every_set_that_learns_or_judges(seed: int) -> None:
    presence = scenes(seed=seed)
    assert presence[:, 7].sum() == 4
    sets = split_sets(presence, options(), seed)
    for name in ("state", "reward", "start", "play"):
        assert presence[getattr(sets, name)].any(axis=0).all(), name


def test_the_state_set_is_no_richer_in_classes_than_the_split() -> None:
    presence, differences = scenes(400, rare=()), []
    for seed in range(10):
        sets = split_sets(presence, options(state=10), seed)
        differences.append(np.abs(presence[sets.state].mean(axis=0) - presence.mean(axis=0)).mean())
    drawn = [
        np.abs(presence[np.random.default_rng(seed).permutation(400)[:10]].mean(axis=0) - presence.mean(axis=0)).mean()
        for seed in range(200)
    ]
    assert np.mean(differences) < 0.5 * np.mean(drawn)


def test_seeds_decide() -> None:
    presence = scenes()
    one, same, other = (split_sets(presence, options(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(getattr(one, name), getattr(same, name)) for name in NAMES)
    assert all(not np.array_equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def test_a_class_that_occurs_nowhere_is_expected_of_no_set() -> None:
    presence = np.pad(scenes(), ((0, 0), (0, 1)))
    assert sizes(split_sets(presence, options(), 0))["state"] == 5


def test_images_without_a_label_are_only_ever_in_the_pool() -> None:
    presence = scenes()
    presence[40:] = False
    for seed in range(5):
        sets = split_sets(presence, options(), seed)
        assert set(range(40, 80)) <= set(sets.pool)
        assert sizes(sets) == {"state": 5, "start": 6, "play": 14, "reward": 10, "pool": 45}


@pytest.mark.parametrize(
    ("presence", "changes", "message"),
    [
        (
            scenes(35),
            {},
            r"asks for 5 \(state\) \+ 20 \(play\) \+ 10 \(reward\) = 35 images, but .* has 35, of which at",
        ),
        (np.pad(scenes(34), ((0, 9), (0, 0))), {}, r"= 35 images with labels, but of the .* 43 only 34 have one"),
        (
            scenes(rare=(1,)),
            {},
            r"The class 'g' is missing from D_R: it occurs in 1 image of the .* all of them in D_S; label",
        ),
        (np.eye(6, dtype=bool).repeat(10, 0), {}, r"class 'f', .* 10 images .* from D_S: 5 images .* ralis.sets.state"),
        (
            np.eye(6, dtype=bool).repeat(10, 0),
            {"state": 6, "reward": 5},
            r"'f', .* from D_R: 5 .* ralis.sets.reward larger",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(presence: np.ndarray, changes: dict[str, int], message: str) -> None:
    names = "abcdefgh"[: presence.shape[1]]
    with pytest.raises(InputError, match=message) as error:
        split_sets(presence, options(**changes), 0, class_names=names)
    assert "\n" not in str(error.value)


def test_classes_without_names_have_numbers() -> None:
    with pytest.raises(InputError, match=r"The class 6 is missing from D_R"):
        split_sets(scenes(rare=(1,)), options(), 0)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    count=st.integers(6, 40),
    classes=st.integers(1, 5),
    seed=st.integers(0, 1000),
    state=st.integers(1, 4),
    play=st.integers(2, 6),
    reward=st.integers(1, 4),
)
def test_sets_are_right_or_refused(count: int, classes: int, seed: int, state: int, play: int, reward: int) -> None:
    presence = np.random.default_rng(seed).random((count, classes)) < 0.4
    wanted = SetsOptions(state=state, play=play, start=1, reward=reward)
    occurring = presence.sum(axis=0)
    labelled = presence.any(axis=1)
    total = state + play + reward
    if total >= count or total > labelled.sum():
        with pytest.raises(InputError, match="sets asks for"):
            split_sets(presence, wanted, seed)
        return
    try:
        sets = split_sets(presence, wanted, seed)
    except InputError:
        # D_S covers its classes with no more images than there are classes, so that D_R finds one of each beyond.
        if min(state, reward) >= classes and occurring[occurring > 0].min() > classes:
            raise
        return
    assert sizes(sets) == {"state": state, "start": 1, "play": play - 1, "reward": reward, "pool": count - total}
    rows = np.concatenate([getattr(sets, name) for name in NAMES])
    assert sorted(rows) == list(range(count))
    assert labelled[np.setdiff1d(rows, sets.pool)].all()
    for part in (sets.state, sets.reward):
        assert (presence[part].any(axis=0) == (occurring > 0)).all()


# ---- the file -------------------------------------------------------------------------------------------------------

KEYS = [f"street-{row:03d}" for row in range(80)]


def test_sets_are_found_again_by_their_keys_whatever_their_rows(tmp_path: Path) -> None:
    sets = split_sets(scenes(), options(), 0)
    sets.save(tmp_path / "sets.json", KEYS)
    content = json.loads((tmp_path / "sets.json").read_text())
    assert content["state"] == [KEYS[row] for row in sets.state]
    same = RegionSets.load(tmp_path / "sets.json", KEYS)
    assert all(np.array_equal(getattr(same, name), getattr(sets, name)) for name in NAMES)
    turned = RegionSets.load(tmp_path / "sets.json", KEYS[::-1])
    assert turned.pool.tolist() == sorted(79 - sets.pool)
    assert [path.name for path in tmp_path.iterdir()] == ["sets.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": None}, "must be the lists state, start, play, reward, pool of keys"),
        ({"state": "a"}, "must be the lists"),
        ({"state": [1]}, "must be the lists"),
        ({"extra": []}, "must be the lists"),
        ({"state": ["nowhere"]}, "name the image 'nowhere', which is not in the training split"),
        ({"state": ["b"]}, "have the image 'b' in 'state' and in 'start'"),
        ({"pool": []}, "lack 1 images of the training split, among them 'e': the data have changed"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {name: [key] for name, key in zip(NAMES, "abcde", strict=True)} | change
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(InputError, match=f"sets.json' {message}"):
        RegionSets.load(path, list("abcde"))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), (None, "does not exist"), ("[]", "must be the lists")]
)
def test_files_that_are_no_sets_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "sets.json").write_text(text)
    with pytest.raises(InputError, match=rf"sets\.json'.*{message}"):
        RegionSets.load(tmp_path / "sets.json", ["a"])
