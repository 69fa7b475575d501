"""A checkpoint is complete or not there; a damaged one is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysseg.core import checkpoint
from raysseg.errors import InputError


class Writer:
    """Stands for an algorithm: writes two files, or fails between them."""

    def __init__(self, iteration: int, *, fails: bool = False) -> None:
        self.iteration = iteration
        self.fails = fails

    def save_to_path(self, path: str) -> None:
        folder = Path(path) / "learner"
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(256)) * self.iteration)
        if self.fails:
            raise OSError("no space left")
        (folder.parent / "state.json").write_text(f'{{"iteration": {self.iteration}}}')


def save(iteration: int, folder: Path, *, keep: int = 2, fails: bool = False) -> Path:
    writer: Any = Writer(iteration, fails=fails)
    return checkpoint.save(writer, folder, keep=keep)


def test_the_newest_is_found_and_verifies(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None
    save(9, tmp_path)
    written = save(10, tmp_path)
    assert checkpoint.newest(tmp_path) == written
    checkpoint.verify(written)
    assert (written / "state.json").read_text() == '{"iteration": 10}'


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 10, 11):
        save(iteration, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000011"]


def test_an_interrupted_write_leaves_the_one_before(tmp_path: Path) -> None:
    good = save(1, tmp_path)
    with pytest.raises(OSError, match="no space"):
        save(2, tmp_path, fails=True)
    assert checkpoint.newest(tmp_path) == good
    again = save(2, tmp_path)
    checkpoint.verify(again)
    assert checkpoint.newest(tmp_path) == again


def test_a_checkpoint_without_manifest_does_not_count(tmp_path: Path) -> None:
    good = save(1, tmp_path)
    (save(2, tmp_path) / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) == good


def test_the_same_iteration_may_be_written_again(tmp_path: Path) -> None:
    (save(3, tmp_path) / "learner" / "weights.bin").write_bytes(b"old")
    again = save(3, tmp_path)
    checkpoint.verify(again)
    assert checkpoint.newest(tmp_path) == again
    assert (again / "learner" / "weights.bin").read_bytes() != b"old"


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_damage_is_one_sentence_that_names_the_file(tmp_path: Path, damage: str) -> None:
    written = save(4, tmp_path)
    victim = written / "learner" / "weights.bin"
    data = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(data[:-1])
    elif damage == "changed":
        victim.write_bytes(data[:-1] + b"\x00")
    else:
        victim.unlink()
    with pytest.raises(InputError, match=r"weights\.bin") as error:
        checkpoint.verify(written)
    assert str(written) in str(error.value)
    assert "\n" not in str(error.value)
