"""RALIS' replay: what is kept and shared, what is drawn and how often, and what a checkpoint writes and brings back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysseg.algorithms.ralis.replay import DRAW_SCHEMA, STEP_SCHEMA, Draw, StepReplay
from raysseg.algorithms.ralis.steps import StepShapes, from_binary, step_records, to_binary
from raysseg.core.replay_files import collect_garbage, files_of
from raysseg.core.seeding import generator
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError, NonFiniteError

STEPS, K, N = 3, 4, 5
SHAPES = StepShapes(state=(6, 7), candidates=(K, N, 9))
EACH = STEPS * K
"""Transitions of one episode."""


def tensors(number: int) -> dict[str, np.ndarray]:
    """Returns what an episode of this number holds, in half precision."""
    source = np.random.default_rng(number)
    return {
        "state": source.random((STEPS, *SHAPES.state)).astype(np.float16),
        "candidates": source.random((STEPS, *SHAPES.candidates)).astype(np.float16),
        "chosen": source.integers(0, N, (STEPS, K)),
        "reward": source.normal(size=STEPS).astype(np.float32),
    }


def episode(number: int, *, segmenter: int = 0, policy: int = 0, **changes: Any) -> pa.RecordBatch:
    """Returns the records of one played episode."""
    columns: dict[str, Any] = {
        "episode": [number] * STEPS,
        "step": range(STEPS),
        "terminated": [False] * (STEPS - 1) + [True],
        "miou": [0.5] * STEPS,
        "epsilon": [0.9] * STEPS,
        "mean_q": [None] + [0.25] * (STEPS - 1),
        "rows": [[3] * K] * STEPS,
        "regions": [list(range(K))] * STEPS,
        "segmenter_version": [segmenter] * STEPS,
        "policy_version": [policy] * STEPS,
    }
    return step_records({**columns, **tensors(number), **changes})


def buffer_of(
    capacity: int, *numbers: int, return_steps: int = 1, gamma: float = 0.5, centred: bool = False, **options: Any
) -> StepReplay:
    """Returns a buffer with the episodes of these numbers, whose policies have their numbers as versions."""
    settings = ReplaySettings(capacity=capacity, **options)
    made = StepReplay(settings, shapes=SHAPES, return_steps=return_steps, gamma=gamma, centred=centred)
    for number in numbers:
        made.add(episode(number, policy=number))
    return made


def ids(draw: Draw) -> list[int]:
    return draw.records.column("id").to_pylist()


def everything(buffer: StepReplay) -> list[int]:
    return ids(buffer.sample(len(buffer), generator(0)))


def restored(buffer: StepReplay, folder: Path, *, shapes: StepShapes = SHAPES, **options: Any) -> StepReplay:
    """Returns a new buffer with what another one saves, its state through JSON."""
    copy = StepReplay(ReplaySettings(**options), shapes=shapes)
    copy.load(folder, json.loads(json.dumps(buffer.save(folder))))
    return copy


def assert_same(one: Draw, other: Draw) -> None:
    assert one.records.equals(other.records)
    assert one.states.tobytes() == other.states.tobytes()


def times(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.iterdir()}


# ---- what a transition is -------------------------------------------------------------------------------------------


def test_every_transition_is_what_was_played() -> None:
    buffer = buffer_of(100, 7, 8)
    draw = buffer.sample(2 * EACH, generator(0))
    assert draw.records.schema.equals(DRAW_SCHEMA)
    assert draw.records.column("weight").to_pylist() == [1.0] * 2 * EACH
    for place, record in enumerate(draw.records.to_pylist()):
        number, t, k = 7 + place // EACH, place % EACH // K, place % K
        played = tensors(number)
        assert (record["id"], record["episode"], record["step"], record["k"]) == (place, number, t, k)
        assert np.array_equal(draw.states[record["state_index"]], played["state"][t])
        assert record["action"] == played["candidates"][t, k, played["chosen"][t, k]].tobytes()
        assert record["reward"] == played["reward"][t]
        if t == STEPS - 1:
            assert (record["terminated"], record["next_index"], record["next_candidates"]) == (True, -1, None)
        else:
            assert not record["terminated"]
            assert np.array_equal(draw.states[record["next_index"]], played["state"][t + 1])
            assert record["next_candidates"] == played["candidates"][t + 1, k].tobytes()


@pytest.mark.parametrize("count", [2, STEPS, STEPS + 2])
def test_a_transition_may_reach_over_several_steps(count: int) -> None:
    buffer = buffer_of(100, 7, 8, return_steps=count, gamma=0.5)
    draw = buffer.sample(2 * EACH, generator(0))
    for place, record in enumerate(draw.records.to_pylist()):
        t, k, played = place % EACH // K, place % K, tensors(7 + place // EACH)
        summed = sum(0.5**i * float(played["reward"][t + i]) for i in range(min(count, STEPS - t)))
        assert record["reward"] == pytest.approx(summed, abs=1e-6)
        assert np.array_equal(draw.states[record["state_index"]], played["state"][t])
        assert record["terminated"] == (t + count >= STEPS)
        if record["terminated"]:
            assert (record["next_index"], record["next_candidates"]) == (-1, None)
        else:
            assert np.array_equal(draw.states[record["next_index"]], played["state"][t + count])
            assert record["next_candidates"] == played["candidates"][t + count, k].tobytes()


def test_rewards_may_count_from_their_mean_at_the_same_step() -> None:
    buffer = buffer_of(3 * EACH, 6, 7, 8, 9, return_steps=2, gamma=0.5, centred=True)
    held = np.stack([tensors(number)["reward"] for number in (7, 8, 9)])
    centred = held - held.mean(0)
    expected = centred + 0.5 * np.pad(centred[:, 1:], ((0, 0), (0, 1)))
    draw = buffer.sample(3 * EACH, generator(0))
    assert draw.records.column("reward").to_pylist() == pytest.approx(expected.repeat(K).tolist(), abs=1e-5)


def test_a_state_is_drawn_once_however_many_share_it() -> None:
    draw = buffer_of(100, 0).sample(EACH, generator(0))
    assert draw.states.shape == (STEPS, *SHAPES.state)
    assert draw.states.dtype == np.float16
    assert draw.records.column("state_index").to_pylist() == [0] * K + [1] * K + [2] * K
    assert draw.records.column("next_index").to_pylist() == [1] * K + [2] * K + [-1] * K
    one = buffer_of(100, 0).sample(1, generator(0))
    assert len(one.states) == 2 - one.records.column("terminated")[0].as_py()


def test_columns_of_a_draw_unpack_to_arrays() -> None:
    draw = buffer_of(100, 3).sample(EACH, generator(0))
    played = tensors(3)
    actions = from_binary(draw.records.column("action"), (9,))
    expected = np.take_along_axis(played["candidates"], played["chosen"][..., None, None], axis=2)
    assert np.array_equal(actions, expected.reshape(EACH, 9))
    candidates = from_binary(draw.records.column("next_candidates"), (N, 9))
    assert np.array_equal(candidates, played["candidates"][1:].reshape(-1, N, 9))
    part = draw.records.slice(2, 4)
    assert np.array_equal(from_binary(part.column("action"), (9,)), actions[2:6])
    assert np.array_equal(from_binary(part.column("next_candidates"), (N, 9)), candidates[2:6])
    none = draw.records.slice(EACH - K).column("next_candidates")
    assert from_binary(none, (N, 9)).shape == (0, N, 9)


def test_drawing_depends_on_contents_and_generator_alone() -> None:
    buffer, copy = buffer_of(20, 0, 1, 2), buffer_of(20, 0, 1, 2)
    source = generator(3)
    first, second = buffer.sample(6, source), buffer.sample(6, source)
    assert ids(first) != ids(second)
    again = generator(3)
    assert_same(copy.sample(6, again), first)
    assert_same(copy.sample(6, again), second)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_transitions_go_one_by_one_and_an_episode_with_its_last_one() -> None:
    buffer = buffer_of(EACH + 1, 0)
    alone = buffer.nbytes
    buffer.add(episode(1))
    assert everything(buffer) == list(range(EACH - 1, 2 * EACH))
    last = buffer.sample(len(buffer), generator(0)).records.to_pylist()[0]
    assert (last["episode"], last["step"], last["k"], last["terminated"]) == (0, STEPS - 1, K - 1, True)
    assert buffer.nbytes > 1.9 * alone
    buffer.add(episode(2))
    assert everything(buffer) == list(range(2 * EACH - 1, 3 * EACH))
    assert buffer.nbytes < 2.1 * alone, "the first episode is gone"
    assert buffer.dropped == 0, "only what is dropped by version is counted"


def test_of_an_episode_larger_than_the_capacity_the_newest_stay() -> None:
    buffer = buffer_of(5, 0, 1)
    assert everything(buffer) == list(range(2 * EACH - 5, 2 * EACH))
    draw = buffer.sample(5, generator(0))
    assert draw.records.column("step").to_pylist() == [1, 2, 2, 2, 2]
    assert np.array_equal(draw.states, tensors(1)["state"][1:])


def test_bytes_are_those_of_the_states_and_candidates_once() -> None:
    shapes = StepShapes(state=(40, 30), candidates=(8, 10, 50))
    source = np.random.default_rng(0)
    buffer = StepReplay(ReplaySettings(capacity=1000), shapes=shapes)
    for number in range(3):
        arrays = {"state": source.random((6, *shapes.state)), "candidates": source.random((6, *shapes.candidates))}
        plain = {name: [[0] * 8] * 6 for name in ("rows", "regions", "chosen")}
        versions = {"segmenter_version": [0] * 6, "policy_version": [0] * 6}
        numbers = {"reward": [0.0] * 6, "miou": [0.0] * 6, "epsilon": [0.0] * 6, "mean_q": [None] * 6}
        place = {"episode": [number] * 6, "step": range(6), "terminated": [False] * 5 + [True]}
        before = pa.total_allocated_bytes()
        buffer.add(step_records({**arrays, **plain, **versions, **numbers, **place}))
        tensor_bytes = 6 * 2 * (40 * 30 + 8 * 10 * 50)
        assert tensor_bytes < pa.total_allocated_bytes() - before < 1.1 * tensor_bytes
    assert len(buffer) == 3 * 6 * 8
    assert 3 * tensor_bytes < buffer.nbytes < 1.1 * 3 * tensor_bytes


def test_what_was_added_is_no_longer_needed() -> None:
    records = episode(0)
    data = pa.allocate_buffer(pa.ipc.get_record_batch_size(records) + 4096)
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(data), STEP_SCHEMA) as writer:
        writer.write_batch(records)
    buffer = buffer_of(100)
    with pa.ipc.open_stream(data) as reader:
        buffer.add(reader.read_next_batch())
    np.frombuffer(data, np.uint8)[:] = 255
    assert_same(buffer.sample(EACH, generator(0)), buffer_of(100, 0).sample(EACH, generator(0)))


def test_what_is_older_is_dropped_and_counted() -> None:
    buffer = buffer_of(100, 0, 1, 2)
    assert buffer.drop_older(segmenter_version=0, policy_version=1) == EACH
    assert everything(buffer) == list(range(EACH, 3 * EACH))
    assert buffer.drop_older(segmenter_version=1, policy_version=0) == 2 * EACH
    assert (len(buffer), buffer.dropped, buffer.nbytes) == (0, 3 * EACH, 0)
    buffer.add(episode(3, segmenter=1))
    assert everything(buffer) == list(range(3 * EACH, 4 * EACH)), "identifiers are never given twice"
    buffer.close()
    assert (len(buffer), buffer.nbytes) == (0, 0)


def test_an_empty_buffer_refuses_to_draw() -> None:
    buffer = buffer_of(10)
    buffer.add(episode(0).slice(0, 0))
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1, generator(0))


# ---- how often it is drawn ------------------------------------------------------------------------------------------


def test_drawing_is_uniform_and_without_replacement() -> None:
    buffer = buffer_of(EACH + 3, 0, 1)
    counts, source = np.zeros(2 * EACH), np.random.default_rng(0)
    for _ in range(1000):
        picked = ids(buffer.sample(5, source))
        assert len(set(picked)) == 5
        counts[picked] += 1
    assert counts[: EACH - 3].sum() == 0
    # 333 expected each; the standard deviation of a binomial with p = 1/3 is 15.
    assert np.abs(counts[EACH - 3 :] - 1000 / 3).max() < 5 * 15
    assert len(ids(buffer.sample(50, source))) == 50


def test_drawing_by_priority_follows_the_errors_and_its_weights_undo_it() -> None:
    buffer = buffer_of(100, 0, priority_exponent=1.0, importance_exponent=1.0)
    errors = np.ones(EACH)
    errors[7] = 9.0
    buffer.update_priorities(np.arange(EACH), errors)
    draw = buffer.sample(1000, generator(0))
    counts = np.bincount(ids(draw))
    np.testing.assert_allclose(counts, np.where(errors == 9, 450, 50), atol=1)
    weights = draw.records.column("weight").to_numpy()
    np.testing.assert_allclose(weights, np.where(np.array(ids(draw)) == 7, 1 / 9, 1.0), rtol=1e-5)
    assert len(draw.states) == STEPS
    buffer.add(episode(1))
    counts = np.bincount(ids(buffer.sample(2180, generator(0))))
    np.testing.assert_allclose(counts[EACH:], 2180 * 9 / (20 + 9 * EACH), atol=1)


def test_bad_errors_are_refused() -> None:
    buffer = buffer_of(100, 0)
    with pytest.raises(NonFiniteError, match=r"\[1\]"):
        buffer.update_priorities(np.array([0, 1]), np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=f"never held the transition {EACH}"):
        buffer.update_priorities(np.array([EACH]), np.array([1.0]))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros((STEPS, 6, 8))}, r"Row 0 has 96 bytes; 84 are expected of half precision \[6, 7\]"),
        ({"candidates": np.zeros((STEPS, K, N - 1, 9))}, r"Row 0 has 288 bytes; 360 .* \[4, 5, 9\]"),
        ({"chosen": np.zeros((STEPS, K + 1), int)}, r"chose \[5, 5, 5\] regions; one of each of 4 pools"),
        ({"chosen": np.full((STEPS, K), N)}, "outside of a pool of 5 candidates"),
        ({"step": [0, 2, 1]}, "are not one whole episode"),
        ({"episode": [0, 0, 1]}, "are not one whole episode"),
        ({"terminated": [False] * STEPS}, "must end at its last step"),
        ({"terminated": [False, True, True]}, "must end at its last step"),
    ],
)
def test_what_is_not_one_whole_episode_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    buffer = buffer_of(100, 0)
    with pytest.raises(ValueError, match=message):
        buffer.add(episode(1, **changes))
    assert everything(buffer) == list(range(EACH))


def test_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="Replay takes transitions with the columns"):
        buffer_of(4).add(pa.RecordBatch.from_pydict({"episode": [1]}))


@pytest.mark.parametrize(
    ("column", "value"), [("state", np.nan), ("candidates", 1e6), ("candidates", -np.inf), ("reward", np.nan)]
)
def test_what_is_not_finite_is_refused_where_it_arises(column: str, value: float) -> None:
    values = tensors(0)[column].astype(np.float32)
    values.reshape(STEPS, -1)[1, -1] = value
    with pytest.raises(NonFiniteError, match=rf"The {column} of episode 5 is not finite at steps \[1\]"):
        episode(5, **{column: values})


def test_bytes_with_nulls_survive_packing() -> None:
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    packed = to_binary(values, np.array([False, True, True, False, True]))
    packed.validate(full=True)
    assert [None if one is None else len(one) for one in packed.to_pylist()] == [None, 8, 8, None, 8]
    assert np.array_equal(from_binary(packed, (4,)), values)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_a_checkpoint_brings_back_every_bit(tmp_path: Path, exponent: float) -> None:
    options: dict[str, Any] = {"capacity": 2 * EACH + 5, "priority_exponent": exponent}
    buffer = StepReplay(ReplaySettings(**options), shapes=SHAPES)
    for number in range(4):
        buffer.add(episode(number, policy=number))
    buffer.update_priorities(np.arange(20, 40), np.linspace(0, 2, 20))
    buffer.drop_older(segmenter_version=0, policy_version=2)
    copy = restored(buffer, tmp_path, **options)
    assert (len(copy), copy.dropped, copy.nbytes) == (len(buffer), buffer.dropped, buffer.nbytes)
    for seed in range(5):
        assert_same(copy.sample(6, generator(seed)), buffer.sample(6, generator(seed)))
    for one in (buffer, copy):
        one.add(episode(4, policy=4))
    assert_same(copy.sample(20, generator(9)), buffer.sample(20, generator(9)))
    assert buffer.save(tmp_path) == copy.save(tmp_path)


def test_an_empty_buffer_survives_a_checkpoint_and_writes_nothing(tmp_path: Path) -> None:
    full = buffer_of(100, 2)
    full.load(tmp_path / "replay", buffer_of(100).save(tmp_path / "replay"))
    assert len(full) == 0
    assert not (tmp_path / "replay").exists()


def test_a_checkpoint_after_one_more_episode_writes_that_episode(tmp_path: Path) -> None:
    buffer = buffer_of(1000, *range(20))
    buffer.save(tmp_path)
    before = times(tmp_path)
    buffer.add(episode(20))
    state = buffer.save(tmp_path)
    after = times(tmp_path)
    assert before.items() <= after.items()
    new = sorted(path.name for path in after.keys() - before.keys())
    assert [name.rpartition("-")[0] for name in new] == ["000000000240", "episode-000000000240"]
    written = sum((tmp_path / name).stat().st_size for name in new)
    assert written < 0.06 * sum(path.stat().st_size for path in after)
    assert {entry["file"] for entry in files_of(state)} == {path.name for path in after}
    assert len(json.dumps(state)) < 200 * len(after)


def test_files_of_episodes_that_are_gone_are_garbage(tmp_path: Path) -> None:
    buffer = buffer_of(2 * EACH, 0, 1)
    old = buffer.save(tmp_path)
    buffer.add(episode(2))
    new = buffer.save(tmp_path)
    assert collect_garbage(tmp_path, [old, new]) == []
    gone = collect_garbage(tmp_path, [new])
    assert old["episodes"][0]["file"] in gone
    assert not {entry["file"] for entry in files_of(new)} & set(gone)
    copy = StepReplay(ReplaySettings(capacity=2 * EACH), shapes=SHAPES)
    copy.load(tmp_path, new)
    assert_same(copy.sample(9, generator(1)), buffer.sample(9, generator(1)))


def test_the_same_episode_played_again_reuses_its_file_only_if_it_is_whole(tmp_path: Path) -> None:
    state = buffer_of(100, 4).save(tmp_path)
    path = tmp_path / state["episodes"][0]["file"]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert buffer_of(100, 4).save(tmp_path) == state
    assert path.read_bytes() == good


def test_a_smaller_capacity_keeps_the_newest(tmp_path: Path) -> None:
    copy = restored(buffer_of(100, 0, 1), tmp_path, capacity=5)
    assert everything(copy) == list(range(2 * EACH - 5, 2 * EACH))
    assert copy.nbytes < 1.2 * buffer_of(100, 1).nbytes


@pytest.mark.parametrize("damage", ["missing", "has .* bytes instead of", "content .* has changed"])
@pytest.mark.parametrize("kind", ["episode-*.arrow", "0*.arrow", "*.npy"])
def test_damage_is_one_sentence_that_names_the_file(tmp_path: Path, damage: str, kind: str) -> None:
    buffer = buffer_of(100, 0, priority_exponent=1.0)
    state = buffer.save(tmp_path)
    (path,) = tmp_path.glob(kind)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if "bytes" in damage else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=damage) as error:
        buffer_of(100, priority_exponent=1.0).load(tmp_path, state)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_episodes_of_other_shapes_are_refused(tmp_path: Path) -> None:
    other = StepShapes(state=(6, 8), candidates=SHAPES.candidates)
    with pytest.raises(InputError, match=r"episode-0.*does not fit the settings: Row 0 has 84 bytes; 96 are expected"):
        restored(buffer_of(100, 0), tmp_path, shapes=other, capacity=100)
