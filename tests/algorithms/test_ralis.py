"""RALIS as every method, and what is its own: phases, sets, budgets and what a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from algorithms.base import MethodTester, weights_of
from algorithms.tiny_ralis import CLASSES, PER_STEP, settings_of
from safetensors.torch import load_file

from raysseg.algorithms.ralis.algorithm import RALIS
from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.module import QUERY, START_FILE
from raysseg.algorithms.ralis.results import QUERY_FILE, REGIONS_FILE
from raysseg.algorithms.ralis.stages import Labelled, rare_classes, window
from raysseg.algorithms.ralis.steps import STEP_SCHEMA
from raysseg.algorithms.ralis.variant_sets import SETS_FILE
from raysseg.core.modules import SEGMENTER
from raysseg.data.store import Store
from raysseg.errors import InputError

REGIONS = 4
"""Of an image."""


class TestRALIS(MethodTester):
    """RALIS with its query network: pre-training, play, acquisition and two budgets."""

    config = RALISConfig
    networks = (*MethodTester.networks, "query.query", "query.target_query", "start.network", "start.origin")
    # Of 24: inside pre-training, play, acquisition and refining for the first budget, and before the second one.
    save_after = (4, 7, 10, 15, 18)
    bad_settings = (
        ({"ralis__polcy": "query"}, r"ralis\.polcy.*did you mean 'policy'"),
        ({"ralis__policy": "random"}, r"ralis\.policy.*'random'"),
        ({"ralis__budgets": [12, 6]}, r"budgets must rise, not \[12, 6\]"),
        ({"ralis__budgets": [6, 13]}, "the largest of budgets is 13, which is not a multiple of per_step, 3"),
        ({"ralis__learning__budget": 8}, r"learning\.budget is 8, which is not a multiple of per_step, 3"),
        ({"ralis__learning__budget": 300}, r"learning\.budget is 300, but the 7 images of D_T .* have 28 regions"),
        ({"ralis__learning__gamma": 1.1}, r"ralis\.learning\.gamma"),
        ({"ralis__learning__batch_size": 1}, r"ralis\.learning\.batch_size"),
        ({"ralis__learning__replay__shards": 2}, "replay.shards has no effect"),
        (
            {"ralis__learning__replay__capacity": 8},
            "capacity is 8, but 1 × learning.budget = 9 transitions arrive between two updates",
        ),
        (
            {"engine__num_env_runners": 8},
            "capacity is 64, but 8 × learning.budget = 72 transitions arrive between two updates",
        ),
        ({"ralis__episode__pass_size": 2}, "pass_size is 2 but scope is 'all', where it has no effect"),
        ({"ralis__sets__start": 10}, "start is 10 but play is 10"),
        ({"ralis__regions__entropy_poolings": ["max", "max"]}, "lists one twice"),
        ({"ralis__episode__scope": "decoder"}, "augmentation must be off"),
        ({"data__scribbles": "generate"}, "labels regions: use 'none'"),
        ({"training__batch_size": 0}, r"training\.batch_size"),
        (
            {"training__self_training": {"weight": 1}},
            r"self_training\.weight is 1, but this variant of ralis does not refine on label maps, .* expected 0",
        ),
        ({"engine__num_learners": 1}, "remote actor"),
    )

    @pytest.fixture(scope="class")
    @classmethod
    def store_uri(cls, game_store: str) -> str:
        """The scenes of RALIS' tests."""
        return game_store

    @classmethod
    def settings(cls, **changes: Any) -> RALISSettings:
        return settings_of(
            **{
                "engine__updates_per_iteration": 1,
                "ralis__learning__target_interval": 2,
                "ralis__learning__optimiser": {"name": "adam", "learning_rate": 1e-3},
                **changes,
            }
        )


Train = Callable[..., tuple[RALIS, list[dict[str, Any]]]]


@pytest.fixture
def play(tmp_path: Path, game_store: str, ray_session: None) -> Iterator[Train]:
    """Trains a variant to its end; gives the algorithm and its records."""
    runs: list[RALIS] = []

    def train(**changes: Any) -> tuple[RALIS, list[dict[str, Any]]]:
        config = RALISConfig().apply(
            settings_of(**changes), run_dir=str(tmp_path / f"run-{len(runs)}"), store_uri=game_store
        )
        algorithm = config.build_algo()
        runs.append(algorithm)
        records = []
        while not algorithm.done:
            algorithm.train()
            records.append(algorithm.record)
        return algorithm, records

    yield train
    for algorithm in runs:
        algorithm.stop()


