"""The sets of a run: those of its pre-training, of itself where it goes on, or else cut now; always written beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysseg.algorithms.ralis.config import RALISSettings
from raysseg.algorithms.ralis.sets import RegionSets, split_sets
from raysseg.data.store import Store
from raysseg.errors import InputError

SETS_FILE = "sets.json"


def sets_of_run(settings: RALISSettings, store: Store, folder: Path) -> RegionSets:
    """Returns the sets of a run and leaves them in its folder.

    A segmenter that was pre-trained elsewhere knows the labels of its own D_T, so a run that starts from it takes its sets.

    Args:
        settings: the variant's.
        store: the data.
        folder: of the run; it is made.

    Raises:
        InputError: the sets that were found are of other sizes than the settings say, or none can be cut.

    Source: reconstruction.
    """
    keys, own = store.keys(settings.data.train_split), folder / SETS_FILE
    pretrained = settings.training.pretrained
    given = None if pretrained is None else Path(pretrained) / SETS_FILE
    found = next((path for path in (given, own) if path is not None and path.is_file()), None)
    if found is None and given is not None:
        raise InputError(f"training.pretrained is {pretrained}, but the file {SETS_FILE} is not in that folder.")
    if found is not None:
        sets = RegionSets.load(found, keys)
        _check_sizes(sets, settings, found)
    else:
        sets = split_sets(
            class_presence(store, keys, store.info.num_classes),
            settings.ralis.sets,
            settings.seed,
            class_names=store.info.class_names,
        )
    if found != own:
        folder.mkdir(parents=True, exist_ok=True)
        sets.save(own, keys)
    return sets


def _check_sizes(sets: RegionSets, settings: RALISSettings, path: Path) -> None:
    wanted = settings.ralis.sets
    sizes = {
        "state": (len(sets.state), wanted.state),
        "start": (len(sets.start), wanted.start),
        "play": (len(sets.start) + len(sets.play), wanted.play),
        "reward": (len(sets.reward), wanted.reward),
    }
    for name, (size, expected) in sizes.items():
        if size != expected:
            raise InputError(f"ralis.sets.{name} is {expected}, but the run goes on with {path}, where it is {size}.")


def class_presence(store: Store, keys: Sequence[str], num_classes: int) -> np.ndarray:
    """Says which class occurs in which image, bool `[N, C]`; a class of an image without ground truth does not.

    Source: reconstruction.
    """
    presence: np.ndarray = np.zeros((len(keys), 256), dtype=bool)
    for row, key in enumerate(keys):
        label = store.label(key)
        if label is not None:
            presence[row, np.unique(label)] = True
    return presence[:, :num_classes]
