"""The replay buffer: what is kept, what is drawn and how often, what is dropped, and what a checkpoint brings back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raysseg.core import replay_rows, rollout
from raysseg.core.replay import REPLAY_SCHEMA, SMALLEST_PRIORITY, ReplayBuffer
from raysseg.core.replay_files import collect_garbage, files_of
from raysseg.core.seeding import generator
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError, NonFiniteError

SMALL_SEGMENT = 8


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 8 rows."""
    monkeypatch.setattr(replay_rows, "SEGMENT_ROWS", SMALL_SEGMENT)


def batch(first: int, count: int, *, segmenter: int = 0, policy: int | np.ndarray = 0) -> pa.RecordBatch:
    """Returns transitions numbered `first`, `first + 1`, … in their column `row`."""
    return rollout.transitions(
        {
            "key": [f"image-{first + index}" for index in range(count)],
            "row": np.arange(first, first + count),
            "seed": np.arange(first, first + count) + 2**60,
            "stage": np.ones(count, int),
            "step": np.zeros(count, int),
            "labels": [None if index % 2 else b"before" for index in range(count)],
            "action": [b"1234"] * count,
            "next_labels": [bytes([(first + index) % 256]) * (1 + (first + index) % 5) for index in range(count)],
            "reward": np.arange(first, first + count) / 8,
            "reward_parts": [[0.25, float(first + index)] for index in range(count)],
            "value": [None] * count,
            "terminated": [False] * count,
            "label_version": np.zeros(count, int),
            "segmenter_version": np.full(count, segmenter),
            "policy_version": np.broadcast_to(policy, count),
        }
    )


def buffer_of(capacity: int, *sizes: int, **options: Any) -> ReplayBuffer:
    """Returns a buffer with record batches of some sizes, whose rows are numbered as their identifiers."""
    made, first = ReplayBuffer(ReplaySettings(capacity=capacity, **options)), 0
    for size in sizes:
        made.add(batch(first, size))
        first += size
    return made


def rows(records: pa.RecordBatch) -> list[int]:
    return records.column("row").to_pylist()


def everything(buffer: ReplayBuffer) -> list[int]:
    return sorted(rows(buffer.sample(len(buffer), generator(0))))


def restored(buffer: ReplayBuffer, folder: Path, **options: Any) -> ReplayBuffer:
    """Returns a new buffer with what another one saves, its state through JSON."""
    copy = ReplayBuffer(ReplaySettings(**options))
    copy.load(folder, json.loads(json.dumps(buffer.save(folder))))
    return copy


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_the_oldest_go_first_one_by_one() -> None:
    buffer = buffer_of(10, 4, 4, 4, 4, 4)
    assert everything(buffer) == list(range(10, 20))
    buffer.add(batch(20, 1))
    assert everything(buffer) == list(range(11, 21))
    assert buffer.dropped == 0, "only what is dropped by version is counted"


def test_of_a_batch_larger_than_the_capacity_the_newest_stay() -> None:
    assert everything(buffer_of(2, 5)) == [3, 4]


def test_an_empty_batch_changes_nothing() -> None:
    assert everything(buffer_of(4, 3, 0)) == [0, 1, 2]


def test_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="Replay takes transitions with the columns"):
        buffer_of(4).add(pa.RecordBatch.from_pydict({"row": [1]}))


@pytest.mark.usefixtures("small_segments")
def test_any_columns_are_held_that_tell_their_versions(tmp_path: Path) -> None:
    versions = [pa.field("segmenter_version", pa.int32()), pa.field("policy_version", pa.int32())]
    schema = pa.schema([pa.field("name", pa.string()), *versions])
    buffer = ReplayBuffer(ReplaySettings(capacity=20), schema)
    for first in range(0, 30, 3):
        names = [str(first + index) for index in range(3)]
        columns = [pa.array(names), pa.array([0] * 3, pa.int32()), pa.array([first] * 3, pa.int32())]
        buffer.add(pa.RecordBatch.from_arrays(columns, schema=schema))
    assert buffer.drop_older(segmenter_version=0, policy_version=15) == 5
    assert (buffer.next_id, buffer.ids.tolist()) == (30, list(range(15, 30)))
    copy = ReplayBuffer(ReplaySettings(capacity=20), schema)
    copy.load(tmp_path, json.loads(json.dumps(buffer.save(tmp_path))))
    drawn = copy.sample(15, generator(0))
    assert drawn.schema.names == ["name", "segmenter_version", "policy_version", "id", "weight"]
    assert drawn.column("name").to_pylist() == [str(number) for number in range(15, 30)]
    with pytest.raises(ValueError, match="with the columns"):
        buffer.add(batch(0, 1))
    with pytest.raises(ValueError, match="need the column policy_version"):
        ReplayBuffer(ReplaySettings(), schema.remove(2))


