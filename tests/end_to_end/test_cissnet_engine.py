"""CiSS-Net over processes: the serial numbers from remote ones and after a resume, actors side by side and ahead, two learners."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from algorithms.tiny_cissnet import STEPS, settings_of

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.algorithms.cissnet.algorithm import CiSSNet
from raysseg.algorithms.cissnet.config import CiSSNetConfig
from raysseg.algorithms.cissnet.env_runner import CiSSNetEnvRunner
from raysseg.algorithms.cissnet.learner import CiSSNetLearner
from raysseg.algorithms.cissnet.module import CONTEXT
from raysseg.algorithms.cissnet.plan import ContextPlan
from raysseg.algorithms.cissnet.steps import read_maps
from raysseg.core import checkpoint, rollout
from raysseg.core.progress import Silent
from raysseg.core.run import run_variant
from raysseg.core.work import LearnerWork
from raysseg.data import open_dataset

Train = Callable[..., Path]
LOSSES = ("loss", "segmentation_loss", "policy_loss", "value_loss", "entropy")
REMOTE: dict[str, Any] = {
    "engine__num_cpus_per_env_runner": 0.5,
    "engine__num_cpus_per_learner": 0.5,
    "engine__stall_seconds": 300.0,
}
AHEAD: dict[str, Any] = {**REMOTE, "engine__mode": "asynchronous", "engine__write_rollouts": True}
CALM: dict[str, Any] = {"name": "sgd", "learning_rate": 0.05, "clip_norm": 0.5}
"""An optimiser that does not turn rounding into steps, as Adam does, which divides a gradient by its own size."""


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The scenes of CiSS-Net's tests."""
    return open_dataset(settings_of().data, tmp_path_factory.mktemp("context")).uri


