"""Readers against small files made in each format, and what they say about files that are wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from raysseg.data.readers import CamvidReader, CityscapesReader, FolderReader, FolderSettings, VocReader, VocSettings
from raysseg.data.readers.camvid import CLASSES
from raysseg.data.readers.cityscapes import classes_of_label_ids
from raysseg.data.readers.images import classes_of, read_image, read_index_map
from raysseg.data.readers.voc import CLASS_NAMES, read_sbd, read_scribble_xml
from raysseg.errors import InputError

random = np.random.default_rng(0)


def save(path: Path, values: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def save_palette(path: Path, values: np.ndarray) -> Path:
    """An index PNG whose palette shows the indices in misleading colours, as VOC's label files are."""
    image = Image.fromarray(values)
    image.putpalette([(7 * i) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def index_map(*values: int, height: int = 6, width: int = 8) -> np.ndarray:
    return random.choice(np.array(values, np.uint8), size=(height, width))


class TestImages:
    def test_colour_grey_and_opaque_images_become_rgb(self, tmp_path: Path) -> None:
        colour = picture()
        assert np.array_equal(read_image(save(tmp_path / "a.png", colour)), colour)
        grey = colour[..., 0]
        assert np.array_equal(read_image(save(tmp_path / "b.png", grey)), grey[..., None].repeat(3, -1))
        opaque = np.dstack([colour, np.full((6, 8), 255, np.uint8)])
        assert np.array_equal(read_image(save(tmp_path / "c.png", opaque)), colour)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: p, "image '.*x.png' does not exist"),
            (lambda p: p.write_bytes(b"no picture"), "x.png' cannot be read as an image"),
            (lambda p: (save(p, picture(64, 64)), p.write_bytes(p.read_bytes()[:200])), "x.png' cannot be read"),
            (lambda p: save(p, np.full((4, 4), 999, np.uint16)), "x.png' has more than 8 bits"),
            (lambda p: save(p, np.zeros((4, 4, 4), np.uint8)), "x.png' is partly transparent"),
            (lambda p: save(p, picture(), exif=_rotated()), "x.png' is stored rotated"),
        ],
    )
    def test_wrong_images(self, tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
        make(tmp_path / "x.png")
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / "x.png")

    def test_index_maps_are_read_by_index(self, tmp_path: Path) -> None:
        values = index_map(0, 1, 2, 3, 255)
        assert np.array_equal(read_index_map(save(tmp_path / "grey.png", values), "label"), values)
        assert np.array_equal(read_index_map(save_palette(tmp_path / "palette.png", values), "label"), values)

    def test_grey_pngs_of_few_bits_keep_their_stored_values(self, tmp_path: Path) -> None:
        values = index_map(0, 1)
        Image.fromarray(values * 255).convert("1").save(tmp_path / "one.png")
        assert np.array_equal(read_index_map(tmp_path / "one.png", "label"), values)
        few = index_map(0, 1, 2, 3)
        _write_grey_png(tmp_path / "two.png", few, bits=2)
        assert np.array_equal(read_index_map(tmp_path / "two.png", "label"), few)
        more = index_map(*range(16))
        _write_grey_png(tmp_path / "four.png", more, bits=4)
        assert np.array_equal(read_index_map(tmp_path / "four.png", "label"), more)

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("x.png", picture(), r"label '.*x.png' is a colour image \(RGB\); an index PNG with one channel"),
            ("x.png", np.zeros((4, 4), np.uint16), "x.png' is of mode I;16; an index PNG"),
            ("x.jpg", np.zeros((4, 4), np.uint8), "x.jpg' is a JPEG, which alters class values"),
        ],
    )
    def test_wrong_index_maps(self, tmp_path: Path, name: str, values: np.ndarray, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_index_map(save(tmp_path / name, values), "label")

    def test_values_become_classes(self) -> None:
        values = np.array([[0, 1, 4], [9, 255, 1]], np.uint8)
        names = ("a", "b")
        found = classes_of(values, Path("x"), kind="label", class_names=names, unlabelled=[4, 9, 255])
        assert found.tolist() == [[0, 1, 255], [255, 255, 1]]
        message = (
            r"scribble 'x' holds the value 9 at row 1, column 0, .* class list; 0 to 1 \(a to b\), 4 \(unlabelled\)"
        )
        with pytest.raises(InputError, match=message):
            classes_of(values, Path("x"), kind="scribble", class_names=names, unlabelled=[4])


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _write_grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """Writes a grey PNG of 2 or 4 bits, which Pillow itself does not."""
    import struct
    import zlib

    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    lines = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(raw))]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, stem in (("train", "a"), ("train", "b"), ("val", "a")):
        save(tmp_path / split / "images" / f"{stem}.jpg", picture())
        save(tmp_path / split / "labels" / f"{stem}.png", np.array([[0, 1, 2, 3, 255, 0, 0, 0]] * 6, np.uint8))
    for stem in ("a", "b"):
        save(tmp_path / "train" / "scribbles" / f"{stem}.png", np.array([[0, 4, 4, 3, 4, 4, 4, 4]] * 6, np.uint8))
    (tmp_path / "train" / "images" / ".hidden").touch()
    return tmp_path