@pytest.mark.usefixtures("small_segments")
def test_drawn_transitions_are_what_was_added_whatever_became_of_their_batches() -> None:
    buffer = buffer_of(40, *[3] * 20)
    drawn = buffer.sample(40, generator(0))
    assert drawn.schema.equals(REPLAY_SCHEMA, check_metadata=True)
    assert drawn.column("id").to_pylist() == list(range(20, 60))
    assert drawn.column("weight").to_pylist() == [1.0] * 40
    expected = pa.Table.from_batches([batch(first, 3) for first in range(0, 60, 3)]).slice(20)
    assert pa.Table.from_batches([drawn]).select(expected.column_names).equals(expected)


@pytest.mark.usefixtures("small_segments")
def test_bytes_follow_what_is_held() -> None:
    buffer = buffer_of(1000, 4)
    assert buffer.nbytes == rollout.wire_bytes(batch(0, 4))
    for first in range(4, 1000, 4):
        buffer.add(batch(first, 4))
    full = buffer.nbytes
    for first in range(1000, 2000, 4):
        buffer.add(batch(first, 4))
        assert buffer.nbytes < 1.1 * full
    buffer.drop_older(segmenter_version=1, policy_version=0)
    assert (len(buffer), buffer.nbytes) == (0, 0)


@pytest.mark.usefixtures("small_segments")
def test_what_is_gone_never_outweighs_what_is_there() -> None:
    buffer = ReplayBuffer(ReplaySettings(capacity=400))
    for first in range(0, 400, 4):
        buffer.add(batch(first, 4, policy=np.arange(first, first + 4) % 16))
    full, kept = buffer.nbytes, list(range(400))
    for version in range(1, 16):
        buffer.drop_older(segmenter_version=0, policy_version=version)
        kept = [row for row in kept if row % 16 >= version]
        assert everything(buffer) == kept
        assert buffer.nbytes < 2.2 * full * len(kept) / 400 + full / 20
    assert len(kept) == 25


def test_one_drawn_transition_does_not_keep_its_segment_alive() -> None:
    buffer = buffer_of(2000, 1500)
    before = pa.total_allocated_bytes()
    drawn = buffer.sample(1, generator(0))
    assert pa.total_allocated_bytes() - before < 20_000
    assert sum(array.get_total_buffer_size() for array in drawn.columns) < 5_000


def test_what_is_older_is_dropped_and_counted() -> None:
    buffer = ReplayBuffer(ReplaySettings(capacity=100))
    buffer.add(batch(0, 3, segmenter=1, policy=5))
    buffer.add(batch(3, 2, segmenter=2, policy=1))
    mixed = pa.Table.from_batches([batch(5, 2, segmenter=2, policy=3), batch(7, 4, segmenter=2, policy=4)])
    buffer.add(mixed.combine_chunks().to_batches()[0])
    assert buffer.drop_older(segmenter_version=2, policy_version=4) == 7
    assert everything(buffer) == [7, 8, 9, 10]
    assert buffer.dropped == 7
    assert buffer.drop_older(segmenter_version=2, policy_version=4) == 0
    assert buffer.drop_older(segmenter_version=3, policy_version=0) == 4
    assert (len(buffer), buffer.dropped) == (0, 11)
    buffer.add(batch(11, 1, segmenter=3))
    assert buffer.sample(1, generator(0)).column("id").to_pylist() == [11], "identifiers are never given twice"


