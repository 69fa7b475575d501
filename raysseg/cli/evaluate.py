"""`raysseg evaluate`: scores trained variants on a split of their own or of another store."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from rich.text import Text

from raysseg.algorithms.trained import TrainedVariant
from raysseg.cli.console import table_console
from raysseg.cli.inference_options import FlipOption, ScalesOption, parse_scales
from raysseg.cli.progress import Progress
from raysseg.core.metrics_writer import write_atomically
from raysseg.data import Store
from raysseg.errors import CannotPredictError, InputError
from raysseg.evaluation import Counts, tells_objects_apart
from raysseg.visualization import VariantRun, load_variant_runs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One variant and the images it is scored on."""

    run: VariantRun
    trained: TrainedVariant
    store: Store
    split: str


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run directory (all its finished variants) or one variant folder.")],
    data: Annotated[
        str | None, typer.Option(metavar="STORE", help="Path or URI of a store; by default the run's own data.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split that is scored; by default the one the run validates on.")
    ] = None,
    scales: ScalesOption = None,
    flip: FlipOption = None,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Scores trained variants: mIoU, pixel accuracy, mean foreground Dice, the IoU of every class, and iIoU on Cityscapes."""
    factors = parse_scales(scales)
    if out is not None and out.suffix != ".json":
        raise InputError(f"The file {out} ends in '{out.suffix}'; expected is a name that ends in .json.")
    other = None if data is None else Store.open(data)
    runs = load_variant_runs([run])
    finished = [entry for entry in runs if entry.finished]
    if not finished:
        raise InputError(f"{run} has no finished variant: {_name(runs[0])} is {runs[0].status()}.")
    jobs, left_out = [], []
    for entry in finished:
        try:
            jobs.append(_prepare(entry, other, split, factors, flip))
        except CannotPredictError as error:
            left_out.append(f"{_name(entry)} was left out. {error}")
            if len(left_out) == len(finished):
                raise
    results = []
    with Progress(sum(len(job.store.keys(job.split)) for job in jobs), "evaluating") as bar:
        for entry in runs:
            if not entry.finished:
                bar.note(f"{_name(entry)} was left out, it is {entry.status()}.")
        for sentence in left_out:
            bar.note(sentence)
        done = 0
        for job in jobs:

            def show(images: int, name: str = _name(job.run), before: int = done, **fields: float) -> None:
                bar.update(before + images, phase=name, **fields)

            results.append(_score(job, show))
            done += len(job.store.keys(job.split))
    console = table_console()
    console.print(_table(results))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(results, indent=1))
        console.print(f"Written to {out}", highlight=False, markup=False, soft_wrap=True)


def _name(run: VariantRun) -> str:
    return f"{run.variant} · seed {run.seed}"


def _prepare(
    run: VariantRun, other: Store | None, split: str | None, scales: tuple[float, ...] | None, flip: bool | None
) -> _Job:
    """Loads a variant and refuses data that it cannot be scored on."""
    trained = TrainedVariant(run.path, scales=scales, flip=flip)
    store = other or trained.store
    own, given = trained.info.class_names, store.info.class_names
    if given != own:
        raise InputError(
            f"The store '{store.uri}' has the classes {', '.join(given)}, but {_name(run)} was trained on "
            f"{', '.join(own)}; the same names in the same order are expected."
        )
    chosen = split or trained.settings.data.val_split
    store.keys(chosen)
    return _Job(run=run, trained=trained, store=store, split=chosen)


def _score(job: _Job, show: Callable[..., None]) -> dict[str, Any]:
    """Runs one variant over its images; `show` is told how many are done, with images_per_second."""
    info, keys = job.trained.info, job.store.keys(job.split)
    objects = tells_objects_apart(info.class_names) and job.store.has_instances(keys[0])
    total: Counts | None = None
    start = time.perf_counter()
    show(0)
    for number, key in enumerate(keys, start=1):
        label = job.store.label(key)
        if label is None:
            raise InputError(
                f"The image '{key}' of the store '{job.store.uri}' has no label; the split '{job.split}' cannot be scored."
            )
        prediction = job.trained.probabilities(job.store.image(key)).argmax(0).to(torch.uint8).cpu()
        counts = Counts.of(
            prediction[None],
            torch.tensor(label)[None],
            info.num_classes,
            instances=_instances(job, key) if objects else None,
            sizes=torch.tensor([label.shape]),
        )
        total = counts if total is None else total + counts
        show(number, images_per_second=number / (time.perf_counter() - start))
    assert total is not None
    instance_scores = total.instance_scores()
    return {
        "run": job.run.run,
        "variant": job.run.variant,
        "seed": job.run.seed,
        "data": job.store.uri,
        "split": job.split,
        "images": len(keys),
        "scales": list(job.trained.protocol.scales),
        "flip": job.trained.protocol.flip,
        "class_names": list(info.class_names),
        **dataclasses.asdict(total.scores()),
        **({} if instance_scores is None else dataclasses.asdict(instance_scores)),
    }


def _instances(job: _Job, key: str) -> torch.Tensor:
    """The instances of an image, int32 [1, H, W]."""
    found = job.store.instances(key)
    if found is None:
        raise InputError(f"The sample '{key}' of the store '{job.store.uri}' has no instances, but others have.")
    return torch.tensor(found.astype(np.int32))[None]


def _table(results: list[dict[str, Any]]) -> Table:
    """One column per variant; one line per score and per class, in per cent."""
    first = results[0]
    title = f"{first['images']} images of the split {first['split']} of {first['data']}"
    table = Table(
        title=Text(title), title_justify="left", caption="in per cent; –: neither in the labels nor predicted"
    )
    table.add_column("")
    for result in results:
        table.add_column(Text(f"{result['variant']} · seed {result['seed']}"), justify="right")
    for score, key in (
        ("mIoU", "miou"),
        ("pixel accuracy", "pixel_accuracy"),
        ("mean foreground Dice", "mean_foreground_dice"),
    ):
        table.add_row(score, *(_percent(result[key]) for result in results))
    if any("iiou" in result for result in results):
        table.add_row("mean iIoU of objects", *(_percent(result.get("iiou")) for result in results))
    table.add_section()
    for number, name in enumerate(first["class_names"]):
        table.add_row(Text(f"IoU of {name}"), *(_percent(result["per_class_iou"][number]) for result in results))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
