"""EIL passes what every method passes, goes through its phases, and writes its rollouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from algorithms.base import MethodTester
from algorithms.tiny_eil import IMAGES, settings_of

from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.core import rollout
from raysseg.data.codec import decode_map
from raysseg.errors import InputError

Train = Callable[..., tuple[Any, list[dict[str, Any]]]]


class TestEIL(MethodTester):
    """EIL with its operators, virtual steps and replay."""

    config = EILConfig
    networks = (
        *MethodTester.networks,
        "operators.searcher",
        "operators.assessor",
        "operators.target_searcher",
        "operators.target_assessor",
    )
    # Of 15: inside pre-training, inside the first exploration, after an inference, inside refining, inside the second exploration.
    save_after = (1, 4, 6, 7, 10)
    bad_settings = (
        ({"eil__polcy": "searcher"}, r"eil\.polcy.*did you mean 'policy'"),
        ({"eil__policy": "search"}, r"eil\.policy.*'search'"),
        ({"eil__window": 10}, "odd number of pixels"),
        ({"eil__window": -3}, "odd number of pixels"),
        ({"eil__window": [9]}, "lists 1 sides, but there are 2 stages"),
        ({"eil__window": "all"}, r"eil\.window"),
        ({"eil__thresholds": 1.5}, r"\[0, 1\]"),
        ({"eil__gamma": 1.1}, r"eil\.gamma"),
        ({"eil__gamma": float("nan")}, r"eil\.gamma"),
        ({"eil__action_semantics": "grow", "eil__action": "shared"}, "must be 'object_ground'"),
        ({"eil__action": "mask"}, "fusion must be 'planes'"),
        ({"eil__action": "mask", "eil__policy": "fixed"}, "decided per pixel"),
        ({"training__batch_size": 0}, r"training\.batch_size"),
        (
            {"eil__policy": "none", "training__inferred_weight": 1.0},
            "inferred_weight is 1, but this variant of eil infers no labels",
        ),
        ({"training__self_training": {"confidence": 0.5}}, "confidence is set but weight is 0, where it has no effect"),
        ({"data__scribbles": "none"}, "starts from scribbles"),
        ({"engine__num_learners": 1}, "remote actor"),
        ({"eil__stages": "many"}, r"eil\.stages"),
    )

    @classmethod
    def settings(cls, **changes: Any) -> EILSettings:
        return settings_of(
            **{
                "eil__virtual_steps": 1,
                "engine__updates_per_iteration": 1,
                "eil__exploration__kappa": 0.01,
                # The small values of the operators' biases move by less than a float's rounding at the paper's rates.
                "eil__exploration__searcher_optimiser": {"name": "adam", "learning_rate": 1e-3},
                "eil__exploration__assessor_optimiser": {"name": "adam", "learning_rate": 1e-3},
                **changes,
            }
        )


def phases(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Returns the phases in order, each once per stage."""
    return list(dict.fromkeys((record["phase"], record["stage"]) for record in records))


@pytest.mark.parametrize(
    ("policy", "stage"),
    [
        ("searcher", ["explore", "infer", "refine", "evaluate"]),
        ("fixed", ["infer", "refine", "evaluate"]),
        ("none", ["refine", "evaluate"]),
    ],
)
def test_each_policy_has_its_phases(trained: Train, policy: str, stage: list[str]) -> None:
    _, records = trained(eil__policy=policy)
    assert phases(records) == [("evaluate", 0), *[(phase, number) for number in (1, 2) for phase in stage]]


def test_scoring_only_at_the_end_keeps_the_stages(trained: Train) -> None:
    _, records = trained(eil__policy="fixed", evaluation__every_stage=False)
    assert phases(records) == [
        ("evaluate", 0), ("infer", 1), ("refine", 1), ("infer", 2), ("refine", 2), ("evaluate", 2),
    ]  # fmt: skip


def test_stage_numbers_say_what_the_stores_hold(trained: Train) -> None:
    algorithm, records = trained(eil__policy="fixed", eil__thresholds=0.5)
    rows = {record["stage"]: record for record in records if record["phase"] == "evaluate"}
    truth = np.stack([algorithm.store.label(key) for key in algorithm.train_keys])
    scribbles = np.stack([algorithm.store.scribble(key) for key in algorithm.train_keys])
    previous = scribbles
    for stage, radius in ((0, 0), (1, 9), (2, 17)):
        maps = (
            np.stack([algorithm.label_store.label(stage, key) for key in algorithm.train_keys]) if stage else scribbles
        )
        row = rows[stage]
        assert row["radius"] == radius
        assert row["labelled_share"] == pytest.approx((maps != 255).mean())
        if stage:
            mine = (maps != 255) & (scribbles == 255)
            assert row["new_share"] == pytest.approx(((maps != 255) & (previous == 255)).mean())
            assert row["label_precision"] == pytest.approx((maps == truth)[mine].mean())
            assert row["accepted_share"] == 1.0
            per_class = [(truth == label)[mine & (maps == label)].mean() for label in np.unique(maps[mine])]
            assert row["class_mean_precision"] == pytest.approx(np.mean(per_class))
        previous = maps
    assert rows[1]["new_share"] > 0.05


def test_rollouts_are_written_in_the_schema_they_travel_in(trained: Train) -> None:
    algorithm, records = trained(engine__write_rollouts=True, engine__updates_per_iteration=1)
    files = sorted((Path(algorithm.config.run_dir) / "rollouts").iterdir())
    assert [path.name for path in files] == [
        f"stage-{stage}-update-{update:06d}.parquet" for stage in (1, 2) for update in (0, 1)
    ]
    tables = [pq.read_table(path) for path in files]
    for table in tables:
        assert table.schema.equals(rollout.TRANSITION_SCHEMA, check_metadata=True)
    table = pa.concat_tables(tables)
    assert table.column("stage").to_pylist() == [1] * 8 + [2] * 8
    assert table.column("policy_version").to_pylist() == [version for version in range(4) for _ in range(4)]
    assert sorted(set(table.column("row").to_pylist())) == list(range(IMAGES)), "two batches of 4 are one epoch of 8"
    rewards = [record["reward"] for record in records if record["phase"] == "explore"]
    np.testing.assert_allclose(table.column("reward").to_numpy().reshape(4, 4).mean(1), rewards, rtol=1e-5, atol=1e-7)
    assert decode_map(table.column("next_labels")[0].as_py()).shape == (48, 48)


def test_nothing_is_written_unless_asked_for(trained: Train) -> None:
    algorithm, _ = trained()
    assert not (Path(algorithm.config.run_dir) / "rollouts").exists()


def test_full_supervision_without_scribbles_is_possible(trained: Train) -> None:
    with pytest.raises(InputError, match="starts from scribbles"):
        settings_of(data__scribbles="none", eil__policy="fixed")
    assert settings_of(data__scribbles="none", eil__policy="full").eil.policy == "full"
