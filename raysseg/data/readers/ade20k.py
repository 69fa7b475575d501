"""ADE20K: 150 classes of scenes, from the scene parsing challenge or from the full release.

The challenge, `ADEChallengeData2016`, has index PNGs in which 0 is "other" and 1…150 are the classes; 0 is never a
class here, and all others go down by one. The full release has thousands of objects, whose numbers stand in the
colours of `…_seg.png`: red / 10 · 256 + green. The numbers of the 150 classes among them are known from the
challenge's own conversion, by which three classes are made of two objects each (door of "door" and "double door",
booth of "booth" and "booth, cubicle, stall, kiosk", wardrobe of "wardrobe" and "closet"); every other object is void.
Names would not do: "door, double door" is no object, and "screen" is part of three classes' names.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from raysseg.data.readers.images import SampleFiles, make_sample, match_by_stem, read_image, read_index_map
from raysseg.data.sample import DatasetInfo, Sample
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

CLASSES: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    "wall": ((2978,), (120, 120, 120)),
    "building": ((312,), (180, 120, 120)),
    "sky": ((2420,), (6, 230, 230)),
    "floor": ((976,), (80, 50, 50)),
    "tree": ((2855,), (4, 200, 3)),
    "ceiling": ((447,), (120, 120, 80)),
    "road": ((2131,), (140, 140, 140)),
    "bed": ((165,), (204, 5, 255)),
    "windowpane": ((3055,), (230, 230, 230)),
    "grass": ((1125,), (4, 250, 7)),
    "cabinet": ((350,), (224, 5, 255)),
    "sidewalk": ((2377,), (235, 255, 7)),
    "person": ((1831,), (150, 5, 61)),
    "earth": ((838,), (120, 120, 70)),
    "door": ((774, 783), (8, 255, 51)),
    "table": ((2684,), (255, 6, 82)),
    "mountain": ((1610,), (143, 255, 140)),
    "plant": ((1910,), (204, 255, 4)),
    "curtain": ((687,), (255, 51, 7)),
    "chair": ((471,), (204, 70, 3)),
    "car": ((401,), (0, 102, 200)),
    "water": ((2994,), (61, 230, 250)),
    "painting": ((1735,), (255, 6, 51)),
    "sofa": ((2473,), (11, 102, 255)),
    "shelf": ((2329,), (255, 7, 71)),
    "house": ((1276,), (255, 9, 224)),
    "sea": ((2264,), (9, 7, 230)),
    "mirror": ((1564,), (220, 220, 220)),
    "rug": ((2178,), (255, 9, 92)),
    "field": ((913,), (112, 9, 255)),
    "armchair": ((57,), (8, 255, 214)),
    "seat": ((2272,), (7, 255, 224)),
    "fence": ((907,), (255, 184, 6)),
    "desk": ((724,), (10, 255, 71)),
    "rock": ((2138,), (255, 41, 10)),
    "wardrobe": ((533, 2985), (7, 255, 255)),
    "lamp": ((1395,), (224, 255, 8)),
    "bathtub": ((155,), (102, 8, 255)),
    "railing": ((2053,), (255, 61, 6)),
    "cushion": ((689,), (255, 194, 7)),
    "base": ((137,), (255, 122, 8)),
    "box": ((266,), (0, 255, 20)),
    "column": ((581,), (255, 8, 41)),
    "signboard": ((2380,), (255, 5, 153)),
    "chest of drawers": ((491,), (6, 51, 255)),
    "counter": ((627,), (235, 12, 255)),
    "sand": ((2212,), (160, 150, 20)),
    "sink": ((2388,), (0, 163, 255)),
    "skyscraper": ((2423,), (140, 140, 140)),
    "fireplace": ((943,), (250, 10, 15)),
    "refrigerator": ((2096,), (20, 255, 0)),
    "grandstand": ((1121,), (31, 255, 0)),
    "path": ((1788,), (255, 31, 0)),
    "stairs": ((2530,), (255, 224, 0)),
    "runway": ((2185,), (153, 255, 0)),
    "case": ((420,), (0, 0, 255)),
    "pool table": ((1948,), (255, 71, 0)),
    "pillow": ((1869,), (0, 235, 255)),
    "screen door": ((2251,), (0, 173, 255)),
    "stairway": ((2531,), (31, 0, 255)),
    "river": ((2128,), (11, 200, 200)),
    "bridge": ((294,), (255, 82, 0)),
    "bookcase": ((239,), (0, 255, 245)),
    "blind": ((212,), (0, 61, 255)),
    "coffee table": ((571,), (0, 255, 112)),
    "toilet": ((2793,), (0, 255, 133)),
    "flower": ((978,), (255, 0, 0)),
    "book": ((236,), (255, 163, 0)),
    "hill": ((1240,), (255, 102, 0)),
    "bench": ((181,), (194, 255, 0)),
    "countertop": ((629,), (0, 143, 255)),
    "stove": ((2598,), (51, 255, 0)),
    "palm": ((1744,), (0, 82, 255)),
    "kitchen island": ((1374,), (0, 255, 41)),
    "computer": ((591,), (0, 255, 173)),
    "swivel chair": ((2679,), (10, 0, 255)),
    "boat": ((223,), (173, 255, 0)),
    "bar": ((123,), (0, 255, 153)),
    "arcade machine": ((47,), (255, 92, 0)),
    "hovel": ((1282,), (255, 0, 255)),
    "bus": ((327,), (255, 0, 245)),
    "towel": ((2821,), (255, 0, 102)),
    "light": ((1451,), (255, 173, 0)),
    "truck": ((2880,), (255, 0, 20)),
    "tower": ((2828,), (255, 184, 184)),
    "chandelier": ((480,), (0, 31, 255)),
    "awning": ((77,), (0, 255, 61)),
    "streetlight": ((2616,), (0, 71, 255)),
    "booth": ((246, 247), (255, 0, 204)),
    "television": ((2733,), (0, 255, 194)),
    "airplane": ((14,), (0, 255, 82)),
    "dirt track": ((738,), (0, 10, 255)),
    "apparel": ((38,), (0, 112, 255)),
    "pole": ((1936,), (51, 0, 255)),
    "land": ((1401,), (0, 194, 255)),
    "bannister": ((120,), (0, 122, 255)),
    "escalator": ((868,), (0, 255, 163)),
    "ottoman": ((1702,), (255, 153, 0)),
    "bottle": ((249,), (0, 255, 10)),
    "buffet": ((308,), (255, 112, 0)),
    "poster": ((1969,), (143, 255, 0)),
    "stage": ((2526,), (82, 0, 255)),
    "van": ((2928,), (163, 255, 0)),
    "ship": ((2337,), (255, 235, 0)),
    "fountain": ((1023,), (8, 184, 170)),
    "conveyer belt": ((609,), (133, 0, 255)),
    "canopy": ((389,), (0, 255, 92)),
    "washer": ((2989,), (184, 0, 255)),
    "plaything": ((1930,), (255, 0, 31)),
    "swimming pool": ((2668,), (0, 184, 255)),
    "stool": ((2586,), (0, 214, 255)),
    "barrel": ((131,), (255, 0, 112)),
    "basket": ((146,), (92, 255, 0)),
    "waterfall": ((3016,), (0, 224, 255)),
    "tent": ((2739,), (112, 224, 255)),
    "bag": ((95,), (70, 184, 160)),
    "minibike": ((1563,), (163, 0, 255)),
    "cradle": ((642,), (153, 0, 255)),
    "oven": ((1708,), (71, 255, 0)),
    "ball": ((103,), (255, 0, 163)),
    "food": ((1002,), (255, 204, 0)),
    "step": ((2569,), (255, 0, 143)),
    "tank": ((2704,), (0, 255, 235)),
    "trade name": ((2833,), (133, 255, 0)),
    "microwave": ((1551,), (255, 0, 235)),
    "pot": ((1981,), (245, 0, 255)),
    "animal": ((29,), (255, 0, 122)),
    "bicycle": ((187,), (255, 245, 0)),
    "lake": ((1393,), (10, 190, 212)),
    "dishwasher": ((747,), (214, 255, 0)),
    "screen": ((2254,), (0, 204, 255)),
    "blanket": ((206,), (20, 0, 255)),
    "sculpture": ((2262,), (255, 255, 0)),
    "hood": ((1260,), (0, 153, 255)),
    "sconce": ((2243,), (0, 41, 255)),
    "vase": ((2932,), (0, 255, 204)),
    "traffic light": ((2836,), (41, 0, 255)),
    "tray": ((2850,), (41, 255, 0)),
    "ashcan": ((64,), (173, 0, 255)),
    "fan": ((894,), (0, 245, 255)),
    "pier": ((1858,), (71, 0, 255)),
    "crt screen": ((3109,), (122, 0, 255)),
    "plate": ((1919,), (0, 255, 184)),
    "monitor": ((1583,), (0, 92, 255)),
    "bulletin board": ((318,), (184, 255, 0)),
    "shower": ((2356,), (0, 133, 255)),
    "radiator": ((2046,), (255, 214, 0)),
    "glass": ((1098,), (25, 194, 194)),
    "clock": ((530,), (102, 255, 0)),
    "flag": ((954,), (92, 0, 255)),
}
"""Classes 0…149 by the first of their names in `objectInfo150.txt`, each with its object numbers in the full release
and the challenge's colour.
"""

LAST_OBJECT = 3688
"""Number of objects of the full release of 2021; that of 2016 has fewer, with the same numbers."""

IMAGES, LABELS = "images", "annotations"
SPLITS = {"train": "training", "val": "validation", "test": "testing"}
"""The folder of every split, whose own name is a split's name, too."""

