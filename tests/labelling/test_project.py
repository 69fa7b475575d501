"""A run's files as they were written, damaged or changed, and the folders that are written whole or not at all."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from raysseg.data.readers.images import read_image
from raysseg.data.sample import default_palette
from raysseg.errors import InputError
from raysseg.labelling import cvat, export
from raysseg.labelling.answers import Given
from raysseg.labelling.export import export_answers
from raysseg.labelling.hand_out import check_target, hand_out
from raysseg.labelling.project import Project
from raysseg.labelling.rounds import Rounds


def write_round(project: Project, rounds: Rounds, out: Path) -> None:
    hand_out(out, project, list(rounds.asked.values()), {}, url="", on_region=lambda done: None)


def colours_in(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The colour of every class for CVAT and for Label Studio."""
    labels = json.loads((out / "cvat" / "labels.json").read_text())
    interface = ElementTree.parse(out / "label_studio" / "interface.xml")
    return (
        {label["name"]: label["color"] for label in labels},
        {str(label.get("value")): str(label.get("background")) for label in interface.iter("Label")},
    )


def cvat_export(path: Path, colours: dict[str, str], pixels: np.ndarray) -> None:
    """What CVAT writes as "Segmentation mask 1.1": a black 'background' comes first, unless a label has that name."""
    listed = [
        (name, ",".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))) for name, colour in colours.items()
    ]
    if "background" not in colours:
        listed.insert(0, ("background", "0,0,0"))
    with zipfile.ZipFile(path, "w") as archive:
        lines = "".join(f"{name}:{colour}::\n" for name, colour in listed)
        archive.writestr("labelmap.txt", f"# label:color_rgb:parts:actions\n{lines}")
        with archive.open("SegmentationClass/a_r00c00.png", "w") as file:
            Image.fromarray(pixels).save(file, format="PNG")


@pytest.mark.parametrize(
    "classes", [("ground", "disc", "box"), ("background", "disc", "box"), ("a", "background", "b")]
)
def test_the_colours_that_are_handed_out_come_back_from_cvat(
    make_project: Callable[..., Project], ask: Callable[..., Rounds], tmp_path: Path, classes: tuple[str, ...]
) -> None:
    project = make_project(classes=classes)
    write_round(project, ask(project, "a_r00c00"), tmp_path / "out")
    colours, brushes = colours_in(tmp_path / "out")
    assert list(colours) == list(classes)
    assert brushes == colours
    assert len(set(colours.values())) == len(classes)
    assert [name for name, colour in colours.items() if colour == "#000000"] == [
        name for name in classes if name == "background"
    ]
    pixels = np.array([[[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours.values()]], np.uint8)
    cvat_export(tmp_path / "masks.zip", colours, pixels)
    (answer,) = cvat.read_export(tmp_path / "masks.zip", classes)
    assert isinstance(answer, Given), answer
    assert answer.mask.tolist() == [[0, 1, 2]]


def test_most_classes_have_colours_of_their_own(make_project: Callable[..., Project]) -> None:
    project = make_project(classes=tuple(f"class {number}" for number in range(254)))
    assert len(set(project.tool_colours)) == 254
    assert (0, 0, 0) not in project.tool_colours
    assert project.tool_colours[1:] == default_palette(254)[1:]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("project.yaml", b"", "project.yaml is damaged"),
        ("project.yaml", b"classes: [a, b", "project.yaml is damaged"),
        ("project.yaml", b"\xff\xfe\xfa", "project.yaml is damaged"),
        ("images.jsonl", b'{"image": "a", "fi', "Line 1 of .*images.jsonl is damaged"),
        ("images.jsonl", b'{"image": "a"}\n', "Line 1 of .*images.jsonl is damaged"),
        ("images.jsonl", b"[1]\n", "Line 1 of .*images.jsonl is damaged"),
        ("images.jsonl", b"", "images.jsonl lists no image"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(project: Project, name: str, content: bytes, sentence: str) -> None:
    (project.path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        Project(project.path)


def test_a_file_that_must_not_be_read_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"images\.jsonl cannot be read: Permission denied"):
        Project(project.path)


def test_an_image_with_other_pixels_is_noticed(project: Project) -> None:
    before = project.image("a")
    Image.fromarray(255 - before).save(project.images["a"].file)
    with pytest.raises(InputError, match="was changed since the run was made"):
        project.image("a")
    path = project.path / "images.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**entry, "digest": None}) + "\n" for entry in entries))
    np.testing.assert_array_equal(Project(project.path).image("a"), 255 - before)


def test_a_round_can_be_written_into_the_current_folder(
    project: Project, ask: Callable[..., Rounds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_round(project, ask(project, "a_r00c00"), Path("."))
    assert (tmp_path / "here" / "crops" / "a_r00c00.png").is_file()


def test_a_target_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="is no folder that may be written"):
        check_target(tmp_path / "file" / "out")
    check_target(tmp_path / "new" / "out")


def test_a_failed_export_leaves_nothing(
    project: Project,
    ask: Callable[..., Rounds],
    answer: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = ("a_r00c00", "b_r00c00")
    answer(project, ask(project, *ids), *ids)
    before = sorted(path.name for path in tmp_path.iterdir())
    out, image = tmp_path / "out", project.images["b"].file
    content = image.read_bytes()
    Image.fromarray(255 - read_image(image)).save(image)
    with pytest.raises(InputError, match="was changed since the run was made"):
        export_answers(project.path, out, val_share=0.0, on_image=lambda number, total: None)
    image.write_bytes(content)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export.shutil, "copyfile", full)
        with pytest.raises(InputError, match="No space left"):
            export_answers(project.path, out, val_share=0.0, on_image=lambda number, total: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert export_answers(project.path, out, val_share=0.0, on_image=lambda number, total: None).train == 2
