"""Data settings: combinations that make no sense are refused; a store is built once and found again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysseg.configuration import load_settings
from raysseg.data.sample import Sample
from raysseg.data.scribbles import ScribbleSettings
from raysseg.data.settings import DataSettings, build_store, open_dataset
from raysseg.errors import InputError

TINY = {"train_images": 3, "val_images": 2}


def settings(**values: Any) -> DataSettings:
    return load_settings(DataSettings, values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training images with scribbles, one for validation without."""
    random = np.random.default_rng(0)
    for split, stem in (("train", "a"), ("train", "b"), ("val", "c")):
        for kind in ("images", "labels", *(["scribbles"] if split == "train" else [])):
            path = tmp_path / "data" / split / kind / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            if kind != "images":
                values = np.zeros((40, 40), np.uint8)
                values[10:, 10:] = 1
            Image.fromarray(values).save(path)
    return tmp_path / "data"


def folder_settings(folder: Path, **values: Any) -> DataSettings:
    return settings(source="folder", path=str(folder), folder={"class_names": ["ground", "thing"]}, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder"}, "source 'folder' needs a path"),
        ({"path": "x"}, "path has no effect with the source 'synthetic'"),
        ({"train_split": "test"}, "train_split is 'test', but synthetic scenes have"),
        ({"source": "folder", "path": "x"}, "needs folder.class_names"),
        ({"source": "camvid", "path": "x", "synthetic": {"seed": 1}}, "settings of 'synthetic' have no effect"),
        ({"source": "camvid", "path": "x", "voc": {"labels": "sbd"}}, "settings of 'voc' have no effect"),
        ({"source": "store", "path": "x", "scribbles": "generate"}, "a store keeps the scribbles"),
        ({"source": "store", "path": "x", "image_encoding": "png"}, "image_encoding has no effect"),
        ({"scribbles": "none", "generate": {"width": 5}}, "'generate' have no effect with scribbles 'none'"),
        ({"source": "voc", "path": "x", "generate": {"width": 5}}, "'generate' have no effect with scribbles 'given'"),
        ({"source": "vok"}, "'source' .* has the value 'vok'"),
        ({"synthetic": {"hight": 3}}, "Unknown key 'synthetic.hight' .* did you mean 'height'"),
    ],
)
def test_combinations_without_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**values)


def test_defaults_are_synthetic_and_survive_a_round_trip() -> None:
    default = settings()
    assert default.source == "synthetic"
    assert load_settings(DataSettings, default.model_dump(mode="json")) == default


