"""Shards draw as one buffer does, claim no CPU, and one that dies or falls silent costs what it held and nothing more."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from core.test_replay import batch, rows

from raysseg.core import rollout
from raysseg.core.replay import REPLAY_SCHEMA, ReplayBuffer
from raysseg.core.replay_files import collect_garbage, files_of
from raysseg.core.replay_shards import ShardedReplay, make_replay
from raysseg.core.seeding import generator
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("ray_session")

Make = Callable[..., ShardedReplay]


@pytest.fixture
def notes() -> list[str]:
    """What was said about lost shards."""
    return []


@pytest.fixture
def make(notes: list[str]) -> Iterator[Make]:
    """Makes sharded buffers, with record batches of four that are numbered as their identifiers."""
    made: list[ShardedReplay] = []

    def build(batches: int = 0, *, patience: float = 120.0, **options: Any) -> ShardedReplay:
        values = {"capacity": 100, "shards": 3} | options
        made.append(ShardedReplay(ReplaySettings(**values), note=notes.append, patience=patience))
        for number in range(batches):
            made[-1].add(batch(4 * number, 4, policy=number))
        return made[-1]

    yield build
    for one in made:
        one.close()


def processes(buffer: ShardedReplay) -> list[int]:
    """Returns the process of every shard."""
    return ray.get([shard.__ray_call__.remote(lambda _: os.getpid()) for shard in buffer._shards])


def held_by(buffer: ShardedReplay) -> list[int]:
    """Returns how many transitions every shard says it holds."""
    return ray.get([shard.size.remote() for shard in buffer._shards])


def everything(buffer: ShardedReplay) -> list[int]:
    return sorted(rows(buffer.sample(len(buffer), generator(0))))


# ---- as one buffer --------------------------------------------------------------------------------------------------


def test_batches_go_to_the_shards_in_turn_and_the_oldest_go_first_in_each(make: Make) -> None:
    buffer = make(7, capacity=17)
    assert held_by(buffer) == [6, 6, 5]
    assert len(buffer) == 17
    # Shard 0 took the batches at 0, 12 and 24, shard 1 those at 4 and 16, shard 2 those at 8 and 20.
    assert everything(buffer) == [6, 7, 11, 14, 15, *range(16, 28)]


def test_what_is_drawn_is_what_was_added(make: Make) -> None:
    drawn = make(5).sample(20, generator(0))
    assert drawn.schema.equals(REPLAY_SCHEMA, check_metadata=True)
    assert drawn.column("weight").to_pylist() == [1.0] * 20
    assert drawn.column("id").to_pylist() == rows(drawn), "identifiers are unique over all shards"
    table = pa.Table.from_batches([drawn]).sort_by("id").select(rollout.TRANSITION_SCHEMA.names)
    assert table.equals(pa.Table.from_batches([batch(4 * number, 4, policy=number) for number in range(5)]))


@pytest.mark.parametrize("exponent", [0.0, 0.8])
def test_one_shard_draws_exactly_as_a_buffer_without_shards(make: Make, exponent: float) -> None:
    options: dict[str, Any] = {"capacity": 18, "priority_exponent": exponent}
    single, sharded = ReplayBuffer(ReplaySettings(**options)), make(6, shards=1, **options)
    for number in range(6):
        single.add(batch(4 * number, 4, policy=number))
    for seed in range(3):
        drawn = single.sample(5, generator(seed))
        assert sharded.sample(5, generator(seed)).equals(drawn)
        errors = np.arange(5) * 0.5
        for one in (single, sharded):
            one.update_priorities(drawn.column("id").to_numpy(), errors)
    assert single.drop_older(segmenter_version=0, policy_version=3) == 6
    assert sharded.drop_older(segmenter_version=0, policy_version=3) == 6
    assert sharded.sample(5, generator(9)).equals(single.sample(5, generator(9)))
    assert (len(sharded), sharded.dropped, sharded.nbytes) == (len(single), single.dropped, single.nbytes)


def test_drawing_is_uniform_over_shards_of_unequal_size(make: Make) -> None:
    buffer = make(2, shards=2, capacity=10)
    buffer.add(batch(8, 1))
    assert held_by(buffer) == [5, 4]
    counts, source = np.zeros(9), np.random.default_rng(0)
    for _ in range(150):
        picked = rows(buffer.sample(3, source))
        assert len(set(picked)) == 3
        counts[picked] += 1
    # 50 expected each; the standard deviation of a binomial with p = 1/3 is 5.8.
    assert np.abs(counts - 150 / 3).max() < 4 * 5.8


def test_priorities_and_weights_hold_over_all_shards(make: Make) -> None:
    buffer = make(3, priority_exponent=1.0, importance_exponent=1.0)
    errors = np.arange(1, 13) / 4
    buffer.update_priorities(np.arange(12), errors)
    drawn = buffer.sample(780, generator(0))
    np.testing.assert_allclose(np.bincount(rows(drawn)), 780 * errors / errors.sum(), atol=1)
    weights = dict(zip(rows(drawn), drawn.column("weight").to_pylist(), strict=True))
    assert weights == pytest.approx({row: 1 / (row + 1) for row in range(12)}, abs=1e-5)
    buffer.add(batch(12, 1))
    counts = np.bincount(rows(buffer.sample(900, generator(0))))
    assert abs(counts[12] - counts[11]) <= 1, "a new one has the largest priority of all shards"


def test_drops_are_counted(make: Make) -> None:
    buffer = make(6)
    assert buffer.drop_older(segmenter_version=0, policy_version=2) == 8
    assert (len(buffer), buffer.dropped, held_by(buffer)) == (16, 8, [4, 4, 8])
    assert everything(buffer) == list(range(8, 24))
    assert buffer.drop_older(segmenter_version=1, policy_version=0) == 16
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1, generator(0))


def test_bad_input_is_refused_by_the_driver(make: Make) -> None:
    buffer = make(1, priority_exponent=1.0)
    with pytest.raises(ValueError, match="columns"):
        buffer.add(pa.RecordBatch.from_pydict({"row": [1]}))
    with pytest.raises(NonFiniteError):
        buffer.update_priorities(np.array([0]), np.array([np.inf]))
    with pytest.raises(ValueError, match="never held"):
        buffer.update_priorities(np.array([4]), np.array([1.0]))
    with pytest.raises(InputError, match=r"replay.shards is 3 but replay.capacity is 2"):
        make(capacity=2)


def test_the_settings_choose_the_kind() -> None:
    assert isinstance(make_replay(ReplaySettings()), ReplayBuffer)
    sharded = make_replay(ReplaySettings(shards=2))
    assert isinstance(sharded, ShardedReplay)
    sharded.close()


# ---- processes ------------------------------------------------------------------------------------------------------


def test_shards_are_processes_that_claim_no_cpu_and_load_no_torch(make: Make) -> None:
    before = ray.available_resources()["CPU"]
    buffer = make(3)
    assert len({*processes(buffer), os.getpid()}) == 4
    assert ray.available_resources()["CPU"] == before
    loaded = ray.get(buffer._shards[0].__ray_call__.remote(lambda _: __import__("sys").modules.keys() & {"torch"}))
    assert not loaded


def test_closing_ends_the_processes(make: Make) -> None:
    buffer = make(3)
    pids = processes(buffer)
    buffer.close()
    wait_for_the_end(pids)
    assert len(buffer) == 0


def wait_for_the_end(pids: list[int]) -> None:
    """Waits until processes are gone."""
    for _ in range(1500):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.02)
    raise AssertionError(f"one of {pids} still runs")


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- a shard is lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_a_dead_shard_costs_what_it_held(make: Make, notes: list[str], exponent: float) -> None:
    buffer = make(8, priority_exponent=exponent)
    pids = processes(buffer)
    os.kill(pids[1], signal.SIGKILL)
    wait_for_the_end(pids[1:2])
    drawn = buffer.sample(200, generator(0))
    lost = {row for number in (1, 4, 7) for row in range(4 * number, 4 * number + 4)}
    assert set(rows(drawn)) == set(range(32)) - lost
    assert (len(buffer), buffer.dropped) == (20, 12)
    assert notes == [
        "Replay shard 1 of 3 has died: the 12 transitions it held are lost and counted as dropped, "
        "and an empty one takes its place."
    ]
    ray.get(buffer._started, timeout=60)
    for number in range(8, 14):
        buffer.add(batch(4 * number, 4))
    assert held_by(buffer) == [20, 8, 16], "the new shard takes its turn"
    drawn = buffer.sample(2000, generator(1))
    assert set(rows(drawn)) == set(range(56)) - lost
    assert drawn.column("id").to_pylist() == rows(drawn)
    assert len(notes) == 1


def test_what_was_on_its_way_to_a_dead_shard_is_counted_too(make: Make, notes: list[str]) -> None:
    buffer = make(3)
    pids = processes(buffer)
    os.kill(pids[0], signal.SIGKILL)
    wait_for_the_end(pids[:1])
    buffer.add(batch(12, 4))
    assert len(buffer) == 16
    assert everything_drawn(buffer) == set(range(4, 12))
    assert (len(buffer), buffer.dropped, len(notes)) == (8, 8, 1)


def everything_drawn(buffer: ShardedReplay) -> set[int]:
    return set(rows(buffer.sample(100, generator(0))))


def test_a_silent_shard_is_replaced_after_a_bounded_time(make: Make, notes: list[str]) -> None:
    buffer = make(6, patience=1.0)
    pids = processes(buffer)
    os.kill(pids[2], signal.SIGSTOP)
    try:
        start = time.monotonic()
        drawn = everything_drawn(buffer)
        assert time.monotonic() - start < 30, "the shard would be silent for ever"
    finally:
        os.kill(pids[2], signal.SIGKILL)
    assert drawn == set(range(24)) - {8, 9, 10, 11, 20, 21, 22, 23}
    assert buffer.dropped == 8
    assert "shard 2 of 3 does not answer" in notes[0]


def test_a_silent_shard_does_not_pile_up_batches(make: Make, notes: list[str]) -> None:
    buffer = make(1, shards=1, patience=0.5, capacity=1000)
    (pid,) = processes(buffer)
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(1, 60):
            buffer.add(batch(4 * number, 4))
    finally:
        os.kill(pid, signal.SIGKILL)
    assert len(notes) == 1
    assert len(buffer) + buffer.dropped == 240


@pytest.mark.parametrize("call", ["update", "drop", "nbytes"])
def test_every_call_survives_a_dead_shard(make: Make, notes: list[str], call: str) -> None:
    buffer = make(3, priority_exponent=1.0)
    pids = processes(buffer)
    os.kill(pids[0], signal.SIGKILL)
    wait_for_the_end(pids[:1])
    if call == "update":
        buffer.update_priorities(np.arange(12), np.ones(12))
        buffer.sample(1, generator(0))
    elif call == "drop":
        assert buffer.drop_older(segmenter_version=0, policy_version=2) == 4
    else:
        assert buffer.nbytes == 2 * rollout.wire_bytes(batch(0, 4))
    assert len(notes) == 1
    assert len(buffer) + buffer.dropped == 12
    assert everything_drawn(buffer) <= set(range(4, 12))


def test_when_all_are_lost_the_buffer_is_empty_and_fills_again(make: Make, notes: list[str]) -> None:
    buffer = make(3)
    pids = processes(buffer)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for_the_end(pids)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(4, generator(0))
    assert (len(buffer), buffer.dropped, len(notes)) == (0, 12, 3)
    buffer.add(batch(12, 4))
    ray.get(buffer._started, timeout=60)
    assert everything(buffer) == [12, 13, 14, 15]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_a_checkpoint_brings_everything_back(make: Make, tmp_path: Path, exponent: float) -> None:
    buffer = make(20, capacity=50, priority_exponent=exponent)
    buffer.update_priorities(np.arange(40, 60), np.linspace(0.1, 3, 20))
    buffer.drop_older(segmenter_version=0, policy_version=10)
    state = json.loads(json.dumps(buffer.save(tmp_path)))
    copy = make(capacity=50, priority_exponent=exponent)
    copy.load(tmp_path, state)
    assert (len(copy), copy.dropped, held_by(copy)) == (len(buffer), buffer.dropped, held_by(buffer))
    for one in (buffer, copy):
        one.add(batch(80, 4, policy=20))
    for seed in range(3):
        assert copy.sample(7, generator(seed)).equals(buffer.sample(7, generator(seed)))
    before = {path.name for path in tmp_path.iterdir()}
    again = copy.save(tmp_path)
    new = {path.name for path in tmp_path.iterdir()} - before
    assert len([name for name in new if name.endswith(".arrow")]) == 1, "only the new batch"
    assert {entry["file"] for entry in files_of(again)} <= {path.name for path in tmp_path.iterdir()}
    collect_garbage(tmp_path, [again])
    copy.load(tmp_path, again)
    assert copy.sample(7, generator(0)).equals(buffer.sample(7, generator(0)))


def test_damage_is_the_drivers_one_sentence(make: Make, tmp_path: Path) -> None:
    buffer = make(3)
    state = buffer.save(tmp_path)
    victim = sorted(tmp_path.iterdir())[1]
    os.truncate(victim, 10)
    with pytest.raises(InputError, match=f"{victim.name} has 10 bytes instead of") as error:
        make().load(tmp_path, state)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"has 3 shards but replay.shards is 2"):
        make(shards=2).load(tmp_path, state)
    with pytest.raises(InputError, match=r"has 3 shards but replay.shards is 0"):
        ReplayBuffer(ReplaySettings()).load(tmp_path, state)


def test_a_disk_that_cannot_be_written_is_the_systems_own_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "replay").write_text("in the way")
    with pytest.raises(OSError, match="replay") as error:
        make(1).save(tmp_path / "replay")
    assert error.value.errno is not None


def test_a_folder_that_only_the_shards_see_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make(1)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(InputError, match="must be on storage that all nodes share"):
        buffer.save(tmp_path)


def test_a_shard_that_dies_before_a_save_is_saved_empty(make: Make, notes: list[str], tmp_path: Path) -> None:
    buffer = make(3)
    pids = processes(buffer)
    os.kill(pids[0], signal.SIGKILL)
    wait_for_the_end(pids[:1])
    state = buffer.save(tmp_path)
    copy = make()
    copy.load(tmp_path, state)
    assert (len(copy), copy.dropped, everything(copy)) == (8, 4, list(range(4, 12)))
    assert len(notes) == 1
