"""Label Studio's files: tasks with brush pre-annotations and the labelling interface to write, the JSON export to read.

Only the file formats are used; nothing of Label Studio has to be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np

from raysseg.errors import InputError, nearest_name
from raysseg.labelling.answers import Found, Open, Refusal, found, paint
from raysseg.labelling.brush_rle import decode_brush, encode_brush

BRUSH = "brushlabels"
_CONTROL, _IMAGE = "classes", "image"
_NO_SHAPES = ("relation", "choices", "taxonomy", "textarea", "rating", "number", "datetime", "pairwise", "ranker")
"""Types of results that say something about a picture or a shape, and paint nothing."""
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")


def labelling_interface(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> str:
    """Returns the XML of a project's labelling interface: the region, its place in the image, a brush per class."""
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette]
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="{colour}"/>'
        for name, colour in zip(classes, colours, strict=True)
    )
    return (
        "<View>\n"
        f'  <Image name="{_IMAGE}" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <BrushLabels name="{_CONTROL}" toName="{_IMAGE}">\n{labels}\n  </BrushLabels>\n'
        '  <Image name="context" value="$context" zoom="true" zoomControl="true"/>\n'
        "</View>\n"
    )


def task(region: str, url: str, classes: Sequence[str], prelabel: np.ndarray | None, *, version: str) -> dict[str, Any]:
    """Returns the task of one region, to be imported.

    Args:
        region: its id, which names its crop and its context, too.
        url: what stands before `crops/…` and `context/…` in the addresses of the pictures.
        classes: names of the classes.
        prelabel: uint8 [h, w], the segmenter's classes; None where there is none.
        version: of who predicted.
    """
    addresses = {
        "image": f"{url}crops/{quote(region)}.png",
        "context": f"{url}context/{quote(region)}.jpg",
    }
    made: dict[str, Any] = {"data": {**addresses, "region": region}}
    if prelabel is not None:
        height, width = prelabel.shape
        made["predictions"] = [
            {
                "model_version": version,
                "result": [
                    {
                        "id": f"class-{number}",
                        "type": BRUSH,
                        "from_name": _CONTROL,
                        "to_name": _IMAGE,
                        "original_width": width,
                        "original_height": height,
                        "image_rotation": 0,
                        "value": {
                            "format": "rle",
                            "rle": encode_brush(prelabel == number),
                            BRUSH: [classes[number]],
                        },
                    }
                    for number in np.unique(prelabel).tolist()
                ],
            }
        ]
    return made


def read_export(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Reads a JSON export task by task.

    Of several results that overlap, the later one covers the earlier one. Cancelled annotations and predictions are no
    answers, and results that are no shapes say nothing about pixels.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        yield Refusal(name=path.name, source=str(path), reason=f"the file cannot be read as JSON: {error}")
        return
    except RecursionError:
        yield Refusal(
            name=path.name, source=str(path), reason="the file cannot be read as JSON: it is nested too deeply"
        )
        return
    tasks = content if isinstance(content, list) else [content]
    if not all(isinstance(one, dict) and isinstance(one.get("data"), dict) and "annotations" in one for one in tasks):
        yield Refusal(
            name=path.name,
            source=str(path),
            reason="the file is not a Label Studio export of the format 'JSON': a list of tasks with the keys 'data' and "
            "'annotations' is expected",
        )
        return
    for number, one in enumerate(tasks, start=1):
        source = f"{path}, task {one.get('id', number)}"
        name = _region(one["data"])
        try:
            yield _read_task(name, one, classes, source)
        except InputError as error:
            yield Refusal(name=name, source=source, reason=str(error))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, MemoryError):
            reason = "the task is damaged: it is not of the form that Label Studio exports; export it again as 'JSON'"
            yield Refusal(name=name, source=source, reason=reason)


def _region(data: dict[str, Any]) -> str:
    """The region's id of a task: as `label next` wrote it, or the name of an uploaded picture."""
    if isinstance(data.get("region"), str):
        return str(data["region"])
    try:
        path = PurePosixPath(unquote(urlsplit(str(data.get("image", ""))).path))
    except ValueError:
        return str(data["image"])
    # Label Studio puts eight digits and a dash before the name of a picture that was uploaded to it.
    return _UPLOAD_PREFIX.sub("", path.stem, count=1) if "upload" in path.parts else path.stem


def _read_task(name: str, content: dict[str, Any], classes: Sequence[str], source: str) -> Found:
    annotations = [one for one in content["annotations"] if not one.get("was_cancelled") and one.get("result")]
    if not annotations:
        return Open(name=name, source=source)
    if len(annotations) > 1:
        raise InputError(f"The task has {len(annotations)} annotations; one is expected, so keep one and export again.")
    results = [one for one in annotations[0]["result"] if one.get("type") not in _NO_SHAPES]
    if not results:
        return Open(name=name, source=source)
    for result in results:
        if result.get("type") != BRUSH:
            raise InputError(
                f"The annotation holds a result of the type '{result.get('type')}'; '{BRUSH}' is expected."
            )
    sizes = {(int(one["original_height"]), int(one["original_width"])) for one in results if "original_height" in one}
    if len(sizes) != 1:
        raise InputError(f"The results of the annotation are of {len(sizes)} sizes; one size is expected.")
    size = next(iter(sizes))
    return found(name, paint(size, (_layer(one, classes, size) for one in results)), source)


def _layer(result: dict[str, Any], classes: Sequence[str], size: tuple[int, int]) -> tuple[int, np.ndarray]:
    value = result.get("value") or {}
    names = value.get(BRUSH) or []
    if len(names) != 1:
        raise InputError(f"A brush has the labels {names}; one class is expected.")
    if names[0] not in classes:
        raise InputError(f"The class '{names[0]}' is not known{nearest_name(str(names[0]), classes)}")
    if value.get("format") != "rle":
        raise InputError(f"A brush has the format '{value.get('format')}'; 'rle' is expected.")
    code = value.get("rle") or []
    if not isinstance(code, list):
        raise InputError("The code of a brush is no list of numbers; export the task again as 'JSON'.")
    return list(classes).index(names[0]), decode_brush(code, size)
