"""`raysseg evaluate` and `raysseg predict` on two variants that were trained for a moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysseg.algorithms.recipes import load_recipe, load_variant, train_recipe
from raysseg.cli.inference_options import parse_scales
from raysseg.data import DatasetInfo, Sample, Store, default_palette, write_store
from raysseg.errors import InputError
from raysseg.evaluation import predict_probabilities
from raysseg.functional.constants import UNLABELLED
from raysseg.segmenters import Segmenter
from raysseg.visualization import overlay

SCENES = {"train_images": 8, "val_images": 5, "height": 48, "width": 48}
# A GPU computes in bfloat16, where a few pixels may fall to another class in another batch.
TOLERANCE = 0.02 if torch.cuda.is_available() else 1e-6


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path], ray_session: None) -> Path:
    """A run of two variants whose segmenters already tell some classes apart."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        folder / "brief.yaml",
        {"source": "synthetic", "synthetic": SCENES},
        training={
            "pretrain_epochs": 12,
            "optimiser": {"name": "adamw", "learning_rate": 0.003},
            "head_multiplier": 1.0,
        },
        engine={"updates_per_iteration": 50},
        variants={"full": {"policy": "full"}},
    )
    train_recipe(load_recipe(str(recipe)), folder / "run")
    return folder / "run"


def variant_folder(run: Path, variant: str = "none") -> Path:
    return run / "variants" / variant / "seed-0"


def open_variant(run: Path) -> tuple[Store, Segmenter]:
    variant = load_variant(variant_folder(run))
    uri, segmenter = variant.store().uri, variant.segmenter
    return Store.open(uri), segmenter


def images_of(store: Store, split: str) -> list[np.ndarray]:
    return [store.image(key) for key in store.keys(split)]


def plain_prediction(segmenter: Segmenter, image: np.ndarray, **options: Any) -> torch.Tensor:
    """float32 [K, H, W] on the CPU."""
    return predict_probabilities(segmenter, torch.tensor(image).permute(2, 0, 1)[None], **options)[0]


def obvious_miou(predictions: list[np.ndarray], truths: list[np.ndarray], num_classes: int) -> float:
    """The mean over the classes that occur, counted class by class."""
    given, wanted = np.concatenate([p.ravel() for p in predictions]), np.concatenate([t.ravel() for t in truths])
    given, wanted = given[wanted < 254], wanted[wanted < 254]
    ious = []
    for k in range(num_classes):
        union = ((given == k) | (wanted == k)).sum()
        if union:
            ious.append(((given == k) & (wanted == k)).sum() / union)
    return float(np.mean(ious))


