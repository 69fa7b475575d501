"""PASCAL VOC 2012 with SBD's extra labels and ScribbleSup's scribbles, as PNG or as the released XML."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field
from scipy import io as scipy_io
from scipy.io.matlab import MatReadError

from raysseg.configuration import Settings
from raysseg.data.readers.images import SampleFiles, classes_of, make_sample, read_index_map
from raysseg.data.sample import DatasetInfo, Sample, default_palette
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SHORT_NAMES = {
    "plane": "aeroplane",
    "table": "diningtable",
    "plant": "pottedplant",
    "monitor": "tvmonitor",
    "tv": "tvmonitor",
}

_LISTS = {
    "train_aug": (
        "SegmentationAug/train_aug.txt",
        "SegmentationAug/train.txt",
        "Segmentation/train_aug.txt",
        "Segmentation/trainaug.txt",
    )
}
"""Where the list of a split is found, most specific first; other splits are `Segmentation/<split>.txt`."""

_STROKE_WIDTH = 3

_logger = logging.getLogger(__name__)


class VocSettings(Settings):
    """Which of VOC's label sources are read."""

    labels: Literal["any", "SegmentationClass", "SegmentationClassAug", "sbd"] = Field(
        default="any",
        description="Folder of the labels ('sbd': sbd/cls/*.mat); 'any': for each image the first of the three. [R]",
    )
    scribble_folder: str = Field(
        default="pascal_2012_scribble",
        description="Folder of the scribbles, below the path: <id>.png (255 unlabelled, 0 background) or <id>.xml. "
        "[S] rloss names it so.",
    )


class VocReader:
    """Reads a `VOC2012` folder; keys are VOC's image ids.

    Splits: 'train' (1464 images), 'val' (1449), 'train_aug' (10582 with SBD's), any list in `ImageSets/Segmentation`.

    Raises:
        InputError: where `root` has no folder JPEGImages.
    """

    def __init__(self, root: Path, settings: VocSettings) -> None:
        if not (root / "JPEGImages").is_dir():
            inner = next((p.parent for depth in ("*", "*/*") for p in root.glob(f"{depth}/JPEGImages")), None)
            hint = f"; did you mean '{inner}'?" if inner else ""
            raise InputError(f"'{root}' is not a VOC2012 folder: it has no folder 'JPEGImages'{hint}")
        self._root = root
        self._settings = settings
        self.info = DatasetInfo(
            name="voc2012",
            class_names=CLASS_NAMES,
            palette=default_palette(len(CLASS_NAMES)),
            has_background=True,
            source="PASCAL VOC 2012",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split in its list's order; raises InputError where the list or one of its images is missing."""
        result = []
        for key, image, listed_label in self._listed(split):
            if not image.is_file():
                raise InputError(f"The image '{image}' of the split '{split}' does not exist.")
            listed = self._settings.labels == "any" and listed_label is not None and listed_label.is_file()
            label = listed_label if listed else self._label(key)
            scribbles = (self._root / self._settings.scribble_folder / f"{key}{ending}" for ending in (".png", ".xml"))
            scribble = next((path for path in scribbles if path.is_file()), None)
            result.append(SampleFiles(key=key, split=split, image=image, label=label, scribble=scribble))
        return result

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        label = scribble = None
        if files.label is not None:
            values = read_sbd(files.label) if files.label.suffix == ".mat" else read_index_map(files.label, "label")
            label = classes_of(values, files.label, kind="label", class_names=CLASS_NAMES, unlabelled=[UNLABELLED])
        if files.scribble is not None:
            path = files.scribble
            values = self._draw(files) if path.suffix == ".xml" else read_index_map(path, "scribble")
            scribble = classes_of(values, path, kind="scribble", class_names=CLASS_NAMES, unlabelled=[UNLABELLED])
        return make_sample(files, label, scribble, self.info)

    def _draw(self, files: SampleFiles) -> np.ndarray:
        assert files.scribble is not None
        with Image.open(files.image) as image:
            width, height = image.size
        return read_scribble_xml(files.scribble, height, width)

    def _listed(self, split: str) -> list[tuple[str, Path, Path | None]]:
        """Key, image and, where the list names one, label of every line of the split's list."""
        sets = self._root / "ImageSets"
        names = _LISTS.get(split, (f"Segmentation/{split}.txt",))
        found = next((sets / name for name in names if (sets / name).is_file()), None)
        if found is None:
            known = [path.stem for path in (sets / "Segmentation").glob("*.txt")]
            raise InputError(
                f"The list '{sets / names[0]}' of the split '{split}' does not exist{nearest_name(split, known)}"
            )
        entries: dict[str, tuple[str, Path, Path | None]] = {}
        for number, line in enumerate(found.read_text().splitlines(), start=1):
            parts = line.split()
            if not parts:
                continue
            if len(parts) == 2 and "/" in line:
                image, label = (self._root / part.lstrip("/") for part in parts)
                entry: tuple[str, Path, Path | None] = (image.stem, image, label)
            elif len(parts) == 1 and "/" not in line:
                entry = (parts[0], self._root / "JPEGImages" / f"{parts[0]}.jpg", None)
            else:
                raise InputError(
                    f"Line {number} of '{found}' is '{line}'; an image id, or the paths of an image and of its label "
                    "are expected."
                )
            if entry[0] in entries:
                raise InputError(f"'{found}' names the image '{entry[0]}' twice; the second time in line {number}.")
            entries[entry[0]] = entry
        if not entries:
            raise InputError(f"The list '{found}' is empty.")
        if split == "train_aug" and len(entries) == 10581:
            _logger.warning("'%s' has 10581 names; the list that most papers use has one more, 10582.", found)
        return list(entries.values())

    def _label(self, key: str) -> Path | None:
        """The label of an image in the chosen folder, None where there is none."""
        places = {
            "SegmentationClass": self._root / "SegmentationClass" / f"{key}.png",
            "SegmentationClassAug": self._root / "SegmentationClassAug" / f"{key}.png",
            "sbd": self._root / "sbd" / "cls" / f"{key}.mat",
        }
        chosen = places if self._settings.labels == "any" else [self._settings.labels]
        return next((places[name] for name in chosen if places[name].is_file()), None)


def read_sbd(path: Path) -> np.ndarray:
    """Reads SBD's class map, uint8 [H, W], from the field Segmentation of GTcls in a MATLAB file.

    Raises:
        InputError: where the file is missing, is no MATLAB file, or holds no such map.
    """
    if not path.is_file():
        raise InputError(f"The label '{path}' does not exist.")
    try:
        content = scipy_io.loadmat(path)
        values = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, MatReadError) as error:
        raise InputError(f"The label '{path}' is not a MATLAB file with GTcls.Segmentation: {error!r}") from None
    if values.ndim != 2 or values.dtype != np.uint8:
        raise InputError(
            f"GTcls.Segmentation of '{path}' is {values.dtype} {list(values.shape)}; uint8 [H, W] is expected."
        )
    return values


