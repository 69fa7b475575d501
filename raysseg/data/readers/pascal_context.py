"""PASCAL Context: the 59 most frequent classes of the scenes of VOC 2010, with or without the background as a class.

Labels are the released `trainval/<id>.mat` of 459 values, with VOC 2010 beside them, or index PNGs that were made of
them, `SegmentationClassContext/<id>.png`. Both give the same classes, in the order of the released `labels.txt`, which
is the alphabet's and in which mmsegmentation's converter numbers them. The released `59_labels.txt` has another order, VOC's
classes first, and writes three names otherwise (diningtable, bedcloth, clothes); PNGs in that order are not told apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field
from scipy import io as scipy_io
from scipy.io.matlab import MatReadError

from raysseg.configuration import Settings
from raysseg.data.readers.images import SampleFiles, classes_of, make_sample, read_index_map
from raysseg.data.sample import DatasetInfo, Sample, default_palette
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

CLASSES: dict[str, int] = {
    "aeroplane": 2,
    "bag": 9,
    "bed": 18,
    "bedclothes": 19,
    "bench": 22,
    "bicycle": 23,
    "bird": 25,
    "boat": 31,
    "book": 33,
    "bottle": 34,
    "building": 44,
    "bus": 45,
    "cabinet": 46,
    "car": 59,
    "cat": 65,
    "ceiling": 68,
    "chair": 72,
    "cloth": 80,
    "computer": 85,
    "cow": 98,
    "cup": 104,
    "curtain": 105,
    "dog": 113,
    "door": 115,
    "fence": 144,
    "floor": 158,
    "flower": 159,
    "food": 162,
    "grass": 187,
    "ground": 189,
    "horse": 207,
    "keyboard": 220,
    "light": 232,
    "motorbike": 258,
    "mountain": 259,
    "mouse": 260,
    "person": 284,
    "plate": 295,
    "platform": 296,
    "pottedplant": 308,
    "road": 324,
    "rock": 326,
    "sheep": 347,
    "shelves": 349,
    "sidewalk": 354,
    "sign": 355,
    "sky": 360,
    "snow": 366,
    "sofa": 368,
    "table": 397,
    "track": 415,
    "train": 416,
    "tree": 420,
    "truck": 424,
    "tvmonitor": 427,
    "wall": 440,
    "water": 445,
    "window": 454,
    "wood": 458,
}
"""The 59 classes in order, with their values in the released label maps."""

LAST_VALUE = 459

CLASS_NAMES = ("background", *CLASSES)
"""Names of the 60 classes; the background is everything that is none of the 59."""

RELEASED, CONVERTED = "trainval", "SegmentationClassContext"
IMAGES = "JPEGImages"
VOC_PLACES = ("VOCdevkit/VOC2010", "VOC2010", ".")


class PascalContextSettings(Settings):
    """How the classes of PASCAL Context are counted."""

    background: bool = Field(
        default=True,
        description="Whether what is none of the 59 classes is a class of its own (60 classes) or unlabelled (59). "
        "[P] CiSS-Net: 60.",
    )


class PascalContextReader:
    """Reads PASCAL Context from a folder with VOC 2010 in it (or which is it); keys are VOC's image ids.

    Splits: 'train' (4998 images) and 'val' (5105), or any other list of `ImageSets/Main`, or, with converted labels, of
    `ImageSets/SegmentationContext`. Where the released and converted labels are both there, the released are read.

    Raises:
        InputError: where `root` has no images, or no labels of either kind.
    """

    def __init__(self, root: Path, settings: PascalContextSettings) -> None:
        voc = _voc_folder(root)
        if voc is None:
            raise InputError(
                f"'{root}' is not a folder of PASCAL Context: it has no folder 'VOCdevkit/VOC2010/{IMAGES}', "
                f"'VOC2010/{IMAGES}' or '{IMAGES}'{_meant(root)}"
            )
        labels = _label_folder(root, voc)
        if labels is None:
            raise InputError(
                f"'{root}' has no labels of PASCAL Context: '{root / RELEASED}' with <id>.mat or '{voc / CONVERTED}' "
                f"with <id>.png is expected{_meant(root)}"
            )
        self._voc, self._labels = voc, labels
        self._background = settings.background
        first = 0 if settings.background else 1
        self.info = DatasetInfo(
            name="pascal_context",
            class_names=CLASS_NAMES[first:],
            palette=default_palette(len(CLASS_NAMES))[first:],
            has_background=settings.background,
            source=f"PASCAL Context, {len(CLASS_NAMES) - first} classes",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split in its list's order.

        Raises:
            InputError: there is no such list, a line of it is not one id, or one of its images or labels is missing.
        """
        ending = ".mat" if self._labels.name == RELEASED else ".png"
        result = []
        for key in self._listed(split):
            image, label = self._voc / IMAGES / f"{key}.jpg", self._labels / f"{key}{ending}"
            if not image.is_file():
                raise InputError(f"The image '{image}' of the split '{split}' does not exist.")
            if not label.is_file():
                raise InputError(
                    f"The image '{image}' of the split '{split}' has no label '{label}'; all 4998 and 5105 images in "
                    "VOC 2010's lists train and val have one, those of other years' lists have not."
                )
            result.append(SampleFiles(key=key, split=split, image=image, label=label))
        return result

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        path = files.label
        assert path is not None
        if path.suffix == ".mat":
            label = classes_of_label_map(read_label_map(path), path)
        else:
            values = read_index_map(path, "label")
            label = classes_of(values, path, kind="label", class_names=CLASS_NAMES, unlabelled=[UNLABELLED])
        return make_sample(files, label if self._background else without_background(label), None, self.info)

    def _listed(self, split: str) -> list[str]:
        """The ids of the split's list."""
        folder = self._voc / "ImageSets" / ("Main" if self._labels.name == RELEASED else "SegmentationContext")
        path = folder / f"{split}.txt"
        if not path.is_file():
            # Main also holds two lists for every class of VOC, as cat_train.txt.
            known = [other.stem for other in folder.glob("*.txt") if "_" not in other.stem]
            raise InputError(f"The list '{path}' of the split '{split}' does not exist{nearest_name(split, known)}")
        keys: dict[str, int] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            key = line.strip()
            if len(key.split()) > 1 or "/" in key:
                raise InputError(f"Line {number} of '{path}' is '{line}'; an image id alone is expected.")
            if key in keys:
                raise InputError(f"'{path}' names the image '{key}' twice, in line {keys[key]} and in line {number}.")
            if key:
                keys[key] = number
        if not keys:
            raise InputError(f"The list '{path}' is empty.")
        return list(keys)


