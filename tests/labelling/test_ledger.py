"""The ledger: every answer exactly once, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raysseg.errors import InputError
from raysseg.labelling import ledger as ledger_module
from raysseg.labelling.ledger import LINES, MASKS, Ledger, read_answers, read_mask
from raysseg.labelling.sealed_lines import read_sealed, seal_line

KILLS = 1000


def mask_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 4, (6, 9), dtype=np.uint8)


def fill(folder: Path, count: int) -> None:
    with Ledger(folder) as ledger:
        for number in range(count):
            assert ledger.add(f"r{number}", mask_of(number), round_number=1, source="a.png") == "added"


def check(folder: Path, count: int) -> None:
    """Exactly the first answers are there, each with its label map."""
    answers, torn = read_answers(folder)
    assert list(answers) == [f"r{number}" for number in range(count)]
    assert torn == 0
    for number, answer in enumerate(answers.values()):
        np.testing.assert_array_equal(read_mask(folder, answer), mask_of(number))


def test_what_was_added_is_there_in_order_with_where_it_came_from(tmp_path: Path) -> None:
    fill(tmp_path / "ledger", 3)
    check(tmp_path / "ledger", 3)
    answers, _ = read_answers(tmp_path / "ledger")
    assert answers["r1"].round == 1
    assert answers["r1"].source == "a.png"
    assert answers["r1"].time.endswith("+00:00")


def test_an_answer_comes_once(tmp_path: Path) -> None:
    fill(tmp_path / "ledger", 2)
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger.add("r1", mask_of(1), round_number=1, source="again.png") == "known"
        assert ledger.add("r1", mask_of(5), round_number=1, source="again.png") == "different"
        assert ledger.add("r2", mask_of(2), round_number=1, source="again.png") == "added"
    check(tmp_path / "ledger", 3)


def test_a_correction_is_a_line_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    before = (folder / LINES).read_bytes()
    for outcome in ("replaced", "known"):
        with Ledger(folder) as ledger:
            assert ledger.add("r0", mask_of(7), round_number=1, source="b.png", replace=True) == outcome
    lines = (folder / LINES).read_bytes()
    assert lines.startswith(before)
    assert lines.count(b"\n") == 3
    answers, _ = read_answers(folder)
    assert list(answers) == ["r0", "r1"]
    np.testing.assert_array_equal(read_mask(folder, answers["r0"]), mask_of(7))
    # Torn at any byte, the line leaves the answer that it was to replace.
    for end in range(len(before) + 1, len(lines) - 1):
        (folder / LINES).write_bytes(lines[:end])
        answers, torn = read_answers(folder)
        assert torn == end - len(before)
        np.testing.assert_array_equal(read_mask(folder, answers["r0"]), mask_of(0))
    with Ledger(folder) as ledger:
        assert ledger.add("r0", mask_of(7), round_number=1, source="b.png", replace=True) == "replaced"
    assert (folder / LINES).read_bytes().count(b"\n") == 3


def test_a_second_line_that_replaces_nothing_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 1)
    content = read_sealed(folder / LINES)
    line, _ = seal_line({**content.entries[0], "mask": "0" * 40}, content.seal)
    with open(folder / LINES, "ab") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"Line 2 of .* is a second answer for the region 'r0'"):
        read_answers(folder)


def test_a_last_line_that_was_damaged_is_not_called_torn(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    content = bytearray((folder / LINES).read_bytes())
    content[-20] ^= 1
    (folder / LINES).write_bytes(content)
    with Ledger(folder) as ledger:
        assert ledger.repaired is not None
        assert "was damaged (" in ledger.repaired
        assert "set aside" in ledger.repaired
        assert "never acknowledged" not in ledger.repaired
    check(folder, 1)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_the_same_answer_again_heals_its_label_map(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    path = folder / MASKS / f"{read_answers(folder)[0]['r1'].mask}.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with Ledger(folder) as ledger:
        assert ledger.add("r1", mask_of(1), round_number=1, source="again.png") == "known"
    check(folder, 2)


def test_a_ledger_that_was_never_written_has_no_answers(tmp_path: Path) -> None:
    assert read_answers(tmp_path / "ledger") == ({}, 0)


def test_a_line_torn_at_any_byte_loses_no_answer_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 3)
    whole = (folder / LINES).read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(whole)):
        (folder / LINES).write_bytes(whole[:end])
        complete = end == len(whole) - 1
        answers, torn = read_answers(folder)
        assert len(answers) == (3 if complete else 2)
        assert torn == (0 if complete else end - last)
        with Ledger(folder) as ledger:
            assert (ledger.repaired is None) == complete
            if not complete:
                assert ledger.repaired is not None
                aside = folder / ledger.repaired.split("lies in ")[1].split(",")[0]
                assert aside.read_bytes() == whole[last:end]
                assert f"({end - last} bytes" in ledger.repaired
                assert "all 2 answers before it are there" in ledger.repaired
            ledger.add("r2", mask_of(2), round_number=1, source="a.png")
        check(folder, 3)


def test_a_last_block_that_the_disk_left_empty_is_torn(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    with open(folder / LINES, "ab") as file:
        file.write(bytes(200))
    with Ledger(folder) as ledger:
        assert ledger.repaired is not None
    check(folder, 2)


@pytest.mark.parametrize("place", [0, 30, 60])
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(tmp_path: Path, place: int) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 3)
    lines = (folder / LINES).read_bytes().splitlines(keepends=True)
    changed = bytearray(lines[1])
    changed[place] ^= 1
    (folder / LINES).write_bytes(lines[0] + bytes(changed) + lines[2])
    before = (folder / LINES).read_bytes()
    for opened in (lambda: read_answers(folder), lambda: Ledger(folder).__enter__()):
        with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
            opened()
    assert (folder / LINES).read_bytes() == before


def test_a_line_that_was_taken_out_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 4)
    lines = (folder / LINES).read_bytes().splitlines(keepends=True)
    (folder / LINES).write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
        read_answers(folder)


def test_lines_are_json_that_anything_can_read(tmp_path: Path) -> None:
    fill(tmp_path / "ledger", 2)
    lines = (tmp_path / "ledger" / LINES).read_text().splitlines()
    entries = [json.loads(line)["entry"] for line in lines]
    assert [entry["region"] for entry in entries] == ["r0", "r1"]
    assert all((tmp_path / "ledger" / MASKS / f"{entry['mask']}.png").is_file() for entry in entries)


def test_a_label_map_that_was_changed_or_has_gone_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    answers, _ = read_answers(folder)
    first, second = (folder / MASKS / f"{answer.mask}.png" for answer in answers.values())
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="is not what its name says"):
        read_mask(folder, answers["r1"])
    second.write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_mask(folder, answers["r1"])
    second.unlink()
    with pytest.raises(InputError, match="is missing"):
        read_mask(folder, answers["r1"])


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ledger"
    fill(folder, 2)
    before = (folder / LINES).read_bytes()
    whole = os.pwrite
    room = [20]

    def full(descriptor: int, data: bytes, at: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = whole(descriptor, data[: room[0]], at)
        room[0] -= taken
        return taken

    with Ledger(folder) as ledger:
        monkeypatch.setattr(ledger_module.os, "pwrite", full)
        with pytest.raises(InputError, match="No space left"):
            ledger.add("r2", mask_of(2), round_number=1, source="a.png")
        monkeypatch.undo()
        assert (folder / LINES).read_bytes() == before
        assert ledger.add("r2", mask_of(2), round_number=1, source="a.png") == "added"
    check(folder, 3)


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    code = (
        "import sys, time; from pathlib import Path; from raysseg.labelling.ledger import Ledger\n"
        "with Ledger(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"process {holder.pid} is adding answers; wait until it is done"):
            Ledger(folder).__enter__()
        assert read_answers(folder) == ({}, 0)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    fill(folder, 1)
    check(folder, 1)


def test_a_thousand_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_ledger.py")
    words = [sys.executable, str(script), str(tmp_path), str(KILLS), str(time.time_ns() % 2**32)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == KILLS
    assert seen["lost"] == 0, seen
    assert seen["wrong"] == 0, seen
    # The kills hit where it hurts: in the middle of lines and of label maps, and between answers.
    assert seen["answers"] > 50, seen
    assert seen["torn"] > 10, seen
    assert seen["set_aside"] > 10, seen
    assert seen["partial"] > 0, seen


def test_the_ledger_needs_neither_torch_nor_ray() -> None:
    code = "import sys, raysseg.labelling.ledger; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
