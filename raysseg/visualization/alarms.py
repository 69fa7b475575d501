"""Known hazards of a learned label inference, read from a run's metrics and said in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from raysseg.visualization.run_directory import Row, VariantRun, number

MIN_POSITIVE_SHARE = 0.10
MAX_SATURATION = 0.90


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [value for row in rows if (value := number(row, key)) is not None]
    return statistics.fmean(values) if values else None


def alarms(run: VariantRun) -> list[str]:
    """Says, stage by stage, what makes an exploration doubtful; empty where nothing does, or nothing was explored.

    - fewer than 10 % of the exploration's actions had a positive reward (mean over the stage);
    - the assessor's q goes against the reward: corr(q, r) < 0 (mean over the second half of the stage's exploration,
      because the assessor is still new to the stage in the first half);
    - no image's new labels were accepted;
    - more than 90 % of the thresholds are saturated at 0 or 1.

    Source: the limits are a reconstruction; the hazards are those of EIL's gate (Eq. 13) and reward (Eq. 12).
    """
    explored: dict[int, list[Row]] = {}
    for row in run.rows("explore"):
        explored.setdefault(int(number(row, "stage") or 0), []).append(row)
    found: list[str] = []
    for stage, rows in sorted(explored.items()):
        share = _mean(rows, "share_positive_reward")
        if share is not None and share < MIN_POSITIVE_SHARE:
            found.append(
                f"Stage {stage}: only {share:.1%} of the exploration's actions had a positive reward (expected: 10 % "
                "or more). There is little to learn from, and 'extend nothing' becomes the best policy."
            )
        correlation = _mean(rows[len(rows) // 2 :], "corr_q_r")
        if correlation is not None and correlation < 0:
            found.append(
                f"Stage {stage}: the assessor's q runs against the reward (correlation {correlation:+.2f}). "
                "The gate then accepts the wrong images."
            )
    if not explored:
        return found
    for row in run.stages():
        stage = int(row["stage"])
        if stage > 0 and number(row, "accepted_share") == 0:
            found.append(f"Stage {stage}: no image was accepted; the label maps did not change.")
        saturation = number(row, "threshold_saturation")
        if saturation is not None and saturation > MAX_SATURATION:
            found.append(
                f"Stage {stage}: {saturation:.0%} of the thresholds are saturated at 0 or 1; "
                "the searcher has no gradient left."
            )
    return found