def folder_reader(root: Path, **values: object) -> FolderReader:
    return FolderReader(root, FolderSettings.model_validate({"class_names": 4, "scribble_unlabelled": 4, **values}))


class TestFolder:
    def test_files_are_matched_by_name(self, folder: Path) -> None:
        reader = folder_reader(folder)
        assert [f.key for f in reader.files("train") + reader.files("val")] == ["train-a", "train-b", "val-a"]
        sample = reader.read(reader.files("train")[0])
        assert sample.label is not None
        assert sample.scribble is not None
        assert sample.label[0].tolist() == [0, 1, 2, 3, 255, 0, 0, 0]
        assert sample.scribble[0].tolist() == [0, 255, 255, 3, 255, 255, 255, 255]
        assert sample.tags == (1, 2, 3)
        assert reader.read(reader.files("val")[0]).scribble is None
        assert reader.info.class_names == ("class 0", "class 1", "class 2", "class 3")

    def test_settings_take_effect(self, folder: Path) -> None:
        names = ("a", "b", "c", "d")
        reader = folder_reader(folder, class_names=names, has_background=False)
        assert reader.info.class_names == names
        assert reader.read(reader.files("val")[0]).tags == (0, 1, 2, 3)
        three = folder_reader(folder, class_names=3, ignore_index=3)
        with pytest.raises(InputError, match="holds the value 255"):
            three.read(three.files("val")[0])
        save(folder / "val" / "labels" / "a.png", np.array([[0, 1, 2, 3, 0, 0, 0, 0]] * 6, np.uint8))
        label = three.read(three.files("val")[0]).label
        assert label is not None
        assert label[0].tolist() == [0, 1, 2, 255, 0, 0, 0, 0]

    def test_an_image_may_lack_its_label(self, folder: Path) -> None:
        (folder / "train" / "labels" / "b.png").unlink()
        reader = folder_reader(folder)
        sample = reader.read(reader.files("train")[1])
        assert sample.label is None
        assert sample.tags == (3,)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda r: (r / "train/images/b.jpg").unlink(), "label '.*b.png' has no image in '.*train/images'"),
            (lambda r: save(r / "train/scribbles/c.png", index_map(0)), "scribble '.*c.png' has no image"),
            (lambda r: save(r / "train/images/a.png", picture()), "two images of one name"),
            (lambda r: (r / "train/images/notes.txt").touch(), "notes.txt' is not an image"),
            (lambda r: save(r / "train/labels/b.png", index_map(0, height=5)), "8×5 pixels .* image '.*b.jpg' has 8×6"),
            (lambda r: save(r / "train/scribbles/b.png", index_map(0, width=9)), "scribble '.*b.png' has 9×6 pixels"),
            (lambda r: save(r / "train/scribbles/b.png", index_map(4)), "image 'train-b' has no labelled pixel"),
            (lambda r: save(r / "train/scribbles/b.png", index_map(7)), "scribble .*b.png' holds the value 7 .*0 to 3"),
            (lambda r: save(r / "train/labels/b.png", picture()), "label .*b.png' is a colour image"),
        ],
    )
    def test_wrong_files(self, folder: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(folder)
        reader = folder_reader(folder)
        with pytest.raises(InputError, match=message):
            _ = [reader.read(files) for files in reader.files("train")]

    def test_wrong_places_and_settings(self, folder: Path) -> None:
        with pytest.raises(InputError, match="no split 'trian'; did you mean 'train'"):
            folder_reader(folder).files("trian")
        with pytest.raises(InputError, match="nowhere' does not exist"):
            folder_reader(folder / "nowhere")
        with pytest.raises(InputError, match="give class_names"):
            folder_reader(folder, class_names=0)
        with pytest.raises(ValueError, match="scribble_unlabelled is 3, but 3 is the class 'class 3'"):
            folder_reader(folder, scribble_unlabelled=3)
        with pytest.raises(ValueError, match="holds 'a' twice"):
            folder_reader(folder, class_names=("a", "b", "a"), scribble_unlabelled=4)

    def test_real_scribbles_of_heart_images(self, shared_data: Path) -> None:
        names = ("background", "right ventricle", "myocardium", "left ventricle")
        reader = folder_reader(shared_data / "acdc", class_names=names)
        files = reader.files("train")
        assert len(files) == 496
        agreeing = drawn = 0
        for entry in files[::20]:
            sample = reader.read(entry)
            assert sample.label is not None
            assert sample.scribble is not None
            known = sample.scribble != 255
            drawn += int(known.sum())
            agreeing += int((sample.scribble == sample.label)[known].sum())
        assert agreeing > 0.999 * drawn > 0


class TestCamvid:
    @pytest.mark.parametrize("nested", [True, False])
    def test_both_layouts(self, tmp_path: Path, nested: bool) -> None:
        label = np.array([[0, 5, 10, 11, 11, 3, 3, 3]] * 6, np.uint8)
        for split in ("train", "val"):
            images, labels = ("images", "labels") if nested else (".", f"../{split}annot")
            save(tmp_path / split / images / f"{split}1.png", picture())
            save(tmp_path / split / labels / f"{split}1.png", label)
        scribbles = tmp_path / ("val/scribbles" if nested else "valscribbles")
        save(scribbles / "val1.png", np.array([[0, 255, 255, 255, 11, 3, 255, 255]] * 6, np.uint8))
        reader = CamvidReader(tmp_path)
        sample = reader.read(reader.files("train")[0])
        assert sample.key == "train1"
        assert sample.label is not None
        assert sample.label[0].tolist() == [0, 5, 10, 255, 255, 3, 3, 3]
        assert sample.tags == (0, 3, 5, 10)
        assert sample.scribble is None
        scribble = reader.read(reader.files("val")[0]).scribble
        assert scribble is not None
        assert scribble[0].tolist() == [0, 255, 255, 255, 255, 3, 255, 255]
        with pytest.raises(InputError, match=r"neither 'vall/images'.*did you mean 'val'"):
            reader.files("vall")

    def test_class_list(self, tmp_path: Path) -> None:
        info = CamvidReader(tmp_path).info
        assert info.num_classes == 11
        assert not info.has_background
        assert info.palette[info.class_names.index("road")] == (128, 64, 128) == CLASSES["road"]

    def test_real_files(self, shared_data: Path) -> None:
        reader = CamvidReader(shared_data / "camvid")
        files = reader.files("val")
        assert len(files) == 101
        sample = reader.read(files[0])
        assert sample.image.shape == (180, 240, 3)
        assert sample.label is not None
        assert set(np.unique(sample.label)) <= set(range(11)) | {255}


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities, one image with train ids besides its label ids; the other files of a release lie there, too."""
    streets = [("train", "aachen", 0), ("train", "aachen", 1), ("train", "ulm", 0), ("val", "lindau", 0)]
    for split, city, number in [*streets, ("test", "berlin", 0)]:
        stem = f"{city}_{number:06d}_000019"
        save(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", picture())
        labels = tmp_path / "gtFine" / split / city
        save(labels / f"{stem}_gtFine_labelIds.png", np.array([[7, 8, 26, 33, 0, 3, 29, 255]] * 6, np.uint8))
        save(labels / f"{stem}_gtFine_instanceIds.png", np.full((6, 8), 26001, np.uint16))
        save(labels / f"{stem}_gtFine_color.png", np.full((6, 8, 4), 255, np.uint8))
        (labels / f"{stem}_gtFine_polygons.json").write_text("{}")
    train_ids = np.array([[0, 1, 13, 18, 255, 255, 255, 255]] * 6, np.uint8)
    save(tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png", train_ids)
    (tmp_path / "gtFine/train/.hidden").touch()
    return tmp_path


def labels_of(root: Path, name: str) -> Path:
    return root / "gtFine" / "train" / "aachen" / f"aachen_000000_000019_gtFine_{name}"


class TestCityscapes:
    def test_images_and_labels_of_all_cities(self, cityscapes: Path) -> None:
        reader = CityscapesReader(cityscapes)
        files = reader.files("train")
        assert [one.key for one in files] == ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
        assert [one.key for one in reader.files("val")] == ["lindau_000000_000019"]
        endings = [one.label.name.split("_")[-1] for one in files if one.label]
        assert endings == ["labelIds.png", "labelIds.png", "labelTrainIds.png"], "train ids go before label ids"
        for one in files:
            sample = reader.read(one)
            assert sample.label is not None
            assert sample.label[2].tolist() == [0, 1, 13, 18, 255, 255, 255, 255]
            assert sample.tags == (0, 1, 13, 18)
            assert sample.scribble is None

    def test_train_ids_alone_are_enough(self, cityscapes: Path) -> None:
        (cityscapes / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
        assert len(CityscapesReader(cityscapes).files("train")) == 3

    def test_every_label_id_is_its_class_or_never_counted(self) -> None:
        ids = np.arange(34, dtype=np.uint8)[None]
        counted = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        expected = [counted.index(one) if one in counted else 255 for one in range(34)]
        assert classes_of_label_ids(ids, Path("x")).tolist() == [expected]
        assert classes_of_label_ids(np.full((1, 1), 255, np.uint8), Path("x")).tolist() == [[255]]
        with pytest.raises(InputError, match=r"'x' holds the value 34 at row 0, column 1, .* no label id .* 0 to 33"):
            classes_of_label_ids(np.array([[33, 34]], np.uint8), Path("x"))

    def test_class_list(self, cityscapes: Path) -> None:
        info = CityscapesReader(cityscapes).info
        assert (info.num_classes, info.has_background) == (19, False)
        assert info.palette[info.class_names.index("traffic light")] == (250, 170, 30)
        assert [info.class_names[number] for number in (0, 10, 13, 16, 18)] == [
            "road",
            "sky",
            "car",
            "train",
            "bicycle",
        ]

    def test_the_test_split_has_no_labels(self, cityscapes: Path) -> None:
        reader = CityscapesReader(cityscapes)
        (files,) = reader.files("test")
        sample = reader.read(files)
        assert (sample.key, sample.label, sample.tags) == ("berlin_000000_000019", None, ())

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda r: labels_of(r, "labelIds.png").unlink(),
                r"image '.*aachen_000000_000019_leftImg8bit.png' has no label: '.*aachen/aachen_000000_000019_gtFine_"
                r"labelTrainIds.png' or '.*_labelIds.png' is expected, not .*_color.png, .*_instanceIds.png, .*json",
            ),
            (
                lambda r: (r / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png").unlink(),
                "label '.*ulm_000000_000019_gtFine_labelTrainIds.png' has no image 'ulm_000000_000019_leftImg8bit.png'",
            ),
            (lambda r: shutil.rmtree(r / "gtFine"), r"gtFine/train' of the labels does not exist\."),
            (
                lambda r: ((r / "gtFine").rename(r / "x"), (r / "gtCoarse" / "train").mkdir(parents=True)),
                "does not exist; coarse labels, as in '.*gtCoarse/train', are not read",
            ),
            (
                lambda r: [path.unlink() for path in (r / "gtFine/train").glob("*/*Ids.png")],
                "gtFine/train' holds no label that ends in _gtFine_labelIds.png or _gtFine_labelTrainIds.png",
            ),
            (lambda r: shutil.copy(labels_of(r, "color.png"), labels_of(r, "labelIds.png")), "is a colour image .RGBA"),
            (lambda r: shutil.copy(labels_of(r, "instanceIds.png"), labels_of(r, "labelIds.png")), "is of mode I;16"),
            (
                lambda r: shutil.copy(labels_of(r, "labelIds.png"), labels_of(r, "labelTrainIds.png")),
                "labelTrainIds.png' holds the value 26 at row 0, column 2, .* 0 to 18 .road to bicycle",
            ),
            (lambda r: save(labels_of(r, "labelIds.png"), index_map(7, height=5)), "has 8×5 pixels"),
            (
                lambda r: save(r / "leftImg8bit/train/loose_leftImg8bit.png", picture()),
                "loose_leftImg8bit.png' lies outside of a city's folder",
            ),
            (
                lambda r: save(r / "leftImg8bit/train/ulm/ulm_1.png", picture()),
                "ulm_1.png' is not an image of Cityscapes; '<city>_<sequence>_<frame>_leftImg8bit.png' is expected",
            ),
            (
                lambda r: save(r / "leftImg8bit/train/ulm/aachen_000000_000019_leftImg8bit.png", picture()),
                "are two images of one name",
            ),
        ],
    )
    def test_wrong_files(self, cityscapes: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(cityscapes)
        reader = CityscapesReader(cityscapes)
        with pytest.raises(InputError, match=message) as error:
            _ = [reader.read(files) for files in reader.files("train")]
        assert "\n" not in str(error.value)

    def test_wrong_places(self, cityscapes: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no split 'vall'; did you mean 'val'"):
            CityscapesReader(cityscapes).files("vall")
        (tmp_path / "above" / "cityscapes" / "leftImg8bit").mkdir(parents=True)
        with pytest.raises(InputError, match=r"no folder 'leftImg8bit'; did you mean '.*above/cityscapes'"):
            CityscapesReader(tmp_path / "above")

    def test_a_real_image_in_the_real_layout(self, tmp_path: Path, shared_data: Path) -> None:
        source = shared_data / "samples" / "cityscapes1"
        (image,) = source.rglob("*_leftImg8bit.png")
        found = {}
        for ending in ("labelIds", "labelTrainIds"):
            root = tmp_path / ending
            (label,) = source.rglob(f"*_{ending}.png")
            for path, folder in ((image, "leftImg8bit"), (label, "gtFine")):
                place = root / folder / "val" / "frankfurt" / path.name
                place.parent.mkdir(parents=True)
                place.symlink_to(path)
            reader = CityscapesReader(root)
            (files,) = reader.files("val")
            assert files.key == "frankfurt_000000_000294"
            sample = reader.read(files)
            assert sample.label is not None
            assert sample.image.shape[:2] == sample.label.shape
            found[ending] = sample.label
        by_ids, by_train_ids = found["labelIds"], found["labelTrainIds"]
        assert set(np.unique(by_train_ids)) == {0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 255}
        # The two files of this sample were made small one by one, and differ along borders.
        assert (by_ids == by_train_ids).mean() > 0.9
        assert set(np.unique(by_ids)) == set(np.unique(by_train_ids))


XML = """<annotation><folder>pascal_2012</folder><filename>2007_000001.jpg</filename><size><width>8</width></size>
<polygon><tag>background</tag><point><X>0</X><Y>0</Y></point><point><X>20</X><Y>0</Y></point></polygon>
<polygon><tag>{tag}</tag><point><X>2</X><Y>5</Y></point><point><X>5</X><Y>5</Y></point></polygon></annotation>"""


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    lists = {
        "Segmentation/train": ["2007_000001", "2007_000002"],
        "Segmentation/val": ["2007_000003"],
        "SegmentationAug/train": [f"/JPEGImages/{k}.jpg /SegmentationClassAug/{k}.png" for k in ("2007_000001", "2008_000004")],
    }  # fmt: skip
    for name, lines in lists.items():
        path = tmp_path / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    for key in ("2007_000001", "2007_000002", "2007_000003", "2008_000004"):
        save(tmp_path / "JPEGImages" / f"{key}.jpg", picture())
        save(tmp_path / "SegmentationClassAug" / f"{key}.png", index_map(2, 255))
    for key in ("2007_000001", "2007_000003"):
        save_palette(tmp_path / "SegmentationClass" / f"{key}.png", index_map(1, 255))
    scribble: np.ndarray = np.full((6, 8), 255, np.uint8)
    scribble[2, 2:5] = 0
    scribble[4, 1:7] = 15
    save(tmp_path / "pascal_2012_scribble" / "2007_000001.png", scribble)
    (tmp_path / "pascal_2012_scribble" / "2007_000002.xml").write_text(XML.format(tag="person"))
    return tmp_path


class TestVoc:
    def test_lists_labels_and_scribbles(self, voc: Path) -> None:
        reader = VocReader(voc, VocSettings())
        first, second = (reader.read(files) for files in reader.files("train"))
        assert (first.key, second.key) == ("2007_000001", "2007_000002")
        assert first.label is not None
        assert second.label is not None
        assert set(np.unique(first.label)) == {1, 255}
        assert set(np.unique(second.label)) == {2, 255}
        assert first.scribble is not None
        assert first.scribble[4].tolist() == [255, 15, 15, 15, 15, 15, 15, 255]
        assert second.scribble is not None
        assert set(np.unique(second.scribble)) == {0, 15, 255}
        assert reader.read(reader.files("val")[0]).scribble is None

    def test_the_augmented_list_names_its_own_labels(self, voc: Path) -> None:
        reader = VocReader(voc, VocSettings())
        files = reader.files("train_aug")
        assert [f.key for f in files] == ["2007_000001", "2008_000004"]
        assert all(f.label is not None and f.label.parent.name == "SegmentationClassAug" for f in files)
        assert all(f.label is None for f in VocReader(voc, VocSettings(labels="sbd")).files("train_aug"))

    def test_the_chosen_label_folder_is_used(self, voc: Path) -> None:
        (augmented,) = VocReader(voc, VocSettings(labels="SegmentationClassAug")).files("val")
        assert augmented.label == voc / "SegmentationClassAug" / "2007_000003.png"
        dense = index_map(0, 7, 20)
        (voc / "sbd" / "cls").mkdir(parents=True)
        scipy_io.savemat(voc / "sbd" / "cls" / "2007_000003.mat", {"GTcls": {"Segmentation": dense, "Boundaries": 0}})
        reader = VocReader(voc, VocSettings(labels="sbd"))
        label = reader.read(reader.files("val")[0]).label
        assert label is not None
        assert np.array_equal(label, dense)

    def test_the_scribble_folder_is_used(self, voc: Path) -> None:
        (voc / "pascal_2012_scribble").rename(voc / "strokes")
        assert VocReader(voc, VocSettings()).files("train")[0].scribble is None
        found = VocReader(voc, VocSettings(scribble_folder="strokes")).files("train")
        assert [f.scribble.suffix for f in found if f.scribble] == [".png", ".xml"]

    def test_a_list_that_lacks_one_name_is_noted(self, voc: Path, caplog: pytest.LogCaptureFixture) -> None:
        names = [f"2009_{i:06d}" for i in range(10581)]
        (voc / "ImageSets/SegmentationAug/train.txt").write_text("\n".join(names))
        with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"2009_000000\.jpg' of the split"):
            VocReader(voc, VocSettings()).files("train_aug")
        assert "has 10581 names" in caplog.text

    @pytest.mark.parametrize(
        ("split", "damage", "message"),
        [
            ("trian", lambda r: None, "list '.*trian.txt' .* did you mean 'train'"),
            ("val", lambda r: (r / "JPEGImages/2007_000003.jpg").unlink(), "2007_000003.jpg' of the split 'val'"),
            ("val", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("a b c"), "Line 1 of .* is 'a b c'"),
            ("val", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("\n"), "is empty"),
            ("val", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("x\nx"), "names the image 'x' twice"),
        ],
    )
    def test_wrong_lists(self, voc: Path, split: str, damage: Callable[[Path], object], message: str) -> None:
        damage(voc)
        with pytest.raises(InputError, match=message):
            VocReader(voc, VocSettings()).files(split)

    def test_a_folder_above_is_pointed_out(self, voc: Path, tmp_path: Path) -> None:
        (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
        (voc / "JPEGImages").rename(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages")
        with pytest.raises(InputError, match=r"no folder 'JPEGImages'; did you mean '.*/VOCdevkit/VOC2012'"):
            VocReader(voc, VocSettings())

    def test_xml_strokes_are_three_pixels_wide_and_cut_at_the_border(self, tmp_path: Path) -> None:
        path = tmp_path / "a.xml"
        path.write_text(XML.format(tag="Plane"))
        drawn = read_scribble_xml(path, 10, 8)
        assert (drawn[:2] == 0).all()
        assert (drawn[4:7, 1:7] == CLASS_NAMES.index("aeroplane")).all()
        assert (drawn[[2, 3, 7, 8, 9]] == 255).all()
        assert (drawn[4:7, [0, 7]] == 255).all()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("<annotation>", "a.xml' is not XML"),
            (XML.format(tag="persn"), "names the class 'persn'; did you mean 'person'"),
            (XML.format(tag="cat").replace("<X>2</X>", "<X>two</X>"), "X or Y is not a number"),
            ("<a><polygon><tag>cat</tag></polygon></a>", "'cat' of the scribble '.*a.xml' has no point"),
        ],
    )
    def test_wrong_xml(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "a.xml").write_text(content)
        with pytest.raises(InputError, match=message):
            read_scribble_xml(tmp_path / "a.xml", 10, 8)

    @pytest.mark.parametrize("content", [{"other": 1}, {"GTcls": {"Segmentation": np.zeros((2, 2))}}, None])
    def test_wrong_sbd_files(self, tmp_path: Path, content: dict[str, object] | None) -> None:
        path = tmp_path / "a.mat"
        path.write_bytes(b"not matlab at all") if content is None else scipy_io.savemat(path, content)
        with pytest.raises(InputError, match=r"GTcls\.Segmentation"):
            read_sbd(path)
        with pytest.raises(InputError, match="does not exist"):
            read_sbd(tmp_path / "b.mat")
