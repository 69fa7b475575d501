"""Which files of a call hold answers, and who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raysseg.errors import InputError
from raysseg.labelling import cvat, label_studio
from raysseg.labelling.answers import Found, Refusal, read_index_png

_EXPECTED = "index PNGs, a Label Studio export (.json) and CVAT exports (.zip, .xml or a folder) are expected"


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Looks through what was given before anything is taken: a folder of PNGs becomes its files.

    Raises:
        InputError: a path does not exist, cannot be read, or is of no kind that holds answers.
    """
    found: list[Path] = []
    for path in paths:
        try:
            found += _files_of(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return found


def _files_of(path: Path) -> list[Path]:
    if path.is_dir() and not _is_cvat_folder(path):
        inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        other = next((one for one in inside if one.suffix.lower() != ".png"), None)
        if other is not None or not inside:
            what = f"'{other.name}'" if other is not None else "no file"
            raise InputError(f"The folder {path} holds {what}; {_EXPECTED}.")
        return inside
    if not path.exists():
        raise InputError(f"{path} does not exist; {_EXPECTED}.")
    if path.is_file() and path.suffix.lower() not in (".png", ".json", ".zip", ".xml"):
        raise InputError(f"{path} is no file with answers; {_EXPECTED}.")
    return [path]


def read_answers_of(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Reads the answers of one file that `list_files` returned; a file without any is refused."""
    suffix = path.suffix.lower()
    answers: Iterator[Found]
    if path.is_file() and suffix == ".png":
        answers = iter([read_index_png(path, classes)])
    elif path.is_file() and suffix == ".json":
        answers = label_studio.read_export(path, classes)
    else:
        answers = cvat.read_export(path, classes)
    empty = True
    for answer in answers:
        empty = False
        yield answer
    if empty:
        yield Refusal(name=path.name, source=str(path), reason="the file holds no answer, not even an open one")


def _is_cvat_folder(path: Path) -> bool:
    return (path / cvat.ANNOTATIONS).is_file() or (path / cvat.LABELMAP).is_file()
