"""`raysseg predict`: segments images with a trained variant."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console

from raysseg.algorithms.trained import TrainedVariant
from raysseg.cli.inference_options import FlipOption, ScalesOption, parse_scales
from raysseg.cli.progress import Progress
from raysseg.data.readers.images import files_by_stem, read_image
from raysseg.errors import InputError
from raysseg.visualization import RunDirectory, overlay, save_index_png


def predict_command(
    run: Annotated[Path, typer.Argument(help="A variant folder, or a run directory with one variant and seed.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the class probabilities, float16 [K, H, W], as .npz.")
    ] = False,
    scales: ScalesOption = None,
    flip: FlipOption = None,
) -> None:
    """Writes an index PNG with a palette and an overlay for every image."""
    factors = parse_scales(scales)
    folder = _variant_folder(run)
    paths = _inputs(images)
    endings = (".png", "_overlay.png", *((".npz",) if probabilities else ()))
    _check_outputs(paths, out, endings)
    with Progress(len(paths), "checking the images") as bar:
        for number, path in enumerate(paths, start=1):
            read_image(path)
            bar.update(number)
    trained = TrainedVariant(folder, scales=factors, flip=flip)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with Progress(len(paths), "predicting") as bar:
        for number, path in enumerate(paths, start=1):
            image = read_image(path)
            predicted = trained.probabilities(image)
            labels = predicted.argmax(0).to(torch.uint8).cpu().numpy()
            palette = trained.info.palette
            save_index_png(out / f"{path.stem}.png", labels, palette)
            Image.fromarray(overlay(image, labels, palette)).save(out / f"{path.stem}_overlay.png")
            if probabilities:
                np.savez_compressed(out / f"{path.stem}.npz", probabilities=predicted.half().cpu().numpy())
            bar.update(number, images_per_second=number / (time.perf_counter() - start))
    Console().print(f"{len(paths)} images segmented into {out}", highlight=False, markup=False, soft_wrap=True)


def _variant_folder(run: Path) -> Path:
    """The one variant and seed of a run. Raises `InputError` where there are several, with their folders."""
    found = RunDirectory(run).variants()
    if len(found) > 1:
        listed = ", ".join(str(entry.path) for entry in found)
        raise InputError(f"{run} holds {len(found)} trained variants; choose one of the folders {listed}.")
    return found[0].path


def _inputs(given: list[Path]) -> list[Path]:
    """The image files that were named, and those in the folders that were named."""
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = list(files_by_stem(path, "image").values())
        if not inside:
            raise InputError(f"The folder '{path}' holds no image.")
        paths += inside
    return paths


def _check_outputs(paths: list[Path], out: Path, endings: tuple[str, ...]) -> None:
    """Refuses results that would overwrite one another or an input."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; a folder for the results is expected.")
    inputs = {path.resolve() for path in paths}
    written: dict[str, Path] = {}
    for path in paths:
        for ending in endings:
            name = f"{path.stem}{ending}"
            if name in written:
                raise InputError(
                    f"The images '{written[name]}' and '{path}' would both be written to '{out / name}'; "
                    "names that differ are expected."
                )
            if (out / name).resolve() in inputs:
                raise InputError(
                    f"The result '{out / name}' would replace an image that is to be read; use another --out."
                )
            written[name] = path
