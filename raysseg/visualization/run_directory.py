"""Reads what a run wrote: variants, seeds, metrics and summaries; says what is unfinished instead of dropping it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysseg.errors import InputError

Row = dict[str, Any]
"""One line of metrics.jsonl."""

SAMPLING_PHASES = ("explore", "play", "base", "learn")
"""Phases in which actors sample and a policy, or what it acts on, learns from it."""

_SEED_FOLDER = re.compile(r"seed-(\d+)")


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`; None where the key is missing, null, not a number or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRun:
    """One variant with one seed. `summary` is None where it was not completed; `remarks` say what is odd."""

    variant: str
    seed: int
    path: Path
    run: str
    summary: Row | None
    metrics: list[Row]
    remarks: tuple[str, ...] = field(default=())

    @property
    def finished(self) -> bool:
        """Whether the summary of the completed run is there."""
        return self.summary is not None

    def rows(self, *phases: str) -> list[Row]:
        """The metrics of these phases (pretrain, explore, play, refine, evaluate, …), in the order they were written."""
        return [row for row in self.metrics if row.get("phase") in phases]

    def stages(self) -> list[Row]:
        """One evaluation per stage, ascending; where a resumed run evaluated a stage again, the later one counts."""
        summary_stages = (self.summary or {}).get("stages")
        rows = summary_stages if summary_stages else self.rows("evaluate")
        by_stage = {int(row["stage"]): row for row in rows if number(row, "stage") is not None}
        return [by_stage[stage] for stage in sorted(by_stage)]

    def status(self) -> str:
        """`finished`, or in words how far the unfinished run came."""
        if self.finished:
            return "finished"
        if not self.metrics:
            return "unfinished: nothing was logged yet"
        last = self.metrics[-1]
        stages = self.stages()
        evaluated = f"stage {int(stages[-1]['stage'])} evaluated" if stages else "no stage evaluated"
        return f"unfinished: {evaluated}, last row: {last.get('phase', '?')}, iteration {last.get('iteration', '?')}"


def _read_metrics(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """All rows of a metrics.jsonl, and a remark where its last line is torn; no file means no rows."""
    if not path.is_file():
        return [], ()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    filled = [(index, line) for index, line in enumerate(lines, start=1) if line.strip()]
    rows: list[Row] = []
    for index, line in filled:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif index == filled[-1][0]:
            return rows, (f"the last line of metrics.jsonl (line {index}) is torn and was left out",)
        else:
            raise InputError(
                f"Line {index} of {path} is not a JSON object: {line[:60]!r}; expected is one object per line."
            )
    return rows, ()


def _read_summary(path: Path) -> tuple[Row | None, tuple[str, ...]]:
    """The summary of a completed run, or None (with a remark where the file is there but not usable)."""
    if not path.is_file():
        return None, ()
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None, ("summary.json is not readable JSON",)
    if not isinstance(summary, dict):
        return None, ("summary.json does not hold a JSON object",)
    return (summary, ()) if summary.get("complete") is True else (None, ("summary.json is not marked complete",))


def _read_variant(path: Path, *, variant: str, seed: int, run: str) -> VariantRun:
    metrics, metric_remarks = _read_metrics(path / "metrics.jsonl")
    summary, summary_remarks = _read_summary(path / "summary.json")
    return VariantRun(
        variant=variant,
        seed=seed,
        path=path,
        run=run,
        summary=summary,
        metrics=metrics,
        remarks=metric_remarks + summary_remarks,
    )


class RunDirectory:
    """A run directory: a whole run, one variant of it (all seeds), or one seed of one variant.

    Raises:
        InputError: where the path does not exist or holds none of the three.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise InputError(f"{path} is not a folder; expected is a run directory (it holds 'variants').")
        self._folders = self._find_folders()
        if not self._folders:
            if (self.path / "variants").is_dir():
                raise InputError(
                    f"{path} holds no variant yet: its folder 'variants' has no '<variant>/seed-<number>'."
                )
            raise InputError(
                f"{path} is not a run directory: expected is a folder with 'variants/<variant>/seed-<number>', "
                "or one such variant folder with 'metrics.jsonl'."
            )

    def _seed_folders(self, variant: Path) -> list[tuple[str, int, Path]]:
        found = [(child, _SEED_FOLDER.fullmatch(child.name)) for child in variant.iterdir() if child.is_dir()]
        return sorted((variant.name, int(match.group(1)), child) for child, match in found if match)

    def _find_folders(self) -> list[tuple[str, int, Path]]:
        """Variant, seed and folder of everything that belongs to the run."""
        variants = self.path / "variants"
        if variants.is_dir():
            return [entry for v in sorted(variants.iterdir()) if v.is_dir() for entry in self._seed_folders(v)]
        if (self.path / "metrics.jsonl").is_file() or (self.path / "summary.json").is_file():
            match = _SEED_FOLDER.fullmatch(self.path.name)
            if match:
                return [(self.path.parent.name, int(match.group(1)), self.path)]
            summary = _read_summary(self.path / "summary.json")[0] or {}
            if "variant" not in summary or number(summary, "seed") is None:
                raise InputError(
                    f"{self.path} holds metrics of one variant, but neither its name (expected 'seed-<number>') "
                    "nor a finished summary.json says which seed."
                )
            return [(str(summary["variant"]), int(summary["seed"]), self.path)]
        return self._seed_folders(self.path)

    @property
    def root(self) -> Path:
        """The folder of the whole run, also where one variant or seed of it was named."""
        for folder in (self.path, *self.path.parents[:3]):
            if (folder / "variants").is_dir():
                return folder
        return self.path

    def variants(self) -> list[VariantRun]:
        """Every variant and seed, sorted by variant, then seed; unfinished ones included."""
        return [_read_variant(path, variant=v, seed=seed, run=self.root.name) for v, seed, path in self._folders]

    def pretraining(self) -> dict[int, list[Row]]:
        """The metrics of the shared pre-training per seed; empty where the run has none."""
        found = self._seed_folders(self.root / "pretrain") if (self.root / "pretrain").is_dir() else []
        return {seed: _read_metrics(path / "metrics.jsonl")[0] for _, seed, path in found}

    def configuration(self) -> str:
        """The resolved configuration as YAML text; empty where it was not written."""
        path = self.root / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def versions(self) -> dict[str, str]:
        """Package and hardware versions that the run recorded; empty where they were not written.

        Raises:
            InputError: where versions.json is not a JSON object.
        """
        path = self.root / "versions.json"
        if not path.is_file():
            return {}
        try:
            versions = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            versions = None
        if not isinstance(versions, dict):
            raise InputError(f"{path} is not a JSON object; expected are names and versions.")
        return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in versions.items()}


def _distinct_names(roots: Sequence[Path]) -> dict[Path, str]:
    """The shortest ending of each path that no other one shares."""
    names = {}
    for root in dict.fromkeys(roots):
        depth = 1
        while depth < len(root.parts) and any(
            other != root and other.parts[-depth:] == root.parts[-depth:] for other in roots
        ):
            depth += 1
        names[root] = "/".join(root.parts[-depth:])
    return names


def load_variant_runs(paths: Sequence[Path]) -> list[VariantRun]:
    """Reads the variants of several run directories; equal names get as much path as tells them apart.

    Raises:
        InputError: for no path, a path that is no run directory, or one variant and seed that two of the paths hold.
    """
    if not paths:
        raise InputError("No run directory was given; expected is at least one.")
    directories = [RunDirectory(path) for path in paths]
    names = _distinct_names([directory.root for directory in directories])
    runs = [replace(run, run=names[directory.root]) for directory in directories for run in directory.variants()]
    seen: set[Path] = set()
    for run in runs:
        if run.path in seen:
            raise InputError(f"The folder {run.path} was given twice; expected is every run once.")
        seen.add(run.path)
    return runs