# ---- uniform drawing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_drawing_depends_on_contents_and_generator_alone(exponent: float) -> None:
    buffer = buffer_of(100, *[6] * 10, priority_exponent=exponent)
    copy = buffer_of(100, *[4] * 15, priority_exponent=exponent)
    drawn = buffer.sample(8, generator(3, "replay", 1))
    again = copy.sample(8, generator(3, "replay", 1))
    assert rows(drawn) == rows(again)
    assert drawn.equals(buffer.sample(8, generator(3, "replay", 1)))
    assert rows(drawn) != rows(buffer.sample(8, generator(3, "replay", 2)))


def test_drawing_is_uniform_and_without_replacement() -> None:
    buffer = buffer_of(100, 1, 9, 5)
    counts, source = np.zeros(15), np.random.default_rng(0)
    for _ in range(3000):
        picked = rows(buffer.sample(5, source))
        assert len(set(picked)) == 5
        counts[picked] += 1
    # 1000 expected each; the standard deviation of a binomial with p = 1/3 is about 26.
    assert np.abs(counts - 1000).max() < 5 * 26


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_more_than_there_are_is_drawn_with_replacement(exponent: float) -> None:
    picked = rows(buffer_of(100, 3, priority_exponent=exponent).sample(64, generator(0)))
    assert len(picked) == 64
    assert set(picked) == {0, 1, 2}


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_an_empty_buffer_refuses_to_draw(exponent: float) -> None:
    with pytest.raises(ValueError, match="empty"):
        buffer_of(4, priority_exponent=exponent).sample(1, generator(0))


# ---- drawing by priority --------------------------------------------------------------------------------------------


def prioritised(errors: list[float], *, exponent: float = 1.0, importance: float = 1.0) -> ReplayBuffer:
    """Returns a buffer of one transition for each error."""
    buffer = buffer_of(100, len(errors), priority_exponent=exponent, importance_exponent=importance)
    buffer.update_priorities(np.arange(len(errors)), np.array(errors))
    return buffer


def test_transitions_are_drawn_in_proportion_to_their_priority() -> None:
    errors = np.array([1.0, -2.0, 3.0, 4.0, 0.0, 10.0])
    masses = (np.abs(errors) + SMALLEST_PRIORITY) ** 0.5
    share = masses / masses.sum()
    buffer, source = prioritised(errors.tolist(), exponent=0.5), np.random.default_rng(0)
    counts, draws = np.zeros(6), 4000
    for _ in range(draws):
        np.add.at(counts, rows(buffer.sample(3, source)), 1)
    # Systematic steps: the counts vary less than those of independent draws, whose deviation is taken as the bound.
    assert (np.abs(counts - 3 * draws * share) <= 4 * np.sqrt(3 * draws * share * (1 - share)) + 1).all()


def test_none_is_drawn_twice_unless_its_share_exceeds_one_draw() -> None:
    source = np.random.default_rng(0)
    errors = source.random(40) + 0.1
    buffer = prioritised(errors.tolist())
    assert 8 * errors.max() / errors.sum() < 1
    for _ in range(300):
        assert len(set(rows(buffer.sample(8, source)))) == 8
    heavy = prioritised([1.0, 1.0, 6.0])
    for _ in range(50):
        assert rows(heavy.sample(4, source)).count(2) == 3


def test_importance_weights_are_those_worked_out_by_hand() -> None:
    # P = 1/10, 2/10, 3/10, 4/10 and N = 4: (N·P)^-1/2 = 1.5811, 1.1180, 0.9129, 0.7906; the largest drawn one becomes 1.
    buffer = prioritised([1.0, 2.0, 3.0, 4.0], importance=0.5)
    drawn = buffer.sample(100, generator(0))
    weights = dict(zip(rows(drawn), drawn.column("weight").to_pylist(), strict=True))
    assert weights == pytest.approx({0: 1.0, 1: 0.70711, 2: 0.57735, 3: 0.5}, abs=1e-5)
    counts = np.bincount(rows(drawn))
    assert counts.tolist() == [10, 20, 30, 40]


