"""`raysseg data`: builds a store from any source, checks it, shows what is in it, and makes scribbles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from PIL import Image
from rich.table import Table
from rich.text import Text

from raysseg.cli.console import table_console
from raysseg.cli.progress import Progress
from raysseg.configuration import load_settings
from raysseg.data.doctor import check_dataset
from raysseg.data.readers.images import classes_of, files_by_stem, read_index_map
from raysseg.data.sample import Sample
from raysseg.data.scribbles import ScribbleSettings
from raysseg.data.settings import DataSettings, build_store
from raysseg.data.store import Store
from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES, UNLABELLED

data_app = typer.Typer(
    name="data", help="Build, check and inspect datasets; make scribbles.", no_args_is_help=True, add_completion=False
)

_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_SHOWN_KEYS = 5

SharePart = Annotated[float, typer.Option(help="Share of the labelled pixels that the strokes cover.")]
WidthPart = Annotated[int, typer.Option(help="Width of the strokes in pixels.")]
SeedPart = Annotated[int, typer.Option(help="Base seed; each image draws from it and its own key.")]


@data_app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="New folder for the store.")],
    source: Annotated[
        str, typer.Option(help="synthetic, folder, ade20k, camvid, cityscapes, pascal_context or voc.")
    ] = "synthetic",
    path: Annotated[str | None, typer.Option(help="Folder of the data.")] = None,
    train_split: Annotated[str | None, typer.Option(help="Split to train on; VOC: train or train_aug.")] = None,
    val_split: Annotated[str | None, typer.Option(help="Split to evaluate on.")] = None,
    scribbles: Annotated[str | None, typer.Option(help="given, generate (from the labels) or none.")] = None,
    share: Annotated[float | None, typer.Option(help="Generated scribbles: share of the labelled pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Generated scribbles: width in pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Generated scribbles: base seed.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="folder: names a,b,c of the classes 0, 1, …, or a number.")
    ] = None,
    ignore_index: Annotated[int | None, typer.Option(help="folder: label value that means 'not labelled'.")] = None,
    scribble_unlabelled: Annotated[
        int | None, typer.Option(help="folder: scribble value that means 'no stroke'.")
    ] = None,
    background: Annotated[bool | None, typer.Option(help="folder: whether class 0 is the background.")] = None,
    image_encoding: Annotated[str | None, typer.Option(help="raw (read faster) or png (smaller).")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other data setting, as synthetic.height=128."),
    ] = None,
) -> None:
    """Build a store from a source of any format."""
    class_names: Any = None
    if classes is not None:
        class_names = int(classes) if classes.isdigit() else [name.strip() for name in classes.split(",")]
    values: dict[str, Any] = {}
    given = {
        "source": source,
        "path": path,
        "train_split": train_split,
        "val_split": val_split,
        "scribbles": scribbles,
        "generate.share": share,
        "generate.width": width,
        "generate.seed": seed,
        "folder.class_names": class_names,
        "folder.ignore_index": ignore_index,
        "folder.scribble_unlabelled": scribble_unlabelled,
        "folder.has_background": background,
        "image_encoding": image_encoding,
    }
    for key, value in given.items():
        if value is not None:
            _set(values, key, value)
    for assignment in settings or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: KEY=VALUE is expected.")
        try:
            _set(values, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError:
            raise InputError(f"--set {assignment}: the value is not YAML.") from None
    store = build_store(load_settings(DataSettings, values, where="the options"), out, track=_tracked)
    _show(store)


@data_app.command("check")
def check(path: Annotated[str, typer.Argument(help="Folder or URI of a store.")]) -> None:
    """Say in plain words what is wrong with a store; exit status 1 where something is."""
    store = Store.open(path)
    with Progress(None, "checking") as bar:
        findings = check_dataset(store, progress=lambda done, total: bar.update(done, total))
    table = Table(title=f"{store.info.name}: {path}", title_justify="left", show_lines=False)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold")
    table.add_column("samples", overflow="fold")
    for finding in findings:
        more = f" and {len(finding.keys) - _SHOWN_KEYS} more" if len(finding.keys) > _SHOWN_KEYS else ""
        # Text, not markup: a key may hold brackets.
        level = Text(finding.level, style=_LEVEL_STYLES[finding.level])
        table.add_row(level, Text(finding.message), Text(", ".join(finding.keys[:_SHOWN_KEYS]) + more))
    table_console().print(table)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@data_app.command("info")
def info(path: Annotated[str, typer.Argument(help="Folder or URI of a store.")]) -> None:
    """Show the classes, splits and origin of a store."""
    _show(Store.open(path))


@data_app.command("scribble")
def scribble(
    path: Annotated[str, typer.Argument(help="A store, or a folder of index PNGs.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the PNGs.")],
    split: Annotated[str, typer.Option(help="Of a store: the split.")] = "train",
    classes: Annotated[int | None, typer.Option(help="Of a folder: the number of classes.")] = None,
    ignore_index: Annotated[int, typer.Option(help="Of a folder: label value that means 'not labelled'.")] = UNLABELLED,
    share: SharePart = 0.03,
    width: WidthPart = 3,
    seed: SeedPart = 0,
) -> None:
    """Make human-like scribbles from dense labels: one index PNG per image, 255 where there is no stroke."""
    how = load_settings(ScribbleSettings, {"share": share, "width": width, "seed": seed}, where="the options")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' is not an empty folder; scribbles that are there are never overwritten.")
    labels: Iterable[tuple[str, np.ndarray]]
    if _is_plain_folder(path):
        files = files_by_stem(Path(path), "label")
        names = list(files)
        labels = ((name, _folder_label(file, classes, ignore_index)) for name, file in files.items())
        num_classes = classes or MAX_CLASSES
    else:
        if classes is not None or ignore_index != UNLABELLED:
            raise InputError(f"'{path}' is no folder of PNGs; --classes and --ignore-index are for those.")
        store = Store.open(path)
        names = store.keys(split)
        labels = ((key, _store_label(store, key)) for key in names)
        num_classes = store.info.num_classes
    if not names:
        raise InputError(f"The folder '{path}' holds no label.")
    out.mkdir(parents=True, exist_ok=True)
    drawn = pixels = 0
    with Progress(len(names), "scribbles") as bar:
        for number, (name, label) in enumerate(labels, start=1):
            strokes = how.for_label(label, name, num_classes)
            Image.fromarray(strokes).save(out / f"{name}.png")
            drawn += int((strokes != UNLABELLED).sum())
            pixels += strokes.size
            bar.update(number)
    console = table_console()
    console.print(
        f"{len(names)} scribbles in {out}, over {100 * drawn / pixels:.2f} % of the pixels",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _is_plain_folder(path: str) -> bool:
    return Path(path).is_dir() and not any(Path(path).glob("*.arrow"))


def _folder_label(path: Path, classes: int | None, ignore_index: int) -> np.ndarray:
    """One label of a folder; without a number of classes every value but the ignored ones is a class."""
    names = tuple(f"class {k}" for k in range(classes or MAX_CLASSES))
    values = read_index_map(path, "label")
    # The ignored value may lie among the numbers of the classes, where these are not all in use.
    ignored = values == ignore_index
    values = np.where(ignored, UNLABELLED, values)
    return classes_of(values, path, kind="label", class_names=names, unlabelled=[UNLABELLED])


def _store_label(store: Store, key: str) -> np.ndarray:
    label = store.label(key)
    if label is None:
        raise InputError(f"The image '{key}' of '{store.uri}' has no label, from which its scribble could be made.")
    return label


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value at a dotted key into nested dictionaries."""
    *groups, last = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {key}: '{group}' has a value already and is no group of settings.")
    values[last] = value


def _tracked(samples: Iterable[Sample], total: int) -> Iterator[Sample]:
    """Passes samples on and shows how many are done."""
    with Progress(total, "building") as bar:
        for number, sample in enumerate(samples, start=1):
            yield sample
            bar.update(number)


def _show(store: Store) -> None:
    """Prints what a store holds, without reading its images."""
    console = table_console()
    names = store.info.class_names
    sizes = {split: [store.size(key) for key in store.keys(split)] for split in store.splits}
    table = Table("split", "images", "smallest (H×W)", "largest (H×W)", title=store.info.name, title_justify="left")
    for split, shapes in sizes.items():
        smallest, largest = (by(shapes, key=lambda shape: shape[0] * shape[1]) for by in (min, max))
        table.add_row(split, str(len(shapes)), f"{smallest[0]}×{smallest[1]}", f"{largest[0]}×{largest[1]}")
    console.print(table)
    listed = ", ".join(f"{k} {name}" for k, name in enumerate(names))
    background = "class 0 is the background" if store.info.has_background else "no background class"
    for line in (
        f"{len(names)} classes ({background}): {listed}",
        f"images are stored as {store.image_encoding}; source: {store.info.source}",
        f"store: {store.uri}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
