"""ADE20K's two releases: small trees in their layouts, the numbers of its classes, and what is usually wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysseg.algorithms import CiSSNetSettings
from raysseg.algorithms.recipes import load_recipe
from raysseg.configuration import load_settings
from raysseg.data.readers import Ade20kReader
from raysseg.data.readers.ade20k import CLASSES, classes_of_objects, classes_of_values
from raysseg.data.settings import DataSettings, open_dataset
from raysseg.errors import InputError

NAMES = tuple(CLASSES)
random = np.random.default_rng(0)


def save(path: Path, values: np.ndarray, *, palette: bool = False, **options: Any) -> Path:
    """Saves an image; with a palette, one that shows the indices in misleading colours."""
    image = Image.fromarray(values)
    if palette:
        image.putpalette([(7 * i) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def values(*row: int, height: int = 6) -> np.ndarray:
    return np.array([row] * height, np.uint8)


def objects(*row: int, height: int = 6) -> np.ndarray:
    """Colours of object numbers, with different instances in blue."""
    numbers = np.array([row] * height)
    blue = np.arange(numbers.size).reshape(numbers.shape)
    return np.stack([numbers // 256 * 10, numbers % 256, blue], axis=-1).astype(np.uint8)


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for folder, stems in (
        ("training", ("ADE_train_00000001", "ADE_train_00000002")),
        ("validation", ("ADE_val_00000001",)),
    ):
        for stem in stems:
            save(root / "images" / folder / f"{stem}.jpg", picture())
            save(root / "annotations" / folder / f"{stem}.png", values(0, 1, 2, 150, 149, 13, 13, 13))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    return root


@pytest.fixture(params=["2016", "2021"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Both generations of the full release: the newer one's masks of instances lie in folders named like the image."""
    new = request.param == "2021"
    root = tmp_path / ("ADE20K_2021_17_01" if new else "ADE20K_2016_07_26")
    places = {
        "training": ("urban/street", "cultural/zoo") if new else ("s/street", "z/zoo/outdoor"),
        "validation": ("urban/street",) if new else ("s/street",),
    }
    for split, scenes in places.items():
        for number, scene in enumerate(scenes):
            folder = root / "images" / ("ADE" if new else ".") / split / scene
            stem = f"ADE_{split[:5].removesuffix('i')}_{number:08d}"
            save(folder / f"{stem}.jpg", picture())
            save(folder / f"{stem}_seg.png", objects(0, 2978, 312, 774, 783, 3050, 954, 3688))
            save(folder / f"{stem}_parts_1.png", objects(*[3050] * 8))
            if new:
                (folder / f"{stem}.json").write_text("{}")
                save(folder / stem / f"instance_000_{stem}.png", values(*[255] * 8))
            else:
                (folder / f"{stem}_atr.txt").write_text("001 # 0 # 0 # wall # wall # \n")
    return root


class TestClasses:
    def test_the_table(self) -> None:
        assert len(NAMES) == 150
        assert [NAMES[k] for k in (0, 12, 20, 74, 149)] == ["wall", "person", "car", "computer", "flag"]
        numbers = [number for several, _ in CLASSES.values() for number in several]
        assert len(set(numbers)) == len(numbers) == 153
        assert CLASSES["sky"] == ((2420,), (6, 230, 230))

    def test_the_challenges_values_go_down_by_one_and_zero_is_void(self) -> None:
        found = classes_of_values(np.arange(151, dtype=np.uint8)[None], Path("x"))
        assert found.tolist() == [[255, *range(150)]]
        for wrong in (151, 255):
            message = (
                rf"label 'x' holds the value {wrong} at row 0, column 1, .* 0 \(void\) and 1 to 150 \(wall to flag\)"
            )
            with pytest.raises(InputError, match=message):
                classes_of_values(np.array([[150, wrong]], np.uint8), Path("x"))

    def test_colours_of_objects(self) -> None:
        found = classes_of_objects(objects(0, 2978, 774, 783, 246, 247, 533, 2985, 954, 778, height=1), Path("x"))
        door, booth, wardrobe = (NAMES.index(name) for name in ("door", "booth", "wardrobe"))
        assert found.tolist() == [[255, 0, door, door, booth, booth, wardrobe, wardrobe, 149, 255]]

    @pytest.mark.parametrize("colour", [(128, 64, 128), (150, 0, 0), (140, 105, 0)])
    def test_colours_that_are_no_objects(self, colour: tuple[int, int, int]) -> None:
        wrong = np.array([[(110, 162, 3), colour]], np.uint8)
        expected = r"holds the colour \({}, {}, {}\) at row 0, column 1, .* 0 to 3688".format(*colour)
        with pytest.raises(InputError, match=expected):
            classes_of_objects(wrong, Path("x"))