def test_importance_weights_make_the_mean_that_of_uniform_drawing() -> None:
    errors, source = [0.5, 1.0, 4.0, 2.5], np.random.default_rng(0)
    buffer = prioritised(errors)
    sums = np.zeros(4)
    for _ in range(4000):
        drawn = buffer.sample(1, source)
        # One draw's weight is 1 by its own normalisation: its chance, 4 · P, takes the place of it.
        sums[rows(drawn)] += 1 / (4 * errors[rows(drawn)[0]] / sum(errors))
        assert drawn.column("weight").to_pylist() == [1.0]
    np.testing.assert_allclose(sums / 4000, 0.25, atol=0.02)


def test_exponents_of_zero_and_one() -> None:
    flat = prioritised([1.0, 9.0], exponent=0.0)
    assert flat.sample(2, generator(0)).column("weight").to_pylist() == [1.0, 1.0]
    unweighted = prioritised([1.0, 9.0], importance=0.0)
    assert set(unweighted.sample(20, generator(0)).column("weight").to_pylist()) == {1.0}


def test_new_transitions_get_the_largest_priority_so_far() -> None:
    buffer = buffer_of(100, 2, priority_exponent=1.0)
    buffer.update_priorities(np.array([0, 1]), np.array([0.5, 0.125]))
    buffer.add(batch(2, 1))
    buffer.update_priorities(np.array([0]), np.array([0.125]))
    buffer.add(batch(3, 1))
    counts = np.bincount(rows(buffer.sample(1000, generator(0))))
    np.testing.assert_allclose(counts, [100, 100, 400, 400], atol=1)


def test_a_priority_of_an_evicted_transition_changes_nothing() -> None:
    buffer = buffer_of(4, 4, 2, priority_exponent=1.0)
    buffer.update_priorities(np.array([0, 1, 2, 5]), np.array([9.0, 9.0, 3.0, 1.0]))
    counts = np.bincount(rows(buffer.sample(600, generator(0))), minlength=6)
    np.testing.assert_allclose(counts, [0, 0, 300, 100, 100, 100], atol=1)
    buffer.drop_older(segmenter_version=1, policy_version=0)
    buffer.update_priorities(np.array([5]), np.array([1.0]))
    assert len(buffer) == 0


def test_an_error_of_zero_can_still_be_drawn() -> None:
    buffer = prioritised([0.0, 0.0])
    assert set(rows(buffer.sample(4, generator(0)))) == {0, 1}
    assert SMALLEST_PRIORITY > 0


def test_bad_errors_are_refused() -> None:
    buffer = prioritised([1.0, 2.0])
    with pytest.raises(NonFiniteError, match=r"\[1\]"):
        buffer.update_priorities(np.array([0, 1]), np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="never held the transition 2"):
        buffer.update_priorities(np.array([0, 2]), np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="1 errors for 2 transitions"):
        buffer.update_priorities(np.array([0, 1]), np.array([1.0]))


# ---- against a slow and obvious buffer ------------------------------------------------------------------------------


class ListReplay:
    """A list of (identifier, row, policy version, priority)."""

    def __init__(self, capacity: int, exponent: float) -> None:
        self.capacity, self.exponent, self.largest = capacity, exponent, 0.0
        self.items: list[tuple[int, int, int, float]] = []
        self.next_id = self.dropped = 0

    def add(self, first: int, policies: list[int]) -> None:
        for offset, policy in enumerate(policies):
            self.items.append((self.next_id, first + offset, policy, self.largest or 1.0))
            self.next_id += 1
        self.items = self.items[-self.capacity :]

    def drop_older(self, policy: int) -> int:
        kept = [item for item in self.items if item[2] >= policy]
        gone = len(self.items) - len(kept)
        self.items, self.dropped = kept, self.dropped + gone
        return gone

    def update(self, number: int, error: float) -> None:
        self.largest = max(self.largest, error + SMALLEST_PRIORITY)
        self.items = [(*item[:3], error + SMALLEST_PRIORITY) if item[0] == number else item for item in self.items]

    def sample(self, count: int, source: np.random.Generator) -> list[int]:
        if self.exponent == 0:
            return [self.items[at][1] for at in sorted(source.choice(len(self.items), count, count > len(self.items)))]
        masses = [float(np.float32(item[3] ** self.exponent)) for item in self.items]
        offset, picked = source.random(), []
        for step in range(count):
            place, at = (step + offset) * sum(masses) / count, 0
            while at < len(masses) - 1 and place >= sum(masses[: at + 1]):
                at += 1
            picked.append(self.items[at][1])
        return picked


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 6), max_size=9)),
        st.tuples(st.just("drop"), st.integers(0, 6)),
        st.tuples(st.just("draw"), st.integers(1, 12)),
        st.tuples(st.just("error"), st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 3.0]))),
        st.tuples(st.just("save"), st.none()),
    ),
    max_size=25,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, capacity=st.integers(1, 30), exponent=st.sampled_from([0.0, 1.0, 0.5]))
