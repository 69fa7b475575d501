"""Cityscapes: 19 classes of street scenes, `leftImg8bit/<split>/<city>` and `gtFine/<split>/<city>`.

Labels are `…_gtFine_labelTrainIds.png` (0…18, 255), which the dataset's own scripts make, or else the released
`…_gtFine_labelIds.png` (0…33), whose values are turned into the same 19 classes here. Instances are
`…_gtFine_instanceIds.png`: label id · 1000 + number of the object, or the label id alone (below 1000) for what has no
objects and for groups whose objects are not told apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raysseg.data.readers.images import SampleFiles, classes_of, make_sample, read_id_map, read_index_map
from raysseg.data.sample import DatasetInfo, Sample
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

CLASSES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
"""Classes 0…18 in the order of the trainIds, with their label ids and Cityscapes' colours."""

LAST_LABEL_ID = 33

IMAGES, LABELS = "leftImg8bit", "gtFine"
IMAGE_ENDING = "_leftImg8bit.png"
TRAIN_IDS_ENDING = "_gtFine_labelTrainIds.png"
LABEL_IDS_ENDING = "_gtFine_labelIds.png"
INSTANCE_IDS_ENDING = "_gtFine_instanceIds.png"
OBJECTS_PER_LABEL_ID = 1000
"""An instance id is the label id times this, plus the number of the object."""
UNLABELLED_SPLIT = "test"
"""Its labels are kept back: the files in `gtFine/test` name nothing but what is never counted."""


