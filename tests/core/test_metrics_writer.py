import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysseg.core.metrics_writer import MetricsWriter, write_atomically
from raysseg.core.telemetry import FIELDS
from raysseg.errors import InputError


def rows(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, each of which must be JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(writer: MetricsWriter, iteration: int, phase: str = "explore") -> None:
    """One iteration with a loss, its duration and a little telemetry."""
    writer.write(
        {"iteration": iteration, "phase": phase, "loss": 0.5, "phase_over": False},
        {"seconds": 1.5, "policy_lag_mean": 2.0, "actors_alive": 3.0},
    )


@contextmanager
def room(path: Path, more: int) -> Iterator[None]:
    """Lets no file grow beyond this file's size and `more` bytes: what is longer is written in part, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_clock_and_the_numbers_go_into_files_of_their_own(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    write(writer, 1)
    writer.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"iteration": 1, "phase": "explore", "loss": 0.5, "phase_over": False}]
    assert rows(tmp_path / "timings.jsonl") == [
        {"iteration": 1, "seconds": 1.5, "policy_lag_mean": 2.0, "actors_alive": 3.0}
    ]


def test_tensorboard_has_the_engine_under_one_name_in_every_phase_and_says_what_it_means(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    write(writer, 1, "explore")
    write(writer, 2, "refine")
    writer.close()
    MetricsWriter(tmp_path, 2).close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {
        "explore/loss",
        "explore/seconds",
        "explore/iteration",
        "refine/loss",
        "refine/seconds",
        "refine/iteration",
        "engine/policy_lag_mean",
        "engine/actors_alive",
    }
    assert [(event.step, event.value) for event in board.Scalars("engine/actors_alive")] == [(1, 3.0), (2, 3.0)]
    (text,) = board.Tensors("fields/text_summary")
    (table,) = (value.decode() for value in text.tensor_proto.string_val)
    for name, meaning in FIELDS.items():
        assert f"| `engine/{name}` | {meaning} |" in table


def test_lines_after_the_checkpoint_and_torn_ones_are_removed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for iteration in (1, 2, 3):
        write(writer, iteration)
    writer.close()
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"iteration": 4, "pha')
    again = MetricsWriter(tmp_path, 2)
    write(again, 3)
    again.close()
    assert [row["iteration"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["iteration"] for row in rows(tmp_path / "timings.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_full_disk_is_said_and_leaves_no_half_iteration(tmp_path: Path, name: str) -> None:
    writer = MetricsWriter(tmp_path, 0)
    # The file that fails is the longest one by far, so that only it meets the limit.
    long = {each: "x" * (60_000 if each == name else 100) for each in ("metrics.jsonl", "timings.jsonl")}
    writer.write({"iteration": 1, "phase": "explore", "note": long["metrics.jsonl"]}, {"note": long["timings.jsonl"]})
    with (
        room(tmp_path / name, 12),
        pytest.raises(InputError, match=f"The file .*{name} could not be written: File too"),
    ):
        write(writer, 2)
    assert [row["iteration"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
    assert [row["iteration"] for row in rows(tmp_path / "timings.jsonl")] == [1]
    write(writer, 2)
    writer.close()
    assert [row["iteration"] for row in rows(tmp_path / "timings.jsonl")] == [1, 2]


def test_no_space_left_is_the_reason_that_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    writer = MetricsWriter(tmp_path, 0)
    (tmp_path / "timings.jsonl").unlink()
    (tmp_path / "timings.jsonl").symlink_to(full)
    with pytest.raises(InputError, match=r"timings\.jsonl could not be written: no space left on its disk; free some"):
        write(writer, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_file_that_cannot_be_written_whole_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with room(path, 100), pytest.raises(InputError, match=r"summary\.json could not be written"):
        write_atomically(path, "n" * 1000)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("call", [lambda w: write(w, 1), lambda w: w.close()])
def test_a_failure_of_tensorboards_own_thread_is_said_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[MetricsWriter], None]
) -> None:
    writer = MetricsWriter(tmp_path, 0)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._board, "add_scalar", fail)
    monkeypatch.setattr(writer._board, "close", fail)
    with pytest.raises(InputError, match="tensorboard could not be written: no space left"):
        call(writer)
