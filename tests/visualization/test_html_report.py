import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from raysseg.visualization.alarms import alarms
from raysseg.visualization.report import write_report
from raysseg.visualization.run_directory import load_variant_runs


class Balance(HTMLParser):
    """Fails where a tag is closed that was not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_its_pictures_inside(run: Path) -> None:
    out = write_report([run], run / "pages" / "report.html")
    page = out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert "http" not in page
    assert "<script" not in page
    sources = re.findall(r'<img alt="[^"]+" src="([^"]+)"', page)
    # Accuracy, labels, training, two explorations, and one evolution picture per variant.
    assert len(sources) == page.count("<img") == 7
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_the_report_has_numbers_versions_classes_and_configuration(run: Path) -> None:
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    assert "54.0 ± 2.6" in page
    assert "+2.0 ± 1.0 (n=3)" in page
    assert "torch 2.14" in page
    assert "made-up" in page
    # Class 'cat' is half the mIoU: 27.0; class 'dog' is in no evaluated image.
    assert re.search(r'<td>cat</td><td style="background:#[0-9a-f]{6}" title="± 1.3, n=3">27.0</td>', page)
    assert re.search(r"<td>dog</td><td title=\"not in the evaluation split\">–</td>", page)
    assert "a &lt;tag&gt; &amp; more" in page


def test_the_engine_has_a_section_where_it_was_measured(run: Path, make_timings: Callable[..., Path]) -> None:
    assert "<h2>Engine</h2>" not in write_report([run], run / "report.html").read_text(encoding="utf-8")
    make_timings(run / "variants" / "eil" / "seed-1")
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    assert re.search(
        r'<h2>Engine</h2><h3>eil</h3><figure><img alt="Actors and learner of eil, seed 1" src="data:', page
    )
    assert page.count("<h2>Engine</h2>") == page.count("Actors and learner of") == 1


def test_the_report_names_unfinished_seeds(run: Path, make_seed: Callable[..., Path]) -> None:
    make_seed(run / "variants" / "slow" / "seed-4", 0.5, finished=False)
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    assert "slow: seed 4 is unfinished: stage 2 evaluated" in page
    assert "6 of 7 variant runs finished" in page


def test_a_report_over_two_runs_compares_them(run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    more = make_run(tmp_path / "second", {"eil": {0: 0.7}})
    page = write_report([run, more], tmp_path / "report.html", baseline="none").read_text(encoding="utf-8")
    assert "eil (first)" in page
    assert "eil (second)" in page
    # Seed 0 of none has 50.
    assert "+20.0 (n=1)" in page


@pytest.mark.parametrize(
    ("hazard", "words"),
    [
        ({"share_positive_reward": 0.05}, "only 5.0% of the exploration's actions had a positive reward"),
        ({"corr_q_r": -0.2}, "the assessor's q runs against the reward (correlation -0.20)"),
    ],
)
def test_exploration_hazards_are_said_in_words(
    make_run: Callable[..., Path], tmp_path: Path, hazard: dict[str, float], words: str
) -> None:
    path = make_run(tmp_path / "run", {"eil": {0: 0.5}}, hazards=hazard)
    (found,) = load_variant_runs([path])
    assert len(alarms(found)) == 4
    assert alarms(found)[0].startswith("Stage 0: ")
    assert words in alarms(found)[0]
    assert words.replace("'", "&#x27;") in write_report([path], path / "report.html").read_text(encoding="utf-8")


def test_no_acceptance_and_saturation_are_alarms(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {"eil": {0: 0.5}}, accepted=0.0)
    (found,) = load_variant_runs([path])
    assert alarms(found) == [
        f"Stage {stage}: no image was accepted; the label maps did not change." for stage in range(1, 5)
    ]
    assert found.summary is not None
    found.summary["stages"][1]["threshold_saturation"] = 0.95
    assert any("Stage 1: 95% of the thresholds are saturated" in alarm for alarm in alarms(found))


def test_a_sound_run_and_one_that_explores_nothing_have_no_alarm(make_run: Callable[..., Path], tmp_path: Path) -> None:
    sound = make_run(tmp_path / "sound", {"eil": {0: 0.5}})
    constant = make_run(tmp_path / "constant", {"none": {0: 0.5}}, explores=False, accepted=0.0)
    assert alarms(load_variant_runs([sound])[0]) == []
    assert alarms(load_variant_runs([constant])[0]) == []
    assert "No alarm" in write_report([sound], sound / "report.html").read_text(encoding="utf-8")
    assert "explores nothing" in write_report([constant], constant / "report.html").read_text(encoding="utf-8")
