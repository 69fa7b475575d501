"""The files of Label Studio and CVAT: what is written is what was meant, and what is read is what people painted."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raysseg.errors import InputError
from raysseg.labelling import cvat, label_studio
from raysseg.labelling.answers import Given, Open, Refusal
from raysseg.labelling.brush_rle import decode_brush, encode_brush

CLASSES = ("ground", "disc", "a & b")
PALETTE = ((0, 0, 0), (128, 0, 0), (0, 128, 0))


def bytes_of(bits: str) -> list[int]:
    padded = bits.replace(" ", "")
    padded += "0" * (-len(padded) % 8)
    return [int(padded[place : place + 8], 2) for place in range(0, len(padded), 8)]


def slow_decode(code: list[int]) -> list[int]:
    """The words of a code, bit by bit, as the format is described."""
    bits = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    count, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    words: list[int] = []
    while len(words) < count:
        if take(1):
            length = take(sizes[take(2)]) + 1
            words += [take(word)] * length
        else:
            words += [take(word) for _ in range(take(sizes[take(2)]) + 1)]
    assert len(words) == count
    return words


masks = st.integers(0, 2**31).flatmap(
    lambda seed: st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.0, 0.03, 0.5, 1.0])).map(
        lambda shape: np.random.default_rng(seed).random(shape[:2]) < shape[2]
    )
)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_a_brush_comes_back_and_others_read_it_too(mask: np.ndarray) -> None:
    code = encode_brush(mask)
    assert slow_decode(code) == np.repeat(255 * mask.reshape(-1), 4).tolist()
    np.testing.assert_array_equal(decode_brush(code, mask.shape), mask)


def test_one_painted_pixel_by_hand() -> None:
    # 4 words of 8 bits; sizes 3, 4, 8, 16; one run of 4 (3 more than 1, in 3 bits) of 255.
    header = f"{4:032b} 00111 0010 0011 0111 1111"
    code = bytes_of(f"{header} 1 00 011 11111111")
    assert encode_brush(np.ones((1, 1), dtype=bool)) == code
    assert decode_brush(code, (1, 1)).all()


def test_long_runs_are_split_and_words_without_runs_are_read() -> None:
    large = np.ones((200, 200), dtype=bool)
    np.testing.assert_array_equal(decode_brush(encode_brush(large), (200, 200)), large)
    # Two pixels, written out one word after the other: alpha 0, then alpha 200.
    words = [9, 9, 9, 0, 9, 9, 9, 200]
    code = bytes_of(f"{8:032b} 00111 0010 0011 0111 1111 0 00 111 {''.join(f'{word:08b}' for word in words)}")
    assert decode_brush(code, (1, 2)).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (encode_brush(np.ones((3, 4), dtype=bool)), "is of 48 values; 80 are expected for 5×4 pixels"),
        (encode_brush(np.ones((4, 5), dtype=bool))[:-2], "ends too early"),
        ([0, 0], "ends too early"),
        ([300, 0], "holds something that is no byte"),
        ("abc", "holds something that is no byte"),
        (bytes_of(f"{80:032b} 00111 0010 0011 0111 1111 1 11 {99:016b} 11111111"), "holds more than the 80 values"),
    ],
)
def test_a_damaged_brush_is_refused(code: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decode_brush(code, (4, 5))


# ---- Label Studio -------------------------------------------------------------------------------------------------------


def prelabel() -> np.ndarray:
    label: np.ndarray = np.zeros((4, 6), np.uint8)
    label[1:3, 2:5], label[3, :2] = 1, 2
    return label


def annotated(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The task as it is exported once a person has accepted its pre-annotation."""
    result = task["predictions"][0]["result"]
    return {"id": 7, **task, "annotations": [{"was_cancelled": False, "result": result, **changes}]}


def read(tmp_path: Path, *tasks: dict[str, Any]) -> list[Any]:
    path = tmp_path / "export.json"
    path.write_text(json.dumps(list(tasks)))
    return list(label_studio.read_export(path, CLASSES))


def test_an_accepted_pre_annotation_is_the_pre_label(tmp_path: Path) -> None:
    task = label_studio.task("a b_r00c01", "/data/local-files/?d=", CLASSES, prelabel(), version="entropy 0")
    assert task["data"]["image"] == "/data/local-files/?d=crops/a%20b_r00c01.png"
    (answer,) = read(tmp_path, annotated(task))
    assert answer.name == "a b_r00c01"
    assert answer.source.endswith("export.json, task 7")
    np.testing.assert_array_equal(answer.mask, prelabel())


