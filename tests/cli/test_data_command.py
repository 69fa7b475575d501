"""`raysseg data` from end to end: build, info, check, scribble, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from raysseg.cli.data import data_app
from raysseg.data.readers.images import read_index_map
from raysseg.data.store import Store
from raysseg.errors import InputError

TINY = ["--set", "synthetic.train_images=4", "--set", "synthetic.val_images=2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, InputError), error
    return str(error)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    result = run("build", "--out", tmp_path / "store", *TINY)
    assert result.exit_code == 0, result.output
    return tmp_path / "store"


def test_build_and_info(store: Path) -> None:
    assert Store.open(store).splits == {"train": 4, "val": 2}
    output = run("info", store).output
    for expected in ("train", "96×96", "5 classes (class 0 is the background): 0 background, 1 disc", "stored as raw"):
        assert expected in output


def test_build_from_a_folder(tmp_path: Path) -> None:
    label: np.ndarray = np.zeros((32, 48), np.uint8)
    label[:, 20:40] = 1
    label[:, 40:] = 9
    for split in ("train", "val"):
        for kind, values in (("images", label * 9), ("labels", label), ("scribbles", np.where(label == 9, 7, label))):
            (tmp_path / "in" / split / kind).mkdir(parents=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "in" / split / kind / f"{split}.png")
    common = ("build", "--source", "folder", "--path", tmp_path / "in", "--ignore-index", 9)
    options = ("--classes", "ground, thing", "--scribble-unlabelled", 7, "--image-encoding", "png", "--no-background")
    assert run(*common, *options, "--out", tmp_path / "given").exit_code == 0
    store = Store.open(tmp_path / "given")
    assert store.info.class_names == ("ground", "thing")
    assert not store.info.has_background
    assert store.image_encoding == "png"
    assert set(np.unique(store.label("train-train"))) == {0, 1, 255}  # type: ignore[arg-type]
    made = ("--classes", "2", "--scribbles", "generate", "--share", 0.2, "--width", 5, "--seed", 3)
    assert run(*common, *made, "--out", tmp_path / "made").exit_code == 0
    assert "share 0.2, width 5, seed 3" in Store.open(tmp_path / "made").info.source
    assert "needs folder.class_names" in refused(*common, "--out", tmp_path / "x")
    assert "holds the value 7" in refused(*common, "--classes", 2, "--out", tmp_path / "x")


def test_check_tells_good_from_bad_by_its_exit_status(store: Path, tmp_path: Path) -> None:
    good = run("check", store)
    assert good.exit_code == 0
    assert "scribbles cover" in good.output
    pair: np.ndarray = np.zeros((32, 32), np.uint8)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "in" / split / kind).mkdir(parents=True)
            Image.fromarray(pair).save(tmp_path / "in" / split / kind / f"[{split}].png")
    source = ("--source", "folder", "--path", tmp_path / "in", "--classes", 2, "--scribbles", "none")
    assert run("build", *source, "--out", tmp_path / "bad").exit_code == 0
    bad = run("check", tmp_path / "bad")
    assert bad.exit_code == 1
    assert "in both train and val" in bad.output
    assert "train-[train], val-[val]" in bad.output


def test_scribble_a_store(store: Path, tmp_path: Path) -> None:
    result = run("scribble", store, "--out", tmp_path / "out", "--split", "val", "--share", 0.1)
    assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["val-00000", "val-00001"]
    strokes = read_index_map(tmp_path / "out" / "val-00000.png", "scribble")
    label = Store.open(store).label("val-00000")
    assert label is not None
    drawn = strokes != 255
    assert (strokes[drawn] == label[drawn]).all()
    assert 0.08 < drawn.mean() < 0.13
    assert "is not an empty folder" in refused("scribble", store, "--out", tmp_path / "out")
    assert "is no folder of PNGs" in refused("scribble", store, "--out", tmp_path / "o", "--classes", 3)
    assert "no split 'vall'" in refused("scribble", store, "--out", tmp_path / "o", "--split", "vall")


def test_scribble_a_folder(tmp_path: Path) -> None:
    label: np.ndarray = np.zeros((40, 40), np.uint8)
    label[:20] = 3
    label[:, :10] = 200
    (tmp_path / "in").mkdir()
    Image.fromarray(label).save(tmp_path / "in" / "a.png")
    assert run("scribble", tmp_path / "in", "--out", tmp_path / "all").exit_code == 0
    assert set(np.unique(read_index_map(tmp_path / "all" / "a.png", "scribble"))) == {0, 3, 200, 255}
    assert run("scribble", tmp_path / "in", "--out", tmp_path / "some", "--ignore-index", 200).exit_code == 0
    assert set(np.unique(read_index_map(tmp_path / "some" / "a.png", "scribble"))) == {0, 3, 255}
    assert "holds the value 200" in refused("scribble", tmp_path / "in", "--out", tmp_path / "o", "--classes", 4)
    (tmp_path / "empty").mkdir()
    assert "holds no label" in refused("scribble", tmp_path / "empty", "--out", tmp_path / "o")


def test_wrong_options_are_named(tmp_path: Path, store: Path) -> None:
    out = ("--out", tmp_path / "x")
    assert "Unknown key 'synthetic.hight'" in refused("build", *out, "--set", "synthetic.hight=3")
    assert "KEY=VALUE is expected" in refused("build", *out, "--set", "height")
    assert "value is not YAML" in refused("build", *out, "--set", "path=[")
    assert "is no group of settings" in refused("build", *out, "--set", "source.kind=1")
    assert "'source' in the options has the value 'nothing'" in refused("build", *out, "--source", "nothing")
    assert "exists already" in refused("build", "--out", store, *TINY)
    assert "is not a store" in refused("info", tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