def read_scribble_xml(path: Path, height: int, width: int) -> np.ndarray:
    """Draws ScribbleSup's polylines, 3 px wide, into a map of 255, uint8 [H, W]; what lies outside is cut off.

    Raises:
        InputError: where the file is no XML, names an unknown class, or a stroke has no point.

    Source: meng-tang/rloss, convertscribbles.m (line width, canvas value, class numbers).
    """
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise InputError(f"The scribble '{path}' does not exist.") from None
    except ElementTree.ParseError as error:
        raise InputError(f"The scribble '{path}' is not XML: {error}") from None
    canvas = Image.new("L", (width, height), UNLABELLED)
    draw = ImageDraw.Draw(canvas)
    for polygon in root.iter("polygon"):
        written = polygon.findtext("tag", "").strip()
        name = written.lower().replace(" ", "").replace("_", "")
        name = _SHORT_NAMES.get(name, name)
        if name not in CLASS_NAMES:
            raise InputError(f"The scribble '{path}' names the class '{written}'{nearest_name(name, CLASS_NAMES)}")
        k = CLASS_NAMES.index(name)
        try:
            points = [
                (round(float(point.findtext("X", ""))), round(float(point.findtext("Y", ""))))
                for point in polygon.iter("point")
            ]
        except ValueError:
            raise InputError(f"A stroke '{written}' of '{path}' has a point whose X or Y is not a number.") from None
        if not points:
            raise InputError(f"A stroke '{written}' of the scribble '{path}' has no point.")
        half = _STROKE_WIDTH // 2
        for x, y in points:
            # Squares at the points close the gaps that separate segments leave at their joints.
            draw.rectangle((x - half, y - half, x + half, y + half), fill=k)
        draw.line(points, fill=k, width=_STROKE_WIDTH)
    return np.asarray(canvas)