def test_without_a_segmenter_a_task_has_no_prediction() -> None:
    assert "predictions" not in label_studio.task("a_r00c01", "", CLASSES, None, version="")


def test_the_interface_names_every_class(tmp_path: Path) -> None:
    root = ElementTree.fromstring(label_studio.labelling_interface(CLASSES, PALETTE))
    labels = [(label.get("value"), label.get("background")) for label in root.iter("Label")]
    assert labels == [("ground", "#000000"), ("disc", "#800000"), ("a & b", "#008000")]
    task = label_studio.task("a_r00c01", "", CLASSES, prelabel(), version="")
    (brush,) = root.iter("BrushLabels")
    result = task["predictions"][0]["result"][0]
    assert (result["from_name"], result["to_name"]) == (brush.get("name"), brush.get("toName"))
    assert {image.get("value", "")[1:] for image in root.iter("Image")} <= set(task["data"])


def test_a_later_brush_covers_an_earlier_one_and_the_rest_stays_open(tmp_path: Path) -> None:
    task = label_studio.task("a_r00c01", "", CLASSES, prelabel(), version="")
    first, second = (dict(task["predictions"][0]["result"][0]) for _ in range(2))
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :4], right[:, 3:5] = True, True
    first["value"] = {"format": "rle", "rle": encode_brush(left), "brushlabels": ["disc"]}
    second["value"] = {"format": "rle", "rle": encode_brush(right), "brushlabels": ["ground"]}
    (answer,) = read(tmp_path, annotated(task, result=[first, second]))
    assert answer.mask[0].tolist() == [1, 1, 1, 0, 0, 255]


def test_a_task_that_nobody_did_is_open(tmp_path: Path) -> None:
    task = label_studio.task("a_r00c01", "", CLASSES, prelabel(), version="")
    untouched = {"id": 1, **task, "annotations": []}
    for one in (untouched, annotated(task, was_cancelled=True), annotated(task, result=[])):
        assert isinstance(read(tmp_path, one)[0], Open)


def test_an_uploaded_picture_is_known_by_its_name(tmp_path: Path) -> None:
    task = annotated(label_studio.task("x", "", CLASSES, prelabel(), version=""))
    task["data"] = {"image": "/data/upload/3/0a1b2c3d-a%20b_r00c01.png"}
    assert read(tmp_path, task)[0].name == "a b_r00c01"
    task["data"] = {"image": "s3://bucket/0a1b2c3d-a.png"}
    assert read(tmp_path, task)[0].name == "0a1b2c3d-a"


def test_results_that_paint_nothing_are_passed_over(tmp_path: Path) -> None:
    task = annotated(label_studio.task("a_r00c01", "", CLASSES, prelabel(), version=""))
    others = [
        {"type": "relation", "from_id": "class-0", "to_id": "class-1", "direction": "right"},
        {"type": "choices", "value": {"choices": ["hard"]}, "from_name": "difficulty", "to_name": "image"},
    ]
    brushes = task["annotations"][0]["result"]
    both, neither = read(tmp_path, annotated(task, result=[*others, *brushes]), annotated(task, result=others))
    np.testing.assert_array_equal(both.mask, prelabel())
    assert isinstance(neither, Open)


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": 3},
        {"annotations": [{"result": [None]}]},
        {"annotations": [{"result": [{"type": "brushlabels", "original_height": "x", "original_width": 3}]}]},
        {"annotations": [{"result": [{"type": "brushlabels", "original_height": 1e400, "original_width": 3}]}]},
    ],
)
def test_a_damaged_task_is_refused_in_plain_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    (refusal,) = read(tmp_path, {"id": 1, "data": {"image": "http://[x/a.png"}, **changes})
    assert refusal.reason.startswith("the task is damaged: it is not of the form that Label Studio exports")
    assert "Error" not in refusal.reason


