"""Weights of a segmenter in files: its own checkpoints, and encoders trained elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import raysseg
from raysseg.errors import InputError
from raysseg.segmenters.segmenter import Segmenter

_IDENTITY = ("architecture", "encoder", "encoder_depth", "output_stride", "decoder_channels", "context")
"""Settings that decide which tensors a segmenter has, and what they mean."""


def save_segmenter(path: str | Path, segmenter: Segmenter) -> None:
    """Writes a segmenter into one .safetensors file; `build_segmenter` reads it when `weights` names it.

    The file is written under a temporary name and renamed: it exists entirely or not at all.

    Args:
        path: the file; its folder must exist.
        segmenter: on any device.

    Raises:
        InputError: if the path does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"A segmenter is saved as a .safetensors file, not as {path}.")
    metadata = {
        "format": "pt",
        "raysseg": raysseg.__version__,
        "settings": json.dumps(segmenter.settings.model_dump(exclude={"weights"})),
        "num_classes": str(segmenter.num_classes),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(segmenter: Segmenter, path: str | Path) -> None:
    """Fills a segmenter from a file of encoder weights or of a whole segmenter; which of the two, the names tell.

    Of an encoder's file, tensors that the segmenter has no place for (a classifier, stages beyond `encoder_depth`) are
    left aside; every tensor of the segmenter's encoder must be in the file. A whole segmenter must match exactly.

    Raises:
        InputError: if the file is missing, unreadable, or of another network.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if any(name.startswith("decoder.") for name in tensors) and any(name.startswith("encoder.") for name in tensors):
        _check_identity(segmenter, path, metadata)
        expected, module = segmenter.state_dict(), "segmenter"
        surplus = len(tensors.keys() - expected.keys())
    else:
        expected, module = segmenter.encoder.state_dict(), "encoder"
        tensors = _as_encoder(tensors, expected)
        surplus = 0
    # Files older than the counter lack it; it has no influence on what a network computes.
    needed = [name for name in expected if name in tensors or not name.endswith("num_batches_tracked")]
    missing = sum(name not in tensors for name in needed)
    misshaped = sum(name in tensors and tensors[name].shape != expected[name].shape for name in needed)
    if missing or misshaped or surplus:
        settings = segmenter.settings
        target = (
            f"{settings.architecture} with encoder {settings.encoder}" if module == "segmenter" else settings.encoder
        )
        more = f", and {surplus} are of no use" if surplus else ""
        raise InputError(
            f"The weights file {path} is not for the {module} {target}: of {len(needed)} expected tensors {missing} "
            f"are missing and {misshaped} have another shape{more}."
        )
    with torch.no_grad():
        for name in needed:
            expected[name].copy_(tensors[name])


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Returns the named tensors of a file and its metadata."""
    if not path.is_file():
        raise InputError(
            f"The weights file {path} does not exist; expected 'imagenet', 'none' or the path of a .safetensors, .pth "
            "or .pt file."
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if path.suffix in (".pth", ".pt"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
                content = content["state_dict"]
            if isinstance(content, Mapping):
                tensors = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
                if tensors and all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                    return tensors, {}
            raise InputError(f"The weights file {path} holds no named tensors, expected a state_dict.")
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The weights file {path} cannot be read ({' '.join(str(error).split())[:160]}).") from error
    raise InputError(f"The weights file {path} ends in '{path.suffix}', expected .safetensors, .pth or .pt.")


def _as_encoder(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under the encoder's own names: without `encoder.`, with the prefix of a wrapper."""
    names = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    for prefix in ("", "model.", "network.model."):
        if any(prefix + name in expected for name in names):
            return {prefix + name: tensor for name, tensor in names.items()}
    return names


def _check_identity(segmenter: Segmenter, path: Path, metadata: Mapping[str, str]) -> None:
    """Refuses a checkpoint whose metadata say that it is of another segmenter."""
    if "settings" not in metadata:
        return
    saved = json.loads(metadata["settings"])
    current = segmenter.settings.model_dump()
    for key in _IDENTITY:
        if saved.get(key) != current[key]:
            raise InputError(
                f"The weights file {path} is of a segmenter with {key} {saved.get(key)!r}, expected {current[key]!r}."
            )
    if int(metadata["num_classes"]) != segmenter.num_classes:
        raise InputError(
            f"The weights file {path} is of a segmenter with {metadata['num_classes']} classes, expected "
            f"{segmenter.num_classes}."
        )
