"""The training pass of a labelling step: the segmenter learns from the newest regions, and from their pixels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysseg.algorithms.ralis.config import RegionOptions, SegmenterStepOptions
from raysseg.algorithms.ralis.maps import Autocast, EncoderMaps, ImageSource
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.seeding import generator
from raysseg.data.augmentation import crop_and_flip, draw_geometry, normalise, warp_images, warp_labels
from raysseg.data.batches import GROUND_TRUTH
from raysseg.errors import NonFiniteError
from raysseg.functional.class_balance import label_mass
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.regions import cut_regions
from raysseg.segmenters import Segmenter, SegmenterOutput, upsample_logits


class LabelledImages(ImageSource, Protocol):
    """Images and labels by row number, as `raysseg.data.DeviceDataset` gives them."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""

    @property
    def keys(self) -> Sequence[str]:
        """Name of every row's image."""

    def sizes(self, rows: Tensor) -> Tensor:
        """(H, W) of the images of rows int64 `[B]`, int64 `[B, 2]`."""

    def labels(self, rows: Tensor, version: int) -> Tensor:
        """Label maps of rows int64 `[B]`, uint8 `[B, H, W]` at the top left of the canvas that `images` has for them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KnownLabels:
    """Images of which all or some labels are known from before.

    Args:
        rows: int64 `[M]`, each image once.
        asked: bool `[M, R]`, the regions whose labels are known.
    """

    rows: np.ndarray
    asked: np.ndarray

    @classmethod
    def of(cls, whole: np.ndarray, rows: np.ndarray, regions: np.ndarray, count: int) -> KnownLabels:
        """Joins images with all of their labels, int64 `[W]`, and single regions of other images, int64 `[L]` each."""
        images, places = np.unique(rows, return_inverse=True)
        asked: np.ndarray = np.ones((len(whole) + len(images), count), dtype=bool)
        asked[len(whole) :] = False
        asked[len(whole) + places, regions] = True
        return cls(rows=np.concatenate([whole, images]), asked=asked)


def region_labels(
    data: LabelledImages, rows: np.ndarray, regions: np.ndarray, grid: RegionOptions
) -> list[tuple[np.ndarray, Tensor]]:
    """Returns the labels of regions: the oracle's answer.

    Args:
        data: gives the labels.
        rows: images of the regions, int64 `[K]`.
        regions: their numbers therein, int64 `[K]`.
        grid: how images are cut.

    Returns:
        For each size of images which of the regions these are, int64 `[M]`, and their labels uint8 `[M, h, w]`: classes, 255
        unlabelled.
    """
    images, places = np.unique(rows, return_inverse=True)
    index = torch.as_tensor(images)
    labels, sizes = data.labels(index, GROUND_TRUTH), data.sizes(index).cpu().numpy()
    found = []
    for height, width in np.unique(sizes, axis=0):
        same = (sizes == (height, width)).all(1)
        of = np.flatnonzero(same[places])
        cut = cut_regions(labels[torch.as_tensor(places[of])][:, :height, :width], grid.rows, grid.columns)
        found.append((of, cut[torch.arange(len(of)), torch.as_tensor(regions[of])]))
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Minibatch:
    """What one update learns from.

    Args:
        rows: images, int64 `[B]`; one may stand twice where each region has its own crop.
        asked: bool `[B, R]`, which regions' labels count.
        centres: the region in the middle of a crop, int64 `[B]`.
        seeds: of the augmentation, int64 `[B]`.
    """

    rows: np.ndarray
    asked: np.ndarray
    centres: np.ndarray
    seeds: np.ndarray


class RegionTrainer:
    """Trains a segmenter on regions, with one optimiser over all steps of an episode.

    Batch normalisation works as in ordinary training, with the statistics of the images that pass together (of one size, with
    `pass_size` at most so many of a minibatch), and its running statistics follow; one image alone takes the running ones. With
    scope `decoder` the encoder's stay as they are.

    Args:
        data: images and labels.
        regions: the grid.
        options: how to train.
        maps: the encoder's maps, used with scope `decoder`.
        autocast: the precision.

    Source: RALIS, Sec. 3.1; the optimiser is the authors' code.
    """

    def __init__(
        self,
        data: LabelledImages,
        regions: RegionOptions,
        options: SegmenterStepOptions,
        maps: EncoderMaps,
        autocast: Autocast,
    ) -> None:
        self._data, self._regions, self._options, self._maps = data, regions, options, maps
        self._autocast = autocast
        # A window that holds a region is chosen here, so that what remains to be drawn is what happens within it.
        self._augmentation = options.augmentation.model_copy(update={"crop": None})
        self._crop = options.augmentation.crop

    def begin(self, segmenter: Segmenter, weights: Tensor | None = None) -> None:
        """Starts an episode with a segmenter, which is trained in place.

        Args:
            segmenter: f.
            weights: of the classes in the loss, float32 `[C]`; None weighs all alike.
        """
        options, self._weights = self._options, weights
        segmenter.requires_grad_(True)
        segmenter.encoder.requires_grad_(options.scope == "all")
        rate = options.optimiser.learning_rate
        groups = segmenter.parameter_groups(rate, options.head_multiplier, options.optimiser.weight_decay)
        for group in groups:
            group["learning_rate_multiplier"] = group["lr"] / rate
        # The first group is the encoder.
        groups = groups if options.scope == "all" else groups[1:]
        self._segmenter = segmenter
        self._network: nn.Module = segmenter if options.scope == "all" else segmenter.decoder
        self._optimiser = build_optimiser(options.optimiser, groups)

    def get_state(self) -> dict[str, Any]:
        """Returns weights and optimiser of what is trained."""
        return {"network": self._network.state_dict(), "optimiser": self._optimiser.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` gave."""
        self._network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])

    @torch.enable_grad()
    def train(
        self, rows: np.ndarray, regions: np.ndarray, *, seed: int, progress: float, known: KnownLabels | None = None
    ) -> float:
        """Passes over regions `passes` times.

        Args:
            rows: images of the regions, int64 `[K]`.
            regions: their numbers therein, int64 `[K]`.
            seed: of order, augmentation and dropout.
            progress: of the episode, in [0, 1), for the learning rate's schedule.
            known: what was labelled before; `rehearsal` of its images join every minibatch.

        Returns:
            The mean loss over minibatches.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        options, losses = self._options, []
        optimiser = options.optimiser
        set_learning_rate(self._optimiser, optimiser.learning_rate * schedule_factor(optimiser, progress))
        devices = [self._data.device] if self._data.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for number in range(options.passes):
                torch.manual_seed(int(generator(seed, "dropout", number).integers(2**62)))
                draws = generator(seed, "order", number)
                for minibatch in self._minibatches(rows, regions, draws):
                    losses.append(
                        self._update(minibatch if known is None else self._rehearsing(minibatch, known, draws))
                    )
        values = torch.stack(losses)
        if not bool(torch.isfinite(values).all()):
            keys = ", ".join(self._data.keys[row] for row in np.unique(rows))
            raise NonFiniteError(f"The segmenter's loss on newly labelled regions is {values.tolist()}; of {keys}.")
        return float(values.mean())

    def _minibatches(self, rows: np.ndarray, regions: np.ndarray, draws: np.random.Generator) -> list[_Minibatch]:
        """Cuts the regions, image by image in a drawn order, into minibatches of `batch_size` of them.

        Regions of one image pass the segmenter together, in one pass of that image, unless each has its own crop.
        """
        images, places = np.unique(rows, return_inverse=True)
        order = np.argsort(draws.permutation(len(images))[places], kind="stable")
        result = []
        for first in range(0, len(order), self._options.batch_size):
            part = order[first : first + self._options.batch_size]
            shown, of = np.unique(rows[part], return_inverse=True)
            asked: np.ndarray = np.zeros((len(shown), self._regions.count), dtype=bool)
            asked[of, regions[part]] = True
            if self._crop is not None:
                shown, asked = rows[part], asked[of]
            result.append(
                _Minibatch(
                    rows=shown,
                    asked=asked,
                    centres=regions[part] if self._crop is not None else np.zeros(len(shown), dtype=np.int64),
                    seeds=draws.integers(0, 2**62, size=len(shown), dtype=np.int64),
                )
            )
        return result

    def _rehearsing(self, minibatch: _Minibatch, known: KnownLabels, draws: np.random.Generator) -> _Minibatch:
        """Adds some images with what is known of them, or one crop of each around a region that is known."""
        count = min(self._options.rehearsal, len(known.rows))
        if count == 0:
            return minibatch
        drawn = draws.choice(len(known.rows), size=count, replace=False)
        asked = known.asked[drawn]
        return _Minibatch(
            rows=np.concatenate([minibatch.rows, known.rows[drawn]]),
            asked=np.concatenate([minibatch.asked, asked]),
            centres=np.concatenate([minibatch.centres, (draws.random(asked.shape) * asked).argmax(1)]),
            seeds=np.concatenate([minibatch.seeds, draws.integers(0, 2**62, size=count, dtype=np.int64)]),
        )

    def _update(self, minibatch: _Minibatch) -> Tensor:
        """Takes one step; returns the loss, the mean over labelled pixels by the weights of their classes."""
        self._segmenter.eval()
        labels = self._labels(minibatch)
        smallest = 1.0 if self._weights is None else 1e-6
        self._optimiser.zero_grad(set_to_none=True)
        if self._options.scope == "all":
            pixels, labels = self._augmented(minibatch, labels)
            self._segmenter.train(len(pixels) > 1)
            mass = label_mass(labels, self._weights).clamp(min=smallest)
            with self._autocast():
                output = self._segmenter(pixels)
            loss = _summed_loss(output, labels, self._weights) / mass
            loss.backward()
        else:
            mass = label_mass(labels, self._weights).clamp(min=smallest)
            losses = []
            together = self._options.pass_size or len(minibatch.rows)
            for batch in self._maps.batches(self._segmenter, minibatch.rows, together):
                self._segmenter.decoder.train(len(batch.places) > 1)
                with self._autocast():
                    output = self._segmenter.decode(batch.maps, batch.size)
                part = labels[torch.as_tensor(batch.places), : batch.size[0], : batch.size[1]]
                losses.append(_summed_loss(output, part, self._weights) / mass)
                losses[-1].backward()
            loss = torch.stack(losses).sum()
        if self._options.optimiser.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._options.optimiser.clip_norm)
        self._optimiser.step()
        return loss.detach()

    def _labels(self, minibatch: _Minibatch) -> Tensor:
        """Returns the labels of images uint8 `[B, H, W]`, 255 outside the regions that were asked for."""
        rows = torch.as_tensor(minibatch.rows)
        labels = self._data.labels(rows, GROUND_TRUTH)
        sizes = self._data.sizes(rows)
        region = _lines(sizes[:, 0], labels.shape[1], self._regions.rows)[:, :, None] * self._regions.columns
        region = region + _lines(sizes[:, 1], labels.shape[2], self._regions.columns)[:, None, :]
        asked = torch.as_tensor(minibatch.asked, device=labels.device).gather(1, region.flatten(1)).view_as(labels)
        return torch.where(asked, labels, UNLABELLED)

    def _augmented(self, minibatch: _Minibatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns varied images, normalised `[B, 3, h, w]`, and labels, uint8 `[B, h, w]`."""
        images, sizes = self._data.images(torch.as_tensor(minibatch.rows))
        seeds = torch.as_tensor(minibatch.seeds)
        if self._crop is None:
            geometry = draw_geometry(
                sizes, seeds, self._augmentation, output_size=(int(labels.shape[1]), int(labels.shape[2]))
            )
        else:
            windows = torch.minimum(sizes, sizes.new_tensor(self._crop))
            geometry = draw_geometry(windows, seeds, self._augmentation, output_size=self._crop)
            corners = self._corners(minibatch, sizes, windows)
            geometry.matrix[:, :, 2] += corners.flip(1)
        if self._augmentation.scale == (1.0, 1.0) and self._augmentation.rotation == 0.0:
            pixels, (moved,) = crop_and_flip(images, [labels], sizes, geometry)
            return pixels, moved
        return normalise(warp_images(images, sizes, geometry)), warp_labels(labels, sizes, geometry)

    def _corners(self, minibatch: _Minibatch, sizes: Tensor, windows: Tensor) -> Tensor:
        """Draws where the windows of crops begin, int64 `[B, 2]` (y, x): within the image, around a region's centre."""
        grid = sizes.new_tensor([self._regions.rows, self._regions.columns])
        place = np.stack(np.divmod(minibatch.centres, self._regions.columns), 1)
        region = sizes // grid
        centre = torch.as_tensor(place, device=sizes.device) * region + region // 2
        lowest = (centre - windows + 1).clamp(min=0)
        highest = torch.minimum(centre, sizes - windows)
        shares = np.stack([generator(int(seed), "corner").random(2) for seed in minibatch.seeds])
        drawn = torch.as_tensor(shares, device=sizes.device) * (highest - lowest + 1)
        return lowest + drawn.long()


def _lines(lengths: Tensor, canvas: int, parts: int) -> Tensor:
    """Returns the part of an image's height or width `[B]` that each line of the canvas belongs to, int64 `[B, canvas]`."""
    lines = torch.arange(canvas, device=lengths.device)
    return (lines * parts // lengths[:, None]).clamp(max=parts - 1)


def _summed_loss(output: SegmenterOutput, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sum of the cross-entropy over labelled pixels, uint8 `[B, H, W]`, by the weights of their classes `[C]`."""
    logits = upsample_logits(output.logits, (int(labels.shape[1]), int(labels.shape[2])))
    labelled = labels < PADDING
    pixels, classes = logits.permute(0, 2, 3, 1)[labelled], labels[labelled].long()
    return F.cross_entropy(pixels, classes, weight=weights, reduction="sum")