def test_what_is_no_brush_label_is_refused_and_the_other_tasks_are_read(tmp_path: Path) -> None:
    task = label_studio.task("a_r00c01", "", CLASSES, prelabel(), version="")
    good = annotated(task)
    result = good["annotations"][0]["result"]
    polygon = [{**result[0], "type": "polygonlabels"}]
    unknown = [{**result[0], "value": {**result[0]["value"], "brushlabels": ["disk"]}}]
    two = [{**result[0], "value": {**result[0]["value"], "brushlabels": ["disc", "ground"]}}]
    sizes = [result[0], {**result[1], "original_width": 5}]
    twice = {**good, "annotations": [*good["annotations"], *good["annotations"]]}
    bad = [annotated(task, result=one) for one in (polygon, unknown, two, sizes)]
    answers = read(tmp_path, *bad, twice, good)
    for answer, sentence in zip(
        answers,
        (
            "'polygonlabels'; 'brushlabels' is expected",
            "'disk' is not known; did you mean 'disc'?",
            "one class is expected",
            "of 2 sizes; one size is expected",
            "2 annotations; one is expected",
        ),
        strict=False,
    ):
        assert isinstance(answer, Refusal)
        assert sentence in answer.reason
        assert answer.name == "a_r00c01"
    assert isinstance(answers[-1], Given)


@pytest.mark.parametrize("content", ["no json", '{"a": 1}', '[{"image": "x", "label": []}]', "[1]"])
def test_another_file_is_refused_as_a_whole(tmp_path: Path, content: str) -> None:
    path = tmp_path / "export.json"
    path.write_text(content)
    (refusal,) = label_studio.read_export(path, CLASSES)
    assert isinstance(refusal, Refusal)


# ---- CVAT ---------------------------------------------------------------------------------------------------------------


def test_cvat_masks_come_back(tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 3, (9, 13), dtype=np.uint8)
    whole: np.ndarray = np.full((4, 5), 1, np.uint8)
    path = tmp_path / "annotations.xml"
    path.write_bytes(cvat.annotations_xml([("crops/x_r00c00.png", label), ("y.v2_r00c00.png", whole)], CLASSES))
    first, second = cvat.read_export(path, CLASSES)
    assert isinstance(first, Given)
    assert isinstance(second, Given)
    assert (first.name, second.name) == ("x_r00c00", "y.v2_r00c00")
    np.testing.assert_array_equal(first.mask, label)
    np.testing.assert_array_equal(second.mask, whole)


def mask_xml(*shapes: str, width: int = 5, height: int = 3) -> str:
    image = f'<image id="0" name="a_r00c00.png" width="{width}" height="{height}">{"".join(shapes)}</image>'
    return f"<annotations><version>1.1</version>{image}</annotations>"


def read_xml(tmp_path: Path, text: str) -> list[Any]:
    (tmp_path / "folder").mkdir(exist_ok=True)
    path = tmp_path / "folder" / "annotations.xml"
    path.write_text(text)
    return list(cvat.read_export(path.parent, CLASSES))


def test_a_cvat_mask_by_hand_lies_in_its_box_row_by_row(tmp_path: Path) -> None:
    # The box is 3×2 at (1, 1): 1 unpainted, 3 painted, 2 unpainted.
    upper = '<mask label="disc" rle="1, 3, 2" left="1" top="1" width="3" height="2" z_order="1" occluded="0"/>'
    lower = '<mask label="ground" rle="0, 4" left="1" top="1" width="4" height="1" z_order="0" occluded="0"/>'
    (answer,) = read_xml(tmp_path, mask_xml(upper, lower, '<tag label="seen"/>'))
    assert answer.mask.tolist() == [
        [255, 255, 255, 255, 255],
        [255, 0, 1, 1, 0],
        [255, 1, 255, 255, 255],
    ]
    (empty,) = read_xml(tmp_path, mask_xml())
    assert isinstance(empty, Open)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ('<polygon label="disc" points="0,0;1,1;2,2"/>', "There is a polygon in it; masks are expected"),
        ('<mask label="sky" rle="0, 1" left="0" top="0" width="1" height="1"/>', "'sky' is not known"),
        ('<mask label="disc" rle="0, 3" left="0" top="0" width="2" height="2"/>', "2×2 pixels has runs over 3 pixels"),
        ('<mask label="disc" rle="0, 4" left="4" top="0" width="2" height="2"/>', "reaches beyond its image of 5×3"),
        (
            '<mask label="disc" rle="x" left="4" top="0" width="2" height="2"/>',
            "cannot be read; whole numbers of pixels",
        ),
        (
            f'<mask label="disc" rle="0, {10**30}" left="0" top="0" width="2" height="2"/>',
            f"has runs over {10**30} pixels",
        ),
        (
            f'<mask label="disc" rle="{2**63}, {2**63 + 4}" left="0" top="0" width="2" height="2"/>',
            "has runs over 184467",
        ),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path: Path, shape: str, sentence: str) -> None:
    (refusal,) = read_xml(tmp_path, mask_xml(shape))
    assert isinstance(refusal, Refusal)
    assert sentence in refusal.reason
    assert refusal.name == "a_r00c00"


