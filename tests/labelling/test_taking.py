"""Which answers are taken: each says what became of it, and one that is refused keeps no other out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg.errors import InputError
from raysseg.labelling.answers import Found, Given, Open, Refusal
from raysseg.labelling.inputs import list_files, read_answers_of
from raysseg.labelling.ledger import Ledger, read_answers, read_mask
from raysseg.labelling.masks import mask_digest
from raysseg.labelling.project import Project
from raysseg.labelling.regions import Grid
from raysseg.labelling.rounds import Rounds
from raysseg.labelling.taking import AnswerTaker, Taken

CLASSES = ("ground", "disc", "box")

REGION = (20, 16)
"""(h, w) of the regions of images of 48×40 pixels under 2×3."""


def take(project: Project, rounds: Rounds, *answers: Found) -> Taken:
    with Ledger(project.ledger) as ledger:
        taker = AnswerTaker(project, rounds, ledger)
        taker.take(answers)
        return taker.taken


def given(name: str, mask: np.ndarray) -> Given:
    return Given(name=name, mask=mask, source=f"{name}.png")


def full(value: int, size: tuple[int, int] = REGION) -> np.ndarray:
    return np.full(size, value, np.uint8)


def test_an_answer_is_taken_once_and_the_same_one_again_is_no_error(
    project: Project, ask: Callable[..., Rounds]
) -> None:
    rounds = ask(project, "a_r00c01", "b_r01c02")
    taken = take(project, rounds, given("a_r00c01", full(1)), given("b_r01c02", full(2)), given("a_r00c01", full(1)))
    assert (taken.added, taken.known, taken.refused) == (["a_r00c01", "b_r01c02"], ["a_r00c01"], [])
    again = take(project, rounds, given("b_r01c02", full(2)))
    assert (again.added, again.known) == ([], ["b_r01c02"])
    answers, _ = read_answers(project.ledger)
    np.testing.assert_array_equal(read_mask(project.ledger, answers["b_r01c02"]), full(2))
    assert answers["b_r01c02"].source == "b_r01c02.png"


def test_every_refusal_says_why_and_the_others_are_taken(project: Project, ask: Callable[..., Rounds]) -> None:
    rounds = ask(project, "a_r00c01", "b_r01c02", "c_r00c00")
    taken = take(
        project,
        rounds,
        given("a_r00c01", full(1)),
        given("a_r00c01", full(2)),
        given("b_r01c03", full(1)),
        given("z_r00c00", full(1)),
        given("d_r00c00", full(1)),
        given("b_r01c02", full(1, (16, 20))),
        given("c_r00c00", full(0)),
    )
    assert taken.added == ["a_r00c01", "c_r00c00"]
    reasons = {one.name: one.reason for one in taken.refused}
    assert reasons["a_r00c01"].startswith("already labelled, otherwise, by a_r00c01.png at 20")
    assert "no region and no image of the name 'b_r01c03'; did you mean 'b_r01c02'" in reasons["b_r01c03"]
    assert "no region and no image of the name 'z_r00c00'" in reasons["z_r00c00"]
    assert reasons["d_r00c00"] == "the region was not asked for"
    assert reasons["b_r01c02"].startswith("20×16 pixels (width×height); 16×20 pixels (width×height) are expected")
    answers, _ = read_answers(project.ledger)
    np.testing.assert_array_equal(read_mask(project.ledger, answers["a_r00c01"]), full(1))


def test_a_correction_takes_the_place_of_an_answer_where_it_is_wanted(
    project: Project, ask: Callable[..., Rounds]
) -> None:
    rounds = ask(project, "a_r00c01", "b_r01c02")
    take(project, rounds, given("a_r00c01", full(1)))
    (refused,) = take(project, rounds, given("a_r00c01", full(2))).refused
    assert refused.reason.endswith("the first answer stays, unless --replace is given")
    corrections = [given("a_r00c01", full(2)), given("b_r01c02", full(0)), given("a_r00c01", full(0))]
    for repeated in (False, True):
        with Ledger(project.ledger) as ledger:
            taker = AnswerTaker(project, rounds, ledger, replace=True)
            taker.take(corrections)
        taken = taker.taken
        assert (taken.replaced, taken.added) == (([], []) if repeated else (["a_r00c01"], ["b_r01c02"]))
        assert taken.known == (["a_r00c01", "b_r01c02"] if repeated else [])
        # The second answer of one call is no correction of the first.
        assert [one.name for one in taken.refused] == ["a_r00c01"]
        answers, _ = read_answers(project.ledger)
        np.testing.assert_array_equal(read_mask(project.ledger, answers["a_r00c01"]), full(2))


def test_what_has_no_label_is_still_asked_for(project: Project, ask: Callable[..., Rounds]) -> None:
    rounds = ask(project, "a_r00c01", "b_r00c00")
    taken = take(project, rounds, given("b_r00c00", full(0)), *(Open(name=name, source="x") for name in rounds.asked))
    assert taken.open == ["a_r00c01"]
    assert not taken.refused


def test_an_answer_that_equals_the_pre_label_is_counted(project: Project, ask: Callable[..., Rounds]) -> None:
    rounds = ask(project, "a_r00c01", "b_r00c00", prelabel=mask_digest(full(1)))
    taken = take(project, rounds, given("a_r00c01", full(1)), given("b_r00c00", full(2)))
    assert taken.unchanged == ["a_r00c01"]


def test_a_whole_image_answers_for_its_regions(project: Project, ask: Callable[..., Rounds]) -> None:
    rounds = ask(project, "a_r00c01", "a_r01c02", "a_r01c00")
    label: np.ndarray = np.full((40, 48), 255, np.uint8)
    label[:20, 16:32] = 1
    label[20:, 32:] = np.arange(320).reshape(20, 16) % 3
    taken = take(project, rounds, given("a", label))
    assert taken.added == ["a_r00c01", "a_r01c02"]
    assert taken.open == ["a_r01c00"]
    assert not taken.refused
    answers, _ = read_answers(project.ledger)
    np.testing.assert_array_equal(read_mask(project.ledger, answers["a_r01c02"]), label[20:, 32:])
    label[:20, :16] = 0
    more = take(project, rounds, given("a", label))
    assert (more.known, more.surplus, more.refused) == (["a_r00c01", "a_r01c02"], 1, [])
    wrong = take(project, rounds, given("a", full(1, (48, 40))), given("b", label))
    assert [one.reason.split(" (")[0] for one in wrong.refused] == [
        "40×48 pixels",
        "no region of the image was asked for",
    ]


def test_index_pngs_are_read_by_their_names(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    Image.fromarray(full(2)).save(folder / "a_r00c01.png")
    Image.fromarray(full(7)).save(folder / "b_r00c01.png")
    Image.fromarray(np.full((*REGION, 3), 9, np.uint8)).save(folder / "c_r00c01.png")
    (folder / "d_r00c01.png").write_bytes(b"no picture")
    found = [next(read_answers_of(path, CLASSES)) for path in list_files([folder])]
    assert isinstance(found[0], Given)
    reasons = [getattr(one, "reason", "") for one in found[1:]]
    assert "holds the value 7" in reasons[0]
    assert "is a colour image (RGB)" in reasons[1]
    assert "cannot be read as an image" in reasons[2]


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.xml", "<annotations/>")])
def test_an_export_without_any_answer_is_said(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (refusal,) = read_answers_of(tmp_path / name, CLASSES)
    assert isinstance(refusal, Refusal)
    assert "holds no answer" in refusal.reason


def test_files_of_no_known_kind_are_refused_before_anything_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"notes\.txt is no file with answers"):
        list_files([tmp_path / "notes.txt"])
    with pytest.raises(InputError, match="does not exist"):
        list_files([tmp_path / "gone.png"])
    with pytest.raises(InputError, match="holds no file"):
        list_files([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"holds 'notes\.txt'|holds 'empty'"):
        list_files([tmp_path])


def test_regions_have_one_name_each() -> None:
    grid = Grid(rows=2, columns=3)
    names = [grid.region("a_b", number, (40, 48)).id for number in range(grid.count)]
    assert names == ["a_b_r00c00", "a_b_r00c01", "a_b_r00c02", "a_b_r01c00", "a_b_r01c01", "a_b_r01c02"]
    assert [grid.parse(name) for name in names] == [("a_b", number) for number in range(6)]
    assert grid.region("a_b", 5, (40, 48)).box == (32, 20, 48, 40)
    for name in ("a_b", "a_r02c00", "a_r00c03", "a_r000c00", "_r00c00", "a_r0c0"):
        assert grid.parse(name) is None
    large = Grid(rows=120, columns=1)
    assert large.parse(large.region("a", 111, (120, 1)).id) == ("a", 111)


def test_a_grid_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(InputError, match=r"2x3 .*does not divide the image 'b' of 40×45 .* all images is 1x2\."):
        Grid(rows=2, columns=3).check({"a": (40, 48), "b": (45, 40)})


def test_an_image_with_the_name_of_a_region_is_refused(
    make_project: Callable[..., Project], image_folder: Path
) -> None:
    (image_folder / "e.png").rename(image_folder / "a_r00c01.png")
    with pytest.raises(InputError, match="'a_r00c01' has the name of a region of the image 'a'"):
        make_project()
