"""The rollout schema: what is put in comes out, on the wire and off it, and a transition stays small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysseg.core import rollout
from raysseg.data.codec import decode_map, encode_map


def columns(count: int = 3) -> dict[str, Any]:
    """Returns one value of every kind, nulls included."""
    maps = [np.full((5, 7), index, np.uint8) for index in range(count)]
    return {
        "key": [f"image-{index}" for index in range(count)],
        "row": np.arange(count),
        "seed": np.arange(count) + 2**61,
        "stage": np.full(count, 2),
        "step": np.zeros(count, int),
        "labels": [None, *(encode_map(one) for one in maps[1:])],
        "action": [np.array([0.25, index / 8], np.float32).tobytes() for index in range(count)],
        "next_labels": [encode_map(one) for one in maps],
        "reward": np.linspace(-1, 1, count, dtype=np.float32),
        "reward_parts": [[0.5, -0.5]] * count,
        "value": [None, *[0.125] * (count - 1)],
        "terminated": np.arange(count) % 2 == 0,
        "label_version": np.full(count, 1),
        "segmenter_version": np.full(count, 7),
        "policy_version": np.arange(count),
    }


def test_transitions_come_back_from_the_wire_exactly() -> None:
    first, second = rollout.transitions(columns(3)), rollout.transitions(columns(5))
    back = rollout.from_bytes(rollout.to_bytes([first, second]))
    assert [batch.num_rows for batch in back] == [3, 5]
    for sent, received in zip([first, second], back, strict=True):
        assert received.equals(sent)
        assert received.schema.equals(rollout.TRANSITION_SCHEMA, check_metadata=True)
    np.testing.assert_array_equal(decode_map(back[1].column("next_labels")[3].as_py()), np.full((5, 7), 3))
    assert back[0].column("labels")[0].as_py() is None
    assert back[0].column("seed")[2].as_py() == 2**61 + 2


def test_nothing_is_empty_bytes() -> None:
    assert rollout.to_bytes([]) == b""
    assert rollout.from_bytes(b"") == []


def test_torn_bytes_are_refused() -> None:
    data = rollout.to_bytes([rollout.transitions(columns())])
    with pytest.raises(pa.ArrowInvalid):
        rollout.from_bytes(data[: len(data) // 2])


def test_a_missing_field_is_refused() -> None:
    values = columns()
    del values["reward"]
    with pytest.raises(KeyError, match="reward"):
        rollout.transitions(values)


@pytest.mark.parametrize(("field", "value"), [("row", 2**31), ("stage", 2**15), ("reward", "high")])
def test_a_value_that_does_not_fit_is_refused(field: str, value: Any) -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        rollout.transitions({**columns(), field: [value] * 3})


def test_orders_keep_rows_and_seeds() -> None:
    batch = rollout.order(np.array([4, 2]), np.array([2**62 - 1, 0]))
    assert batch.to_pydict() == {"row": [4, 2], "seed": [2**62 - 1, 0]}


def test_wire_bytes_are_those_of_the_message() -> None:
    batch = rollout.transitions(columns(4))
    empty, one, two = (len(rollout.to_bytes([batch] * count)) for count in (1, 2, 3))
    assert rollout.wire_bytes(batch) == one - empty == two - one


def test_what_a_resumed_run_does_again_is_removed(tmp_path: Path) -> None:
    names = ["stage-1-update-000004", "stage-1-update-000010", "stage-2-update-000000", "stage-2-update-000003"]

    def left(place: tuple[int, ...]) -> list[str]:
        for name in names:
            rollout.write_parquet(
                [rollout.order(np.arange(2), np.arange(2))], tmp_path / "rollouts" / f"{name}.parquet"
            )
        rollout.remove_later(tmp_path / "rollouts", place)
        return sorted(path.stem for path in (tmp_path / "rollouts").iterdir())

    assert left((1, 10)) == names[:1]
    assert left((2, 0)) == left((2,)) == names[:2]
    assert left((2, 3)) == names[:3]
    assert left((3,)) == names
    rollout.remove_later(tmp_path / "absent", (0,))