@pytest.fixture
def train(tmp_path: Path, store_uri: str, ray_session: None) -> Train:
    """Trains a variant to its end and returns its folder; `cissnet__learning__steps=2` replaces `cissnet.learning.steps`."""

    def run(
        name: str, *, look: Callable[[Any], None] = lambda algorithm: None, resume: bool = False, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        config = CiSSNetConfig().apply(settings_of(**changes), run_dir=str(folder), store_uri=store_uri)
        run_variant(config, folder, listener=Silent(), after_iteration=look, resume=resume)
        return folder

    return run


def lines(folder: Path, name: str = "metrics.jsonl", phase: str | None = None) -> list[dict[str, Any]]:
    """Returns the records of a run, or those of one phase."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [row for row in rows if phase in (None, row.get("phase"))]


def episodes(folder: Path) -> list[dict[str, Any]]:
    """Returns what was learned from, in order."""
    return [row for path in sorted((folder / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def crops(folder: Path) -> list[tuple[int, int]]:
    """Returns the crops that were learned from, in order."""
    return [(row["row"], row["seed"]) for row in episodes(folder)]


# ---- the same numbers -----------------------------------------------------------------------------------------------


def test_a_remote_actor_and_a_remote_learner_give_the_serial_numbers(train: Train) -> None:
    serial = train("serial", engine__write_rollouts=True)
    remote = train("remote", engine__num_env_runners=1, engine__num_learners=1, engine__write_rollouts=True, **REMOTE)
    assert (remote / "metrics.jsonl").read_bytes() == (serial / "metrics.jsonl").read_bytes()
    rows = lines(serial, phase="learn")
    assert len(rows) == 4
    assert all(np.isfinite(row[name]) for row in rows for name in LOSSES)
    assert len({row["loss"] for row in rows}) == 4
    assert episodes(remote) == episodes(serial)
    scores = [json.loads((folder / "summary.json").read_text()) for folder in (serial, remote)]
    for one in scores:
        del one["wall_seconds"]
    assert scores[0] == scores[1]


class Interruption(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize(("remote", "base", "at"), [(False, 0, 3), (True, 0, 3), (False, 2, 1), (False, 2, 2)])
def test_a_run_that_goes_on_in_the_middle_of_learning_ends_where_it_would_have(
    train: Train, remote: bool, base: int, at: int
) -> None:
    changes: dict[str, Any] = {"engine__checkpoint_interval": 1, "engine__write_rollouts": True}
    changes |= {"cissnet__learning__base_updates": base}
    # In this process: remote ones give the same numbers, and each costs seconds to start.
    whole = train("whole", **changes)
    if remote:
        changes |= {"engine__num_env_runners": 1, "engine__num_learners": 1, **REMOTE}

    def fail(algorithm: CiSSNet) -> None:
        if algorithm.record.get("update") == at:
            raise Interruption

    with pytest.raises(Interruption):
        train("broken", look=fail, **changes)
    broken = train("broken", resume=True, **changes)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert episodes(broken) == episodes(whole)


def test_a_finished_variant_is_an_environment_and_starts_as_its_episodes_did(train: Train) -> None:
    folder = train("run", cissnet__learning__updates=1)
    env = gymnasium.make("raysseg/CiSSNet-v0", run=str(folder))
    observation, _ = env.reset(options={"rows": np.array([2]), "seeds": np.array([5])})
    assert env.observation_space.contains(observation)
    inner = env.unwrapped.vector_env
    with torch.no_grad():
        expected = inner.networks.base(torch.tensor(observation["features"])[None]).argmax(1)[0]
    assert np.array_equal(observation["predictions"], expected)
    ends = [env.step(env.action_space.sample())[3] for _ in range(STEPS)]
    assert ends == [False] * (STEPS - 1) + [True]
    other = gymnasium.make("raysseg/CiSSNet-v0", run=str(folder), reward={"correct_weight": 1.0}).unwrapped.vector_env
    assert other.settings.cissnet.reward.model_dump() == {
        **inner.settings.cissnet.reward.model_dump(),
        "correct_weight": 1.0,
    }


# ---- actors side by side --------------------------------------------------------------------------------------------


def test_two_actors_in_turn_play_the_crops_of_one(train: Train) -> None:
    changes = {**REMOTE, "cissnet__learning__optimiser": CALM, "engine__write_rollouts": True}
    one = train("one", **changes)
    two = train("two", engine__num_env_runners=2, **changes)
    assert crops(two) == crops(one)
    assert len(crops(one)) == 4 * 4
    first, other = lines(one, phase="learn")[0], lines(two, phase="learn")[0]
    assert [row["predictions"] for row in episodes(two)[:4]] == [row["predictions"] for row in episodes(one)[:4]]
    for name in LOSSES:
        assert other[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    assert [row["policy_lag"] for row in lines(two, phase="learn")] == [0.0] * 4


def test_two_actors_play_ahead_and_every_crop_is_learned_from_once(train: Train) -> None:
    folder = train("ahead", engine__num_env_runners=2, engine__num_learners=1, cissnet__learning__updates=12, **AHEAD)
    rows = lines(folder, phase="learn")
    assert [row["update"] for row in rows] == list(range(1, 13))
    assert all(np.isfinite(row[name]) for row in rows for name in LOSSES)
    played = episodes(folder)
    assert len(played) == 12 * 4
    assert len(set(crops(folder))) == 12 * 4, "none is learned from twice"
    assert sorted(row for row, _ in crops(folder)) == sorted(list(range(12)) * 4), "all of four epochs"
    for number, row in enumerate(rows):
        lags = [number - one["policy_version"] for one in played[4 * number : 4 * number + 4]]
        assert row["policy_lag"] == np.mean(lags)
        assert min(lags) >= 0
    assert len({one["policy_version"] for one in played}) > 3, "actors pulled weights again"
    assert rows[-1]["rollouts_dropped"] == 0


def test_the_loop_alone_publishes_while_it_goes_on(train: Train) -> None:
    seen: list[int] = []

    def look(algorithm: CiSSNet) -> None:
        if algorithm.record["phase"] == "learn":
            seen.append(algorithm._publications)

    changes = {**AHEAD, "engine__num_env_runners": 1, "engine__broadcast_interval": 3}
    folder = train("rare", look=look, cissnet__learning__updates=9, **changes)
    assert [count - seen[0] for count in seen] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert {one["policy_version"] for one in episodes(folder)} <= {0, 3, 6}


def test_what_is_too_old_is_dropped_counted_and_played_again(train: Train) -> None:
    folder = train(
        "strict",
        engine__num_env_runners=2,
        engine__num_learners=1,
        engine__max_policy_lag=0,
        cissnet__learning__updates=6,
        **AHEAD,
    )
    rows = lines(folder, phase="learn")
    assert [row["update"] for row in rows] == list(range(1, 7))
    assert [row["policy_lag"] for row in rows] == [0.0] * 6
    assert [one["policy_version"] for one in episodes(folder)] == [update for update in range(6) for _ in range(4)]
    assert len(set(crops(folder))) == 6 * 4
    dropped = [row["rollouts_dropped"] for row in rows]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0, "two actors that sample ahead cannot both be in time"
    assert lines(folder, "timings.jsonl")[-1]["rollouts_dropped"] >= dropped[-1]


def test_without_lag_asynchronous_learning_is_synchronous_learning(train: Train) -> None:
    changes = {"cissnet__learning__optimiser": CALM, "engine__num_env_runners": 1, "cissnet__network__dropout": 0.0}
    turns = train("turns", **changes, **REMOTE, engine__write_rollouts=True)
    ahead = train("ahead", engine__rollouts_ahead=1, **changes, **AHEAD)
    assert crops(ahead) == crops(turns)
    assert [one["predictions"] for one in episodes(ahead)[:4]] == [one["predictions"] for one in episodes(turns)[:4]]
    for row, other in zip(lines(ahead, phase="learn"), lines(turns, phase="learn"), strict=True):
        assert row["policy_lag"] == 0
        for name in LOSSES:
            # Probabilities travel in half precision, so a ratio is 1 to about 1e-3.
            assert row[name] == pytest.approx(other[name], rel=5e-3, abs=5e-3), name


def test_fresh_rollouts_are_in_the_checkpoint_of_an_asynchronous_run(
    tmp_path: Path, store_uri: str, ray_session: None
) -> None:
    settings = settings_of(
        engine__num_env_runners=2,
        engine__rollouts_per_update=2.0,
        engine__rollouts_ahead=3,
        cissnet__learning__updates=6,
        **{**AHEAD, "engine__write_rollouts": False},
    )

    def build() -> CiSSNet:
        return CiSSNetConfig().apply(settings, run_dir=str(tmp_path / "run"), store_uri=store_uri).build_algo()

    algorithm = build()
    try:
        while algorithm.record.get("update") != 2:
            algorithm.train()
        loop = algorithm._loop
        assert loop is not None
        # A third rollout, of an update that has one of its two.
        while not algorithm.fresh:
            loop._give_orders()
            for answer in loop._pool.receive(0.25):
                loop._take(answer)
        fresh = [one.to_pydict() for one in algorithm.fresh]
        received = loop.get_state()["received"]
        folder = checkpoint.save(algorithm, tmp_path / "checkpoints", keep=1)
    finally:
        algorithm.stop()
    resumed = build()
    try:
        checkpoint.restore(resumed, folder)
        assert [one.to_pydict() for one in resumed.fresh] == fresh
        learned = []
        while resumed.position.phase == "learn":
            resumed.train()
            learned.append(resumed.record["update"])
            if len(learned) == 1:
                assert resumed._loop is not None
                assert resumed._loop.get_state()["received"] >= received
                assert resumed._loop.plan.learned_from[0].to_pydict() == fresh[0]
        assert learned == [3, 4, 5, 6]
    finally:
        resumed.stop()


# ---- learners -------------------------------------------------------------------------------------------------------


class Bench:
    """A learner and an actor that share their networks, without Ray."""

    def __init__(self, folder: Path, store_uri: str, **changes: Any) -> None:
        base = {
            "cissnet__learning__optimiser": CALM,
            "cissnet__learning__base_updates": 1,
            "cissnet__network__dropout": 0.3,
        }
        self.settings = settings_of(**{**base, **changes})
        config = CiSSNetConfig().apply(self.settings, run_dir=str(folder), store_uri=store_uri)
        self.learner: Any = CiSSNetLearner(config=config, module_spec=config.get_multi_rl_module_spec())
        self.learner.build()
        self.runner = CiSSNetEnvRunner(config=config, worker_index=0)
        self.runner.share_module(self.learner.module)

    def works(self, *, probabilities: bool) -> list[LearnerWork]:
        """Returns three updates on episodes of the untrained networks, the first of the Base Net alone."""
        found = []
        for update in range(3):
            orders = rollout.order(np.arange(4) + 4 * update, np.arange(4) + 10 * update)
            context = {"segmenter_version": 0, "policy_version": 0, "steps": STEPS if update else 0}
            context["probabilities"] = probabilities
            records = self.runner.sample(records=orders, context=context)
            # Two policies, so that learners with half of the rows each have lags of their own.
            place, versions = (
                records.schema.get_field_index("policy_version"),
                pa.array([0, 0, update, update], pa.int32()),
            )
            records = records.set_column(place, records.schema.field(place), versions)
            values = {"update": update, "policy_version": update, "seed": 3}
            found.append(LearnerWork(kind="context", records=records, context=values, minibatches=(records.num_rows,)))
        return found


def learn_all(learner: Any, works: list[LearnerWork], part: int, world: int) -> tuple[list[dict[str, Any]], Any]:
    """Returns numbers, and the weights that the updates end with."""
    answers = []
    for work in works:
        numbers = learner.update(training_data=work.shard(world)[part][0])
        del numbers["timing"]
        answers.append(numbers)
    networks = learner.module[CONTEXT].unwrapped().networks
    return answers, {name: value.clone() for name, value in networks.state_dict().items()}


def in_process(part: int, world: int, folder: str, store_uri: str, works: list[LearnerWork]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=part, world_size=world)
    changes = {"engine__num_env_runners": 1, "engine__num_learners": world}
    bench = Bench(Path(folder), store_uri, **changes)
    torch.save(learn_all(bench.learner, works, part, world), f"{folder}/answer-{part}")
    dist.destroy_process_group()


def assert_alike(found: Any, expected: Any) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture
def reference(tmp_path: Path, store_uri: str) -> tuple[list[LearnerWork], Any]:
    """Three updates, and what one learner makes of them."""
    bench = Bench(tmp_path, store_uri)
    works = bench.works(probabilities=True)
    before = {name: value.clone() for name, value in bench.runner.networks.state_dict().items()}
    expected = learn_all(bench.learner, works, 0, 1)
    moved = [name for name, value in expected[1].items() if not torch.allclose(before[name], value, atol=1e-4)]
    assert moved, "weights must move more than what is tolerated for this test to say anything"
    return works, expected


def test_two_learners_are_one(reference: tuple[list[LearnerWork], Any], tmp_path: Path, store_uri: str) -> None:
    works, expected = reference
    torch.multiprocessing.spawn(in_process, (2, str(tmp_path), store_uri, works), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"answer-{part}", weights_only=False) for part in range(2))
    assert first[0] == second[0], "every learner gives the same numbers"
    assert_alike(first, expected)


@pytest.mark.parametrize("parts", [2, 3])
def test_pieces_are_the_whole(
    reference: tuple[list[LearnerWork], Any], tmp_path: Path, store_uri: str, parts: int
) -> None:
    works, expected = reference
    bench = Bench(tmp_path, store_uri, engine__gradient_accumulation=parts)
    assert_alike(learn_all(bench.learner, works, 0, 1), expected)


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_rollouts_of_old_policies_are_dropped_counting_what_is_with_the_learner(tmp_path: Path, store_uri: str) -> None:
    class Run:
        """What a plan asks of the algorithm."""

        fresh: list[pa.RecordBatch] = []  # noqa: RUF012
        policy_version = 2
        settings = settings_of(engine__num_env_runners=1, **{**AHEAD, "engine__max_policy_lag": 1})

    bench = Bench(tmp_path, store_uri)
    orders = rollout.order(np.arange(4), np.arange(4))
    plan = ContextPlan(Run(), steps=STEPS, first=0)  # type: ignore[arg-type]
    for version in (0, 1, 2):
        context = {"segmenter_version": 0, "policy_version": version, "steps": STEPS, "probabilities": True}
        plan.keep(bench.runner.sample(records=orders, context=context))
    assert plan.drop_older(2 - 1) == 1
    work = plan.work(2)
    assert work.context["policy_version"] == 2
    assert set(np.asarray(work.records.column("policy_version"))) == {1}  # type: ignore[union-attr]
    assert plan.drop_older(2 - 1) == 0
    plan.keep(bench.runner.sample(records=orders, context={**context, "policy_version": 1}))
    assert plan.drop_older(2 - 1) == 1, "it would meet the policy after the update that is under way"
    assert plan.work(3).context["policy_version"] == 3
    assert read_maps(work.records).probabilities is not None  # type: ignore[arg-type]
