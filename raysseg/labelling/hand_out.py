"""The folder of a round: everything that people need to label its regions, with a script, Label Studio or CVAT.

    regions.jsonl                 one line per region
    crops/ID.png                  the region itself
    context/ID.jpg                its image, with the region outlined
    prelabels/ID.png              the segmenter's classes, as an index PNG
    label_studio/tasks.json       tasks to import, with brush pre-annotations
    label_studio/interface.xml    the labelling interface
    cvat/labels.json              the labels, for CVAT's raw editor
    cvat/annotations.xml          the pre-labels as "CVAT for images 1.1"

Without a segmenter that knows the classes there are no pre-labels, and no files that would hold them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from raysseg.errors import InputError
from raysseg.labelling import cvat, label_studio
from raysseg.labelling.durable import whole_folder
from raysseg.labelling.project import Project
from raysseg.labelling.rounds import Asked
from raysseg.visualization import save_index_png

_CONTEXT_SIDE = 1024
_OUTLINE = (255, 0, 255)


def check_target(out: Path) -> None:
    """Raises `InputError` unless a folder can be written at `out`: it is new, or empty."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} exists and is not an empty folder; choose another one.")
        above = next(folder for folder in out.resolve().parents if folder.exists())
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {error.strerror or error}.") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"--out {out} cannot be written: {above} is no folder that may be written; choose another one."
        )


def hand_out(
    out: Path,
    project: Project,
    asked: Sequence[Asked],
    prelabels: Mapping[str, np.ndarray],
    *,
    url: str,
    on_region: Callable[[int], None],
) -> None:
    """Writes the folder of a round; it exists entirely or not at all.

    Args:
        out: the folder, new or empty.
        project: the run.
        asked: the regions, in their order.
        prelabels: uint8 [h, w] by the region's id; none where the segmenter knows no classes yet.
        url: what stands before the pictures' paths in Label Studio's tasks.
        on_region: shows how far it is.

    Raises:
        InputError: the disk refuses, or an image has gone or changed.
    """
    with whole_folder(out) as partial:
        _write_pictures(partial, project, asked, prelabels, on_region)
        _write_label_studio(partial / "label_studio", project, asked, prelabels, url)
        _write_cvat(partial / "cvat", project, asked, prelabels)
        (partial / "regions.jsonl").write_text("".join(f"{one.line()}\n" for one in asked))


def _write_pictures(
    folder: Path,
    project: Project,
    asked: Sequence[Asked],
    prelabels: Mapping[str, np.ndarray],
    on_region: Callable[[int], None],
) -> None:
    for name in ("crops", "context", *(["prelabels"] if prelabels else [])):
        (folder / name).mkdir()
    done = 0
    for image in dict.fromkeys(one.image for one in asked):
        pixels = project.image(image)
        for one in (one for one in asked if one.image == image):
            x0, y0, x1, y1 = one.box
            Image.fromarray(pixels[y0:y1, x0:x1]).save(folder / "crops" / f"{one.id}.png")
            _context(pixels, one.box).save(folder / "context" / f"{one.id}.jpg", quality=88)
            if one.id in prelabels:
                save_index_png(folder / "prelabels" / f"{one.id}.png", prelabels[one.id], project.palette)
            done += 1
            on_region(done)


def _context(pixels: np.ndarray, box: tuple[int, int, int, int]) -> Image.Image:
    """The image, made smaller where it is large, with the region outlined just outside of it."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_CONTEXT_SIDE, _CONTEXT_SIDE))
    across, down = picture.width / pixels.shape[1], picture.height / pixels.shape[0]
    x0, y0, x1, y1 = box
    outline = (round(x0 * across) - 1, round(y0 * down) - 1, round(x1 * across), round(y1 * down))
    ImageDraw.Draw(picture).rectangle(outline, outline=_OUTLINE)
    return picture


def _write_label_studio(
    folder: Path, project: Project, asked: Sequence[Asked], prelabels: Mapping[str, np.ndarray], url: str
) -> None:
    folder.mkdir()
    classes = project.settings.classes
    tasks = [
        label_studio.task(one.id, url, classes, prelabels.get(one.id), version=f"{one.policy} {one.policy_version}")
        for one in asked
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False))
    (folder / "interface.xml").write_text(label_studio.labelling_interface(classes, project.tool_colours))


def _write_cvat(folder: Path, project: Project, asked: Sequence[Asked], prelabels: Mapping[str, np.ndarray]) -> None:
    folder.mkdir()
    labels = cvat.label_definitions(project.settings.classes, project.tool_colours)
    (folder / "labels.json").write_text(json.dumps(labels, indent=1, ensure_ascii=False))
    if prelabels:
        pictures = [(f"{one.id}.png", prelabels[one.id]) for one in asked]
        (folder / cvat.ANNOTATIONS).write_bytes(cvat.annotations_xml(pictures, project.settings.classes))
