"""The networks that a labelling run starts from: a finished variant's, or a new segmenter with given weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from raysseg.algorithms.ralis.config import LearningOptions, RALISOptions, RALISSettings
from raysseg.algorithms.ralis.module import QUERY, QueryNetwork
from raysseg.algorithms.ralis.results import QUERY_FILE
from raysseg.algorithms.recipes import FinishedVariant, load_variant
from raysseg.core.modules import SEGMENTER
from raysseg.errors import InputError
from raysseg.labelling.settings import LabellingSettings
from raysseg.segmenters import Segmenter, build_segmenter

_FINGERPRINT = 12


class Networks:
    """A labelling run's segmenter as it starts, and the query network where one ranks.

    Args:
        settings: the run's.

    Raises:
        InputError: the variant is not finished, has other classes or another grid, or no query network where one is asked for;
            the weights cannot be had.
    """

    def __init__(self, settings: LabellingSettings) -> None:
        self.settings = settings
        self.query: QueryNetwork | None = None
        torch.manual_seed(settings.seed)
        if settings.variant is None:
            self.segmenter, self.knows_classes = _new_segmenter(settings)
            self.options = _options(settings)
        else:
            variant = load_variant(Path(settings.variant))
            _check_classes(settings, variant)
            self.segmenter, self.knows_classes = _variant_segmenter(settings, variant), True
            self.options = _options(settings)
            if settings.policy == "query":
                self.query, self.options = _query_network(settings, variant)
                self.query.eval()
        self.segmenter.eval()

    def check_images(self, images: int) -> None:
        """Raises `InputError` where a run has fewer images than the state that the query network looks at."""
        wanted = self.options.sets.state
        if self.query is not None and images < wanted:
            raise InputError(
                f"The state of the query network has {wanted} images, but the run has only {images}; "
                "put more images into the folder, or rank with another --policy."
            )


def variant_options(folder: Path) -> tuple[tuple[str, ...], RALISOptions | None]:
    """The classes of a finished variant, and its settings of the labelling game where its method is RALIS.

    Raises:
        InputError: it is not finished.
    """
    variant = load_variant(folder)
    options = variant.settings.ralis if isinstance(variant.settings, RALISSettings) else None
    return variant.info.class_names, options


def fingerprint(segmenter: Segmenter, query: QueryNetwork | None) -> str:
    """Twelve hexadecimal digits that change with any weight of the networks that rank."""
    digest = hashlib.sha256()
    for network in (segmenter, query):
        if network is not None:
            for name, value in network.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:_FINGERPRINT]


def _options(settings: LabellingSettings) -> RALISOptions:
    """The labelling game's settings as far as ranking looks at them."""
    return RALISOptions(
        policy=settings.policy,
        regions=settings.regions,
        per_step=1,
        pool_size=settings.pool_size,
        budgets=(1,),
        dropout_passes=settings.dropout_passes,
        dropout=settings.dropout,
        learning=LearningOptions(budget=1),
    )


def _new_segmenter(settings: LabellingSettings) -> tuple[Segmenter, bool]:
    """A segmenter with the weights that the settings name, and whether they are those of its classifier, too."""
    own = settings.segmenter
    if settings.policy == "bald":
        own = own.model_copy(update={"dropout": settings.dropout})
    segmenter = build_segmenter(own, len(settings.classes))
    if own.weights in ("imagenet", "none"):
        return segmenter, False
    # A weights file holds an encoder or a whole segmenter; only then does the decoder differ from a fresh one.
    torch.manual_seed(settings.seed)
    fresh = build_segmenter(own.model_copy(update={"weights": "none"}), len(settings.classes)).decoder.state_dict()
    loaded = segmenter.decoder.state_dict()
    return segmenter, any(not torch.equal(value, fresh[name]) for name, value in loaded.items())


def _variant_segmenter(settings: LabellingSettings, variant: FinishedVariant) -> Segmenter:
    if settings.policy != "bald":
        return variant.segmenter
    weights = variant.folder / SEGMENTER / "online.safetensors"
    own = variant.settings.segmenter.model_copy(update={"weights": str(weights), "dropout": settings.dropout})
    return build_segmenter(own, len(settings.classes))


def _check_classes(settings: LabellingSettings, variant: FinishedVariant) -> None:
    if settings.classes != variant.info.class_names:
        raise InputError(
            f"The classes are {', '.join(settings.classes)}, but the variant {variant.folder} was trained on "
            f"{', '.join(variant.info.class_names)}; the same ones in the same order are expected."
        )


def _query_network(settings: LabellingSettings, variant: FinishedVariant) -> tuple[QueryNetwork, RALISOptions]:
    path = variant.folder / QUERY / QUERY_FILE
    if not isinstance(variant.settings, RALISSettings) or not path.is_file():
        raise InputError(
            f"The policy is 'query', but the variant {variant.folder} has no query network; a finished variant of RALIS "
            "with ralis.policy 'query' is expected."
        )
    options = variant.settings.ralis
    if options.regions != settings.regions:
        own, other = settings.regions.model_dump(mode="json"), options.regions.model_dump(mode="json")
        key = next(key for key in own if own[key] != other[key])
        raise InputError(
            f"regions.{key} is {json.dumps(own[key])}, but the query network of {variant.folder} was trained with "
            f"{json.dumps(other[key])}; the same is expected."
        )
    network = QueryNetwork(**options.network(len(settings.classes)))
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"The query network {path} cannot be read: {' '.join(str(error).split())[:160]}") from error
    return network, options
