"""Two learners on real processes give what one learner gives: losses, errors, parameters, statistics, and the same refusals."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from algorithms.tiny_eil import Bench, build, settings_of
from torch import nn

from raysseg.core import rollout
from raysseg.core.parallel import RowsOfBatch
from raysseg.core.seeding import draw_seeds
from raysseg.core.weights import load_weights
from raysseg.core.work import LearnerWork, Share
from raysseg.data.label_store import LabelRow
from raysseg.functional.constants import UNLABELLED

WORLD = 2
SCHEDULE = {"total_updates": 10}

# What makes rounding large is left out, or two runs of one learner would differ as much: Adam divides a gradient by its own size,
# batch normalisation over a handful of values by their spread, and a large step takes activations over their kinks. Untrained
# networks have large gradients, so they are clipped in all cases but one.
WELL_CONDITIONED: dict[str, Any] = {
    "training__optimiser": {"name": "sgd", "learning_rate": 1e-4, "clip_norm": 0.5},
    "segmenter__architecture": "Unet",
    "segmenter__dropout": 0.5,
    "eil__operators__searcher_bias": -1.0,
    "eil__exploration__assessor_optimiser": {"name": "sgd", "learning_rate": 1e-4, "clip_norm": 0.1},
    "eil__exploration__searcher_optimiser": {"name": "sgd", "learning_rate": 1e-4, "clip_norm": 0.1},
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced": {
        "training__class_balance_power": 0.5,
        "training__teacher_interval": "update",
        "eil__virtual_steps": 1,
    },
    "random-policy-unclipped": {
        "eil__policy": "random",
        "engine__prefetch": 2,
        "segmenter__encoder": "mobilenet_v2",
        "training__optimiser": {"name": "sgd", "learning_rate": 1e-4},
        "eil__exploration__assessor_optimiser": {"name": "sgd", "learning_rate": 1e-5},
    },
    "self-training": {
        "training__self_training": {
            "weight": 1.0,
            "classes": "labelled",
            "class_balanced": True,
            "student_view": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "blur": 1.0, "cutout": 0.25},
        },
        "training__class_balance_power": 0.5,
        "training__inferred_weight": 0.5,
        "training__teacher_interval": "update",
    },
    "accumulated": {"engine__gradient_accumulation": 2, "engine__prefetch": 0},
    "low-precision": {"engine__gradient_accumulation": 2, "engine__precision": "bf16"},
}
FROZEN = ("accumulated", "low-precision")
"""Cases whose normalisation keeps its statistics, as pieces on two learners are other images than pieces on one."""


def settings(case: str, learners: int, **changes: Any) -> Any:
    engine = {"engine__num_env_runners": 1, "engine__num_learners": learners} if learners else {}
    return settings_of(**{**WELL_CONDITIONED, **CASES[case], **engine, **changes})


def segmenter_work(version: int = 0, *, self_training: bool = False) -> LearnerWork:
    """Returns an odd, an even, a small and a single minibatch over two epochs."""
    sizes, ends = (5, 3, 4, 1), [8, 13]
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 5, 3, 1, 2])
    context = {"version": version, "first_update": 2, "learning_rate": 1e-4, "epoch_ends": ends, "seed": 7}
    return LearnerWork(
        kind="segmenter",
        records=rollout.order(rows, draw_seeds(1, "test", count=len(rows))),
        context={**context, **SCHEDULE, "self_training": self_training},
        minibatches=sizes,
    )


def operator_works(records: pa.RecordBatch) -> list[LearnerWork]:
    """Returns three updates on different transitions, with importance weights, the next ones announced."""
    weights = pa.array(np.linspace(0.2, 1.0, records.num_rows), type=pa.float32())
    weighted = records.append_column("weight", weights)
    parts = [weighted.slice(0, 8), weighted.slice(8, 7), weighted.slice(5, 9)]
    return [
        LearnerWork(
            kind="operators",
            records=part,
            context={"update": update, "seed": 3, **SCHEDULE},
            upcoming=parts[update + 1] if update + 1 < len(parts) else None,
        )
        for update, part in enumerate(parts)
    ]


def state_of(learner: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in learner.module.items()
        for key, value in module.state_dict().items()
    }


def learn_all(learner: Any, works: list[LearnerWork], part: int, world: int) -> list[dict[str, Any]]:
    answers = []
    for work in works:
        mine, _ = work.shard(world)[part]
        numbers, _ = learner.update_and_publish(mine, ())
        assert set(numbers.pop("timing")) == {"busy_seconds", "idle_seconds", "prepare_seconds", "update_seconds"}
        answers.append(numbers)
    return answers


def learner_of(case: str, learners: int, folder: Path, store_uri: str) -> Any:
    learner = Bench(settings(case, learners), folder, store_uri).learner
    if case in FROZEN:
        for network in learner.trained_networks().values():
            freeze_statistics(network)
    return learner


def freeze_statistics(network: nn.Module) -> None:
    """Keeps batch normalisation in evaluation mode, so that a piece does not depend on the other pieces."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
            layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign]


