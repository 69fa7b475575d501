"""Policies that are searched for by rehearsed stages: what a rehearsal sees, what the search does with it, and a run of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import Bench, build, maps_of, play, settings_of

from raysseg.algorithms.eil.policy import Policy, PolicyDistribution
from raysseg.algorithms.eil.rehearsal import _join
from raysseg.core.segmenter_loss import ClassWeights
from raysseg.errors import InputError
from raysseg.functional import UNLABELLED, class_overlap, estimated_overlap, pair_counts
from raysseg.segmenters import upsample_logits

Train = Callable[..., tuple[Any, list[dict[str, Any]]]]
SMALL = {
    "eil__policy": "population",
    "eil__population": {
        "size": 3,
        "elites": 2,
        "generations": 2,
        "later_generations": 1,
        "images": 8,
        "updates": 3,
        "windows": [5, "image"],
    },
}


def parameters(object_bias: float, ground_bias: float, window: float = 5.0) -> np.ndarray:
    """A policy that treats all images alike."""
    return np.array([object_bias, 0, 0, ground_bias, 0, 0, window])


@pytest.fixture
def context() -> dict[str, Any]:
    """A rehearsal order's context on all eight images."""
    return {
        "rows": np.arange(8),
        "stage": 1,
        "label_version": 0,
        "segmenter_version": 0,
        "truth": True,
        "seed": 3,
        "fold": 0,
        "centre": [[0.5, 0.0], [0.1, 0.1]],
    }


def test_a_policy_chooses_its_window_by_equal_intervals() -> None:
    settings = settings_of(eil__policy="population", eil__population={"windows": [5, 9, "image"]})
    sides = [Policy.of(parameters(0, 0, value), settings.eil).window for value in (-9.0, -0.8, -0.6, 0.6, 0.8, 40.0)]
    assert sides == [5, 5, 9, 9, None, None]


def test_a_rehearsal_infers_what_the_environment_would(bench: Callable[..., Bench], context: dict[str, Any]) -> None:
    one = bench(**SMALL)
    order = {"parameters": parameters(-1.0, 0.5), "centre": context["centre"]}
    inferred = one.runner.infer(
        rows=np.arange(8),
        context={
            "stage": 1,
            "label_version": 0,
            "seeds": np.arange(8),
            "thresholds": None,
            "truth": True,
            "policy": order,
        },
    )
    rehearsal = one.runner._rehearsal_of(context)
    policy = Policy.of(order["parameters"], one.settings.eil)
    with torch.inference_mode():
        labels = rehearsal._infer(policy, one.runner._centre_of(order))
    assert ((labels != UNLABELLED) & (rehearsal.scribbles == UNLABELLED)).any()
    shares = (labels != UNLABELLED).flatten(1).sum(1)
    assert inferred.column("labelled").to_pylist() == shares.tolist()
    fewer = rehearsal._infer(Policy.of(parameters(-1.0, 0.5, -5.0), one.settings.eil), one.runner._centre_of(order))
    assert (fewer != UNLABELLED).sum() < (labels != UNLABELLED).sum(), (
        "a window of five pixels reaches less far than the image"
    )


