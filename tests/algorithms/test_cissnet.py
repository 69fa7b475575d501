"""CiSS-Net as every method, and what is its own: phases, on-policy rollouts, what an actor sees and the learner rebuilds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from algorithms.base import MethodTester, weights_of
from algorithms.tiny_cissnet import CELLS, CLASSES, STEPS, settings_of

from raysseg.algorithms.cissnet.algorithm import CiSSNet
from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.env_runner import CiSSNetEnvRunner
from raysseg.algorithms.cissnet.episode import box_of_positions, context_map, labels_of_positions
from raysseg.algorithms.cissnet.features import NewestFeatures, domain_features
from raysseg.algorithms.cissnet.learner import CiSSNetLearner
from raysseg.algorithms.cissnet.results import CONTEXT_FILE, load_networks
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.algorithms.cissnet.steps import EPISODE_SCHEMA, EpisodeMaps, episode_records, read_maps
from raysseg.core.modules import SEGMENTER
from raysseg.data import open_dataset
from raysseg.errors import InputError
from raysseg.evaluation import Counts


@pytest.fixture(scope="session")
def context_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The scenes of CiSS-Net's tests."""
    return open_dataset(settings_of().data, tmp_path_factory.mktemp("context")).uri


class TestCiSSNet(MethodTester):
    """CiSS-Net with its Context Net: pre-training, learning, scores at every t."""

    config = CiSSNetConfig
    networks = (*MethodTester.networks, "context.networks.base", "context.networks.bias", "context.networks.context")
    save_after = (1, 4, 6)
    bad_settings = (
        ({"cissnet__polcy": "context"}, r"cissnet\.polcy.*did you mean 'policy'"),
        ({"cissnet__policy": "random"}, r"cissnet\.policy.*'random'"),
        ({"cissnet__learning__gamma": 1.1}, r"cissnet\.learning\.gamma"),
        ({"cissnet__learning__entropy_weight": -0.1}, r"cissnet\.learning\.entropy_weight"),
        ({"cissnet__learning__return_steps": 4}, "return_steps is 4, but an episode has 3 steps"),
        ({"cissnet__learning__return_steps": 2, "cissnet__learning__trace": 0.5}, "cut by one of them"),
        ({"cissnet__network__width": 20}, "width is 20, which is not a multiple of group_channels, 8"),
        ({"cissnet__inference__steps": 1}, r"steps is 1, but scored_steps is \[0, 2\]"),
        ({"cissnet__inference__scored_steps": [2, 0]}, "expected rising numbers"),
        ({"cissnet__greedy_share": 0.2}, "greedy_share is 0.2 but policy is 'context'"),
        ({"segmenter__architecture": "FPN"}, "expected 'PSPNet'; 'encoder' takes any"),
        ({"engine__num_env_runners": 3}, "which the 3 rollouts of an update cannot share equally"),
        ({"data__scribbles": "generate"}, "learns from whole maps: use 'none'"),
        (
            {"training__inferred_weight": 1},
            "inferred_weight is 1, but this variant of cissnet infers no labels, .* expected null",
        ),
        (
            {"training__self_training": {"weight": 1}},
            r"self_training\.weight is 1, but this variant of cissnet does not refine",
        ),
        ({"training__crop_place": "labelled"}, "has no effect on maps that are labelled everywhere"),
    )

    @pytest.fixture(scope="class")
    @classmethod
    def store_uri(cls, context_store: str) -> str:
        """The scenes of CiSS-Net's tests."""
        return context_store

    @classmethod
    def settings(cls, **changes: Any) -> CiSSNetSettings:
        return settings_of(**changes)

    @classmethod
    def exported(cls, algorithm: CiSSNet) -> torch.nn.Module:
        """What predicts: S-Net with the contexts of its own predictions."""
        return ContextSegmenter(
            algorithm.export_module().online.eval(), algorithm.export_networks(), algorithm.settings.cissnet
        ).eval()


Train = Callable[..., tuple[CiSSNet, list[dict[str, Any]]]]


@pytest.fixture
def learn(tmp_path: Path, context_store: str, ray_session: None) -> Iterator[Train]:
    """Trains a variant to its end; gives the algorithm and its records."""
    runs: list[CiSSNet] = []

    def train(**changes: Any) -> tuple[CiSSNet, list[dict[str, Any]]]:
        folder = tmp_path / f"run-{len(runs)}"
        algorithm = (
            CiSSNetConfig().apply(settings_of(**changes), run_dir=str(folder), store_uri=context_store).build_algo()
        )
        runs.append(algorithm)
        records = []
        while not algorithm.done:
            algorithm.train()
            records.append(algorithm.record)
        return algorithm, records

    yield train
    for algorithm in runs:
        algorithm.stop()


