"""The numbers of one stage's label inference, from the records of all images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def stage_numbers(table: pa.Table, num_classes: int) -> dict[str, Any]:
    """Returns coverage, acceptance, thresholds and, where ground truth exists, the precision of the label maps.

    Args:
        table: one record per image, as `EILEnvRunner.infer` gives.
        num_classes: K.

    Returns:
        `labelled_share`, `new_share` (of all pixels); `accepted_share` (of images); `label_precision` (of non-scribble
        labels) and `class_mean_precision`; `accepted_precision` and `rejected_precision` (of what was proposed);
        `threshold_mean`, `threshold_std`, `threshold_saturation` (share outside [0.05, 0.95]); `mean_q`; `value_map`
        (mean V). None where undefined.

    Source: eil.md, known hazards.
    """
    column = {name: np.array(table.column(name).to_pylist(), dtype=object) for name in table.column_names}
    pixels = float(column["pixels"].sum())
    accepted = column["accepted"].astype(bool)
    numbers: dict[str, Any] = {
        "labelled_share": _share(float(column["labelled"].sum()), pixels),
        "new_share": _share(float(column["new"].sum()), pixels),
        "proposed_share": _share(float(column["proposed"].sum()), pixels),
        "accepted_share": float(accepted.mean()),
        "value_map": float(np.mean(column["value_map"].astype(float))),
    }
    if column["value"][0] is not None:
        numbers["mean_q"] = float(np.mean(column["value"].astype(float)))
    if column["action"][0] is not None:
        actions = np.array(column["action"].tolist(), dtype=float)
        numbers["threshold_saturation"] = float(((actions < 0.05) | (actions > 0.95)).mean())
        if actions.shape[1] <= num_classes:
            numbers["threshold_mean"] = actions.mean(0).tolist()
            numbers["threshold_std"] = actions.std(0).tolist()
    if "correct" in column:
        correct, total = (np.array(column[name].tolist(), dtype=float).sum(0) for name in ("correct", "total"))
        present = total > 0
        numbers["label_precision"] = _share(correct.sum(), total.sum())
        numbers["class_mean_precision"] = float((correct[present] / total[present]).mean()) if present.any() else None
        known, right = column["proposed_known"].astype(float), column["proposed_correct"].astype(float)
        numbers["accepted_precision"] = _share(right[accepted].sum(), known[accepted].sum())
        numbers["rejected_precision"] = _share(right[~accepted].sum(), known[~accepted].sum())
    return numbers
