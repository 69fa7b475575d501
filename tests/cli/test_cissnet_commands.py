"""The commands on runs of CiSS-Net: what they say of bad input, and what a finished run can be asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from algorithms.tiny_cissnet import CLASSES, VALUES, changed
from commands import start
from PIL import Image

import raysseg.core.run
from raysseg.algorithms.cissnet import CiSSNetConfig
from raysseg.algorithms.cissnet.results import CONTEXT_FILE
from raysseg.algorithms.recipes import load_recipe, load_variant, train_recipe
from raysseg.data import Sample, Store, open_dataset, write_store
from raysseg.data.settings import DataSettings
from raysseg.evaluation import predict_probabilities
from raysseg.segmenters import SegmenterSettings, build_segmenter, save_segmenter

Refused = Callable[..., str]
Command = Callable[..., Any]
TOLERANCE = 0.02 if torch.cuda.is_available() else 1e-6
VARIANTS = {"baseline": {"policy": "baseline"}, "cissnet": {}, "oracle": {"policy": "oracle"}}


def write_recipe(path: Path, variants: dict[str, Any], **changes: Any) -> Path:
    """Writes the small recipe; `cissnet__learning__gamma=0.5` replaces `cissnet.learning.gamma`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(yaml.safe_dump({**changed(VALUES, dotted), "seeds": [0], "variants": variants}))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The small recipe with its Context Net alone."""
    return write_recipe(tmp_path / "tiny.yaml", {"cissnet": {}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A run of three variants that already tell some classes apart."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"training__pretrain_epochs": 6, "cissnet__learning__updates": 6, "engine__updates_per_iteration": 3}
    train_recipe(load_recipe(str(write_recipe(folder / "tiny.yaml", VARIANTS, **changes))), folder / "run")
    return folder / "run"


def variant_of(run: Path, name: str = "cissnet") -> Path:
    """Returns the folder of a variant."""
    return run / "variants" / name / "seed-0"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two images of sizes that are no multiple of anything, one smaller than the crops of the training."""
    folder, generator = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in {"wide": (50, 91), "small": (33, 21)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where Ray, or an algorithm with its actors, would be started."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the bad input was not noticed before anything was started")

    monkeypatch.setattr(raysseg.core.run, "start_ray", fail)
    monkeypatch.setattr(CiSSNetConfig, "build_algo", fail)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("cissnet.learning.gamma=1.5", r"'cissnet\.learning\.gamma'.* 1\.5.*less than or equal to 1"),
        ("cissnet.learning.gamma=-0.1", r"'cissnet\.learning\.gamma'.*greater than or equal to 0"),
        ("cissnet.learning.entropy_weight=-1", r"'cissnet\.learning\.entropy_weight'.* -1.*greater than or equal to 0"),
        ("cissnet.learning.entropy_weight=2", r"'cissnet\.learning\.entropy_weight'.* 2.*less than or equal to 1"),
        (
            "cissnet.reward.box=[24, 96]",
            r"\[24, 96\] pixels, 13 positions of 8 pixels in its width, but the maps have 6",
        ),
        ("cissnet.reward.bocks=[24, 24]", r"Unknown key 'cissnet\.reward\.bocks' in the recipe tiny.*"),
        ("cissnet.gama=0.9", r"Unknown key 'cissnet\.gama' in the recipe tiny.*"),
        (
            "segmenter.architecture=FPN",
            r"features is 'pyramid' but segmenter\.architecture is 'FPN', expected 'PSPNet'",
        ),
        ("cissnet.learning.clip_ratio=2", r"clip_ratio is 2 but engine\.mode is 'synchronous'"),
        (
            "engine={mode: asynchronous, num_env_runners: 2, broadcast_interval: 3, max_policy_lag: 1}",
            r"max_policy_lag is 1 but broadcast_interval is 3: .* up to 2 updates old",
        ),
        (
            "engine={mode: asynchronous, num_env_runners: 2, rollouts_per_update: 0.5}",
            r"rollouts_per_update is 0\.5, but a rollout is learned from once: expected a whole number",
        ),
    ],
)
def test_bad_settings_are_one_sentence(
    option: str, expected: str, recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    said = refused("train", recipe, "--run-dir", tmp_path / "run", "--set", option)
    assert re.search(expected, said), said


@pytest.mark.usefixtures("nothing_starts")
def test_asynchronous_returns_are_not_cut_twice(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    engine = ("--set", "engine.mode=asynchronous", "--set", "engine.num_env_runners=1")
    said = refused("train", recipe, "--run-dir", tmp_path / "run", *engine, "--set", "cissnet.learning.return_steps=2")
    assert "return_steps is 2 but engine.mode is 'asynchronous'" in said


@pytest.mark.usefixtures("nothing_starts")
def test_a_box_is_held_against_the_largest_image_where_nothing_is_cropped(
    recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    crop = ("--set", "training.augmentation.crop=null", "--set", "cissnet.reward.box=[64, 24]")
    said = refused("train", recipe, "--run-dir", tmp_path / "run", *crop)
    assert "9 positions of 8 pixels in its height, but the maps have 6" in said


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("changes", "classes", "expected"),
    [
        ({}, CLASSES + 2, f"is of a segmenter with {CLASSES + 2} classes, expected {CLASSES}."),
        (
            {"architecture": "FPN", "decoder_channels": 32},
            CLASSES,
            "is of a segmenter with architecture 'FPN', expected 'PSPNet'.",
        ),
        ({"encoder": "resnet34"}, CLASSES, "is of a segmenter with encoder 'resnet34', expected 'resnet18'."),
    ],
)
def test_another_segmenter_is_refused_by_name(
    changes: dict[str, Any], classes: int, expected: str, recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    other = build_segmenter(SegmenterSettings.model_validate({**VALUES["segmenter"], **changes}), classes)
    for name in ("online", "teacher"):
        save_segmenter(tmp_path / f"{name}.safetensors", other)
    said = refused("train", recipe, "--run-dir", tmp_path / "run", "--set", f"training.pretrained={tmp_path}")
    assert said == f"The weights file {tmp_path / 'online.safetensors'} {expected}"


@pytest.mark.usefixtures("nothing_starts")
def test_a_segmenter_of_other_classes_is_refused_with_both(
    copy: Path, recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    path = variant_of(copy) / "dataset.json"
    record = json.loads(path.read_text())
    own = record["info"]["class_names"]
    path.write_text(json.dumps({**record, "info": {**record["info"], "class_names": own[::-1]}}))
    folder = variant_of(copy) / "segmenter"
    said = refused("train", recipe, "--run-dir", tmp_path / "run", "--set", f"training.pretrained={folder}")
    assert said == (
        f"training.pretrained is {folder}, whose segmenter tells {', '.join(own[::-1])} apart, but the data has "
        f"{', '.join(own)}: the same classes in the same order are expected."
    )


def last_words(command: Command, *words: Any) -> str:
    """Returns the sentence of a command that fails after it has shown some progress."""
    outcome = command(*words)
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    return outcome.err.splitlines()[-1]


def test_networks_that_cannot_be_read_are_named(copy: Path, pictures: Path, tmp_path: Path, command: Command) -> None:
    folder, path = variant_of(copy), variant_of(copy) / CONTEXT_FILE
    content = path.read_bytes()
    for words in (("predict", folder, pictures, "--out", tmp_path / "out"), ("evaluate", folder)):
        path.unlink()
        assert last_words(command, *words) == f"{folder} has no networks on X: the file {CONTEXT_FILE} is missing."
        path.write_bytes(content[: len(content) // 2])
        assert last_words(command, *words).startswith(f"{path} cannot be read: ")
        shutil.copy(variant_of(copy, "baseline") / CONTEXT_FILE, path)
        assert re.match(rf"{path} holds other networks: '\S+' is missing, expected ", last_words(command, *words))
        path.write_bytes(content)


def test_an_oracle_predicts_nothing(finished: Path, pictures: Path, tmp_path: Path, command: Command) -> None:
    folder = variant_of(finished, "oracle")
    expected = f"The variant in {folder} has the policy 'oracle', which looks at the truth: it cannot predict."
    assert last_words(command, "predict", folder, pictures, "--out", tmp_path / "out") == expected
    assert not (tmp_path / "out").exists()
    assert last_words(command, "evaluate", folder) == expected


# ---- images of several sizes ----------------------------------------------------------------------------------------


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """A store of images of several sizes."""
    data = DataSettings.model_validate({**VALUES["data"], "source": "synthetic"})
    store = Store.open(open_dataset(data, tmp_path / "scenes").uri)
    samples = []
    for split, cuts in {"train": [(48, 48), (40, 33), (25, 48), (48, 31)], "val": [(48, 48), (37, 45)]}.items():
        for key, (height, width) in zip(store.keys(split), cuts, strict=False):
            image, label = store.image(key), store.label(key)
            assert label is not None
            cut = (slice(0, height), slice(0, width))
            samples.append(Sample(key=key, image=image[cut], split=split, label=label[cut]))
    write_store(tmp_path / "sizes", samples, store.info, image_encoding="png")
    return tmp_path / "sizes"


def test_whole_images_of_several_sizes_are_trained_on_and_scored(
    sizes: Path, tmp_path: Path, command: Command, ray_session: None
) -> None:
    path = write_recipe(
        tmp_path / "sizes.yaml",
        {"cissnet": {}},
        data={"source": "store", "path": str(sizes), "scribbles": "none"},
        training__augmentation__crop=None,
    )
    outcome = command("train", path, "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    summary = json.loads((variant_of(tmp_path / "run") / "summary.json").read_text())
    assert summary["images"] == 2
    outcome = command("evaluate", tmp_path / "run", "--out", tmp_path / "scores.json")
    assert outcome.status == 0, outcome.err
    (result,) = json.loads((tmp_path / "scores.json").read_text())
    assert result["pixel_accuracy"] == pytest.approx(summary["pixel_accuracy"], abs=TOLERANCE)


def test_images_of_any_size_are_segmented(finished: Path, pictures: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("predict", variant_of(finished), pictures, "--out", tmp_path / "out", "--probabilities")
    assert outcome.status == 0, outcome.err
    predictor = load_variant(variant_of(finished)).predictor()
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            image = np.array(picture)
        expected = predict_probabilities(predictor, torch.tensor(image).permute(2, 0, 1)[None])[0]
        found = np.load(tmp_path / "out" / f"{path.stem}.npz")["probabilities"]
        assert found.shape == (CLASSES, *image.shape[:2])
        assert np.abs(found.astype(np.float32) - expected.numpy()).max() < 1e-3 + TOLERANCE
        with Image.open(tmp_path / "out" / f"{path.stem}.png") as picture:
            assert np.array(picture).shape == image.shape[:2]


# ---- a finished run -------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_scores_of_the_last_record(finished: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("evaluate", finished, "--out", tmp_path / "scores.json")
    assert outcome.status == 0, outcome.err
    results = {one["variant"]: one for one in json.loads((tmp_path / "scores.json").read_text())}
    assert list(results) == ["baseline", "cissnet"]
    assert "oracle · seed 0 was left out. The variant in" in outcome.err
    for name, result in results.items():
        last = json.loads((variant_of(finished, name) / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["miou"] == last["miou_at_steps"][last["steps"].index(2 if name == "cissnet" else 0)]
        for score in ("miou", "pixel_accuracy", "mean_foreground_dice", "per_class_iou"):
            assert result[score] == pytest.approx(last[score], abs=TOLERANCE), (name, score)


def test_compare_and_report_show_every_variant_and_t(finished: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("compare", finished, "--baseline", "baseline", "--out", tmp_path / "table.md")
    assert outcome.status == 0, outcome.err
    table = (tmp_path / "table.md").read_text()
    for name in VARIANTS:
        summary = json.loads((variant_of(finished, name) / "summary.json").read_text())
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name}")]
        assert f"| {100 * summary['miou']:.1f} |" in line
    outcome = command("report", finished, "--out", tmp_path / "report.html")
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "report.html").read_text()
    for heading in ("Accuracy over the steps", "Contexts step by step", "Diagnostics", "Training"):
        assert f"<h2>{heading}</h2>" in page
    last = json.loads((variant_of(finished) / "metrics.jsonl").read_text().splitlines()[-1])
    first, second = (f"{100 * miou:.1f}" for miou in last["miou_at_steps"])
    assert f"<td>cissnet</td><td>{first}</td><td>{second}</td>" in page
    assert 'alt="Exploration of cissnet, seed 0"' in page


@pytest.mark.slow
def test_a_sweep_over_gamma_ends_with_a_table_and_a_best_point(tmp_path: Path) -> None:
    write_recipe(tmp_path / "tiny.yaml", {"cissnet": {}}, cissnet__learning__updates=2)
    sweep = {"recipe": "tiny.yaml", "space": {"cissnet.learning.gamma": [0.1, 0.9]}, "concurrent": 1}
    (tmp_path / "gamma.yaml").write_text(yaml.safe_dump(sweep))
    run = tmp_path / "run"
    process = start("tune", tmp_path / "gamma.yaml", run)
    assert process.wait(600) == 0, run.with_suffix(".log").read_text()[-3000:]
    record = json.loads((run / "sweep.json").read_text())
    assert [(one["trial"], one["state"]) for one in record["trials"]] == [
        ("gamma=0.1/seed-0", "finished"),
        ("gamma=0.9/seed-0", "finished"),
    ]
    for one in record["trials"]:
        summary = json.loads((run / "variants" / one["trial"] / "summary.json").read_text())
        assert one["scores"] == [stage["miou"] for stage in summary["stages"]]
    assert "gamma" in (run / "table.md").read_text()
    assert (run / "gamma.png").stat().st_size > 1000
    best = load_recipe(str(run / "best.yaml"))
    assert best.values["cissnet"]["learning"]["gamma"] in (0.1, 0.9)