@pytest.mark.parametrize("policy", ["none", "baseline", "p-map", "greedy", "oracle", "context"])
def test_each_policy_has_its_phases_and_scores(learn: Train, policy: str) -> None:
    _algorithm, records = learn(cissnet__policy=policy, cissnet__learning__updates=1)
    phases = list(dict.fromkeys((record["phase"], record["stage"]) for record in records))
    expected = [("pretrain", 0), ("evaluate", 0)] + ([] if policy == "none" else [("learn", 1), ("evaluate", 1)])
    assert phases == expected
    last = records[-1]
    if policy != "none":
        assert last["steps"] == ([0] if policy == "baseline" else [0, 2])
        assert last["miou"] == last["miou_at_steps"][-1]
        assert ("policy_loss" in records[-2]) == (policy == "context")
        assert ("reward" in records[-2]) == (policy != "baseline")


def test_the_score_is_that_of_the_step_that_is_used(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [torch.eye(CLASSES, dtype=torch.int64) * 3 + wrong for wrong in (0, 1, 2)]

    def score_steps(self: CiSSNetEnvRunner, *, rows: np.ndarray, split: str) -> list[Counts]:
        return [Counts(confusion=one.clone(), instances=None) for one in right]

    monkeypatch.setattr(CiSSNetEnvRunner, "score_steps", score_steps)
    _, records = learn(cissnet__inference__scored_steps=[0, 2, 3], cissnet__learning__updates=1)
    last = records[-1]
    assert last["steps"] == [0, 2, 3]
    assert last["miou_at_steps"] == sorted(set(last["miou_at_steps"]), reverse=True)
    assert last["miou"] == last["miou_at_steps"][1]
    assert last["pixel_accuracy"] == last["pixel_accuracy_at_steps"][1]


def test_the_base_net_may_learn_alone_at_first(learn: Train) -> None:
    changes = {"cissnet__learning__base_updates": 2, "cissnet__learning__updates": 2}
    algorithm, records = learn(**changes)
    assert [(row["phase"], row["update"]) for row in records if "update" in row] == [
        ("base", 1),
        ("base", 2),
        ("learn", 3),
        ("learn", 4),
    ]
    rates = [row["learning_rate"] for row in records if "update" in row]
    assert rates == sorted(rates, reverse=True)
    assert "policy_loss" not in records[5]
    assert "policy_loss" in records[-2]
    alone, whole = learn(cissnet__policy="baseline", **changes), learn(cissnet__policy="baseline")
    numbers = [[row["loss"] for row in rows if "update" in row] for _, rows in (alone, whole)]
    assert numbers[0] == numbers[1], "without contexts nothing tells the two phases apart"
    losses = [row["loss"] for row in records if row["phase"] == "base"]
    assert losses == numbers[0][:2], "every variant begins with the same Base Net"
    assert algorithm.iterations_left() == 0


def test_the_loss_of_s_net_weighs_classes_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 2, 3, generator=generator)
    labels = torch.randint(0, 4, (3, 2, 3), generator=generator).to(torch.uint8)
    labels[0, 0, 0], labels[1, 1, 2] = 255, 254
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25])
    logs, expected, plain = logits.log_softmax(2), 0.0, 0.0
    for step, image, y, x in np.ndindex(2, 3, 2, 3):
        label = int(labels[image, y, x])
        if label < 254:
            plain -= float(logs[step, image, label, y, x])
            expected -= float(weights[label] * logs[step, image, label, y, x])
    assert float(CiSSNetLearner._segmentation(logits, labels, weights)) == pytest.approx(expected, rel=1e-5)
    assert float(CiSSNetLearner._segmentation(logits, labels, None)) == pytest.approx(plain, rel=1e-5)


