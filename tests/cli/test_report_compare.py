import io
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from raysseg.cli.compare import compare_command
from raysseg.cli.progress import Progress, duration_text, field_text
from raysseg.cli.report import report_command
from raysseg.errors import InputError

app = typer.Typer()
app.command("compare")(compare_command)
app.command("report")(report_command)


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """Two seeds of two variants, with summaries only: none 40 and 50, eil 42 and 56 per cent."""
    for variant, mious in {"none": (0.40, 0.50), "eil": (0.42, 0.56)}.items():
        for seed, miou in enumerate(mious):
            folder = tmp_path / "run" / "variants" / variant / f"seed-{seed}"
            folder.mkdir(parents=True)
            summary = {"variant": variant, "seed": seed, "miou": miou, "stages": [], "complete": True}
            (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "run"


def test_compare_prints_means_and_differences_from_none(small_run: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(small_run)])
    assert result.exit_code == 0, result.output
    assert "49.0 ± 9.9" in result.output
    # 2 and 6 points: mean 4, deviation √8.
    assert "+4.0 ± 2.8 (n=2)" in result.output


def test_a_wide_table_is_not_cut_in_a_pipe(small_run: Path) -> None:
    for folder in small_run.glob("variants/*/*"):
        summary = json.loads((folder / "summary.json").read_text())
        stages = [{"stage": 1, "budget": 240, "miou": 0.5}, {"stage": 2, "budget": 480, "miou": 0.5}]
        (folder / "summary.json").write_text(json.dumps({**summary, "stages": stages}))
    result = CliRunner().invoke(app, ["compare", str(small_run)])
    assert max(len(line) for line in result.output.splitlines()) > 80
    for heading in ("mIoU at 240 regions", "mIoU at 480 regions"):
        assert heading in result.output


def test_compare_takes_another_baseline_and_writes_files(small_run: Path, tmp_path: Path) -> None:
    for name in ("sub/table.md", "sub/table.csv"):
        result = CliRunner().invoke(
            app, ["compare", str(small_run), "--baseline", "eil", "--out", str(tmp_path / name)]
        )
        assert result.exit_code == 0, result.output
    markdown = (tmp_path / "sub" / "table.md").read_text(encoding="utf-8")
    assert "| none | 0, 1 | 45.0 ± 7.1 | -4.0 ± 2.8 (n=2) |" in markdown
    assert "none,none,run,miou,,0.45," in (tmp_path / "sub" / "table.csv").read_text(encoding="utf-8")


def test_compare_refuses_other_endings_before_reading_anything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"table.txt ends in '.txt'; expected is a name that ends in .md or .csv"):
        compare_command([tmp_path / "absent"], None, tmp_path / "table.txt")


def test_report_lies_in_the_run_unless_told_otherwise(small_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(small_run)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(small_run / "report.html")
    assert "49.0 ± 9.9" in (small_run / "report.html").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(small_run), "--out", str(tmp_path / "other.html")])
    assert (tmp_path / "other.html").is_file()


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_writes_a_line_per_phase_and_per_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "eil", stream=stream, clock=clock) as progress:
        progress.update(0, phase="explore", stage=1, reward=0.0123456)
        clock.now = 9.0
        progress.update(5, reward=0.5)
        clock.now = 10.0
        progress.update(10, images_per_second=33.3)
        clock.now = 11.0
        progress.update(11, 110, phase="refine", miou=0.531)
        progress.note("checkpoint written")
        clock.now = 12.0
        progress.update(12)
    assert stream.getvalue().splitlines() == [
        "eil: 0.0 %; explore, stage 1, reward 0.01235",
        "eil: 10.0 %; explore, stage 1, reward 0.5, 33 images/s; 1:30 left",
        "eil: 10.0 %; refine, stage 1, mIoU 53.1 %; 1:39 left",
        "eil: checkpoint written",
        "eil: 10.9 %; refine, stage 1, mIoU 53.1 %; 1:38 left",
    ]


def test_the_time_left_counts_from_where_a_resumed_run_started() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "eil", stream=stream, clock=clock) as progress:
        progress.update(90)
        clock.now = 20.0
        progress.update(95)
    assert stream.getvalue().splitlines()[-1] == "eil: 95.0 %; 0:20 left"


def test_progress_says_where_it_was_stopped_and_works_without_a_total() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Progress(None, "doctor", stream=stream) as progress:
            progress.update(3)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert stream.getvalue().splitlines() == ["doctor: 3", "doctor: stopped at 3"]


def test_progress_on_a_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(10, "eil[a]", stream=stream) as progress:
        progress.update(5, phase="explore", stage=2, miou=0.5)
        progress.note("a note with [brackets]")
    text = stream.getvalue()
    assert "eil[a]" in text
    assert "50%" in text
    assert "explore, stage 2, mIoU 50.0 %" in text
    assert "a note with [brackets]" in text


def test_values_are_written_for_people() -> None:
    assert field_text("images_per_second", 3.25) == "3.2 images/s"
    assert field_text("variant", "rand") == "variant rand"
    assert duration_text(3725.4) == "1:02:05"
