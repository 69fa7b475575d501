"""What a finished run of CiSS-Net leaves beside its segmenter: the networks on X, and a picture of what they do."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.features import feature_shape
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.errors import CannotPredictError, InputError
from raysseg.segmenters import Segmenter

CONTEXT_FILE = "context/networks.safetensors"
"""Base, Bias and Context Net of a run, in its folder."""


def save_networks(networks: ContextNetworks, folder: Path) -> None:
    """Writes the networks on X into the folder of a run. Source: design."""
    path = folder / CONTEXT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in networks.state_dict().items()}, path)


def load_networks(settings: CiSSNetSettings, folder: Path, segmenter: Segmenter) -> ContextNetworks:
    """Reads the networks on X of a finished variant, in evaluation mode on the CPU.

    Args:
        settings: the variant's.
        folder: the variant's.
        segmenter: that X is from.

    Raises:
        InputError: the file is missing, damaged or of other networks.

    Source: design.
    """
    options = settings.cissnet
    channels, _ = feature_shape(segmenter, options.network.features)
    networks = ContextNetworks(
        options.network.model_dump(),
        channels,
        segmenter.num_classes,
        uses_context=options.uses_context,
        learns=options.learns,
    )
    path = folder / CONTEXT_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no networks on X: the file {CONTEXT_FILE} is missing.")
    read_into(networks, path)
    return networks.eval()


def load_predictor(settings: CiSSNetSettings, folder: Path, segmenter: Segmenter) -> Segmenter | ContextSegmenter:
    """Returns what predicts in a finished variant: S-Net with the contexts of its own predictions, or for 'none' the segmenter.

    Args:
        settings: the variant's.
        folder: the variant's.
        segmenter: that X is from.

    Raises:
        InputError: the networks cannot be read.
        CannotPredictError: the policy looks at the truth.

    Source: CiSS-Net, Sec. 3.4.
    """
    options = settings.cissnet
    if not options.trains:
        return segmenter
    if options.policy == "oracle":
        raise CannotPredictError(
            f"The variant in {folder} has the policy 'oracle', which looks at the truth: it cannot predict."
        )
    return ContextSegmenter(segmenter, load_networks(settings, folder, segmenter), options).eval()


def read_into(networks: ContextNetworks, path: Path) -> None:
    """Loads weights into networks of the same shapes. Raises `InputError` where the file is damaged or of others."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    own = {name: tuple(value.shape) for name, value in networks.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if own != given:
        first = next(name for name in sorted(own.keys() | given.keys()) if own.get(name) != given.get(name))
        raise InputError(
            f"{path} holds other networks: '{first}' is {given.get(first, 'missing')}, expected {own.get(first, 'nothing')}."
        )
    networks.load_state_dict(weights)
