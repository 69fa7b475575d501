"""Instance-level IoU against objects counted one by one, against numbers worked out by hand, and in runs of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_cissnet import settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysseg.algorithms.cissnet.algorithm import CiSSNet
from raysseg.algorithms.cissnet.config import CiSSNetConfig
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.cli import evaluate as evaluate_module
from raysseg.data import DatasetInfo, Sample, Store, write_store
from raysseg.data.readers.cityscapes import CLASSES
from raysseg.errors import InputError
from raysseg.evaluation import Counts, instance_sums, predict_probabilities, predict_steps, tells_objects_apart
from raysseg.evaluation.instances import AVERAGE_SIZES, AVERAGE_SIZES_AREA
from raysseg.functional.constants import PADDING, UNLABELLED

NAMES = tuple(CLASSES)
PERSON, CAR, BUS = (NAMES.index(name) for name in ("person", "car", "bus"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
INFO = DatasetInfo(
    name="streets",
    class_names=NAMES,
    palette=tuple(colour for _, colour in CLASSES.values()),
    has_background=False,
    source="made by a test",
)


def make_scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A label map uint8, instances uint16 and a wrong-in-places prediction uint8, [H, W]: many rectangles."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 11, (height, width), dtype=np.uint8)
    label_ids = np.array([label_id for label_id, _ in CLASSES.values()])
    instances = label_ids[label].astype(np.uint16)
    for number in range(12):
        label_id = int(random.choice([24, 25, 26, 27, 28, 29, 30, 31, 32, 33]))
        top, left = int(random.integers(0, height)), int(random.integers(0, width))
        place = np.s_[top : top + int(random.integers(1, 9)), left : left + int(random.integers(1, 9))]
        # A group carries the label id alone; caravans (29) and trailers (30) have instances and are never scored.
        instances[place] = label_id if number % 4 == 3 else 1000 * label_id + number // 2
        label[place] = {entry[0]: index for index, entry in enumerate(CLASSES.values())}.get(label_id, UNLABELLED)
    prediction = np.where(random.random(label.shape) < 0.6, label, random.integers(0, 19, label.shape))
    prediction[prediction == UNLABELLED] = CAR
    return label, instances, prediction.astype(np.uint8)


def slow_scores(scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[float | None]:
    """iIoU of every class, object by object and pixel by pixel."""
    found, missed, false = ([0.0] * 19 for _ in range(3))
    for label, instances, prediction in scenes:
        height, width = label.shape
        for instance in np.unique(instances[instances > 1000]):
            index = next((k for k, entry in enumerate(CLASSES.values()) if entry[0] == instance // 1000), None)
            if index is not None:
                mask = instances == instance
                weight = AVERAGE_SIZES[NAMES[index]] * (height * width / (2048 * 1024)) / mask.sum()
                right = (prediction[mask] == index).sum()
                found[index] += float(weight * right)
                missed[index] += float(weight * (mask.sum() - right))
        for true, given_class in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
            if true != UNLABELLED and true != given_class:
                false[given_class] += 1
    wholes = [sum(parts) for parts in zip(found, missed, false, strict=True)]
    return [
        f / whole if name in AVERAGE_SIZES and whole else None
        for name, f, whole in zip(NAMES, found, wholes, strict=True)
    ]


def batch_of(scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, instances, predictions and sizes on the smallest canvas that holds all of the scenes."""
    height, width = (max(scene[0].shape[axis] for scene in scenes) for axis in (0, 1))
    labels = torch.full((len(scenes), height, width), PADDING, dtype=torch.uint8)
    instances = torch.zeros(len(scenes), height, width, dtype=torch.int32)
    predictions = torch.full((len(scenes), height, width), CAR, dtype=torch.uint8)
    for place, (label, objects, prediction) in enumerate(scenes):
        h, w = label.shape
        labels[place, :h, :w] = torch.tensor(label)
        instances[place, :h, :w] = torch.tensor(objects.astype(np.int32))
        predictions[place, :h, :w] = torch.tensor(prediction)
    return labels, instances, predictions, torch.tensor([scene[0].shape for scene in scenes])


def counts_of(scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]], device: str = "cpu") -> Counts:
    labels, instances, predictions, sizes = (part.to(device) for part in batch_of(scenes))
    return Counts.of(predictions, labels, 19, instances=instances, sizes=sizes)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_against_objects_counted_one_by_one(device: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(3, 30), st.integers(3, 30)), min_size=1, max_size=4))
    def check(seed: int, shapes: list[tuple[int, int]]) -> None:
        scenes = [make_scene(seed + number, *shape) for number, shape in enumerate(shapes)]
        scores = counts_of(scenes, device).instance_scores()
        assert scores is not None
        expected = slow_scores(scenes)
        # The sums are rounded to 2^-20 pixel, which shows where an object of few pixels is all there is.
        assert scores.per_class_iiou == pytest.approx(expected, abs=2e-4)
        present = [one for one in expected if one is not None]
        assert scores.iiou == pytest.approx(np.mean(present) if present else None, abs=2e-4)

    check()