@pytest.mark.parametrize(
    "text",
    [
        '<?xml version="1.0" encoding="klingon"?><annotations/>',
        "<annotations>",
        "<html></html>",
        "<annotations><track id='0'/></annotations>",
    ],
)
def test_another_xml_is_refused_as_a_whole(tmp_path: Path, text: str) -> None:
    (refusal,) = read_xml(tmp_path, text)
    assert isinstance(refusal, Refusal)


LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nground:9,9,9::\ndisc:128,0,0::\na & b:0,128,0::\nsky:1,2,3::\n"


def segmentation_masks(tmp_path: Path, pictures: dict[str, Image.Image], labelmap: str = LABELMAP) -> list[Any]:
    folder = tmp_path / "masks" / "SegmentationClass"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder.parent / "labelmap.txt").write_text(labelmap)
    (folder.parent / "SegmentationObject").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
        picture.save(folder.parent / "SegmentationObject" / name)
    archive = tmp_path / "masks.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(folder.parent.rglob("*")):
            zipped.write(path, path.relative_to(folder.parent))
    from_zip, from_folder = (list(cvat.read_export(path, CLASSES)) for path in (archive, folder.parent))
    assert [one.name for one in from_zip] == [one.name for one in from_folder]
    return from_zip


def test_segmentation_masks_are_read_by_their_colours(tmp_path: Path) -> None:
    colours = np.array([[[9, 9, 9], [128, 0, 0], [0, 0, 0]], [[0, 128, 0], [0, 0, 0], [128, 0, 0]]], np.uint8)
    palette = Image.fromarray(np.array([[0, 1, 2], [3, 2, 1]], np.uint8))
    palette.putpalette([9, 9, 9, 128, 0, 0, 0, 0, 0, 0, 128, 0])
    answers = segmentation_masks(tmp_path, {"a_r00c00.png": Image.fromarray(colours), "b_r00c00.png": palette})
    assert [answer.name for answer in answers] == ["a_r00c00", "b_r00c00"]
    for answer in answers:
        assert answer.mask.tolist() == [[0, 1, 255], [2, 255, 1]]


def test_a_segmentation_mask_without_paint_is_open_even_where_background_is_a_class(tmp_path: Path) -> None:
    blank = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
    assert isinstance(segmentation_masks(tmp_path, {"a.png": blank})[0], Open)
    painted = np.zeros((1, 2, 3), np.uint8)
    painted[0, 1] = (128, 0, 0)
    pictures = {"a.png": blank, "b.png": Image.fromarray(painted)}
    segmentation_masks(tmp_path, pictures)
    untouched, touched = cvat.read_export(tmp_path / "masks.zip", ("background", "ground", "disc", "a & b"))
    assert isinstance(untouched, Open)
    assert isinstance(touched, Given)
    assert touched.mask.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("colour", "labelmap", "sentence"),
    [
        ((1, 2, 3), LABELMAP, "'sky' is not known"),
        ((7, 7, 7), LABELMAP, "the colour 7,7,7, which is not in labelmap.txt"),
        ((9, 9, 9), "ground:9,9\n", "Line 1 of labelmap.txt is 'ground:9,9'"),
        ((9, 9, 9), "ground:9,9,9::\ndisc:9,9,9::\n", "gives 'ground' and 'disc' one colour"),
    ],
)
def test_colours_that_say_nothing_are_refused(
    tmp_path: Path, colour: tuple[int, int, int], labelmap: str, sentence: str
) -> None:
    picture = Image.fromarray(np.full((2, 2, 3), colour, np.uint8))
    (refusal,) = segmentation_masks(tmp_path, {"a.png": picture}, labelmap)
    assert isinstance(refusal, Refusal)
    assert sentence in refusal.reason


def test_other_archives_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no zip")
    (refusal,) = cvat.read_export(broken, CLASSES)
    assert isinstance(refusal, Refusal)
    assert "cannot be read as a zip archive" in refusal.reason
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as zipped:
        zipped.writestr("readme.txt", "hello")
    (refusal,) = cvat.read_export(other, CLASSES)
    assert isinstance(refusal, Refusal)
    assert "neither annotations.xml" in refusal.reason


def test_the_labels_for_cvat_have_the_palette_and_any_tool() -> None:
    assert cvat.label_definitions(CLASSES, PALETTE)[1] == {
        "name": "disc",
        "color": "#800000",
        "type": "any",
        "attributes": [],
    }
