"""Builds a segmenter from its settings."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import segmentation_models_pytorch as smp
import timm
from torch import Tensor, nn

from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES
from raysseg.segmenters.context import insert_context
from raysseg.segmenters.segmenter import Segmenter, SegmenterDecoder
from raysseg.segmenters.settings import PYRAMID_ARCHITECTURES, WIDTH_OPTIONS, SegmenterSettings
from raysseg.segmenters.weights import load_weights


class _TokenEncoder(nn.Module):
    """A vision transformer's maps and class tokens as one list: maps first, then the tokens, one per map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, tokens = self.network(images)
        return [*maps, *(token for token in tokens if token is not None)]


class _TokenDecoder(nn.Module):
    """DPT's decoder and the layers of its head before the classifier, on such a list."""

    def __init__(self, network: nn.Module, neck: nn.Module, depth: int) -> None:
        super().__init__()
        self.network = network
        self.neck = neck
        self.depth = depth

    def forward(self, encoded: list[Tensor]) -> Tensor:
        maps, tokens = encoded[: self.depth], encoded[self.depth :]
        return self.neck(self.network(maps, tokens or [None] * self.depth))


def _architecture_options(settings: SegmenterSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"encoder_depth": settings.encoder_depth}
    if settings.effective_output_stride is not None:
        # Of PSPNet alone the library hands this on to the encoder under the encoder's own name for it.
        name = "output_stride" if settings.architecture == "PSPNet" else "encoder_output_stride"
        options[name] = settings.effective_output_stride
    if settings.architecture in PYRAMID_ARCHITECTURES:
        width = settings.decoder_channels or 256
        options["decoder_channels"] = tuple(max(width >> level, 8) for level in range(settings.encoder_depth))
    elif settings.decoder_channels is not None:
        options[WIDTH_OPTIONS[settings.architecture]] = settings.decoder_channels
    if settings.architecture == "DPT":
        options["dynamic_img_size"] = True
    return options


def _build_network(settings: SegmenterSettings, num_classes: int, *, imagenet: bool) -> nn.Module:
    build = getattr(smp, settings.architecture)
    with warnings.catch_warnings():
        # For timm models, 'imagenet' stands for "their own weights"; the library warns that it takes it so.
        warnings.filterwarnings("ignore", message="For 'tu-'", category=UserWarning)
        return build(
            settings.encoder,
            encoder_weights="imagenet" if imagenet else None,
            classes=num_classes,
            **_architecture_options(settings),
        )


def _network(settings: SegmenterSettings, num_classes: int) -> nn.Module:
    download_error: Exception | None = None
    timm_name = settings.encoder.removeprefix("tu-")
    if settings.weights == "imagenet" and timm_name != settings.encoder and not timm.is_model_pretrained(timm_name):
        # timm would warn, and go on with random weights.
        raise InputError(f"There are no ImageNet weights for the encoder {settings.encoder}; set weights to 'none'.")
    if settings.weights == "imagenet":
        try:
            return _build_network(settings, num_classes, imagenet=True)
        except Exception as error:
            # Whatever the hub's client raised: without the download it either builds, or says what else is wrong.
            download_error = error
    try:
        network = _build_network(settings, num_classes, imagenet=False)
    except (ValueError, KeyError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise InputError(
            f"A segmenter {settings.architecture} with encoder {settings.encoder} and encoder_depth "
            f"{settings.encoder_depth} cannot be built: {_one_line(error)}"
        ) from error
    if download_error is not None:
        raise InputError(
            f"The ImageNet weights of the encoder {settings.encoder} could not be had ({_one_line(download_error)}); "
            "set weights to 'none', or to the path of a .safetensors or .pth file of the encoder."
        ) from download_error
    return network


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 120 else text[:120] + '…'}"


def build_segmenter(settings: SegmenterSettings, num_classes: int) -> Segmenter:
    """Returns a segmenter, in training mode on the CPU, with the weights that its settings name.

    New layers are initialised from torch's global random state.

    Args:
        settings: the network and its weights.
        num_classes: K, with the background.

    Raises:
        InputError: where the parts do not fit each other, ImageNet weights cannot be downloaded, or the weights file is
            missing, unreadable or of another network.
    """
    if not 2 <= num_classes <= MAX_CLASSES:
        raise InputError(f"A segmenter of {num_classes} classes was asked for, expected 2 to {MAX_CLASSES}.")
    network = _network(settings, num_classes)
    encoder, decoder, head = network.encoder, network.decoder, network.segmentation_head
    last_map = len(encoder.out_channels) - 1
    # DPT halves the last map once more before it doubles it.
    multiple = encoder.output_stride * (2 if settings.architecture == "DPT" else 1)
    if settings.architecture == "DPT":
        *neck, classifier = head.head
        encoder, decoder = _TokenEncoder(encoder), _TokenDecoder(decoder, nn.Sequential(*neck), last_map + 1)
    else:
        classifier = head[0]
    if settings.context == "pattern_propagation":
        if settings.architecture == "DPT":
            raise InputError(
                "The context module 'pattern_propagation' cannot be put into a DPT; set context to 'none'."
            )
        decoder = insert_context(decoder, network.encoder.out_channels[-1], classifier.in_channels)
    # PAN pools the last encoder map three times by two.
    minimum = 8 * multiple if settings.architecture == "PAN" else multiple
    try:
        segmenter = Segmenter(
            encoder,
            SegmenterDecoder(decoder, classifier, settings, last_map),
            settings,
            num_classes,
            multiple=multiple,
            minimum=minimum,
        )
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise InputError(
            f"The decoder of {settings.architecture} does not run on the maps of the encoder {settings.encoder} at "
            f"encoder_depth {settings.encoder_depth}: {_one_line(error)}"
        ) from error
    if settings.weights not in ("imagenet", "none"):
        load_weights(segmenter, settings.weights)
    return segmenter


@functools.lru_cache(maxsize=16)
def feature_channels(settings: SegmenterSettings, num_classes: int) -> int:
    """Returns the channels of F, without weights being read; a network is built for it once per process.

    Args:
        settings: of the segmenter.
        num_classes: K, with the background.

    Raises:
        InputError: as `build_segmenter`, where the parts do not fit each other.

    Source: design.
    """
    return build_segmenter(settings.model_copy(update={"weights": "none"}), num_classes).feature_channels