def test_a_set_has_the_same_sums_in_any_order_and_in_any_batches() -> None:
    scenes = [make_scene(seed, 17 + seed, 31 - seed) for seed in range(11)]
    whole = counts_of(scenes).instances
    assert whole is not None
    for order, size in ((range(11), 1), (range(10, -1, -1), 3), ([3, 9, 1, 0, 10, 2, 4, 8, 7, 6, 5], 4)):
        shuffled = [scenes[number] for number in order]
        parts = [counts_of(shuffled[first : first + size]) for first in range(0, 11, size)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        assert total.instances is not None
        assert torch.equal(total.instances, whole)


def full_size_scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An image of 1024×2048 with two persons of 100 and 300 pixels, a group of persons, a caravan, and road."""
    labels = torch.zeros(1, 1024, 2048, dtype=torch.uint8)
    instances = torch.full((1, 1024, 2048), 7, dtype=torch.int32)
    for rows, label, instance in (
        (slice(0, 100), PERSON, 24000),
        (slice(200, 500), PERSON, 24001),
        (slice(600, 650), PERSON, 24),
        (slice(700, 720), UNLABELLED, 29000),
    ):
        labels[0, rows, 0] = label
        instances[0, rows, 0] = instance
    return labels, instances, labels.clone(), torch.tensor([[1024, 2048]])


def test_by_hand() -> None:
    labels, instances, prediction, sizes = full_size_scene()
    prediction[0, 600:650, 0] = CAR
    prediction[0, 700:720, 0] = CAR
    prediction[0, 50:100, 0] = 0
    prediction[0, 200:275, 0] = CAR
    prediction[0, 1000, :40] = PERSON
    counts = Counts.of(prediction, labels, 19, instances=instances, sizes=sizes)
    mean = AVERAGE_SIZES["person"]
    assert counts.instances is not None
    # Half of one person and a quarter of the other are missed, whatever their sizes; the group has no weight.
    assert counts.instances[PERSON].tolist() == pytest.approx([1.25 * mean, 0.75 * mean], abs=1e-4)
    assert counts.instances.sum().item() == pytest.approx(2 * mean, abs=1e-4)
    scores = counts.instance_scores()
    assert scores is not None
    assert scores.per_class_iiou[PERSON] == pytest.approx(1.25 * mean / (2 * mean + 40))
    # 125 false positives on persons, those of the group too; none where the truth is never counted; no car is there.
    assert counts.confusion[:, CAR].sum() == 125
    assert scores.per_class_iiou[CAR] == 0.0
    assert [k for k, one in enumerate(scores.per_class_iiou) if one is not None] == [PERSON, CAR]
    assert scores.iiou == pytest.approx(scores.per_class_iiou[PERSON] / 2)


def test_a_smaller_image_has_smaller_objects() -> None:
    """Every second pixel of every second row: shares stay, false positives are a quarter, and so is the mean size."""
    labels, instances, prediction, sizes = full_size_scene()
    prediction[0, 50:100, 0] = 0
    prediction[0, 1000, :40] = PERSON
    prediction[0, 1001, :40] = PERSON
    whole = Counts.of(prediction, labels, 19, instances=instances, sizes=sizes).instance_scores()
    small = [plane[:, ::2, ::2] for plane in (prediction, labels, instances)]
    half = Counts.of(small[0], small[1], 19, instances=small[2], sizes=sizes // 2).instance_scores()
    assert whole is not None
    assert half is not None
    assert half.per_class_iiou[PERSON] == pytest.approx(whole.per_class_iiou[PERSON])
    assert AVERAGE_SIZES_AREA == 2048 * 1024


def test_nothing_to_score_and_what_does_not_fit() -> None:
    labels, instances, prediction, sizes = (part[:, :8, 1:9] for part in (*full_size_scene()[:3], torch.ones(1, 8, 9)))
    scores = Counts.of(prediction, labels, 19, instances=instances, sizes=torch.tensor([[8, 8]])).instance_scores()
    assert scores is not None
    assert scores.iiou is None
    assert set(scores.per_class_iiou) == {None}
    with pytest.raises(InputError, match=r"shape \[1, 8, 7\], expected that of the instances, \[1, 8, 8\]"):
        instance_sums(prediction[:, :, :7], instances, torch.tensor([[8, 8]]))
    without = Counts.of(prediction, labels, 19, instances=None, sizes=sizes)
    assert without.instance_scores() is None
    assert "iiou" not in without.record()
    assert tells_objects_apart(NAMES)
    assert not tells_objects_apart(NAMES[:-1])


# ---- runs of a method -----------------------------------------------------------------------------------------------


def streets(path: Path, *, with_instances: bool = True) -> str:
    """A store of Cityscapes' classes: four images to train on, six of several sizes to validate on."""
    samples = []
    for number in range(10):
        height, width = (48, 48) if number < 4 else (40 + number, 60 - number)
        label, instances, _ = make_scene(number, height, width)
        image = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        split = "train" if number < 4 else "val"
        objects = instances if with_instances and split == "val" else None
        samples.append(Sample(key=f"s{number}", image=image, split=split, label=label, instances=objects))
    return write_store(path, samples, INFO, image_encoding="png").uri


Train = Callable[..., tuple[CiSSNet, list[dict[str, Any]]]]


@pytest.fixture
def evaluated(tmp_path: Path, ray_session: None) -> Iterator[Train]:
    """Trains for one update on X; gives the algorithm and the records of its evaluations."""
    runs: list[CiSSNet] = []

    def train(store_uri: str, **changes: Any) -> tuple[CiSSNet, list[dict[str, Any]]]:
        own = settings_of(
            training__pretrain_epochs=0,
            cissnet__learning__updates=1,
            engine__inference_batch_size=2,
            training__batch_size=2,
            **changes,
        )
        config = CiSSNetConfig().apply(own, run_dir=str(tmp_path / f"run-{len(runs)}"), store_uri=store_uri)
        runs.append(config.build_algo())
        records = []
        while not runs[-1].done:
            runs[-1].train()
            records.append(runs[-1].record)
        return runs[-1], [record for record in records if record["phase"] == "evaluate"]

    yield train
    for algorithm in runs:
        algorithm.stop()


def predicted_scenes(store: Store, predict: Callable[[Tensor], Tensor]) -> list[tuple[np.ndarray, ...]]:
    """Labels, instances and predictions of the validation split, image by image."""
    scenes = []
    for key in store.keys("val"):
        image, label, instances = np.array(store.image(key)), store.label(key), store.instances(key)
        assert label is not None
        assert instances is not None
        probabilities = predict(torch.tensor(image).permute(2, 0, 1)[None])
        scenes.append((label, instances, probabilities[0].argmax(0).byte().numpy()))
    return scenes


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with a prediction on the CPU")
def test_a_run_scores_what_its_networks_predict(evaluated: Train, tmp_path: Path) -> None:
    uri = streets(tmp_path / "store")
    algorithm, records = evaluated(uri)
    first, last = records
    own, networks = algorithm.export_module().online.eval(), algorithm.export_networks()
    network = ContextSegmenter(own, networks, algorithm.settings.cissnet).eval()
    store = algorithm.store
    for found, predict in (
        (first["per_class_iiou"], lambda image: predict_probabilities(own, image)),
        (last["per_class_iiou"], lambda image: predict_steps(network, image, steps=(2,))[0]),
    ):
        assert found == pytest.approx(slow_scores(predicted_scenes(store, predict)), abs=2e-4)
    assert last["iiou_at_steps"][-1] == last["iiou"]
    assert len(last["iiou_at_steps"]) == len(last["steps"])
    assert last["iiou"] > 0


def test_actors_give_the_same_numbers(evaluated: Train, tmp_path: Path) -> None:
    uri = streets(tmp_path / "store")
    (_, records), (_, remote) = evaluated(uri), evaluated(uri, engine__num_env_runners=2)
    names = ("miou", "iiou", "per_class_iiou", "iiou_at_steps")
    assert [[one.get(name) for name in names] for one in remote] == [
        [one.get(name) for name in names] for one in records
    ]


def test_the_command_evaluate_writes_and_prints_it(tmp_path: Path) -> None:
    store = Store.open(streets(tmp_path / "store"))
    predictions = {key: make_scene(50 + number, *store.size(key))[0] for number, key in enumerate(store.keys("val"))}
    predictions = {key: np.where(values == UNLABELLED, CAR, values) for key, values in predictions.items()}
    by_image = {store.image(key).tobytes(): key for key in predictions}

    def probabilities(image: np.ndarray) -> Tensor:
        values = torch.tensor(predictions[by_image[image.tobytes()]]).long()
        return torch.nn.functional.one_hot(values, 19).permute(2, 0, 1).float()

    trained: Any = SimpleNamespace(
        info=INFO, probabilities=probabilities, protocol=SimpleNamespace(scales=(1.0,), flip=False)
    )
    run: Any = SimpleNamespace(run="run", variant="none", seed=0)
    result = evaluate_module._score(
        evaluate_module._Job(run=run, trained=trained, store=store, split="val"), lambda *_, **__: None
    )
    scenes = [(store.label(key), store.instances(key), predictions[key]) for key in store.keys("val")]
    expected = slow_scores(scenes)  # type: ignore[arg-type]
    assert result["per_class_iiou"] == pytest.approx(expected, abs=2e-4)
    cells = list(evaluate_module._table([result]).columns[0].cells)
    shown = list(evaluate_module._table([result]).columns[1].cells)
    assert shown[cells.index("mean iIoU of objects")] == f"{100 * result['iiou']:.1f}"
    without = evaluate_module._score(
        evaluate_module._Job(
            run=run, trained=trained, store=Store.open(streets(tmp_path / "other", with_instances=False)), split="val"
        ),
        lambda *_, **__: None,
    )
    assert without["miou"] == result["miou"]
    assert "iiou" not in without


def test_without_instances_there_is_no_such_score(evaluated: Train, tmp_path: Path) -> None:
    _, records = evaluated(streets(tmp_path / "store", with_instances=False))
    assert records
    for record in records:
        assert "miou" in record
        assert not [name for name in record if "iiou" in name]