def test_any_sequence_gives_what_a_list_gives(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, Any]], capacity: int, exponent: float
) -> None:
    options: dict[str, Any] = {"capacity": capacity, "priority_exponent": exponent}
    buffer, reference, first = ReplayBuffer(ReplaySettings(**options)), ListReplay(capacity, exponent), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_rows, "SEGMENT_ROWS", SMALL_SEGMENT)
        for number, (name, value) in enumerate(operations):
            if name == "add":
                buffer.add(batch(first, len(value), policy=np.array(value, int)))
                reference.add(first, value)
                first += len(value)
            elif name == "drop":
                assert buffer.drop_older(segmenter_version=0, policy_version=value) == reference.drop_older(value)
            elif name == "error" and reference.next_id:
                target = int(value[0] * (reference.next_id - 1))
                buffer.update_priorities(np.array([target]), np.array([value[1]]))
                reference.update(target, value[1])
            elif name == "save":
                buffer = restored(buffer, tmp_path_factory.getbasetemp() / "sequence", **options)
            elif name == "draw" and reference.items:
                drawn = buffer.sample(value, generator(number))
                assert rows(drawn) == reference.sample(value, generator(number))
            assert (len(buffer), buffer.dropped) == (len(reference.items), reference.dropped)
        if reference.items:
            drawn = buffer.sample(len(buffer), generator(0))
            ids = {row: identifier for identifier, row, *_ in reference.items}
            assert [ids[row] for row in rows(drawn)] == drawn.column("id").to_pylist()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.6])
