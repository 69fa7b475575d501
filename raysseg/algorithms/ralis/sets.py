"""RALIS' sets of images: the training split cut by a seed so that every class can be seen where it must be.

training split ── D_S  state      whose regions are the state
               ├─ D_T  start      trains the segmenter of played episodes ┐ both train theta_0
               │       play       the labelling game is played on it      ┘
               ├─ D_R  reward     its mIoU is the reward
               └─ D_V  pool       the rest, labelled by the learned policy
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysseg.algorithms.ralis.config import SetsOptions
from raysseg.core.replay_files import write_durably
from raysseg.core.seeding import draw_order
from raysseg.errors import InputError

NAMES = ("state", "start", "play", "reward", "pool")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RegionSets:
    """Rows of the training split in each set, int64, ascending; each image is in one of them.

    Args:
        state: D_S.
        start: the part of D_T that trains the segmenter which every played episode starts with.
        play: the rest of D_T, on which the labelling game is played.
        reward: D_R.
        pool: D_V.
    """

    state: np.ndarray
    start: np.ndarray
    play: np.ndarray
    reward: np.ndarray
    pool: np.ndarray

    @property
    def labelled(self) -> np.ndarray:
        """D_T, whose labels are known from the start, int64, ascending."""
        return np.union1d(self.start, self.play)

    def to_json(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """Returns the keys of the images in each set.

        Args:
            keys: of the training split, by row.
        """
        return {name: [keys[row] for row in getattr(self, name)] for name in NAMES}

    @classmethod
    def from_json(cls, content: Any, keys: Sequence[str], *, where: str = "The sets") -> RegionSets:
        """Returns the sets whose keys `to_json` gave; the images may have other rows now.

        Args:
            content: what was read.
            keys: of the training split, by row.
            where: what a sentence about an error begins with.

        Raises:
            InputError: a set is missing, a key is unknown or in two sets, or an image is in none.
        """
        if not isinstance(content, dict) or sorted(content) != sorted(NAMES):
            raise InputError(f"{where} must be the lists {', '.join(NAMES)} of keys.")
        if not all(isinstance(part, list) and all(isinstance(key, str) for key in part) for part in content.values()):
            raise InputError(f"{where} must be the lists {', '.join(NAMES)} of keys.")
        rows = {key: row for row, key in enumerate(keys)}
        owner: dict[str, str] = {}
        for name in NAMES:
            for key in content[name]:
                if key not in rows:
                    raise InputError(f"{where} name the image '{key}', which is not in the training split.")
                if key in owner:
                    raise InputError(f"{where} have the image '{key}' in '{owner[key]}' and in '{name}'.")
                owner[key] = name
        if len(owner) < len(keys):
            left = next(key for key in keys if key not in owner)
            raise InputError(
                f"{where} lack {len(keys) - len(owner)} images of the training split, among them '{left}': the data "
                "have changed since the run began; start a new run."
            )
        return cls(**{name: np.sort(np.array([rows[key] for key in content[name]], np.int64)) for name in NAMES})

    def save(self, path: Path, keys: Sequence[str]) -> None:
        """Writes the keys of each set as JSON, whole or not at all; raises OSError where that cannot be."""
        write_durably(path, (json.dumps(self.to_json(keys), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path, keys: Sequence[str]) -> RegionSets:
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing, is no JSON, or does not fit the training split's keys.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"The file '{path}' of RALIS' sets does not exist.") from None
        except ValueError as error:
            raise InputError(f"The file '{path}' of RALIS' sets is not JSON: {error}") from None
        return cls.from_json(content, keys, where=f"The sets in '{path}'")


def split_sets(
    presence: np.ndarray, options: SetsOptions, seed: int, *, class_names: Sequence[str] | None = None
) -> RegionSets:
    """Cuts the training split into RALIS' sets.

    D_S, D_R, the start part and the play part, in this order, first take images until each has every class, the rarest
    class first, as long as there are such images. D_S then takes those that bring the share of its images that have
    each class closest to that of all images; the rest is dealt at random. A class that occurs nowhere is expected of
    no set, and an image without a label is only ever in D_V.

    Args:
        presence: bool `[N, C]`, whether class c occurs in the label of image n.
        options: how many images each set has.
        seed: of the run; equal seeds give equal sets.
        class_names: of the C classes, for what is said about errors.

    Raises:
        InputError: the sets have more images than there are, or a class that occurs is missing from D_S or D_R.

    Source: RALIS, Sec. 3.2 (D_S represents all classes, and footnote 2: distributed as in the training split); how such
    sets are found is a reconstruction.
    """
    sizes = {
        "state": options.state,
        "reward": options.reward,
        "start": options.start,
        "play": options.play - options.start,
    }
    _check_sizes(sum(sizes.values()), options, presence)
    order = draw_order(seed, "sets", count=len(presence))
    presence = presence[order]
    free: np.ndarray = np.array(presence.any(axis=1))
    shares, occurring = presence[free].mean(axis=0), presence.sum(axis=0)
    wanted = [int(one) for one in np.argsort(occurring, kind="stable") if occurring[one]]
    taken = {name: _cover(presence, free, wanted, size) for name, size in sizes.items()}
    _match(presence, free, shares, taken["state"], sizes["state"])
    for name, places in taken.items():
        more = np.flatnonzero(free)[: sizes[name] - len(places)]
        places += more.tolist()
        free[more] = False
    for name, title in (("state", "D_S"), ("reward", "D_R")):
        if missing := [one for one in wanted if not presence[taken[name], one].any()]:
            one = missing[0]
            called = f"'{class_names[one]}'" if class_names else str(one)
            elsewhere = int(presence[taken["state"], one].sum())
            raise InputError(_missing_class(called, int(occurring[one]), elsewhere, name, title, sizes[name]))
    pool: np.ndarray = np.setdiff1d(np.arange(len(presence)), np.concatenate([*taken.values()]))
    rows = {name: np.sort(order[places]) for name, places in {**taken, "pool": pool}.items()}
    return RegionSets(**rows)


def _check_sizes(total: int, options: SetsOptions, presence: np.ndarray) -> None:
    parts = f"{options.state} (state) + {options.play} (play) + {options.reward} (reward)"
    asked = f"ralis.sets asks for {parts} = {total} images"
    if total >= len(presence):
        raise InputError(
            f"{asked}, but the training split has {len(presence)}, of which at least one must be left to label: "
            "make them smaller."
        )
    if total > (labelled := int(presence.any(axis=1).sum())):
        raise InputError(
            f"{asked} with labels, but of the training split's {len(presence)} only {labelled} have one: make them smaller."
        )


def _cover(presence: np.ndarray, free: np.ndarray, wanted: list[int], size: int) -> list[int]:
    """Takes up to `size` free places until all wanted classes are there, the rarest first: of the images that have it the
    one with most of what is missing and least of what is there already, where a class counts by its rarity.
    """
    rarity = 1.0 / np.maximum(presence.sum(axis=0), 1)
    places: list[int] = []
    missing: np.ndarray = np.zeros(presence.shape[1], np.bool_)
    missing[wanted] = True
    for one in wanted:
        candidates = np.flatnonzero(free & presence[:, one])
        if not missing[one] or len(candidates) == 0 or len(places) == size:
            continue
        best = int(candidates[(presence[candidates] @ np.where(missing, rarity, -rarity)).argmax()])
        places.append(best)
        free[best] = False
        missing &= ~presence[best]
    return places


def _match(presence: np.ndarray, free: np.ndarray, shares: np.ndarray, places: list[int], size: int) -> None:
    """Adds free places, up to `size`, so that the share of images that have each class comes closest to `shares` `[C]`."""
    while len(places) < size:
        candidates = np.flatnonzero(free)
        found = (presence[places].sum(axis=0) + presence[candidates]) / (len(places) + 1)
        best = int(candidates[np.abs(found - shares).sum(axis=1).argmin()])
        places.append(best)
        free[best] = False


def _missing_class(called: str, occurring: int, in_state: int, name: str, title: str, size: int) -> str:
    images = f"{occurring} image{'s' if occurring > 1 else ''} of the training split"
    if occurring == in_state:
        return (
            f"The class {called} is missing from {title}: it occurs in {images}, all of them in D_S; label more images that "
            "have it, or leave it out of the classes."
        )
    return (
        f"The class {called}, which occurs in {images}, is missing from {title}: {size} image{'s' if size > 1 else ''} "
        f"cannot show all classes; make ralis.sets.{name} larger."
    )