def test_a_store_is_built_once(tmp_path: Path) -> None:
    built: list[int] = []

    def track(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
        built.append(total)
        return samples

    first = open_dataset(settings(synthetic=TINY), tmp_path, track=track)
    again = open_dataset(settings(synthetic=TINY), tmp_path, track=track)
    assert built == [5]
    assert first.uri == again.uri
    assert first.splits == {"train": 3, "val": 2}
    other = open_dataset(settings(synthetic={**TINY, "noise": 1.0}), tmp_path, track=track)
    assert other.uri != first.uri


def test_a_store_that_another_process_finished_first_is_used(tmp_path: Path) -> None:
    ready = open_dataset(settings(synthetic=TINY), tmp_path / "ready")
    target = tmp_path / "cache" / Path(ready.uri).name

    def overtaken(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
        yield from samples
        shutil.copytree(ready.uri, target)

    store = open_dataset(settings(synthetic=TINY), tmp_path / "cache", track=overtaken)
    assert store.uri == str(target)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [target.name]


def test_only_the_splits_in_use_are_made(tmp_path: Path) -> None:
    store = open_dataset(settings(synthetic=TINY, train_split="val"), tmp_path)
    assert store.splits == {"val": 2}


def test_scribbles_given_generated_or_none(tmp_path: Path) -> None:
    given = open_dataset(settings(synthetic=TINY), tmp_path).scribble("train-00000")
    wide = open_dataset(settings(synthetic=TINY, generate={"width": 5}), tmp_path).scribble("train-00000")
    assert given is not None
    assert wide is not None
    assert not np.array_equal(given, wide)
    assert open_dataset(settings(synthetic=TINY, scribbles="none"), tmp_path).scribble("train-00000") is None


def test_a_folder_with_its_own_or_generated_scribbles(tmp_path: Path, folder: Path) -> None:
    given = open_dataset(folder_settings(folder), tmp_path)
    assert given.splits == {"train": 2, "val": 1}
    assert np.array_equal(given.scribble("train-a"), given.label("train-a"))  # type: ignore[arg-type]
    assert given.scribble("val-c") is None
    made = open_dataset(folder_settings(folder, scribbles="generate", generate={"seed": 4}), tmp_path)
    label = made.label("train-a")
    assert label is not None
    assert np.array_equal(made.scribble("train-a"), ScribbleSettings(seed=4).for_label(label, "train-a", 2))  # type: ignore[arg-type]
    assert "scribbles generated (share 0.03, width 3, seed 4)" in made.info.source
    assert open_dataset(folder_settings(folder, scribbles="none"), tmp_path).scribble("train-a") is None


def test_a_changed_file_means_another_store(tmp_path: Path, folder: Path) -> None:
    first = open_dataset(folder_settings(folder), tmp_path)
    assert open_dataset(folder_settings(folder), tmp_path).uri == first.uri
    os.utime(folder / "val" / "labels" / "c.png", ns=(0, 1))
    assert open_dataset(folder_settings(folder), tmp_path).uri != first.uri


def test_missing_scribbles_and_labels_are_named(tmp_path: Path, folder: Path) -> None:
    (folder / "train" / "scribbles" / "b.png").unlink()
    with pytest.raises(InputError, match=r"training image 'train-b' of .* has no scribble"):
        open_dataset(folder_settings(folder), tmp_path)
    store = build_store(folder_settings(folder, scribbles="none"), tmp_path / "bare")
    with pytest.raises(InputError, match=r"training image 'train-a' of .* has no scribble"):
        open_dataset(settings(source="store", path=store.uri), tmp_path)
    assert open_dataset(settings(source="store", path=store.uri, scribbles="none"), tmp_path).uri == store.uri
    (folder / "train" / "labels" / "a.png").unlink()
    with pytest.raises(InputError, match=r"training image 'train-a' has no label"):
        open_dataset(folder_settings(folder, scribbles="generate"), tmp_path)


def test_an_unknown_split_of_a_store_is_named(tmp_path: Path, folder: Path) -> None:
    store = build_store(folder_settings(folder), tmp_path / "store")
    with pytest.raises(InputError, match="no split 'vall'; did you mean 'val'"):
        open_dataset(settings(source="store", path=store.uri, val_split="vall"), tmp_path)
    with pytest.raises(InputError, match="is named as a store already"):
        build_store(settings(source="store", path=store.uri), tmp_path / "other")


def test_an_image_in_both_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / "0001.png")
    with pytest.raises(InputError, match="image '0001' is in the split 'val' and in 'train'"):
        open_dataset(settings(source="camvid", path=str(tmp_path)), tmp_path / "cache")


def test_a_failed_build_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    (folder / "val" / "images" / "c.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"c\.png' cannot be read"):
        open_dataset(folder_settings(folder), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cityscapes_has_no_scribbles_of_its_own(tmp_path: Path) -> None:
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = tmp_path / "data" / kind / split / city / f"{city}_000000_000019_{ending}.png"
            path.parent.mkdir(parents=True)
            values = np.full((40, 40), 7, np.uint8)
            values[10:, 10:] = 26
            Image.fromarray(values if kind == "gtFine" else values[..., None].repeat(3, -1)).save(path)
    with pytest.raises(InputError, match=r"training image 'aachen_000000_000019' of .* has no scribble"):
        open_dataset(settings(source="cityscapes", path=str(tmp_path / "data")), tmp_path / "cache")
    none = settings(source="cityscapes", path=str(tmp_path / "data"), scribbles="none")
    store = open_dataset(none, tmp_path / "cache")
    label = store.label("lindau_000000_000019")
    assert label is not None
    assert set(np.unique(label)) == {0, 13}
    made = open_dataset(none.model_copy(update={"scribbles": "generate"}), tmp_path / "cache")
    assert made.scribble("aachen_000000_000019") is not None
    assert made.scribble("lindau_000000_000019") is None


def test_camvid_gets_scribbles_where_it_has_none(tmp_path: Path, shared_data: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / split / kind).mkdir(parents=True)
            for path in sorted((shared_data / "camvid" / split / kind).iterdir())[:3]:
                (tmp_path / "camvid" / split / kind / path.name).symlink_to(path)
    store = open_dataset(settings(source="camvid", path=str(tmp_path / "camvid")), tmp_path / "cache")
    assert "scribbles generated" in store.info.source
    assert all(store.scribble(key) is not None for key in store.keys("train"))
    assert all(store.scribble(key) is None for key in store.keys("val"))