class CityscapesReader:
    """Reads Cityscapes; keys are `<city>_<sequence>_<frame>`, which are unique over its splits.

    Splits: 'train' (2975 images), 'val' (500), and 'test' (1525), whose images have no label.

    Raises:
        InputError: where `root` has no folder leftImg8bit.
    """

    def __init__(self, root: Path) -> None:
        if not (root / IMAGES).is_dir():
            inner = next((path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{IMAGES}")), None)
            hint = f"; did you mean '{inner}'?" if inner else ""
            raise InputError(f"'{root}' is not a folder of Cityscapes: it has no folder '{IMAGES}'{hint}")
        self._root = root
        self.info = DatasetInfo(
            name="cityscapes",
            class_names=tuple(CLASSES),
            palette=tuple(colour for _, colour in CLASSES.values()),
            has_background=False,
            source="Cityscapes, fine annotations, 19 classes",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split by city and name.

        Raises:
            InputError: there is no such split, a file lies or is named otherwise than in Cityscapes, an image has no
                label or a label no image, or only some images have instances.
        """
        images = self._by_key(self._root / IMAGES / split, (IMAGE_ENDING,), "image")
        if split == UNLABELLED_SPLIT:
            return [SampleFiles(key=key, split=split, image=path) for key, path in images.items()]
        folder = self._root / LABELS / split
        if not folder.is_dir():
            coarse = self._root / "gtCoarse" / split
            others = f"; coarse labels, as in '{coarse}', are not read" if coarse.is_dir() else ""
            raise InputError(f"The folder '{folder}' of the labels does not exist{others}.")
        labels = self._by_key(folder, (LABEL_IDS_ENDING, TRAIN_IDS_ENDING), "label")
        for key, path in labels.items():
            if key not in images:
                raise InputError(
                    f"The label '{path}' has no image '{key}{IMAGE_ENDING}' in '{self._root / IMAGES / split}'."
                )
        for key, path in images.items():
            if key not in labels:
                city = folder / path.parent.name
                there = sorted(other.name for other in city.glob(f"{key}_*"))
                raise InputError(
                    f"The image '{path}' has no label: '{city / (key + TRAIN_IDS_ENDING)}' or "
                    f"'{key}{LABEL_IDS_ENDING}' is expected" + (f", not {', '.join(there)}." if there else ".")
                )
        instances = _instances_beside(labels)
        return [
            SampleFiles(key=key, split=split, image=path, label=labels[key], instances=instances.get(key))
            for key, path in images.items()
        ]

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        label = None
        if files.label is not None:
            values = read_index_map(files.label, "label")
            if files.label.name.endswith(LABEL_IDS_ENDING):
                label = classes_of_label_ids(values, files.label)
            else:
                label = classes_of(
                    values, files.label, kind="label", class_names=self.info.class_names, unlabelled=[UNLABELLED]
                )
        instances = None if files.instances is None else _read_instances(files.instances)
        return make_sample(files, label, None, self.info, instances)

    def _by_key(self, folder: Path, endings: tuple[str, ...], kind: str) -> dict[str, Path]:
        """Lists the files of all cities whose names have one of the endings, of which a later one goes before an
        earlier one; among images there is nothing else.
        """
        if not folder.is_dir():
            splits = [path.name for path in folder.parent.iterdir() if path.is_dir()]
            raise InputError(f"'{folder}' does not exist: no split '{folder.name}'{nearest_name(folder.name, splits)}")
        found: dict[str, Path] = {}
        for city in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            if not city.is_dir():
                raise InputError(
                    f"'{city}' lies outside of a city's folder: '{folder}/<city>/{city.name}' is expected."
                )
            names = sorted(path for path in city.iterdir() if not path.name.startswith("."))
            for ending in endings:
                for path in names:
                    if path.name.endswith(ending):
                        self._enter(found, path.name.removesuffix(ending), path, kind)
            wrong = next((path for path in names if kind == "image" and not path.name.endswith(endings)), None)
            if wrong is not None:
                raise InputError(
                    f"'{wrong}' is not an image of Cityscapes; '<city>_<sequence>_<frame>{IMAGE_ENDING}' is expected."
                )
        if not found:
            raise InputError(f"The folder '{folder}' holds no {kind} that ends in {' or '.join(endings)}.")
        return found

    @staticmethod
    def _enter(found: dict[str, Path], key: str, path: Path, kind: str) -> None:
        if key in found and found[key].parent != path.parent:
            raise InputError(f"'{path}' and '{found[key]}' are two {kind}s of one name.")
        found[key] = path


def _instances_beside(labels: dict[str, Path]) -> dict[str, Path]:
    """Returns the files of instances that lie beside the labels: one for each of them, or none at all."""
    expected = {key: path.with_name(key + INSTANCE_IDS_ENDING) for key, path in labels.items()}
    found = {key: path for key, path in expected.items() if path.is_file()}
    if found and len(found) < len(expected):
        absent = next(path for key, path in expected.items() if key not in found)
        raise InputError(
            f"{len(found)} of the {len(expected)} labels in '{absent.parent.parent}' have instances beside them, but "
            f"'{absent}' does not exist; one for every label, or none at all, is expected."
        )
    return found


def _read_instances(path: Path) -> np.ndarray:
    """Reads instance ids, uint16 `[H, W]`; raises InputError where a file is wrong."""
    values = read_id_map(path, "instance map")
    end = (LAST_LABEL_ID + 1) * OBJECTS_PER_LABEL_ID
    wrong = (values < 0) | (values >= end)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise InputError(
            f"The instance map '{path}' holds the value {values[y, x]} at row {y}, column {x}, which is no instance id "
            f"of Cityscapes; 0 to {end - 1} are expected."
        )
    return values.astype(np.uint16)


def classes_of_label_ids(values: np.ndarray, path: Path) -> np.ndarray:
    """Turns label ids into the 19 classes of the trainIds.

    Args:
        values: uint8 `[H, W]`: 0…33, or 255, which is the −1 of license plates in eight bits.
        path: named where a value is wrong.

    Returns:
        uint8 `[H, W]`: 0…18, and 255 for all ids that are never counted.

    Raises:
        InputError: for the first value that is no label id.

    Source: reconstruction of the table in the dataset's scripts.
    """
    table: np.ndarray = np.full(256, -1, np.int16)
    table[: LAST_LABEL_ID + 1] = UNLABELLED
    table[UNLABELLED] = UNLABELLED
    table[[label_id for label_id, _ in CLASSES.values()]] = np.arange(len(CLASSES))
    result = table[values]
    if result.min() < 0:
        y, x = np.argwhere(result < 0)[0]
        raise InputError(
            f"The label '{path}' holds the value {values[y, x]} at row {y}, column {x}, which is no label id of Cityscapes; "
            f"0 to {LAST_LABEL_ID} are expected."
        )
    return result.astype(np.uint8)