def test_the_return_is_the_agreement_on_images_that_were_left_out(
    bench: Callable[..., Bench], context: dict[str, Any]
) -> None:
    one = bench(**SMALL)
    before = {name: value.clone() for name, value in one.runner.segmenter.teacher.state_dict().items()}
    outcome = one.runner.rehearse(parameters=parameters(0.0, 0.0), context=context)
    again = one.runner.rehearse(parameters=parameters(0.0, 0.0), context=context)
    assert outcome == again
    after = one.runner.segmenter.teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the segmenter itself stands still"

    rehearsal, builder = one.runner._rehearsal_of(context), one.builder
    left_out: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    learned: list[torch.Tensor] = []
    learn, predict = rehearsal._learn, rehearsal._predict

    def record_learning(labels: torch.Tensor, rows: torch.Tensor, *rest: Any) -> Any:
        learned.append(rows)
        return learn(labels, rows, *rest)

    def record_predicting(decoder: Any, rows: torch.Tensor) -> torch.Tensor:
        seen.append(predict(decoder, rows))
        assert not set(rows.tolist()) & set(learned[-1].tolist())
        assert len(rows) == 2
        left_out.append(rows)
        return seen[-1]

    rehearsal._learn, rehearsal._predict = record_learning, record_predicting  # type: ignore[method-assign]
    one.runner.rehearse(parameters=parameters(0.0, 0.0), context=context)
    assert torch.equal(learned[0], learned[1])
    strokes = rehearsal.scribbles[left_out[0]]
    drawn = strokes != UNLABELLED
    pair, on_strokes, *judged = (
        pair_counts(torch.where(where, one, 0), torch.where(where, two, 0), where, builder.num_classes)
        for one, two, where in (
            (seen[0], seen[1], torch.ones_like(drawn)),
            (seen[0], seen[1], drawn),
            (strokes, seen[0], drawn),
            (strokes, seen[1], drawn),
        )
    )
    expected = estimated_overlap(pair, on_strokes, judged[0] + judged[1], rehearsal.present)
    assert outcome.overlap == pytest.approx(expected.item())
    assert outcome.agreement == pytest.approx(class_overlap(pair)[rehearsal.present].mean().item())
    assert 0 < outcome.overlap < outcome.agreement + 1e-6 < 1, "two orders give two networks"
    assert outcome.miou is not None
    other = one.runner.rehearse(
        parameters=parameters(0.0, 0.0), context={**context, "fold": 1, "truth": False, "stage": 2}
    )
    assert other.miou is None
    assert other.overlap != outcome.overlap


@pytest.mark.parametrize("networks", ["fresh", "teacher"])
def test_a_rehearsal_learns_its_labels(bench: Callable[..., Bench], context: dict[str, Any], networks: str) -> None:
    rows, losses, starts = torch.arange(8), {}, []
    for updates in (1, 40):
        population = {**SMALL["eil__population"], "updates": updates, "networks": networks}  # type: ignore[dict-item]
        one = bench(**{**SMALL, "eil__population": population})
        rehearsal = one.runner._rehearsal_of(context)
        with torch.inference_mode():
            labels = rehearsal._infer(
                Policy.of(parameters(-1.0, -1.0), one.settings.eil), one.runner._centre_of(context)
            )
            decoder = rehearsal._learn(labels, rows, 0, 0)
            losses[updates] = rehearsal._loss(decoder, labels, rows, ClassWeights(), crop=None, mirrored=False)
        torch.manual_seed(len(starts))
        starts += [rehearsal._start()[0].head.weight.detach().clone() for _ in range(2)]
    assert losses[40] < 0.9 * losses[1]
    assert torch.equal(starts[0], starts[1]) == (networks == "teacher")


SOFT = {"weight": 0.5, "pixels": "inferred", "confidence": 0.22}
LEARNED: list[dict[str, Any]] = [
    {},
    {"training__inferred_weight": 0.3, "training__class_balance_power": 0.5},
    {"training__self_training": {"weight": 2.0, "classes": "labelled", "class_balanced": True}},
    {"training__self_training": SOFT},
]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("changes", LEARNED)
def test_a_rehearsal_has_the_loss_of_refining(
    bench: Callable[..., Bench], context: dict[str, Any], changes: dict[str, Any], mirrored: bool
) -> None:
    power = 0.5 if "training__self_training" in changes else 0.0
    one = bench(**SMALL, **{"training__class_balance_power": power, "segmenter__dropout": 0.0, **changes})
    rehearsal, rows = one.runner._rehearsal_of(context), torch.tensor([1, 4, 6])
    training = one.settings.training
    with torch.inference_mode():
        labels = rehearsal._infer(Policy.of(parameters(-1.0, 9.0), one.settings.eil), one.runner._centre_of(context))
        labels[:, 30:] = rehearsal.scribbles[:, 30:]
        weights = rehearsal._class_weights(labels, rows)
        with torch.inference_mode(False):
            student = rehearsal._start()[0].eval()
        found = rehearsal._loss(student, labels, rows, weights, crop=None, mirrored=mirrored).item()
        maps = [part[rows].flip(-1) if mirrored else part[rows] for part in rehearsal.encoded]
        said, heard = (
            upsample_logits(network(maps, (48, 48)).logits, (48, 48)).double()
            for network in (rehearsal.decoder, student)
        )
    own, drawn = (one[rows].flip(-1) if mirrored else one[rows] for one in (labels, rehearsal.scribbles))
    inferred = (own != UNLABELLED) & (drawn == UNLABELLED)
    assert inferred.any()
    assert (own == UNLABELLED).any()

    def hard(where: torch.Tensor, of: torch.Tensor | None) -> float:
        weigh = torch.ones(5) if of is None else of
        right = heard.log_softmax(1).gather(1, own.clamp(max=4).long()[:, None])[:, 0]
        mass = weigh.double()[own.clamp(max=4).long()] * where
        return float(-(mass * right).sum() / mass.sum())

    lesson, expected = training.self_training, hard(own != UNLABELLED, weights.labels)
    if training.inferred_weight or lesson.pixels == "inferred":
        expected = hard(drawn != UNLABELLED, weights.labels)
    if training.inferred_weight:
        expected += 0.3 * hard(inferred, weights.inferred)
    if lesson.weight:
        known = torch.stack([torch.tensor([bool((image == k).any()) for k in range(5)]) for image in labels[rows]])
        known = known if lesson.classes == "labelled" else torch.ones_like(known)
        expects = said.masked_fill(~known[:, :, None, None], -torch.inf).softmax(1)
        counted = inferred if lesson.pixels == "inferred" else own == UNLABELLED
        counted = counted & (expects.amax(1) >= lesson.confidence)
        assert 0 < counted.sum() < counted.numel()
        weigh = weights.labels if lesson.class_balanced else torch.ones(5)
        assert weigh is not None
        expects = expects * weigh.double()[None, :, None, None] * counted[:, None]
        expected += lesson.weight * float(-(expects * heard.log_softmax(1)).sum() / expects.sum())
    assert found == pytest.approx(expected, rel=1e-4)


