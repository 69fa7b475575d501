import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raysseg.errors import InputError
from raysseg.visualization.run_directory import RunDirectory, load_variant_runs, number


def test_reads_all_variants_and_seeds(run: Path) -> None:
    found = RunDirectory(run).variants()
    assert [(r.variant, r.seed) for r in found] == [(v, s) for v in ("eil", "none") for s in range(3)]
    assert all(r.finished and r.run == "first" for r in found)
    assert [row["stage"] for row in found[0].stages()] == [0, 1, 2, 3, 4]
    assert RunDirectory(run).versions() == {"raysseg": "0.1.0", "torch": "2.14"}
    assert "made-up" in RunDirectory(run).configuration()


def test_accepts_one_variant_and_one_seed(run: Path) -> None:
    assert [r.seed for r in RunDirectory(run / "variants" / "eil").variants()] == [0, 1, 2]
    (only,) = RunDirectory(run / "variants" / "eil" / "seed-1").variants()
    assert (only.variant, only.seed, only.run) == ("eil", 1, "first")


def test_a_copied_seed_folder_says_itself_what_it_is(run: Path, tmp_path: Path) -> None:
    copy = (run / "variants" / "eil" / "seed-2").rename(tmp_path / "copy")
    (only,) = RunDirectory(copy).variants()
    assert (only.variant, only.seed) == ("eil", 2)
    (copy / "summary.json").unlink()
    with pytest.raises(InputError, match="which seed"):
        RunDirectory(copy)


def test_an_unfinished_seed_is_reported_with_how_far_it_came(make_seed: Callable[..., Path], tmp_path: Path) -> None:
    make_seed(tmp_path / "run" / "variants" / "eil" / "seed-0", 0.5, finished=False)
    (only,) = RunDirectory(tmp_path / "run").variants()
    assert not only.finished
    assert only.status() == "unfinished: stage 2 evaluated, last row: evaluate, iteration 29"


def test_an_empty_seed_folder_is_not_dropped(run: Path) -> None:
    (run / "variants" / "late" / "seed-0").mkdir(parents=True)
    late = RunDirectory(run).variants()[3]
    assert (late.variant, late.status()) == ("late", "unfinished: nothing was logged yet")


def test_a_torn_last_line_is_tolerated_and_said(run: Path) -> None:
    path = run / "variants" / "eil" / "seed-0" / "metrics.jsonl"
    count = len(path.read_text().splitlines())
    path.write_text(path.read_text() + '{"iteration": 99, "pha')
    first = RunDirectory(run).variants()[0]
    assert len(first.metrics) == count
    assert first.remarks == (f"the last line of metrics.jsonl (line {count + 1}) is torn and was left out",)


def test_a_broken_line_in_the_middle_is_an_error(run: Path) -> None:
    path = run / "variants" / "eil" / "seed-0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    with pytest.raises(InputError, match=r"Line 2 of .*metrics.jsonl is not a JSON object"):
        RunDirectory(run).variants()


@pytest.mark.parametrize(
    ("text", "remark"),
    [("{", "not readable JSON"), ("[]", "does not hold a JSON object"), ('{"complete": false}', "not marked complete")],
)
def test_an_unusable_summary_counts_as_unfinished(run: Path, text: str, remark: str) -> None:
    (run / "variants" / "eil" / "seed-0" / "summary.json").write_text(text)
    first = RunDirectory(run).variants()[0]
    assert not first.finished
    assert remark in first.remarks[0]


def test_a_stage_that_was_evaluated_again_counts_once_with_its_later_value(run: Path) -> None:
    folder = run / "variants" / "eil" / "seed-0"
    (folder / "summary.json").unlink()
    again = {"phase": "evaluate", "stage": 3, "miou": 0.77}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    stages = RunDirectory(run).variants()[0].stages()
    assert [row["stage"] for row in stages] == [0, 1, 2, 3, 4]
    assert stages[3]["miou"] == 0.77


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        RunDirectory(tmp_path / "absent")
    with pytest.raises(InputError, match="is not a run directory"):
        RunDirectory(tmp_path)
    (tmp_path / "variants").mkdir()
    with pytest.raises(InputError, match="holds no variant yet"):
        RunDirectory(tmp_path)
    with pytest.raises(InputError, match="No run directory"):
        load_variant_runs([])


def test_runs_of_one_name_are_told_apart_and_none_is_read_twice(make_run: Callable[..., Path], tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "run", {"eil": {0: 0.5}}) for parent in ("monday", "friday")]
    assert [r.run for r in load_variant_runs(paths)] == ["monday/run", "friday/run"]
    with pytest.raises(InputError, match="given twice"):
        load_variant_runs([paths[0], paths[0] / "variants" / "eil"])


def test_pretraining_is_read_per_seed(run: Path) -> None:
    assert RunDirectory(run).pretraining() == {}
    (run / "pretrain" / "seed-3").mkdir(parents=True)
    (run / "pretrain" / "seed-3" / "metrics.jsonl").write_text('{"phase": "pretrain", "loss": 1.0}\n')
    assert RunDirectory(run).pretraining() == {3: [{"phase": "pretrain", "loss": 1.0}]}


@pytest.mark.parametrize("value", [None, True, "0.5", float("nan"), float("inf"), [1.0]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number({"key": value}, "key") is None
    assert number({"key": 2}, "key") == 2.0