def phases(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Returns the phases in order, each once per stage."""
    return list(dict.fromkeys((record["phase"], record["stage"]) for record in records))


BUDGETS = [(phase, number) for number in (1, 2) for phase in ("refine", "evaluate")]


@pytest.mark.parametrize(
    ("policy", "after"),
    [
        ("query", [("play", 0), ("acquire", 0), *BUDGETS]),
        ("uniform", [("acquire", 0), *BUDGETS]),
        ("full", [("refine", 1), ("evaluate", 1)]),
        ("none", []),
    ],
)
def test_each_policy_has_its_phases(play: Train, policy: str, after: list[tuple[str, int]]) -> None:
    _, records = play(ralis__policy=policy)
    assert phases(records) == [("start", 0), ("pretrain", 0), ("evaluate", 0), *after]


def test_scoring_only_at_the_end_keeps_the_budgets(play: Train) -> None:
    _, records = play(ralis__policy="uniform", evaluation__every_stage=False)
    assert phases(records)[3:] == [("acquire", 0), ("refine", 1), ("refine", 2), ("evaluate", 2)]


@pytest.mark.parametrize("policy", ["entropy", "bald", "margin", "coreset"])
def test_every_baseline_labels_as_many_regions_once(play: Train, policy: str) -> None:
    algorithm, records = play(ralis__policy=policy, ralis__dropout_passes=2)
    pairs = set(zip(algorithm.labelled.rows.tolist(), algorithm.labelled.regions.tolist(), strict=True))
    assert len(pairs) == len(algorithm.labelled) == 12
    assert {row for row, _ in pairs} <= set(algorithm.sets.pool.tolist())
    assert [record["budget"] for record in records if record["phase"] == "evaluate"] == [0, 6, 12]


def test_label_versions_hold_the_labels_that_were_bought_and_no_others(play: Train) -> None:
    algorithm, records = play(ralis__policy="uniform")
    sets, keys = algorithm.sets, algorithm.train_keys
    rows = {record["stage"]: record for record in records if record["phase"] == "evaluate"}
    known = np.stack([algorithm.store.label(keys[row]) for row in sets.labelled])
    rare = rare_classes(np.bincount(known.flatten(), minlength=CLASSES)[:CLASSES])
    assert len(rare) == 2
    for stage, budget in ((1, 6), (2, 12)):
        table = algorithm.label_store.table(stage).column("key").to_pylist()
        bought = algorithm.labelled.first(budget)
        assert sorted(table) == sorted(keys[row] for row in {*sets.labelled.tolist(), *bought.rows.tolist()})
        pixels = []
        for row in bought.rows:
            label, truth = algorithm.label_store.label(stage, keys[row]), algorithm.store.label(keys[row])
            asked = np.zeros(truth.shape, bool)
            for region in bought.regions[bought.rows == row]:
                asked[window(truth.shape, int(region), algorithm.settings.ralis.regions)] = True
            assert (label[asked] == truth[asked]).all()
            assert (label[~asked] == 255).all()
        for row in np.unique(bought.rows):
            label = algorithm.label_store.label(stage, keys[row])
            pixels.append(label[label < CLASSES])
        values = np.concatenate(pixels)
        assert len(values) == budget * 24 * 24
        assert rows[stage]["rare_share"] == pytest.approx(np.isin(values, rare).mean())
        shares = np.bincount(values, minlength=CLASSES) / len(values)
        assert rows[stage]["class_shares"] == pytest.approx(shares)
        present = shares[shares > 0]
        assert rows[stage]["class_entropy"] == pytest.approx(-(present * np.log(present)).sum())
        assert rows[stage]["labelled_share"] == pytest.approx(budget / (len(sets.pool) * REGIONS))
        assert rows[stage]["labelled_images"] == len(np.unique(bought.rows))
    for row in sets.labelled:
        assert (algorithm.label_store.label(1, keys[row]) == algorithm.store.label(keys[row])).all()


def test_no_ground_truth_is_seen_that_was_not_bought(play: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, set[int]]] = []
    learn = RALIS.learn

    def look(self: RALIS, work: Any) -> dict[str, Any]:
        if work.kind == "segmenter":
            trained.append((work.context["version"], set(work.records.column("row").to_pylist())))
        return learn(self, work)

    monkeypatch.setattr(RALIS, "learn", look)
    algorithm, _ = play(ralis__policy="uniform")
    known = set(algorithm.sets.labelled.tolist())
    assert {row for version, rows in trained if version == -1 for row in rows} == known
    assert {version for version, _ in trained} == {-1, 1, 2}
    for stage in (1, 2):
        rows = set.union(*(rows for version, rows in trained if version == stage))
        assert rows <= known | set(algorithm.labelled_at(stage).rows.tolist())
    start = set(algorithm.sets.start.tolist())
    assert trained[0] == (-1, start), "played episodes start from the start part alone"


def test_every_policy_and_budget_trains_as_long(play: Train) -> None:
    lengths = {}
    for policy in ("uniform", "full"):
        algorithm, _ = play(ralis__policy=policy)
        phases_of = [algorithm.segmenter_phase(_position(stage)) for stage in range(1, algorithm.num_stages + 1)]
        lengths[policy] = [(phase.updates, phase.total_updates, phase.first_update) for phase in phases_of]
    assert lengths["uniform"] == [(5, 5, 0)] * 2
    assert lengths["full"] == [(5, 5, 0)]


def _position(stage: int) -> Any:
    from raysseg.core.algorithm import Position

    return Position(phase="refine", stage=stage)


def test_every_budget_starts_from_theta_0_with_a_new_optimiser(play: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, bool, bool, int]] = []
    learn = RALIS.learn

    def look(self: RALIS, work: Any) -> dict[str, Any]:
        tensors = weights_of(self)
        names = [name.removeprefix("start.origin.") for name in tensors if name.startswith("start.origin.")]
        online = {name: tensors[f"segmenter.online.{name}"] for name in names}
        same = [
            all(torch.equal(tensors[f"start.{part}.{name}"], online[name]) for name in names)
            for part in ("origin", "network")
        ]
        (states,) = self.learner_group.foreach_learner(
            lambda learner: len(learner.get_optimizer(SEGMENTER, "segmenter").state)
        )
        seen.append((self.position.phase, self.position.step, *same, states.get()))
        return learn(self, work)

    monkeypatch.setattr(RALIS, "learn", look)
    play(ralis__policy="uniform", engine__updates_per_iteration=20)
    assert [entry[:4] for entry in seen] == [
        ("start", 0, True, True),
        ("pretrain", 0, False, True),
        ("refine", 0, True, False),
        ("refine", 0, True, False),
    ]
    assert [entry[4] for entry in seen] == [0] * 4, "nothing is left of an optimiser's memory"


@pytest.mark.parametrize(("share", "updates"), [(0.3, 2), (1.0, 6)])
def test_the_start_gets_a_share_of_the_updates_of_theta_0(
    play: Train, monkeypatch: pytest.MonkeyPatch, share: float, updates: int
) -> None:
    done: dict[str, int] = {}
    learn = RALIS.learn

    def count(self: RALIS, work: Any) -> dict[str, Any]:
        done[self.position.phase] = done.get(self.position.phase, 0) + len(work.minibatches)
        return learn(self, work)

    monkeypatch.setattr(RALIS, "learn", count)
    play(ralis__policy="none", ralis__start_share=share, training__pretrain_epochs=2)
    assert done == {"start": updates, "pretrain": 6}


def test_sets_are_those_of_the_pretraining(play: Train, tmp_path: Path) -> None:
    first, _ = play(ralis__policy="none")
    folder = tmp_path / "pretrained"
    first.export(folder)
    files = {path.name for path in (folder / SEGMENTER).iterdir()}
    assert files == {"online.safetensors", "teacher.safetensors", START_FILE, SETS_FILE}
    # Another seed would cut other sets.
    second, records = play(ralis__policy="uniform", training__pretrained=str(folder / SEGMENTER), seed=1)
    assert phases(records)[0] == ("evaluate", 0)
    assert json.loads((tmp_path / "run-1" / SETS_FILE).read_text()) == first.sets.to_json(first.train_keys)
    before, after = weights_of(first), weights_of(second)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("start."))
    alone, _ = play(ralis__policy="none", seed=1)
    assert alone.sets.pool.tolist() != first.sets.pool.tolist()


def test_sets_of_other_sizes_are_refused(play: Train, tmp_path: Path) -> None:
    first, _ = play(ralis__policy="none")
    first.export(tmp_path / "pretrained")
    folder = str(tmp_path / "pretrained" / SEGMENTER)
    with pytest.raises(
        InputError, match=r"ralis\.sets\.reward is 5, but the run goes on with .*sets\.json, where it is 4"
    ):
        play(training__pretrained=folder, ralis__sets__reward=5)
    (tmp_path / "pretrained" / SEGMENTER / SETS_FILE).unlink()
    with pytest.raises(InputError, match=r"the file sets\.json is not in that folder"):
        play(training__pretrained=folder)


def test_a_budget_larger_than_the_pool_and_a_grid_that_does_not_fit_are_refused(play: Train) -> None:
    with pytest.raises(InputError, match=r"ralis\.budgets is 30 regions, but the 7 images to label have only 28"):
        play(ralis__budgets=[6, 30])
    with pytest.raises(InputError, match=r"48x48 pixels.*does not divide"):
        play(ralis__regions__rows=5)


def test_images_that_no_oracle_knows_are_said_before_anything_is_trained(
    play: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "has_label", lambda self, key: False)
    with pytest.raises(
        InputError, match=r"7 of the images to label have no ground truth, the first is '.*raysseg label"
    ):
        play()
    play(ralis__policy="none")


def test_every_episode_is_paid_for_whatever_an_update_costs() -> None:
    settings = settings_of(ralis__learning__episodes=60, ralis__learning__updates_per_step=4.0)
    for price in (0.5, 1.0, 1.5, 2.5):
        run = mock.Mock(spec=RALIS, settings=settings, rollouts_per_update=price)
        updates = RALIS.play_updates.fget(run)
        assert math.ceil(updates * price) in range(60, 63), "rollouts that the loop orders"
        assert updates * RALIS.minibatches_per_update.fget(run) == 60 * 3 * 4


def test_a_run_leaves_its_network_its_regions_and_a_picture(play: Train, tmp_path: Path) -> None:
    algorithm, _ = play(engine__write_rollouts=True)
    folder = tmp_path / "out"
    module = algorithm.export(folder)
    algorithm.draw_pictures(module, folder / "pictures")
    assert (folder / "pictures" / "regions.png").stat().st_size > 1000
    after = weights_of(algorithm)
    for name, value in load_file(folder / QUERY / QUERY_FILE).items():
        assert torch.equal(value, after[f"query.query.{name}"])
    lines = [json.loads(line) for line in (folder / REGIONS_FILE).read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(12))
    assert [line["step"] for line in lines] == [number // PER_STEP for number in range(12)]
    assert [line["region"] for line in lines] == algorithm.labelled.regions.tolist()
    assert [algorithm.train_keys.index(line["key"]) for line in lines] == algorithm.labelled.rows.tolist()
    files = sorted((tmp_path / "run-0" / "rollouts").iterdir())
    tables = [pq.read_table(path) for path in files]
    assert all(table.schema.equals(STEP_SCHEMA) for table in tables)
    assert [value for table in tables for value in table.column("episode").to_pylist()] == [0] * 3 + [1] * 3


def test_play_says_what_it_measured(play: Train) -> None:
    algorithm, records = play(engine__updates_per_iteration=1, engine__write_rollouts=True)
    rows = [record for record in records if record["phase"] == "play"]
    assert [row["update"] for row in rows] == [1, 2]
    folder = Path(algorithm.config.run_dir) / "rollouts"
    for row, path in zip(rows, sorted(folder.iterdir()), strict=True):
        table = pq.read_table(path)
        reward = table.column("reward").to_numpy()
        assert row["reward"] == pytest.approx(reward.mean(), abs=1e-6)
        assert row["episode_return"] == pytest.approx(reward.sum(), abs=1e-5)
        assert row["episode_miou"] == pytest.approx(table.column("miou")[-1].as_py())
        assert row["epsilon"] == pytest.approx(table.column("epsilon").to_numpy().mean())
    assert rows[0]["epsilon"] > rows[1]["epsilon"], "the schedule goes on over episodes"
    assert [row["replay_size"] for row in rows] == [9, 18]
    assert algorithm.minibatches_per_update == 3


def test_all_of_a_pool_is_every_region_of_every_image() -> None:
    whole = Labelled.everything(np.array([4, 9]), 3)
    assert whole.rows.tolist() == [4, 4, 4, 9, 9, 9]
    assert whole.regions.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(whole.first(4)) == 4


def test_the_rarer_half_of_the_classes() -> None:
    assert rare_classes(np.array([50, 3, 9, 0, 7])).tolist() == [1, 3]