def test_crops_are_the_same_place_in_every_map(bench: Callable[..., Bench], context: dict[str, Any]) -> None:
    one = bench(**SMALL, training__augmentation={"crop": [20, 32]})
    rehearsal = one.runner._rehearsal_of(context)
    draw = np.random.default_rng(0)
    crops = [rehearsal._draw_crop(draw) for _ in range(40)]
    coarse = 48 // rehearsal.encoded[-1].shape[-1]
    for crop in crops:
        assert crop is not None
        assert (crop.height, crop.width) == (-(-20 // coarse) * coarse, -(-32 // coarse) * coarse)
        assert crop.top + crop.height <= 48 >= crop.left + crop.width
    assert len({(crop.top, crop.left) for crop in crops if crop}) > 3
    pixel = torch.arange(48 * 48).view(1, 1, 48, 48)
    for maps in rehearsal.encoded:
        cell = 48 // maps.shape[-1]
        crop = crops[0]
        assert crop is not None
        part = crop.of(pixel[..., ::cell, ::cell], (48, 48))
        assert part[0, 0, 0, 0] == pixel[0, 0, crop.top, crop.left]
        assert part.shape[-2:] == (crop.height // cell, crop.width // cell)


def test_batches_of_different_sizes_are_padded_to_the_largest() -> None:
    wide, high = torch.ones(2, 3, 2, 5), torch.full((1, 3, 4, 2), 2.0)
    joined = _join([wide, high], 0)
    assert joined.shape == (3, 3, 4, 5)
    assert torch.equal(joined[:2, :, :2], wide)
    assert torch.equal(joined[2:, :, :, :2], high)
    assert joined.sum() == wide.sum() + high.sum()


def test_a_run_searches_infers_and_leaves_its_policy(trained: Train, tmp_path: Path) -> None:
    algorithm, records = trained(**SMALL)
    generations = [(record["stage"], record["generation"]) for record in records if record["phase"] == "explore"]
    assert generations == [(1, 1), (1, 2), (2, 1)]
    for record in records:
        if record["phase"] == "explore":
            assert len(record["returns"]) == len(record["rehearsed_mious"]) == 3
            assert record["reward_best"] == max(record["returns"]) >= record["reward"]
    assert algorithm.label_store.versions() == [1, 2]
    assert (maps_of(algorithm, 1) != UNLABELLED).mean() > 0
    algorithm.export(tmp_path)
    left = json.loads((tmp_path / "policy.json").read_text())
    assert left["mean"] == [record["policy_mean"] for record in records if record["phase"] == "explore"][-1]

    # Elsewhere the search starts from it, and without a generation it is played as it is.
    start = {
        **SMALL["eil__population"],
        "start": str(tmp_path / "policy.json"),
        "generations": 1,
        "later_generations": 0,
    }  # type: ignore[dict-item]
    distribution = PolicyDistribution.of(settings_of(**{**SMALL, "eil__population": start}).eil)
    np.testing.assert_array_equal(distribution.mean, left["mean"])
    other, _ = trained(**{**SMALL, "eil__population": start})
    assert other.search.distribution.mean.tolist() != left["mean"]
    same, records = trained(**{**SMALL, "eil__population": {**start, "generations": 0}})
    assert same.search.distribution.mean.tolist() == left["mean"]
    assert same.search.played().tolist() == left["mean"]
    best = {**start, "generations": 0, "play": "best"}
    same.search.distribution = PolicyDistribution.of(settings_of(**{**SMALL, "eil__population": best}).eil)
    same.search._options = settings_of(**{**SMALL, "eil__population": best}).eil
    assert same.search.played().tolist() == left["best"] != left["mean"]
    assert not [record for record in records if "returns" in record]


def test_a_restored_search_goes_on_as_if_nothing_had_happened(
    trained: Train, store_uri: str, pretrained: str, tmp_path: Path
) -> None:
    _, records = trained(**SMALL)
    settings = settings_of(training__pretrained=pretrained, **SMALL)
    first = build(settings, tmp_path / "first", store_uri)
    while first.position.phase != "explore":
        first.train()
    first.train()
    assert first.position.phase == "explore"
    path = first.save_to_path(str(tmp_path / "checkpoint"))
    first.stop()
    second = build(settings, tmp_path / "first", store_uri)
    second.restore_from_path(path)
    rest = play(second)
    second.stop()
    assert [record["returns"] for record in rest if "returns" in record] == [
        record["returns"] for record in records if "returns" in record
    ][1:]
    assert rest[-1]["miou"] == records[-1]["miou"]


def test_without_state_dependence_weights_stay_zero_and_one_window_stays() -> None:
    population = {**SMALL["eil__population"], "state_dependent": False, "windows": ["image"]}  # type: ignore[dict-item]
    distribution = PolicyDistribution.of(settings_of(eil__policy="population", eil__population=population).eil)
    drawn = distribution.draw(np.random.default_rng(0), 5)
    assert (drawn[:, [1, 2, 4, 5, 6]] == 0).all()
    assert (drawn[1:, [0, 3]].std(0) > 0).all()
    np.testing.assert_array_equal(drawn[0], distribution.mean)


def test_without_state_dependence_a_start_keeps_its_thresholds_for_an_average_image(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"mean": [1, 2, 3, 4, 5, 6, 7], "best": [7, 6, 5, 4, 3, 2, 1]}))
    population = {**SMALL["eil__population"], "state_dependent": False, "start": str(path)}  # type: ignore[dict-item]
    distribution = PolicyDistribution.of(settings_of(eil__policy="population", eil__population=population).eil)
    assert distribution.mean.tolist() == [1, 0, 0, 4, 0, 0, 7]
    assert distribution.best is not None
    assert distribution.best.tolist() == [7, 0, 0, 4, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eil__population": {"elites": 9}}, "elites is 9 but size is 8"),
        ({"eil__population": {"generations": 0, "later_generations": 0}}, "no policy would be searched for"),
        ({"eil__population": {"windows": [4]}}, "odd numbers of pixels or 'image', not 4"),
        ({"eil__action": "per_class"}, "gives classes no thresholds of their own"),
        ({"eil__policy": "fixed", "eil__population": {"size": 4}}, "population has no effect with the policy 'fixed'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        settings_of(**{"eil__policy": "population", **changes})


def test_a_start_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"

    def begin() -> None:
        PolicyDistribution.of(settings_of(eil__policy="population", eil__population={"start": str(path)}).eil)

    with pytest.raises(InputError, match="there is no such file"):
        begin()
    path.write_text("{")
    with pytest.raises(InputError, match=r"is no policy\.json of a run"):
        begin()
    path.write_text(json.dumps({"mean": [1.0, 2.0]}))
    with pytest.raises(InputError, match="has 2 parameters, expected 7"):
        begin()
    path.write_text(json.dumps({"mean": [1.0] * 7, "best": None}))
    begin()
    played = {"start": str(path), "play": "best", "generations": 0}
    with pytest.raises(InputError, match=r"play is 'best', but .* holds none: expected 'mean', or generations above 0"):
        PolicyDistribution.of(settings_of(eil__policy="population", eil__population=played).eil)
