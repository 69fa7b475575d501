"""`raysseg label`: which regions of plain images people should label next, and what becomes of their answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysseg.cli.progress import Progress
from raysseg.configuration import load_settings
from raysseg.data.readers.images import read_image
from raysseg.errors import InputError
from raysseg.labelling.answers import Refusal
from raysseg.labelling.export import export_answers
from raysseg.labelling.inputs import list_files, read_answers_of
from raysseg.labelling.ledger import Ledger
from raysseg.labelling.networks import Networks, variant_options
from raysseg.labelling.next_round import next_round
from raysseg.labelling.overview import overview
from raysseg.labelling.project import Project, check_project, create_project, list_images
from raysseg.labelling.rounds import Rounds
from raysseg.labelling.settings import LabellingSettings
from raysseg.labelling.taking import AnswerTaker, Taken
from raysseg.visualization import RunDirectory

label_app = typer.Typer(
    name="label",
    help="Have people label the regions that a segmenter learns most from: no ground truth is needed.",
    no_args_is_help=True,
    add_completion=False,
)

RunPart = Annotated[Path, typer.Argument(help="Folder of the labelling run.")]


@label_app.command("init")
def init(
    run: RunPart,
    images: Annotated[Path, typer.Option(help="Folder of the images; nothing else is in it.")],
    classes: Annotated[
        str | None, typer.Option(help="Names a,b,c of the classes 0, 1, …; those of --from where it is given.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Regions over height and width of every image.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Who ranks: entropy (default), uniform, margin, bald, coreset or query.")
    ] = None,
    variant: Annotated[
        Path | None, typer.Option("--from", metavar="VARIANT", help="Finished variant whose networks are used.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as training.updates=500."),
    ] = None,
) -> None:
    """Make a labelling run from a plain folder of images."""
    values: dict[str, Any] = {"images": str(images.absolute())}
    if variant is not None:
        _take_variant(values, variant, policy)
    if classes is not None:
        values["classes"] = [name.strip() for name in classes.split(",")]
    if grid is not None:
        rows, columns = _parse_grid(grid)
        values["regions"] = {**values.get("regions", {}), "rows": rows, "columns": columns}
    if policy is not None:
        values["policy"] = policy
    for assignment in settings or []:
        _assign(values, assignment)
    if "classes" not in values:
        raise InputError("The classes are not known: name them with --classes a,b,c, or give a variant with --from.")
    _make_absolute(values)
    checked = load_settings(LabellingSettings, values, where="the options")
    found = list_images(images)
    check_project(run, checked, found)
    # Networks that cannot be had are better said now than at the first round, and so are images that are broken.
    Networks(checked).check_images(len(found))
    with Progress(len(found), "reading the images") as bar:
        for number, image in enumerate(found.values(), start=1):
            read_image(image.file)
            bar.update(number)
    project = create_project(run, checked, found)
    _say(
        f"{len(found)} images with {project.grid.count} regions each ({project.total} in all), "
        f"{len(checked.classes)} classes; go on with: raysseg label next {run} --n NUMBER"
    )


@label_app.command("next")
def next_command(
    run: RunPart,
    n: Annotated[int, typer.Option("--n", min=1, help="How many regions to label now.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for what is to be labelled; RUN/rounds/NUMBER by default.")
    ] = None,
    image_url: Annotated[
        str | None,
        typer.Option(
            help="Label Studio: what stands before crops/… and context/… in the pictures' addresses; by default that of the "
            "round's folder among its local files."
        ),
    ] = None,
) -> None:
    """Train on the answers so far, rank, and write the regions to label now."""
    done = next_round(run, n, out, image_url, lambda title, total: Progress(total, title))
    how = f"chosen by {done.policy}"
    if done.answers:
        how += f" with a segmenter trained on {done.answers} answers"
    elif not done.prelabelled:
        how = "drawn at random, without pre-labels: there are no answers yet, and no trained segmenter"
    _say(f"Round {done.number}: {done.regions} regions in {done.out}, {how}.")


@label_app.command("add")
def add(
    run: RunPart,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Index PNGs (or folders of them), a Label Studio export (.json), CVAT exports (.zip, .xml)."
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Put these answers in the place of earlier ones for the same regions.")
    ] = False,
) -> None:
    """Take answers into the ledger; exit status 1 where some were refused."""
    project = Project(run)
    paths = list_files(files)
    with Ledger(project.ledger) as ledger:
        if ledger.repaired is not None:
            print(ledger.repaired, file=sys.stderr)
        taker = AnswerTaker(project, Rounds(run / "rounds"), ledger, replace=replace)
        with Progress(len(paths), "taking answers") as bar:
            for number, path in enumerate(paths, start=1):
                taker.take(read_answers_of(path, project.settings.classes))
                bar.update(number, answers=len(taker.taken.added))
    _report(taker.taken)
    if taker.taken.refused:
        raise typer.Exit(1)


@label_app.command("status")
def status(run: RunPart) -> None:
    """Show what was asked for, what was answered, and which classes the answers have."""
    shown = overview(Project(run))
    _say(f"{shown.asked} of {shown.total} regions asked for, {shown.answered} answered")
    rounds = Table()
    for column in ("round", "policy", "policy version", "trained on", "asked", "answered"):
        rounds.add_column(column, justify="left" if column.startswith("policy") else "right")
    for one in shown.rounds:
        rounds.add_row(
            str(one.number), one.policy, one.policy_version, f"{one.answers} answers", str(one.asked), str(one.answered)
        )
    Console().print(rounds)
    _say(f"{shown.pixels} labelled pixels, {shown.open_pixels} left open")
    classes = Table()
    classes.add_column("class")
    classes.add_column("share", justify="right")
    for name, share in shown.class_shares.items():
        # Text, not markup: a name may hold brackets.
        classes.add_row(Text(name), f"{100 * share:.2f} %")
    Console().print(classes)
    if shown.torn_bytes:
        _say(
            f"The ledger's last line is torn or damaged ({shown.torn_bytes} bytes); the next raysseg label add sets it aside."
        )


@label_app.command("export")
def export(
    run: RunPart,
    out: Annotated[Path, typer.Option(help="New folder; it can be trained on with the source 'folder'.")],
    val_share: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the images for the split 'val'.")] = 0.2,
) -> None:
    """Write images and label maps (index PNGs, 255 where nothing is labelled) to train on."""
    with Progress(None, "exporting") as bar:
        done = export_answers(run, out, val_share=val_share, on_image=lambda number, total: bar.update(number, total))
    _say(f"{done.train} images to train on and {done.val} to evaluate on in {out}; {sum(done.pixels)} labelled pixels.")


def _take_variant(values: dict[str, Any], variant: Path, policy: str | None) -> None:
    """Takes over the classes of a variant, and where its query network ranks the grid that it was trained with."""
    found = RunDirectory(variant).variants()
    if len(found) > 1:
        listed = ", ".join(str(entry.path) for entry in found)
        raise InputError(f"{variant} holds {len(found)} trained variants; choose one of the folders {listed}.")
    names, options = variant_options(found[0].path)
    values |= {"variant": str(found[0].path), "classes": list(names)}
    if options is not None:
        own = options.regions
        grid = {"rows": own.rows, "columns": own.columns}
        values["regions"] = own.model_dump(mode="json") if policy == "query" else grid


def _parse_grid(text: str) -> tuple[int, int]:
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise InputError(f"--grid is '{text}'; two numbers above 0 are expected, as 4x6: rows x columns.")
    return int(rows), int(columns)


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Sets the key of KEY=VALUE, whose parts are divided by dots, to a value in YAML."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise InputError(f"--set {assignment}: KEY=VALUE is expected.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {assignment}: '{parent}' has a value already, so it has no part '{last}'.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {assignment}: the value is not YAML.") from None


def _make_absolute(values: dict[str, Any]) -> None:
    """Names the files that a run is made from independently of the folder in which it is made."""
    segmenter, variant = values.get("segmenter"), values.get("variant")
    if isinstance(variant, str) and Path(variant).is_dir():
        values["variant"] = str(Path(variant).absolute())
    weights = segmenter.get("weights") if isinstance(segmenter, dict) else None
    if isinstance(weights, str) and weights not in ("imagenet", "none") and Path(weights).is_file():
        values["segmenter"] = {**values["segmenter"], "weights": str(Path(weights).absolute())}


def _report(taken: Taken) -> None:
    """Says what became of the answers: on standard error with a list where some were refused, else on standard output."""
    parts = [f"{len(taken.added)} answers taken"]
    if taken.replaced:
        parts.append(f"{len(taken.replaced)} put in the place of earlier ones")
    if taken.known:
        parts.append(f"{len(taken.known)} were known already")
    if taken.open:
        parts.append(f"{len(taken.open)} regions have no label yet and are still asked for")
    if taken.unchanged:
        parts.append(f"{len(taken.unchanged)} of those taken equal the segmenter's pre-label in every pixel")
    if taken.surplus:
        parts.append(f"labels in {taken.surplus} regions that were not asked for were left out")
    for one in taken.refused:
        print(_refusal(one), file=sys.stderr)
    if taken.refused:
        parts.append(f"{len(taken.refused)} refused, for the reasons above")
        print(f"{'; '.join(parts)}.", file=sys.stderr)
    else:
        _say(f"{'; '.join(parts)}.")


def _refusal(one: Refusal) -> str:
    return " ".join(f"refused: {one.name} ({one.source}): {one.reason}".split())


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
