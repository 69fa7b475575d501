"""Work for the learner: an Arrow record batch and what to do with it, in the form that RLlib's LearnerGroup passes
on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa
from ray.rllib.core.learner.training_data import TrainingData


@dataclasses.dataclass
class LearnerWork(TrainingData):
    """One call of the learner. RLlib's `TrainingData` is what `LearnerGroup.update` ships, shards and resolves.

    Args:
        kind: which of the learner's update functions takes it (`segmenter`, or a method's own, e.g. `operators`).
        records: the decisions to learn from.
        context: plain values that hold for the whole record batch (label version, position in the schedule, seeds).
    """

    kind: str = ""
    records: pa.RecordBatch | None = None
    context: dict[str, Any] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Checks that the work names its kind and carries records."""
        if not self.kind or self.records is None:
            raise ValueError("Learner work needs a kind and records.")

    def shard(self, num_shards: int, len_lookback_buffer: int | None = None, **kwargs: Any) -> list[Any]:
        """Returns the work for each learner; with one learner, the whole of it."""
        if num_shards != 1:
            raise ValueError(f"This work cannot be split over {num_shards} learners.")
        return [(self, {})]

    def solve_refs(self) -> None:
        """The records travel by value: there is nothing to resolve."""