@pytest.mark.usefixtures("small_segments")
def test_a_checkpoint_brings_back_contents_order_and_counts(tmp_path: Path, exponent: float) -> None:
    options: dict[str, Any] = {"capacity": 30, "priority_exponent": exponent}
    buffer = ReplayBuffer(ReplaySettings(**options))
    for first in range(0, 45, 3):
        buffer.add(batch(first, 3, segmenter=first // 20, policy=np.arange(first, first + 3) % 5))
    buffer.update_priorities(np.arange(20, 40), np.linspace(0, 2, 20))
    buffer.drop_older(segmenter_version=1, policy_version=1)
    copy = restored(buffer, tmp_path, **options)
    assert (len(copy), copy.dropped, copy.nbytes) == (len(buffer), buffer.dropped, buffer.nbytes)
    for seed in range(5):
        assert copy.sample(6, generator(seed)).equals(buffer.sample(6, generator(seed)))
    for one in (buffer, copy):
        one.add(batch(45, 6, segmenter=2))
    assert copy.sample(20, generator(9)).equals(buffer.sample(20, generator(9)))
    assert buffer.save(tmp_path) == copy.save(tmp_path)


def test_an_empty_buffer_survives_a_checkpoint_and_writes_nothing(tmp_path: Path) -> None:
    full = buffer_of(10, 2)
    full.load(tmp_path / "replay", buffer_of(10).save(tmp_path / "replay"))
    assert len(full) == 0
    assert not (tmp_path / "replay").exists()


@pytest.mark.usefixtures("small_segments")
def test_a_later_checkpoint_writes_only_what_is_new(tmp_path: Path) -> None:
    buffer = buffer_of(1000, *[4] * 20)
    buffer.save(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 80 // SMALL_SEGMENT
    buffer.add(batch(80, 3))
    state = buffer.save(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    (new,) = after.keys() - before.keys()
    assert new.stat().st_size < 3 * max(path.stat().st_size for path in before)
    assert {entry["file"] for entry in files_of(state)} == {path.name for path in after}
    assert len(json.dumps(state)) < 200 * len(after)


@pytest.mark.usefixtures("small_segments")
def test_an_eviction_or_a_drop_rewrites_nothing(tmp_path: Path) -> None:
    buffer = ReplayBuffer(ReplaySettings(capacity=32))
    for first in range(0, 32, 4):
        buffer.add(batch(first, 4, policy=first))
    buffer.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    buffer.drop_older(segmenter_version=0, policy_version=4)
    buffer.add(batch(32, 6, policy=32))
    assert everything(buffer) == list(range(6, 38))
    state = buffer.save(tmp_path)
    assert len({path.name for path in tmp_path.iterdir()} - names) == 1
    copy = ReplayBuffer(ReplaySettings(capacity=32))
    copy.load(tmp_path, state)
    assert everything(copy) == list(range(6, 38))


def test_the_same_rows_made_again_reuse_their_file_only_if_it_is_whole(tmp_path: Path) -> None:
    state = buffer_of(10, 4).save(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = buffer_of(10, 4)
    assert again.save(tmp_path) == state
    assert path.read_bytes() == good
    path.unlink()
    again.save(tmp_path)
    assert path.read_bytes() == good


def test_a_smaller_capacity_keeps_the_newest(tmp_path: Path) -> None:
    copy = restored(buffer_of(10, 4, 4), tmp_path, capacity=3)
    assert everything(copy) == [5, 6, 7]


def test_priorities_survive_another_exponent(tmp_path: Path) -> None:
    copy = restored(prioritised([1.0, 4.0], exponent=1.0), tmp_path, capacity=10, priority_exponent=0.5)
    assert np.bincount(rows(copy.sample(300, generator(0)))).tolist() == [100, 200]
    flat = restored(copy, tmp_path, capacity=10)
    assert flat.sample(2, generator(0)).column("weight").to_pylist() == [1.0, 1.0]
    back = restored(flat, tmp_path, capacity=10, priority_exponent=0.5)
    assert np.bincount(rows(back.sample(300, generator(0)))).tolist() == [150, 150]


@pytest.mark.parametrize("damage", ["missing", "has .* bytes instead of", "content .* has changed"])
@pytest.mark.parametrize("kind", ["arrow", "npy"])
def test_damage_is_one_sentence_that_names_the_file(tmp_path: Path, damage: str, kind: str) -> None:
    state = prioritised([1.0, 2.0]).save(tmp_path)
    (path,) = tmp_path.glob(f"*.{kind}")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if "bytes" in damage else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=damage) as error:
        ReplayBuffer(ReplaySettings(priority_exponent=1.0)).load(tmp_path, state)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("small_segments")
def test_garbage_is_what_no_checkpoint_names(tmp_path: Path) -> None:
    buffer = buffer_of(16, 8, 8)
    old = buffer.save(tmp_path)
    buffer.add(batch(16, 8))
    new = buffer.save(tmp_path)
    (tmp_path / ".left.arrow.partial").write_bytes(b"killed")
    assert collect_garbage(tmp_path, [old, new]) == [".left.arrow.partial"]
    (gone,) = collect_garbage(tmp_path, [new])
    assert gone == old["segments"][0]["file"]
    assert collect_garbage(tmp_path, [new]) == []
    copy = ReplayBuffer(ReplaySettings(capacity=16))
    copy.load(tmp_path, new)
    assert everything(copy) == list(range(8, 24))
    assert collect_garbage(tmp_path / "absent", []) == []


def test_the_state_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 3 shards but replay.shards is 0"):
        buffer_of(4).load(tmp_path, {"shards": [{}, {}, {}]})