def test_all_policies_see_the_same_crops(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for policy in ("baseline", "context"):
        algorithm, _ = learn(cissnet__policy=policy, engine__write_rollouts=True)
        folder = Path(algorithm.config.run_dir) / "rollouts"
        tables = [pa.parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
        seen.append([table.select(["row", "seed"]).to_pylist() for table in tables])
    assert seen[0] == seen[1]
    rows = [row["row"] for table in seen[0] for row in table]
    assert sorted(rows[:12]) == list(range(12)), "every image once before any comes again"


def test_the_finished_variant_is_read_again(learn: Train, tmp_path: Path) -> None:
    algorithm, _ = learn(cissnet__learning__updates=1)
    module = algorithm.export(tmp_path)
    assert (tmp_path / CONTEXT_FILE).is_file()
    networks = load_networks(algorithm.settings, tmp_path, module.online)
    for name, value in algorithm.export_networks().state_dict().items():
        assert torch.equal(networks.state_dict()[name], value)
    algorithm.draw_pictures(module, tmp_path / "pictures")
    assert (tmp_path / "pictures" / "contexts.png").stat().st_size > 1000
    (tmp_path / CONTEXT_FILE).write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        load_networks(algorithm.settings, tmp_path, module.online)


# ---- what travels ---------------------------------------------------------------------------------------------------


def rolled_out(algorithm: CiSSNet, **context: Any) -> pa.RecordBatch:
    """One rollout of four crops by the algorithm's own actor."""
    from raysseg.core import rollout

    orders = rollout.order(np.arange(4), np.arange(10, 14))
    values = {"segmenter_version": 0, "policy_version": 0, "steps": STEPS, "probabilities": True, **context}
    return algorithm.env_runner.sample(records=orders, context=values)


def test_a_rollout_is_a_function_of_its_order(learn: Train) -> None:
    algorithm, _ = learn(cissnet__learning__updates=1)
    first, again = rolled_out(algorithm), rolled_out(algorithm)
    assert first.equals(again)
    assert first.schema.equals(EPISODE_SCHEMA)
    maps = read_maps(first)
    assert maps.predictions.shape == (STEPS + 1, 4, *CELLS)
    assert maps.actions.shape == (STEPS, 4, *CELLS)
    assert maps.probabilities is not None
    assert ((maps.probabilities > 0) & (maps.probabilities <= 1)).all()
    assert rolled_out(algorithm, probabilities=False).column("probabilities").null_count == 4


def test_the_learner_rebuilds_what_was_played(learn: Train) -> None:
    algorithm, _ = learn(cissnet__learning__updates=1)
    records = rolled_out(algorithm)
    maps = read_maps(records)
    (learner,) = [one.get() for one in algorithm.learner_group.foreach_learner(lambda learner: learner)]
    from raysseg.core.learner import Preparation

    batch = learner.prepare_context(Preparation(kind="context", records=records))
    networks = algorithm.env_runner.networks.eval()
    features = domain_features(algorithm.env_runner.segmenter.online, batch.images, "pyramid")
    contexts = context_map(batch.predictions[:-1], batch.actions)
    with torch.no_grad():
        played = networks(features, batch.predictions, contexts)
        learned = networks.train()(features, batch.predictions, contexts)
    assert torch.equal(played.logits.argmax(2).to(torch.uint8), torch.tensor(maps.predictions))
    assert not torch.equal(learned.logits, played.logits), "S-Net learns with dropout"
    assert torch.equal(learned.action_logits, played.action_logits), "the policy that learns is the one that acts"
    assert torch.equal(learned.values, played.values)
    share = torch.softmax(played.action_logits, 2).gather(2, batch.actions[:, :, None].long())[:, :, 0]
    torch.testing.assert_close(share.half(), batch.probabilities, atol=2e-3, rtol=2e-3)


def test_episodes_may_have_crops_of_their_own(learn: Train, tmp_path: Path) -> None:
    own = {"crop": [24, 40], "scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0}
    changes = {"cissnet__learning__augmentation": own, "cissnet__reward__box": [8, 8]}
    algorithm, records = learn(**changes)
    assert read_maps(rolled_out(algorithm)).predictions.shape[2:] == (3, 5)
    _, plain = learn(cissnet__reward__box=[8, 8])
    losses = [[row["loss"] for row in rows if row["phase"] == "pretrain"] for rows in (records, plain)]
    assert losses[0] == losses[1], "the segmenter is trained on the crops of its own section"
    with pytest.raises(InputError, match="3 positions of 8 pixels in its height, but the maps have 2"):
        learn(cissnet__learning__augmentation={**own, "crop": [16, 40]})


def test_one_process_makes_features_once(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner takes X from its own actor; where a minibatch is passed in pieces it makes X of each piece again."""
    made: list[int] = []
    real = domain_features

    def counted(segmenter: Any, images: torch.Tensor, kind: Any) -> torch.Tensor:
        made.append(len(images))
        return real(segmenter, images, kind)

    monkeypatch.setattr("raysseg.algorithms.cissnet.learner.domain_features", counted)
    _, shared = learn()
    assert made == []
    monkeypatch.setattr("raysseg.algorithms.cissnet.features.NewestFeatures.take", lambda *_: None)
    _, again = learn()
    assert made == [4] * 4
    losses = [[row["loss"] for row in rows if "update" in row] for rows in (shared, again)]
    assert losses[0] == losses[1]
    monkeypatch.undo()
    monkeypatch.setattr("raysseg.algorithms.cissnet.learner.domain_features", counted)
    made.clear()
    learn(engine__gradient_accumulation=2)
    assert made == [2] * 8


def test_kept_features_are_those_of_the_same_crops() -> None:
    newest, rows, seeds = NewestFeatures(), np.array([3, 1]), np.array([7, 8])
    assert newest.take(rows, seeds) is None
    with torch.inference_mode():
        newest.keep(rows, seeds, torch.ones(2, 1, 2, 2))
    assert newest.take(rows, seeds[::-1]) is None
    assert newest.take(rows[::-1], seeds) is None
    found = newest.take(rows.astype(np.int32), seeds)
    assert found is not None
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    torch.nn.functional.conv2d(found, weight).sum().backward()
    assert float(weight.grad) == 8.0


def test_maps_survive_the_wire() -> None:
    generator = np.random.default_rng(0)
    maps = EpisodeMaps(
        predictions=generator.integers(0, CLASSES, (4, 2, 5, 7), dtype=np.uint8),
        actions=generator.random((3, 2, 5, 7)) < 0.5,
        probabilities=generator.random((3, 2, 5, 7)).astype(np.float16),
    )
    columns = {
        "key": ["a", "b"],
        "row": [0, 1],
        "seed": [5, 6],
        "reward": [[0.1] * 3] * 2,
        "context_share": [[0.1] * 3] * 2,
        "context_right": [[0.1] * 3] * 2,
        "accuracy": [[0.1] * 4] * 2,
        "segmenter_version": [0, 0],
        "policy_version": [1, 1],
    }
    records = episode_records(columns, maps)
    found = read_maps(records)
    for name in ("predictions", "actions", "probabilities"):
        assert np.array_equal(getattr(found, name), getattr(maps, name)), name
    other = episode_records(
        columns, EpisodeMaps(predictions=maps.predictions[:, :, :4], actions=maps.actions[:, :, :4], probabilities=None)
    )
    both = pa.Table.from_batches([records, other]).combine_chunks().to_batches()[0]
    with pytest.raises(InputError, match=r"sizes \[\(4, 7\), \(5, 7\)\], expected one size"):
        read_maps(both)


def test_positions_boxes_and_contexts_by_hand() -> None:
    labels = torch.arange(100, dtype=torch.uint8).view(1, 10, 10)
    assert labels_of_positions(labels, (2, 2), 8).tolist() == [[[44, 49], [94, 99]]]
    assert box_of_positions((40, 40), (60, 60), 8) == (5, 5)
    assert box_of_positions((1, 24), (60, 60), 8) == (1, 3)
    with pytest.raises(InputError, match="13 positions of 8 pixels in its height, but the maps have 12"):
        box_of_positions((96, 40), (12, 60), 8)
    predictions = torch.tensor([[0, 4, 2]], dtype=torch.uint8)
    assert context_map(predictions, torch.tensor([[True, False, True]])).tolist() == [[1, 0, 3]]


def test_a_box_larger_than_the_maps_is_said_before_training(learn: Train) -> None:
    with pytest.raises(InputError, match="7 positions of 8 pixels in its height, but the maps have 6"):
        learn(cissnet__reward__box=[48, 24])


def test_the_segmenter_that_features_come_from_stays_as_it_is(learn: Train) -> None:
    algorithm, _ = learn(cissnet__policy="none")
    before = {name: value for name, value in weights_of(algorithm).items() if name.startswith(f"{SEGMENTER}.online")}
    folder = Path(algorithm.config.run_dir) / "out"
    algorithm.export(folder)
    after, _ = learn(training__pretrained=str(folder / SEGMENTER))
    for name, value in weights_of(after).items():
        if name in before:
            assert torch.equal(value, before[name]), name