UNLABELLED_SPLIT = "testing"
OBJECTS_ENDING = "_seg.png"


class Ade20kReader:
    """Reads ADE20K; keys are the names without ending, as `ADE_train_00000001`, which are unique over its splits.

    Splits: 'train' (20210 images of the challenge, 25574 of the full release), 'val' (2000), and, where the challenge's
    `release_test/testing` or `images/testing` is there, 'test', whose images have no label.

    Raises:
        InputError: where `root` has no folder images of either release.
    """

    def __init__(self, root: Path) -> None:
        if not _is_ade20k(root):
            near = [
                *root.parents[:2],
                *(path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{IMAGES}")),
            ]
            inner = next((path for path in near if _is_ade20k(path)), None)
            hint = f"; did you mean '{inner}'?" if inner else ""
            raise InputError(f"'{root}' is not a folder of ADE20K: it has no folder '{IMAGES}/training'{hint}")
        self._root = root
        self._objects = _has_objects(root)
        of = "full release, its objects as the challenge's" if self._objects else "scene parsing challenge,"
        self.info = DatasetInfo(
            name="ade20k",
            class_names=tuple(CLASSES),
            palette=tuple(colour for _, colour in CLASSES.values()),
            has_background=False,
            source=f"ADE20K, {of} 150 classes",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split by place and name.

        Raises:
            InputError: there is no such split, or an image has no label or a label no image.
        """
        name = SPLITS.get(split, split)
        folder = self._folder(name)
        if folder is None:
            known = [key for pair in SPLITS.items() for key in pair if self._folder(pair[1])]
            raise InputError(
                f"'{self._root / IMAGES / name}' does not exist: no split '{split}'{nearest_name(split, known)}"
            )
        if self._objects:
            return _files_with_objects(folder, split)
        labels = None if name == UNLABELLED_SPLIT else self._root / LABELS / name
        files = match_by_stem(folder, labels, None, split=split)
        missing = next((one for one in files if labels is not None and one.label is None), None)
        if missing is not None:
            raise InputError(f"The image '{missing.image}' has no label: '{labels}/{missing.key}.png' is expected.")
        return files

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        label = None
        if files.label is not None:
            if self._objects:
                label = classes_of_objects(_read_objects(files.label), files.label)
            else:
                label = classes_of_values(read_index_map(files.label, "label"), files.label)
        return make_sample(files, label, None, self.info)

    def _folder(self, name: str) -> Path | None:
        """The images of a split by its folder's name, None where there are none."""
        places = [self._root / IMAGES / "ADE" / name, self._root / IMAGES / name]
        if name == UNLABELLED_SPLIT:
            places.append(self._root / "release_test" / name)
        return next((path for path in places if name in SPLITS.values() and path.is_dir()), None)


def _is_ade20k(root: Path) -> bool:
    return any((root / IMAGES / inner / name).is_dir() for inner in (".", "ADE") for name in SPLITS.values())


def _has_objects(root: Path) -> bool:
    """Whether this is the full release, whose images lie in folders of scenes."""
    if (root / IMAGES / "ADE").is_dir():
        return True
    folders = (root / IMAGES / name for name in SPLITS.values())
    return not (root / LABELS).is_dir() and any(
        path.is_dir() for folder in folders if folder.is_dir() for path in folder.iterdir()
    )


def _files_with_objects(folder: Path, split: str) -> list[SampleFiles]:
    """Images of all scenes of the full release with the `_seg.png` beside each."""
    found: dict[str, SampleFiles] = {}
    for place, inner, names in os.walk(folder):
        there = set(names)
        # A folder named like an image holds the masks of its objects, up to hundreds of files.
        inner[:] = sorted(name for name in inner if f"{name}.jpg" not in there)
        for name in sorted(there):
            path = Path(place, name)
            if name.endswith(OBJECTS_ENDING) and f"{name.removesuffix(OBJECTS_ENDING)}.jpg" not in there:
                raise InputError(
                    f"The label '{path}' has no image '{name.removesuffix(OBJECTS_ENDING)}.jpg' beside it."
                )
            if path.suffix != ".jpg" or name.startswith("."):
                continue
            label = path.with_name(path.stem + OBJECTS_ENDING)
            if label.name not in there:
                raise InputError(f"The image '{path}' has no label: '{label.name}' is expected beside it.")
            if path.stem in found:
                raise InputError(f"'{path}' and '{found[path.stem].image}' are two images of one name.")
            found[path.stem] = SampleFiles(key=path.stem, split=split, image=path, label=label)
    if not found:
        raise InputError(f"The folder '{folder}' holds no image that ends in .jpg.")
    return list(found.values())


def _read_objects(path: Path) -> np.ndarray:
    """Reads the colours of a `_seg.png`, uint8 [H, W, 3]; raises InputError where it is no RGB PNG."""
    values = read_image(path)
    with Image.open(path) as image:
        if (image.format, image.mode) != ("PNG", "RGB"):
            raise InputError(
                f"The label '{path}' is a {image.format} of mode {image.mode}; the full release's PNG in RGB is expected."
            )
    return values


def classes_of_values(values: np.ndarray, path: Path) -> np.ndarray:
    """Turns the challenge's values into classes.

    Args:
        values: uint8 `[H, W]`: 1…150, or 0, which is void.
        path: named where a value is wrong.

    Returns:
        uint8 `[H, W]`: 0…149, and 255 for void.

    Raises:
        InputError: for the first value above 150.
    """
    if values.max() > len(CLASSES):
        y, x = np.argwhere(values > len(CLASSES))[0]
        names = tuple(CLASSES)
        raise InputError(
            f"The label '{path}' holds the value {values[y, x]} at row {y}, column {x}, which is no class of ADE20K; "
            f"0 (void) and 1 to {len(names)} ({names[0]} to {names[-1]}) are expected."
        )
    return np.where(values == 0, UNLABELLED, values - 1).astype(np.uint8)


def classes_of_objects(colours: np.ndarray, path: Path) -> np.ndarray:
    """Turns the full release's colours into the challenge's classes.

    Args:
        colours: uint8 `[H, W, 3]`: red / 10 · 256 + green is the object's number, 0 none; blue, which tells instances
            apart, is not used.
        path: named where a colour is wrong.

    Returns:
        uint8 `[H, W]`: 0…149, and 255 for every object that is in none of the classes.

    Raises:
        InputError: for the first colour that is no object's.

    Source: the conversion script and its table of numbers in the challenge's development kit.
    """
    red: np.ndarray = colours[..., 0].astype(np.int32)
    objects = red // 10 * 256 + colours[..., 1]
    wrong = (red % 10 != 0) | (objects > LAST_OBJECT)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise InputError(
            f"The label '{path}' holds the colour {tuple(int(c) for c in colours[y, x])} at row {y}, column {x}, which "
            f"is no object of ADE20K; a red that is a multiple of 10 and red / 10 · 256 + green of 0 to {LAST_OBJECT} "
            "are expected."
        )
    table: np.ndarray = np.full(LAST_OBJECT + 1, UNLABELLED, np.uint8)
    for k, (numbers, _) in enumerate(CLASSES.values()):
        table[list(numbers)] = k
    return table[objects]