def test_evaluate_gives_every_finished_variant_the_scores_of_its_training(
    trained_run: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    outcome = command("evaluate", trained_run, "--out", tmp_path / "new" / "scores.json")
    assert outcome.status == 0, outcome.err
    results = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert [result["variant"] for result in results] == ["full", "none"]
    for result in results:
        summary = json.loads((variant_folder(trained_run, result["variant"]) / "summary.json").read_text())
        for score in ("miou", "pixel_accuracy", "mean_foreground_dice", "per_class_iou"):
            assert result[score] == pytest.approx(summary[score], abs=TOLERANCE)
        for name in ("split", "images", "class_names"):
            assert result[name] == summary[name]
        assert f"{100 * result['miou']:.1f}" in outcome.out
    assert len({result["miou"] for result in results}) == 2, "the variants must differ for this test to say anything"
    for name in ("mIoU", "pixel accuracy", "mean foreground Dice", "IoU of ring", "full · seed 0", "none · seed 0"):
        assert name in outcome.out
    assert "evaluating: 100.0 %" in outcome.err


def test_evaluate_takes_another_store_split_scales_and_the_mirrored_image(
    trained_run: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    own, segmenter = open_variant(trained_run)
    generator = np.random.default_rng(1)
    samples = []
    for number, (height, width) in enumerate([(40, 56), (48, 33)]):
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        label = generator.integers(0, 5, (height, width), dtype=np.uint8)
        label[:5] = UNLABELLED
        samples.append(Sample(key=f"s{number}", image=image, split="test", label=label))
    write_store(tmp_path / "other", samples, own.info, image_encoding="png")
    outcome = command(
        *("evaluate", variant_folder(trained_run), "--data", tmp_path / "other", "--split", "test"),
        *("--scales", "0.5, 1.5", "--flip", "--out", tmp_path / "scores.json"),
    )
    assert outcome.status == 0, outcome.err
    (result,) = json.loads((tmp_path / "scores.json").read_text())
    assert (result["variant"], result["split"], result["images"]) == ("none", "test", 2)
    assert (result["scales"], result["flip"], result["data"]) == ([0.5, 1.5], True, str(tmp_path / "other"))
    truths = [sample.label for sample in samples if sample.label is not None]
    expected = {
        flip: obvious_miou(
            [plain_prediction(segmenter, s.image, scales=(0.5, 1.5), flip=flip).argmax(0).numpy() for s in samples],
            truths,
            5,
        )
        for flip in (True, False)
    }
    assert result["miou"] == pytest.approx(expected[True], abs=TOLERANCE)
    assert expected[True] != expected[False], "mirroring must change something for this test to say anything"


def test_evaluate_says_which_variants_it_leaves_out(
    trained_run: Path, tmp_path: Path, command: Callable[..., Any], refused: Callable[..., str]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained_run, run)
    (variant_folder(run, "full") / "summary.json").unlink()
    outcome = command("evaluate", run)
    assert outcome.status == 0
    assert "full · seed 0 was left out, it is unfinished: stage 1 evaluated" in outcome.err
    assert "none · seed 0" in outcome.out
    assert "full · seed 0" not in outcome.out
    said = refused("evaluate", variant_folder(run, "full"))
    assert "has no finished variant: full · seed 0 is unfinished: stage 1 evaluated" in said


def test_evaluate_refuses_data_that_do_not_fit(trained_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    image: np.ndarray = np.zeros((40, 40, 3), np.uint8)
    other = DatasetInfo(
        name="other",
        class_names=("background", "disc", "box", "stripe", "ring"),
        palette=default_palette(5),
        has_background=True,
        source="a test",
    )
    label: np.ndarray = np.zeros((40, 40), np.uint8)
    write_store(
        tmp_path / "swapped", [Sample(key="a", image=image, split="val", label=label)], other, image_encoding="raw"
    )
    assert refused("evaluate", variant_folder(trained_run), "--data", tmp_path / "swapped") == (
        f"The store '{tmp_path / 'swapped'}' has the classes background, disc, box, stripe, ring, but none · seed 0 was "
        "trained on background, disc, box, ring, stripe; the same names in the same order are expected."
    )
    assert "did you mean 'val'?" in refused("evaluate", trained_run, "--split", "vaal")
    assert "is not a store" in refused("evaluate", trained_run, "--data", tmp_path)
    assert "is not a run directory" in refused("evaluate", tmp_path)
    assert "ends in '.txt'; expected is a name that ends in .json" in refused(
        "evaluate", trained_run, "--out", tmp_path / "scores.txt"
    )


def test_evaluate_refuses_images_without_labels(trained_run: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    store, _ = open_variant(trained_run)
    bare = Sample(key="a", image=np.zeros((40, 40, 3), np.uint8), split="val")
    write_store(tmp_path / "bare", [bare], store.info, image_encoding="raw")
    outcome = command("evaluate", variant_folder(trained_run), "--data", tmp_path / "bare")
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == (
        f"The image 'a' of the store '{tmp_path / 'bare'}' has no label; the split 'val' cannot be scored."
    )


@pytest.mark.parametrize("text", ["", "0.5,", "one", "1,0", "-1", "inf", "nan"])
def test_scales_must_be_positive_numbers(text: str) -> None:
    with pytest.raises(InputError, match="--scales takes positive numbers separated by commas"):
        parse_scales(text)


@pytest.fixture
def pictures(trained_run: Path, tmp_path: Path) -> Path:
    """A folder with two scenes of another size than those trained on, one of them grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    first, second = images_of(open_variant(trained_run)[0], "val")[:2]
    Image.fromarray(first[:37]).save(folder / "colour.png")
    Image.fromarray(second[:, :41]).convert("L").save(folder / "grey.bmp")
    return folder


def test_predict_writes_index_maps_overlays_and_probabilities(
    trained_run: Path, pictures: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    out = tmp_path / "new" / "results"
    outcome = command(
        *("predict", variant_folder(trained_run), pictures / "colour.png", pictures / "grey.bmp"),
        *("--out", out, "--probabilities", "--scales", "1,1.5", "--flip"),
    )
    assert outcome.status == 0, outcome.err
    names = [f"{stem}{ending}" for stem in ("colour", "grey") for ending in (".npz", ".png", "_overlay.png")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    store, segmenter = open_variant(trained_run)
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            image = np.array(picture.convert("RGB"))
        expected = plain_prediction(segmenter, image, scales=(1.0, 1.5), flip=True)
        probabilities = np.load(out / f"{path.stem}.npz")["probabilities"]
        assert probabilities.dtype == np.float16
        assert probabilities.shape == (5, *image.shape[:2])
        assert np.abs(probabilities.astype(np.float32) - expected.numpy()).max() < 1e-3 + TOLERANCE
        with Image.open(out / f"{path.stem}.png") as picture:
            labels, palette = np.array(picture), picture.getpalette()
            assert picture.mode == "P"
        assert (labels == expected.argmax(0).numpy()).mean() >= 1 - TOLERANCE
        assert len(np.unique(labels)) > 1, "one class everywhere would hide a wrong order of the pixels"
        assert palette is not None
        assert palette[:15] == [value for colour in store.info.palette for value in colour]
        with Image.open(out / f"{path.stem}_overlay.png") as picture:
            assert np.array_equal(np.array(picture), overlay(image, labels, store.info.palette))
    assert "predicting: 100.0 %" in outcome.err


def test_predict_takes_folders_and_a_run_of_one_variant(
    trained_run: Path, pictures: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained_run, run)
    shutil.rmtree(run / "variants" / "full")
    outcome = command("predict", run, pictures, "--out", tmp_path / "results")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "colour.png",
        "colour_overlay.png",
        "grey.png",
        "grey_overlay.png",
    ]


def test_predict_lists_the_variants_to_choose_from(
    trained_run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert refused("predict", trained_run, pictures, "--out", tmp_path / "results") == (
        f"{trained_run} holds 2 trained variants; choose one of the folders "
        f"{variant_folder(trained_run, 'full')}, {variant_folder(trained_run, 'none')}."
    )


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a segmenter is loaded."""
    monkeypatch.setattr(
        "raysseg.cli.predict.TrainedVariant", lambda *arguments, **options: pytest.fail("a segmenter was loaded")
    )


@pytest.mark.usefixtures("nothing_is_computed")
def test_predict_checks_all_images_before_anything_is_computed(
    trained_run: Path, pictures: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    out, content = tmp_path / "results", (pictures / "colour.png").read_bytes()
    broken = pictures / "torn.png"
    broken.write_bytes(content[: len(content) // 2])
    outcome = command("predict", variant_folder(trained_run), pictures, "--out", out)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith(f"The image '{broken}' cannot be read as an image: ")
    absent = pictures / "absent.png"
    outcome = command("predict", variant_folder(trained_run), pictures / "colour.png", absent, "--out", out)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == f"The image '{absent}' does not exist."
    assert not out.exists()


@pytest.mark.usefixtures("nothing_is_computed")
def test_predict_never_writes_one_name_twice(
    trained_run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    variant, out = variant_folder(trained_run), tmp_path / "results"
    again = tmp_path / "colour.bmp"
    Image.new("RGB", (40, 40)).save(again)
    assert refused("predict", variant, pictures, again, "--out", out) == (
        f"The images '{pictures / 'colour.png'}' and '{again}' would both be written to '{out / 'colour.png'}'; "
        "names that differ are expected."
    )
    clash = tmp_path / "colour_overlay.png"
    Image.new("RGB", (40, 40)).save(clash)
    assert f"would both be written to '{out / clash.name}'" in refused(
        "predict", variant, pictures, clash, "--out", out
    )
    assert refused("predict", variant, pictures, "--out", pictures) == (
        f"The result '{pictures / 'colour.png'}' would replace an image that is to be read; use another --out."
    )
    assert refused("predict", variant, pictures, "--out", again) == (
        f"--out {again} is a file; a folder for the results is expected."
    )


@pytest.mark.usefixtures("nothing_is_computed")
def test_predict_needs_images(trained_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused("predict", variant_folder(trained_run), empty, "--out", tmp_path / "out") == (
        f"The folder '{empty}' holds no image."
    )