def in_process(
    part: int, folder: str, store_uri: str, case: str, task: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    # A learner that fails leaves the other one waiting, which is then not for long.
    waiting = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/group", timeout=waiting, rank=part, world_size=WORLD)
    try:
        return task(learner_of(case, WORLD, Path(folder), store_uri), part, WORLD, *arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes that serve all tests here: starting one takes longer than most of what it does."""
    with ProcessPoolExecutor(WORLD, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def on_learners(
    processes: ProcessPoolExecutor, folder: Path, store_uri: str, case: str, task: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """Runs a task on every one of two learners, each in its own process; returns what they answered."""
    (folder / "group").unlink(missing_ok=True)
    parts = [processes.submit(in_process, part, str(folder), store_uri, case, task, arguments) for part in range(WORLD)]
    return [part.result() for part in parts]


def train(learner: Any, part: int, world: int, works: list[LearnerWork]) -> tuple[list[dict[str, Any]], Any, Any]:
    """Returns numbers, weights with all buffers, and of each optimiser what it remembers of all gradients."""
    numbers = learn_all(learner, works, part, world)
    momenta = {
        name: torch.cat([one["momentum_buffer"].flatten() for one in optimiser.state.values()])
        for name, optimiser in learner._named_optimizers.items()
        if optimiser.state
    }
    return numbers, state_of(learner), momenta


def transitions(folder: Path, store_uri: str, case: str) -> pa.RecordBatch:
    bench = Bench(settings(case, 0), folder, store_uri)
    parts = [bench.sample(seed=seed) for seed in range(4)]
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def assert_alike(found: Any, expected: Any, *, tolerance: float = 1e-5) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert list(found[1]) == list(expected[1]), "checkpoints keep their names"
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=100 * tolerance, atol=2 * tolerance, msg=name)
    assert set(found[2]) == set(expected[2]) > {"segmenter_segmenter"}
    for name, momentum in expected[2].items():
        apart = float((found[2][name] - momentum).norm() / momentum.norm())
        assert apart < 500 * tolerance, f"gradients of {name} differ by {apart:.1e} of their norm"


def label_some(folder: Path, store_uri: str) -> None:
    """Writes label version 1: some images have no labels at all, so that learners hold very different numbers of them."""
    workspace = Bench(settings("plain", 0), folder, store_uri).learner.workspace
    labels = workspace.train.labels(torch.arange(8), 0).numpy().copy()
    labels[:3] = UNLABELLED
    workspace.label_store.write(
        1, [LabelRow(key=key, label=one) for key, one in zip(workspace.train.keys, labels, strict=True)]
    )


@pytest.mark.parametrize("case", CASES)
def test_two_learners_are_one(processes: ProcessPoolExecutor, tmp_path: Path, store_uri: str, case: str) -> None:
    label_some(tmp_path, store_uri)
    teaches = "training__self_training" in CASES[case]
    works = [segmenter_work(), segmenter_work(version=1, self_training=teaches)]
    updates = operator_works(transitions(tmp_path, store_uri, case))
    if case == "low-precision":
        # A CPU that has no bf16 of its own takes half a minute for each.
        updates = [dataclasses.replace(updates[0], upcoming=None)]
    works = [*updates, *works]
    expected = train(learner_of(case, 0, tmp_path, store_uri), 0, 1, works)
    first, second = on_learners(processes, tmp_path, store_uri, case, train, works)
    assert first[0] == second[0], "every learner gives the same numbers"
    for kind in (1, 2):
        assert all(torch.equal(second[kind][name], value) for name, value in first[kind].items())
    assert len(first[0][len(updates) - 1]["errors"]) == updates[-1].records.num_rows
    if teaches:
        assert expected[0][-1]["self_training_loss"] > 0
        assert 0.9 < expected[0][-1]["self_training_share"] < 1
    # Steps that are not clipped carry the rounding of sums, which differs from CPU to CPU.
    assert_alike(first, expected, tolerance={"low-precision": 0.05, "random-policy-unclipped": 1e-4}.get(case, 1e-5))


def complain(learner: Any, part: int, world: int, works: list[LearnerWork]) -> list[str]:
    messages = []
    for work in works:
        try:
            learn_all(learner, [work], part, world)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_what_is_wrong_on_one_learner_stops_both_in_the_same_words(
    processes: ProcessPoolExecutor, tmp_path: Path, store_uri: str
) -> None:
    records = transitions(tmp_path, store_uri, "plain").slice(0, 4)
    reward, maps = (records.schema.get_field_index(name) for name in ("reward", "next_labels"))
    endless = pa.array([0.1, 0.2, 0.3, float("inf")], pa.float32())
    torn = [*records.column("next_labels").to_pylist()[:3], b"nothing"]
    broken = records.set_column(maps, records.schema.field(maps), pa.array(torn, pa.binary()))
    infinite = records.set_column(reward, records.schema.field(reward), endless)
    works = [
        LearnerWork(kind="operators", records=one, context={"update": 5, "seed": 3, **SCHEDULE})
        for one in (broken, infinite)
    ]
    segmenter = segmenter_work()
    segmenter.context["learning_rate"] = float("inf")
    first, second = on_learners(processes, tmp_path, store_uri, "plain", complain, [*works, segmenter])
    assert first == second
    keys = ", ".join(records.column("key").to_pylist())
    assert first[0].startswith("InputError: 7 bytes are not an encoded label map")
    assert first[1] == f"NonFiniteError: The assessor_loss at operator update 5 is inf; its samples are {keys}."
    assert first[2].startswith("NonFiniteError: The segmenter's loss at update 3 (label version 0) is nan")
    assert first[2].endswith("its samples are train-00005, train-00006, train-00007.")


# ---- pieces of a minibatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "case"), [(3, "plain"), (8, "plain"), (3, "self-training")])
def test_pieces_give_the_gradient_of_the_whole(tmp_path: Path, store_uri: str, parts: int, case: str) -> None:
    records, found = transitions(tmp_path, store_uri, case), []
    work = segmenter_work(self_training=case == "self-training")
    for accumulation in (1, parts):
        changes = {"engine__gradient_accumulation": accumulation, "training__class_balance_power": 0.5}
        learner: Any = Bench(settings(case, 0, **changes), tmp_path, store_uri).learner
        for network in learner.trained_networks().values():
            freeze_statistics(network)
        steps: list[int] = []
        for name in ("assessor", "searcher"):
            optimiser = learner.get_optimizer("operators", name)
            optimiser.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        found.append(train(learner, 0, 1, [work, *operator_works(records)]))
        assert len(steps) == 6, "one step for each update"
    assert_alike(found[1], found[0])


def test_a_piece_holds_no_more_images_than_asked_for(tmp_path: Path, store_uri: str) -> None:
    learner: Any = Bench(settings("plain", 0, engine__gradient_accumulation=2), tmp_path, store_uri).learner
    seen: list[int] = []
    learner._segmenter_module().online.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    learn_all(learner, [segmenter_work()], 0, 1)
    assert seen == [2, 3, 3, 2, 2, 1], "minibatches of 5, 3, 4 and 1; no image of a larger one passes alone"


# ---- random numbers ---------------------------------------------------------------------------------------------------


def stochastic_depth(images: torch.Tensor) -> torch.Tensor:
    return images * images.new_empty((len(images), 1, 1, 1)).bernoulli_(0.5).div_(0.5)


def connections(images: torch.Tensor) -> torch.Tensor:
    return images * (0.5 + torch.rand((len(images), 1, 1, 1), dtype=images.dtype)).floor()


def tokens(images: torch.Tensor) -> torch.Tensor:
    return F.dropout(images.reshape(-1, images[0].numel() // 2), 0.5).view_as(images)


@pytest.mark.parametrize(
    "draw",
    [nn.Dropout(0.3), nn.Dropout2d(0.5), nn.Dropout(0.5, inplace=True), stochastic_depth, connections, tokens],
)
def test_parts_draw_what_the_whole_minibatch_draws(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    images = torch.arange(1.0, 1.0 + 5 * 4 * 6).view(5, 4, 3, 2)
    torch.manual_seed(3)
    expected = [draw(images.clone()), draw(images.clone())]
    assert not torch.equal(*expected)
    for start, stop in ((0, 2), (2, 5), (4, 5)):
        torch.manual_seed(3)
        with RowsOfBatch(Share(total=5, start=start, stop=stop)):
            found = [draw(images[start:stop].clone()) for _ in range(2)]
        for one, whole in zip(found, expected, strict=True):
            assert torch.equal(one, whole[start:stop])


def test_evaluation_draws_nothing_and_foreign_numbers_are_refused() -> None:
    images = torch.ones(3, 4)
    with RowsOfBatch(Share(total=5, start=0, stop=3)):
        assert torch.equal(nn.Dropout(0.5).eval()(images), images)
        with pytest.raises(ValueError, match=r"shape \[4, 2\] do not belong to 3 images"):
            torch.rand(4, 2)


# ---- RLlib's own group of learners ------------------------------------------------------------------------------------


def test_rllibs_learner_group_gives_one_learners_numbers(tmp_path: Path, store_uri: str, ray_session: None) -> None:
    works = [*operator_works(transitions(tmp_path, store_uri, "plain")), segmenter_work()]
    reference = learner_of("plain", 0, tmp_path, store_uri)
    expected = train(reference, 0, 1, works)
    algorithm = build(settings("plain", WORLD), tmp_path / "run", store_uri)
    try:
        group = algorithm.learner_group
        numbers = [group.update(training_data=work) for work in works[:2]]
        for work in works[2:]:
            calls = [
                worker.update_and_publish.options(num_returns=2).remote(mine, ("operators",) if number == 0 else ())
                for number, (worker, (mine, _)) in enumerate(zip(group._workers, work.shard(WORLD), strict=True))
            ]
            numbers.append([ray.get(answer) for answer, _ in calls])
        for answers, other in zip(numbers, expected[0], strict=True):
            for one in answers:
                for name in set(other) & set(one):
                    assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
            assert "loss" in answers[0] or "assessor_loss" in answers[0]
        assert ray.get(calls[1][1]) == {}
        actor = algorithm.config.get_multi_rl_module_spec(inference_only=True).build()
        load_weights(actor, ray.get(calls[0][1]))
        states = group.get_state(components="learner/rl_module")["learner"]["rl_module"]
        for name, module in reference.module.items():
            assert list(states[name]) == list(module.state_dict())
        for key, value in actor["operators"].state_dict().items():
            np.testing.assert_array_equal(value.numpy(), states["operators"][key])
            np.testing.assert_allclose(value.numpy(), expected[1][f"operators.{key}"].numpy(), rtol=1e-3, atol=2e-5)
    finally:
        algorithm.stop()
