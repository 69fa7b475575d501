"""PASCAL Context's released and converted labels, with and without the background, and what is usually wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from raysseg.configuration import load_settings
from raysseg.data.readers import PascalContextReader, PascalContextSettings
from raysseg.data.readers.pascal_context import CLASS_NAMES, CLASSES, classes_of_label_map, read_label_map
from raysseg.data.settings import DataSettings, open_dataset
from raysseg.errors import InputError

random = np.random.default_rng(0)

TRAIN, VAL = ("2008_000008", "2008_000015"), ("2008_000002",)
RELEASED_ROW = (0, 2, 431, 284, 458, 459, 1, 360)
CONVERTED_ROW = (0, 1, 0, 37, 59, 0, 0, 47)


def save(path: Path, values: np.ndarray, *, palette: bool = False) -> Path:
    """Saves an image; with a palette, one that shows the indices in misleading colours."""
    image = Image.fromarray(values)
    if palette:
        image.putpalette([(7 * i) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def save_map(path: Path, values: Any, name: str = "LabelMap") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {name: values})
    return path


def rows(row: tuple[int, ...], kind: type[np.generic] = np.uint8, height: int = 6) -> np.ndarray:
    return np.array([row] * height, kind)


def make_voc(voc: Path, lists: str) -> None:
    for key in (*TRAIN, *VAL):
        save(voc / "JPEGImages" / f"{key}.jpg", random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    (voc / "ImageSets" / lists).mkdir(parents=True)
    for split, keys in (("train", TRAIN), ("val", VAL)):
        (voc / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(keys) + "\n")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    make_voc(root / "VOCdevkit" / "VOC2010", "Main")
    (root / "VOCdevkit/VOC2010/ImageSets/Main/cat_train.txt").write_text("2008_000008 -1\n2008_000015  1\n")
    for key in (*TRAIN, *VAL):
        save_map(root / "trainval" / f"{key}.mat", rows(RELEASED_ROW, np.uint16))
    for name in ("labels.txt", "59_labels.txt"):
        (root / name).write_text("1: accordion\n")
    return root


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    make_voc(root / "VOC2010", "SegmentationContext")
    for key in (*TRAIN, *VAL):
        save(root / "VOC2010" / "SegmentationClassContext" / f"{key}.png", rows(CONVERTED_ROW))
    return root


@pytest.fixture(params=["released", "converted"])
def either(request: pytest.FixtureRequest) -> Path:
    root = request.getfixturevalue(request.param)
    assert isinstance(root, Path)
    return root


def reader_of(root: Path, **values: object) -> PascalContextReader:
    return PascalContextReader(root, PascalContextSettings.model_validate(values))


class TestClasses:
    def test_the_table(self) -> None:
        assert len(CLASSES) == 59
        assert list(CLASSES) == sorted(CLASSES)
        assert list(CLASSES.values()) == sorted(CLASSES.values()), "labels.txt is sorted, too"
        assert [CLASS_NAMES[k] for k in (0, 1, 37, 55, 59)] == [
            "background",
            "aeroplane",
            "person",
            "tvmonitor",
            "wood",
        ]

    def test_all_other_labels_are_background(self) -> None:
        found = classes_of_label_map(np.arange(460)[None], Path("x"))[0]
        assert found.dtype == np.uint8
        assert (found > 0).sum() == 59
        assert found[list(CLASSES.values())].tolist() == list(range(1, 60))
        for wrong in (460, -1):
            with pytest.raises(InputError, match=rf"'x' holds the value {wrong} at row 0, column 1, .* 0 to 459"):
                classes_of_label_map(np.array([[459, wrong]]), Path("x"))


class TestBothLayouts:
    def test_the_background_counts(self, either: Path) -> None:
        reader = reader_of(either)
        assert [one.key for one in reader.files("train")] == list(TRAIN)
        assert [one.key for one in reader.files("val")] == list(VAL)
        sample = reader.read(reader.files("train")[0])
        assert sample.label is not None
        assert sample.label[2].tolist() == list(CONVERTED_ROW)
        assert sample.tags == (1, 37, 47, 59)
        assert (reader.info.num_classes, reader.info.has_background) == (60, True)
        assert reader.info.palette[0] == (0, 0, 0)

    def test_the_background_is_void(self, either: Path) -> None:
        with_it, without = reader_of(either), reader_of(either, background=False)
        sample = without.read(without.files("train")[0])
        assert sample.label is not None
        assert sample.label[2].tolist() == [255, 0, 255, 36, 58, 255, 255, 46]
        assert sample.tags == (0, 36, 46, 58)
        assert (without.info.num_classes, without.info.has_background) == (59, False)
        assert without.info.class_names == with_it.info.class_names[1:]
        assert without.info.palette == with_it.info.palette[1:]

    @pytest.mark.parametrize("background", [True, False])
    def test_a_store_is_built(self, either: Path, tmp_path: Path, background: bool) -> None:
        chosen = {
            "source": "pascal_context",
            "path": str(either),
            "scribbles": "none",
            "pascal_context": {"background": background},
        }
        store = open_dataset(load_settings(DataSettings, chosen), tmp_path / "cache")
        assert store.splits == {"train": 2, "val": 1}
        assert store.info.num_classes == 59 + background
        label = store.label("2008_000002")
        assert label is not None
        assert label[0, 1] == background

    def test_the_setting_belongs_to_the_source(self) -> None:
        chosen = {"source": "camvid", "path": "x", "pascal_context": {"background": False}}
        with pytest.raises(InputError, match="settings of 'pascal_context' have no effect with the source 'camvid'"):
            load_settings(DataSettings, chosen)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda r: next(r.rglob("2008_000015.[mp][an][tg]")).unlink(),
                "image '.*2008_000015.jpg' of the split 'train' has no label '.*2008_000015.(mat|png)'; all 4998",
            ),
            (
                lambda r: next(r.rglob("2008_000015.jpg")).unlink(),
                "image '.*JPEGImages/2008_000015.jpg' of the split 'train' does not exist",
            ),
            (
                lambda r: save(next(r.rglob("2008_000015.jpg")), np.zeros((5, 8, 3), np.uint8)),
                "label '.*2008_000015.(mat|png)' has 8×6 pixels .*, but its image '.*' has 8×5",
            ),
            (
                lambda r: next(r.rglob("train.txt")).write_text("2008_000008\n2008_000015 1\n"),
                "Line 2 of '.*train.txt' is '2008_000015 1'; an image id alone is expected",
            ),
            (
                lambda r: next(r.rglob("train.txt")).write_text("2008_000008\n\n2008_000008\n"),
                "train.txt' names the image '2008_000008' twice, in line 1 and in line 3",
            ),
            (lambda r: next(r.rglob("train.txt")).write_text("\n"), "train.txt' is empty"),
        ],
    )
    def test_wrong_files(self, either: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(either)
        reader = reader_of(either)
        with pytest.raises(InputError, match=message) as error:
            _ = [reader.read(files) for files in reader.files("train")]
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("split", "meant"), [("trian", "train"), ("vall", "val")])
    def test_an_unknown_split(self, either: Path, split: str, meant: str) -> None:
        with pytest.raises(InputError, match=f"of the split '{split}' does not exist; did you mean '{meant}'"):
            reader_of(either).files(split)

    def test_a_folder_above_or_below_is_pointed_out(self, either: Path) -> None:
        for place in (either.parent, next(either.rglob("JPEGImages"))):
            with pytest.raises(
                InputError, match=r"'VOC2010/JPEGImages' or 'JPEGImages'; did you mean '.*/(context|VOC2010)'"
            ):
                reader_of(place)


class TestReleased:
    def test_labels_without_their_voc_and_voc_without_its_labels(self, released: Path) -> None:
        with pytest.raises(InputError, match=r"trainval' with <id>\.mat or .* is expected; did you mean '.*/context'"):
            reader_of(released / "VOCdevkit" / "VOC2010")
        shutil.rmtree(released / "trainval")
        with pytest.raises(InputError, match=r"SegmentationClassContext' with <id>\.png is expected$"):
            reader_of(released)

    def test_they_go_before_converted_ones(self, released: Path) -> None:
        save(released / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000008.png", rows(CONVERTED_ROW))
        assert all(one.label is not None and one.label.suffix == ".mat" for one in reader_of(released).files("train"))

    def test_doubles_are_whole_numbers_too(self, tmp_path: Path) -> None:
        found = read_label_map(save_map(tmp_path / "a.mat", rows(RELEASED_ROW, np.float64)))
        assert np.array_equal(found, rows(RELEASED_ROW, np.int32))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: p, "label '.*a.mat' does not exist"),
            (lambda p: p.touch(), "a.mat' is not a MATLAB file with LabelMap"),
            (lambda p: p.write_bytes(b"not matlab at all" * 20), "a.mat' is not a MATLAB file with LabelMap"),
            (
                lambda p: save_map(p, rows(RELEASED_ROW, np.uint16), "GTcls"),
                "not a MATLAB file with LabelMap: KeyError",
            ),
            (lambda p: save_map(p, np.zeros((2, 3, 4))), r"LabelMap of '.*' is float64 \[2, 3, 4\]; whole numbers"),
            (lambda p: save_map(p, np.full((2, 2), 0.5)), "whole numbers"),
            (lambda p: save_map(p, np.full((2, 2), np.nan)), "whole numbers"),
            (lambda p: save_map(p, "text"), "whole numbers"),
        ],
    )
    def test_wrong_maps(self, tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
        make(tmp_path / "a.mat")
        with pytest.raises(InputError, match=message):
            read_label_map(tmp_path / "a.mat")


class TestConverted:
    def test_palettes_and_unlabelled_pixels(self, converted: Path) -> None:
        path = converted / "VOC2010/SegmentationClassContext/2008_000008.png"
        save(path, rows((0, 1, 59, 255, 255, 0, 0, 0)), palette=True)
        for background, expected in ((True, [0, 1, 59, 255, 255, 0, 0, 0]), (False, [255, 0, 58] + [255] * 5)):
            reader = reader_of(converted, background=background)
            label = reader.read(reader.files("train")[0]).label
            assert label is not None
            assert label[0].tolist() == expected

    @pytest.mark.parametrize("background", [True, False])
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (rows((0, 1, 60)), r"holds the value 60 at row 0, column 2, .* 0 to 59 \(background to wood\), 255"),
            (np.zeros((6, 8, 3), np.uint8), r"is a colour image \(RGB\); an index PNG"),
        ],
    )
    def test_wrong_labels(self, converted: Path, values: np.ndarray, message: str, background: bool) -> None:
        save(converted / "VOC2010/SegmentationClassContext/2008_000008.png", values)
        reader = reader_of(converted, background=background)
        with pytest.raises(InputError, match=message):
            reader.read(reader.files("train")[0])

    def test_the_voc_folder_itself_may_be_given(self, converted: Path) -> None:
        assert len(reader_of(converted / "VOC2010").files("train")) == 2
