"""One stage played on cached features: what a policy's label maps are worth to decoders that learn from them.

A stage is long and coverage pays only at its end, so a policy is paid for all of it. The encoder stands still and its maps are
held, so that only decoders are trained: two, on the policy's label maps of some images, in two orders.
The return is an estimate of their overlap with the truth on images that neither was trained on, from how far they agree with each
other there and with the strokes. See `functional.estimated_overlap`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.policy import Policy
from raysseg.algorithms.eil.state import StateBuilder
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.seeding import generator
from raysseg.core.segmenter_batch import SegmenterBatch, split_labels
from raysseg.core.segmenter_loss import ClassWeights, SegmenterLoss, Totals, count_pixels, teach
from raysseg.errors import InputError
from raysseg.evaluation import Scores, confusion_matrix
from raysseg.functional.class_balance import class_weights
from raysseg.functional.class_presence import present_classes
from raysseg.functional.constants import PADDING
from raysseg.functional.label_inference import predicted_classes
from raysseg.functional.policy_search import class_overlap, estimated_overlap, image_traits, pair_counts
from raysseg.segmenters import Segmenter, SegmenterDecoder, SegmenterOutput, build_segmenter, upsample_logits

INFERRED = 1
"""The version that a rehearsed stage's label maps stand for: any that is not of scribbles."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rehearsed stage came to.

    Args:
        overlap: the return, in [0, 1].
        agreement: mean over classes of the overlap between both networks, in [0, 1].
        on_strokes: mean over classes of their overlap with strokes that neither learned from, in [0, 1].
        labelled_share: of the images' pixels.
        miou: of both networks on the images that were left out, their mean, where there is ground truth; never used for training.
    """

    overlap: float
    agreement: float
    on_strokes: float
    labelled_share: float
    miou: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A part of an image, in pixels that are whole cells of every map."""

    top: int
    left: int
    height: int
    width: int

    def of(self, maps: torch.Tensor, canvas: tuple[int, ...]) -> torch.Tensor:
        """Returns the part of maps `[B, …, h, w]` of a canvas (H, W) in pixels."""
        cell = canvas[0] // maps.shape[-2]
        rows = slice(self.top // cell, (self.top + self.height) // cell)
        return maps[..., rows, self.left // cell : (self.left + self.width) // cell]


class Rehearsal:
    """The states of some training images at one stage, on which policies are played.

    Args:
        builder: makes states and infers label maps.
        segmenter: the teacher, which policies are judged from.
        rows: int64 `[N]` of the training split.
        version: label version of M.
        truth: whether training images have ground truth.

    Raises:
        InputError: there is only one image.
    """

    def __init__(
        self,
        builder: StateBuilder,
        segmenter: Segmenter,
        rows: torch.Tensor,
        *,
        version: int,
        truth: bool,
    ) -> None:
        if len(rows) < 2:
            raise InputError(
                f"A stage cannot be rehearsed on {len(rows)} training image: expected 2 or more, of which one is left out."
            )
        self.builder = builder
        self.settings: EILSettings = builder.settings
        self.decoder = segmenter.decoder
        batch = self.settings.engine.inference_batch_size
        states = [builder.observe(segmenter, part, version) for part in rows.split(batch)]
        self.encoded = [_join(maps, 0) for maps in zip(*(state.encoded for state in states), strict=True)]
        self.labels = _join([state.labels for state in states], PADDING)
        self.scribbles = _join([state.scribbles for state in states], PADDING)
        self.classes = _join([state.classes for state in states], 0)
        self.confidence = _join([state.confidence for state in states], 0)
        self.truth = builder.workspace.train.labels(rows, -1) if truth else None
        self.traits = image_traits(self.confidence, self.labels)
        self.present = torch.bincount(self.scribbles.flatten().long(), minlength=256)[: builder.num_classes] > 0

    def play(self, policy: Policy, centre: tuple[torch.Tensor, torch.Tensor], *, seed: int, fold: int) -> Outcome:
        """Plays a policy for a stage.

        Args:
            policy: what infers the label maps.
            centre: mean and standard deviation of the traits `[2]` each.
            seed: of both orders; policies that are compared are given the same one.
            fold: which images are left out.

        Source: reconstruction.
        """
        labels = self._infer(policy, centre)
        count = len(labels)
        left_out = max(1, round(self.settings.eil.population.held_out * count))
        order = torch.tensor(generator(seed, "rehearsal", fold).permutation(count), device=labels.device)
        learned, predicted = order[left_out:], order[:left_out]
        first, second = (self._predict(self._learn(labels, learned, seed, one), predicted) for one in range(2))
        strokes, num_classes = self.scribbles[predicted], self.builder.num_classes
        drawn = strokes < PADDING
        pair = pair_counts(first, second, strokes != PADDING, num_classes)
        on_strokes = pair_counts(first, second, drawn, num_classes)
        known = torch.where(drawn, strokes, 0)
        judged = sum(pair_counts(known, one, drawn, num_classes) for one in (first, second))
        assert isinstance(judged, torch.Tensor)
        miou = None
        if self.truth is not None:
            truth = self.truth[predicted]
            matrices = (confusion_matrix(one, truth, self.builder.num_classes) for one in (first, second))
            miou = float(np.mean([Scores.from_confusion(matrix).miou for matrix in matrices]))
        labelled = (labels < PADDING).sum() / (labels != PADDING).sum()
        return Outcome(
            overlap=float(estimated_overlap(pair, on_strokes, judged, self.present)),
            agreement=float(class_overlap(pair)[self.present].mean()),
            on_strokes=float(class_overlap(judged)[self.present].mean()),
            labelled_share=float(labelled),
            miou=miou,
        )

    def _infer(self, policy: Policy, centre: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Returns M^{t+1} of all images, uint8 `[N, H, W]`."""
        mean, std = centre
        actions = policy.thresholds((self.traits - mean) / std)
        return self.builder.infer_candidates(
            self.labels, self.scribbles, self.classes, self.confidence, actions, window=policy.window
        )

    def _learn(self, labels: torch.Tensor, rows: torch.Tensor, seed: int, member: int) -> SegmenterDecoder:
        """Returns a decoder after learning from the label maps of some images."""
        training, population = self.settings.training, self.settings.eil.population
        with torch.inference_mode(False), torch.enable_grad():
            draw = generator(seed, "rehearsal-order", member)
            torch.manual_seed(int(draw.integers(2**62)))
            decoder, rate = self._start()
            # Batch normalisation needs two images, so one alone uses its statistics.
            decoder.train(min(training.batch_size, len(rows)) > 1)
            optimiser = build_optimiser(training.optimiser, [{"params": list(decoder.parameters())}])
            weights = self._class_weights(labels, rows)
            for update in range(population.updates):
                factor = schedule_factor(training.optimiser, update / population.updates)
                set_learning_rate(optimiser, rate * training.head_multiplier * factor)
                picked = rows[torch.tensor(draw.choice(len(rows), min(training.batch_size, len(rows)), replace=False))]
                crop = self._draw_crop(draw)
                mirrored = bool(draw.random() < training.augmentation.flip)
                optimiser.zero_grad(set_to_none=True)
                self._loss(decoder, labels, picked, weights, crop=crop, mirrored=mirrored).backward()
                if training.optimiser.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(decoder.parameters(), training.optimiser.clip_norm)
                optimiser.step()
        return decoder.eval()

    def _start(self) -> tuple[SegmenterDecoder, float]:
        """Returns a decoder to be trained and its encoder's learning rate: that of pre-training where it starts anew."""
        training = self.settings.training
        if self.settings.eil.population.networks == "fresh":
            settings = self.settings.segmenter.model_copy(update={"weights": "none"})
            decoder = build_segmenter(settings, self.builder.num_classes).decoder.to(self.labels.device)
            rate = training.optimiser.learning_rate
        else:
            decoder = copy.deepcopy(self.decoder).requires_grad_(True)
            rate = training.refine_learning_rate or training.optimiser.learning_rate
        return decoder, rate

    def _draw_crop(self, draw: np.random.Generator) -> Crop | None:
        """Returns a place of the size that training crops to, in whole cells of the coarsest map; None: the whole images."""
        crop, canvas = self.settings.training.augmentation.crop, self.encoded[0].shape[-2:]
        height, width = self.labels.shape[-2:]
        coarse = self.encoded[-1].shape[-2:]
        # Not every encoder hands the image on, whose size tells how many pixels a cell has.
        if crop is None or canvas[0] < height or canvas[1] < width:
            return None
        cells = [side // cell for side, cell in zip(canvas, coarse, strict=True)]
        sides = [min(-(-side // cell), count) for side, cell, count in zip(crop, cells, coarse, strict=True)]
        starts = [int(draw.integers(count - side + 1)) for side, count in zip(sides, coarse, strict=True)]
        return Crop(
            top=starts[0] * cells[0],
            left=starts[1] * cells[1],
            height=sides[0] * cells[0],
            width=sides[1] * cells[1],
        )

    def _loss(
        self,
        decoder: SegmenterDecoder,
        labels: torch.Tensor,
        rows: torch.Tensor,
        weights: ClassWeights,
        *,
        crop: Crop | None,
        mirrored: bool,
    ) -> torch.Tensor:
        """The loss of refining on some images, with the teacher's decoder as teacher; a mirrored image has its maps mirrored. The
        student's view is not harder than the teacher's here, since there are no images to change.
        """
        training, autocast = self.settings.training, self.builder.workspace.autocast
        encoded, maps = [one[rows] for one in self.encoded], [labels[rows]]
        lesson = training.self_training.weight > 0
        apart = training.tells_inferred_apart(INFERRED, self_training=lesson)
        if apart:
            maps.append(self.scribbles[rows])
        named = training.self_training.classes == "labelled"
        known = present_classes(maps[0], self.builder.num_classes) if named else None
        if crop is not None:
            canvas = self.encoded[0].shape[-2:]
            missing = (0, canvas[1] - maps[0].shape[-1], 0, canvas[0] - maps[0].shape[-2])
            maps = [crop.of(F.pad(one, missing, value=PADDING), canvas) for one in maps]
            encoded = [crop.of(one, canvas) for one in encoded]
        if mirrored:
            encoded, maps = [one.flip(-1) for one in encoded], [one.flip(-1) for one in maps]
        target, inferred = split_labels(maps[0], maps[1] if apart else None)
        # The maps stand for the images, which nobody looks at here.
        batch = SegmenterBatch(
            images=target, target=target, inferred=inferred, crops=target, inside=maps[0] != PADDING, classes=known
        )
        everything = slice(0, len(rows))
        size = (int(target.shape[-2]), int(target.shape[-1]))
        said = None
        if lesson:
            teacher = _OnMaps(self.decoder, encoded, size)
            said = teach(teacher, batch, [everything], autocast, training.self_training, weights.labels)
        loss = SegmenterLoss(
            batch=batch,
            weights=weights,
            totals=Totals(*count_pixels(batch, weights, said, [everything])),
            autocast=autocast,
            inferred_weight=training.inferred_weight or 0.0,
            lesson=said,
        )
        return loss(_OnMaps(decoder, encoded, size), everything)

    def _class_weights(self, labels: torch.Tensor, rows: torch.Tensor) -> ClassWeights:
        """Returns the class weights of some images' label maps, as refining has them."""
        training = self.settings.training
        if training.class_balance_power == 0.0:
            return ClassWeights()

        def weigh(version: int) -> torch.Tensor:
            drawn = (labels if version else self.scribbles)[rows]
            counts = torch.bincount(drawn.flatten().long(), minlength=256)[: self.builder.num_classes]
            return class_weights(counts, training.class_balance_power)

        return ClassWeights.of(training, INFERRED, weigh, self_training=training.self_training.weight > 0)

    @torch.inference_mode()
    def _predict(self, decoder: SegmenterDecoder, rows: torch.Tensor) -> torch.Tensor:
        """Returns the classes that a decoder predicts on some images, uint8 `[n, H, W]`."""
        size = (int(self.labels.shape[-2]), int(self.labels.shape[-1]))
        parts = []
        for part in rows.split(self.settings.engine.inference_batch_size):
            with self.builder.workspace.autocast():
                output = decoder([maps[part] for maps in self.encoded], size)
            parts.append(predicted_classes(upsample_logits(output.logits, size)))
        return torch.cat(parts)


class _OnMaps(nn.Module):
    """A decoder as a segmenter of the images that some encoder maps were made of."""

    def __init__(self, decoder: SegmenterDecoder, encoded: list[torch.Tensor], size: tuple[int, int]) -> None:
        super().__init__()
        self.decoder, self.encoded, self.size = decoder, encoded, size

    def forward(self, images: torch.Tensor) -> SegmenterOutput:
        """Segments all of them; `images` only says how many are asked for."""
        assert len(images) == len(self.encoded[-1])
        output: SegmenterOutput = self.decoder(self.encoded, self.size)
        return output


def _join(parts: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Puts batches `[b, …, h, w]` together, each padded at the right and at the bottom to the largest h and w."""
    height, width = (max(part.shape[side] for part in parts) for side in (-2, -1))
    return torch.cat(
        [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]), value=padding) for part in parts]
    )