class TestChallenge:
    @pytest.mark.parametrize("palette", [False, True])
    def test_files_and_labels(self, challenge: Path, palette: bool) -> None:
        if palette:
            save(
                challenge / "annotations/training/ADE_train_00000001.png",
                values(0, 1, 2, 150, 149, 13, 13, 13),
                palette=True,
            )
        reader = Ade20kReader(challenge)
        assert [one.key for one in reader.files("train")] == ["ADE_train_00000001", "ADE_train_00000002"]
        assert [one.key for one in reader.files("val")] == ["ADE_val_00000001"]
        sample = reader.read(reader.files("train")[0])
        assert sample.label is not None
        assert sample.label[3].tolist() == [255, 0, 1, 149, 148, 12, 12, 12]
        assert sample.tags == (0, 1, 12, 148, 149), "class 0 is a class and not the background"
        assert (reader.info.num_classes, reader.info.has_background) == (150, False)

    def test_the_folders_own_names_are_splits_too(self, challenge: Path) -> None:
        reader = Ade20kReader(challenge)
        assert [one.split for one in reader.files("training")] == ["training"] * 2
        assert [one.image for one in reader.files("validation")] == [one.image for one in reader.files("val")]

    @pytest.mark.parametrize("place", ["images/testing", "release_test/testing"])
    def test_the_test_split_has_no_labels(self, challenge: Path, place: str) -> None:
        with pytest.raises(InputError, match="no split 'test'; known are train, training, val, validation"):
            Ade20kReader(challenge).files("test")
        save(challenge / place / "ADE_test_00000001.jpg", picture())
        reader = Ade20kReader(challenge)
        (files,) = reader.files("test")
        sample = reader.read(files)
        assert (sample.key, sample.label, sample.tags) == ("ADE_test_00000001", None, ())

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda r: (r / "annotations/training/ADE_train_00000002.png").unlink(),
                "image '.*ADE_train_00000002.jpg' has no label: '.*annotations/training/ADE_train_00000002.png' is exp",
            ),
            (
                lambda r: (r / "images/training/ADE_train_00000002.jpg").unlink(),
                "label '.*annotations/training/ADE_train_00000002.png' has no image",
            ),
            (lambda r: shutil.rmtree(r / "annotations"), "annotations/training' of the labels does not exist"),
            (
                lambda r: save(r / "annotations/training/ADE_train_00000002.png", values(1, 2, height=5)),
                "ADE_train_00000002.png' has 2×5 pixels .*, but its image '.*.jpg' has 8×6",
            ),
            (
                lambda r: save(r / "annotations/training/ADE_train_00000002.png", picture()),
                r"is a colour image \(RGB\); an index PNG",
            ),
            (
                lambda r: save(r / "annotations/training/ADE_train_00000002.png", values(0, 149, 255)),
                "holds the value 255 at row 0, column 2, which is no class of ADE20K",
            ),
            (lambda r: (r / "images/training/index.csv").touch(), "index.csv' is not an image"),
        ],
    )
    def test_wrong_files(self, challenge: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(challenge)
        reader = Ade20kReader(challenge)
        with pytest.raises(InputError, match=message) as error:
            _ = [reader.read(files) for files in reader.files("train")]
        assert "\n" not in str(error.value)

    def test_wrong_places(self, challenge: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no split 'trian'; did you mean 'train'"):
            Ade20kReader(challenge).files("trian")
        for place in (tmp_path, challenge / "images", challenge / "images" / "training"):
            with pytest.raises(
                InputError, match=r"no folder 'images/training'; did you mean '.*/ADEChallengeData2016'"
            ):
                Ade20kReader(place)
        with pytest.raises(InputError, match=r"no folder 'images/training'$"):
            Ade20kReader(tmp_path / "nowhere" / "at" / "all")

    def test_a_store_is_built(self, challenge: Path, tmp_path: Path) -> None:
        chosen = {"source": "ade20k", "path": str(challenge), "scribbles": "none"}
        store = open_dataset(load_settings(DataSettings, chosen), tmp_path / "cache")
        assert store.splits == {"train": 2, "val": 1}
        label = store.label("ADE_val_00000001")
        assert label is not None
        assert label[0].tolist() == [255, 0, 1, 149, 148, 12, 12, 12]


class TestFullRelease:
    def test_objects_become_the_challenges_classes(self, full: Path) -> None:
        reader = Ade20kReader(full)
        assert {one.key for one in reader.files("train")} == {"ADE_train_00000000", "ADE_train_00000001"}
        (files,) = reader.files("val")
        sample = reader.read(files)
        assert sample.label is not None
        assert sample.label[5].tolist() == [255, 0, 1, 14, 14, 255, 149, 255]
        assert reader.info.class_names == NAMES
        assert "full release" in reader.info.source

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda p: p.with_name(f"{p.stem}_seg.png").unlink(),
                "00000000.jpg' has no label: '.*_seg.png' is expected",
            ),
            (lambda p: p.unlink(), "label '.*_seg.png' has no image '.*.jpg' beside it"),
            (
                lambda p: save(p.with_name(f"{p.stem}_seg.png"), values(1, 2)),
                "is a PNG of mode L; .* in RGB is expected",
            ),
            (
                lambda p: save(p.with_name(f"{p.stem}_seg.png"), picture(), format="JPEG"),
                "is a JPEG of mode RGB; .* PNG in RGB is expected",
            ),
            (lambda p: save(p.with_name(f"{p.stem}_seg.png"), objects(1, 2)), "has 2×6 pixels .* has 8×6"),
            (lambda p: p.with_name(f"{p.stem}_seg.png").write_bytes(b"x"), "_seg.png' cannot be read as an image"),
            (
                lambda p: [shutil.copy(path, p.parents[2]) for path in (p, p.with_name(f"{p.stem}_seg.png"))],
                "are two images of one name",
            ),
        ],
    )
    def test_wrong_files(self, full: Path, damage: Callable[[Path], object], message: str) -> None:
        reader = Ade20kReader(full)
        damage(next(full.rglob("ADE_train_00000000.jpg")))
        with pytest.raises(InputError, match=message) as error:
            _ = [reader.read(files) for files in reader.files("train")]
        assert "\n" not in str(error.value)

    def test_wrong_places(self, full: Path) -> None:
        with pytest.raises(InputError, match="no split 'vall'; did you mean 'val'"):
            Ade20kReader(full).files("vall")
        with pytest.raises(InputError, match=f"did you mean '.*/{full.name}'"):
            Ade20kReader(full.parent)

    def test_a_split_without_images(self, full: Path) -> None:
        folder = next(full.rglob("validation"))
        shutil.rmtree(folder)
        folder.mkdir()
        with pytest.raises(InputError, match=r"validation' holds no image that ends in \.jpg"):
            Ade20kReader(full).files("val")

    def test_a_real_image_has_the_classes_that_its_description_names(self, tmp_path: Path, shared_data: Path) -> None:
        source = shared_data / "samples" / "ade20k1"
        if not source.is_dir():
            pytest.skip("the real image of ADE20K is not here")
        place = tmp_path / "images" / "ADE" / "training" / "urban" / "street"
        place.mkdir(parents=True)
        for path in source.iterdir():
            (place / path.name).symlink_to(path)
        reader = Ade20kReader(tmp_path)
        (files,) = reader.files("train")
        assert files.key == "ADE_train_00016964"
        sample = reader.read(files)
        assert sample.label is not None
        assert sample.label.shape == (1467, 2200)
        described = json.loads((source / "ADE_train_00016964.json").read_text())["annotation"]["object"]
        whole = {one["name"].split(",")[0] for one in described if one["parts"]["part_level"] == 0}
        assert {NAMES[k] for k in sample.tags} == whole & set(NAMES)
        assert whole - set(NAMES) == {"alarm", "container"}
        # Its doors are parts of other objects, which the full release draws elsewhere.
        assert NAMES.index("door") not in sample.tags
        share = {NAMES[k]: (sample.label == k).mean() for k in sample.tags}
        assert share["building"] == pytest.approx(0.2466, abs=1e-4)
        assert (sample.label == 255).mean() == pytest.approx(0.1174 + 0.0124 + 0.0020, abs=1e-4)


def test_the_papers_settings_are_the_recipes() -> None:
    settings = load_recipe("cissnet-ade20k").settings("cissnet", 0)
    assert isinstance(settings, CiSSNetSettings)
    assert settings.data.source == "ade20k"
    assert settings.training.augmentation.crop == (473, 473)
    learning = settings.cissnet.learning
    assert (learning.batch_size, learning.gamma, learning.entropy_weight) == (32, 0.9, 0.05)
    assert learning.optimiser.learning_rate * learning.context_rate == pytest.approx(2e-4)