def _voc_folder(root: Path) -> Path | None:
    return next((root / place for place in VOC_PLACES if (root / place / IMAGES).is_dir()), None)


def _label_folder(root: Path, voc: Path) -> Path | None:
    places = (root / RELEASED, voc / RELEASED, voc / CONVERTED, root / CONVERTED)
    return next((path for path in places if path.is_dir()), None)


def _meant(root: Path) -> str:
    """A hint at a folder above or below that has images and labels."""
    below = (path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}/{IMAGES}"))
    for path in (*root.parents[:3], *(above for images in below for above in images.parents[:3])):
        voc = _voc_folder(path)
        if voc is not None and _label_folder(path, voc) is not None:
            return f"; did you mean '{path}'?"
    return ""


def read_label_map(path: Path) -> np.ndarray:
    """Reads LabelMap, int32 [H, W], from a MATLAB file.

    Raises:
        InputError: where the file is missing, is no MATLAB file, or holds no map of whole numbers of that name.
    """
    if not path.is_file():
        raise InputError(f"The label '{path}' does not exist.")
    try:
        values = np.asarray(scipy_io.loadmat(path)["LabelMap"])
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, MatReadError) as error:
        raise InputError(f"The label '{path}' is not a MATLAB file with LabelMap: {error!r}") from None
    whole = values.dtype.kind in "uif" and bool((values == np.floor(values)).all())
    if values.ndim != 2 or not whole:
        raise InputError(
            f"LabelMap of '{path}' is {values.dtype} {list(values.shape)}; whole numbers [H, W] are expected."
        )
    return values.astype(np.int32)


def classes_of_label_map(values: np.ndarray, path: Path) -> np.ndarray:
    """Turns the values of a released label map into the 60 classes.

    Args:
        values: int32 `[H, W]`: 0…459.
        path: named where a value is wrong.

    Returns:
        uint8 `[H, W]`: 1…59, and 0, the background, for everything else.

    Raises:
        InputError: for the first value outside of 0…459.

    Source: the released labels.txt.
    """
    wrong = (values < 0) | (values > LAST_VALUE)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise InputError(
            f"The label '{path}' holds the value {values[y, x]} at row {y}, column {x}, which is no label of PASCAL "
            f"Context; 0 to {LAST_VALUE} are expected."
        )
    table: np.ndarray = np.zeros(LAST_VALUE + 1, np.uint8)
    table[list(CLASSES.values())] = np.arange(1, len(CLASS_NAMES))
    return table[values]


def without_background(label: np.ndarray) -> np.ndarray:
    """Turns the 60 classes into 59: 0 becomes 255, 1…59 become 0…58, and 255 stays; uint8 [H, W]."""
    return np.where((label == 0) | (label == UNLABELLED), UNLABELLED, label - 1).astype(np.uint8)
