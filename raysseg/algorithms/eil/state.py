"""EIL's dense state s = (F, P, M): built by actors from what they were ordered to play, rebuilt by the learner from
the same decisions.
"""

from __future__ import annotations

import dataclasses

import torch

from raysseg.algorithms.eil.config import EILSettings
from raysseg.core.workspace import Workspace
from raysseg.data.augmentation import AugmentationSettings, crop_and_flip, draw_geometry, normalise
from raysseg.functional.constants import PADDING
from raysseg.functional.label_inference import (
    candidates,
    expand_thresholds,
    infer_labels,
    infer_labels_from_mask,
    infer_labels_oracle,
)
from raysseg.functional.reward import cell_counts
from raysseg.functional.state import operator_planes
from raysseg.segmenters import Segmenter, SegmenterOutput, upsample_logits, virtual_step


@dataclasses.dataclass(slots=True, kw_only=True)
class EILState:
    """The state of B images.

    Args:
        images: ImageNet-normalised `[B, 3, H, W]`.
        encoded: the encoder's maps, from which a virtual step starts.
        features: F `[B, D, h, w]`.
        probabilities: P `[B, K, H, W]`.
        classes: argmax of P, uint8 `[B, H, W]`.
        confidence: max of P, `[B, H, W]`.
        labels: M, uint8 `[B, H, W]`.
        scribbles: Y, uint8 `[B, H, W]`.
        counts: label pixels of each class per feature cell `[B, K, h, w]`.
    """

    images: torch.Tensor
    encoded: list[torch.Tensor]
    features: torch.Tensor
    probabilities: torch.Tensor
    classes: torch.Tensor
    confidence: torch.Tensor
    labels: torch.Tensor
    scribbles: torch.Tensor
    counts: torch.Tensor

    def planes(self) -> torch.Tensor:
        """Returns the operators' input `[B, D + K + K + 1, h, w]`."""
        return operator_planes(self.features, self.probabilities, self.labels)


class StateBuilder:
    """Makes states, applies actions to them and takes the virtual segmenter step. Callers choose `inference_mode` or `no_grad`.

    Args:
        workspace: the data on this process's device.
        settings: the variant's settings.
    """

    def __init__(self, workspace: Workspace, settings: EILSettings) -> None:
        self.workspace = workspace
        self.settings = settings
        self.options = settings.eil
        self.num_classes = workspace.num_classes
        crop = settings.training.augmentation.crop
        self._exploration = AugmentationSettings(
            scale=(1.0, 1.0), flip=settings.training.augmentation.flip, rotation=0.0, crop=crop
        )

    def observe(
        self,
        segmenter: Segmenter,
        rows: torch.Tensor,
        version: int,
        *,
        seeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> EILState:
        """Builds s for rows int64 `[B]` of the training split.

        Args:
            segmenter: Φ, or its teacher.
            version: label version of M.
            seeds: int64 `[B]`: flip and crop without rescaling, so that the window stays in original pixels; None:
            whole images.
            labels: uint8 `[B, H, W]` in place of the stored M.
        """
        data = self.workspace.train
        images, sizes = data.images(rows)
        scribbles = data.labels(rows, 0)
        stored = scribbles if version == 0 else data.labels(rows, version)
        if seeds is None:
            pixels = normalise(images)
        else:
            geometry = draw_geometry(sizes, seeds, self._exploration, output_size=self._exploration.crop or data.canvas)
            maps = [scribbles] if stored is scribbles else [scribbles, stored]
            pixels, maps = crop_and_flip(images, maps, sizes, geometry)
            scribbles, stored = maps[0], maps[-1]
        segmenter.eval()
        with self.workspace.autocast():
            encoded = segmenter.encode(pixels)
            output = segmenter.decode(encoded, (int(pixels.shape[-2]), int(pixels.shape[-1])))
        return self._state(pixels, encoded, output, stored if labels is None else labels, scribbles)

    def _state(
        self,
        images: torch.Tensor,
        encoded: list[torch.Tensor],
        output: SegmenterOutput,
        labels: torch.Tensor,
        scribbles: torch.Tensor,
    ) -> EILState:
        size = (int(labels.shape[-2]), int(labels.shape[-1]))
        probabilities = upsample_logits(output.logits.float(), size).softmax(1)
        classes, confidence = candidates(probabilities)
        features = output.features.float()
        return EILState(
            images=images,
            encoded=encoded,
            features=features,
            probabilities=probabilities,
            classes=classes,
            confidence=confidence,
            labels=labels,
            scribbles=scribbles,
            counts=cell_counts(labels, self.num_classes, (int(features.shape[-2]), int(features.shape[-1]))),
        )

    def infer(self, state: EILState, actions: torch.Tensor, stage: int, *, per_class: bool = False) -> torch.Tensor:
        """Returns M^{t+1}, uint8 `[B, H, W]` (Eq. 1-2).

        Args:
            actions: thresholds `[B, A]` in [0, 1], or a mask `[B, h·w]` in [0, 1] for the action `mask`.
            stage: t + 1 in 1…T, which says the window.
            per_class: the actions are one threshold per class `[B, K]`, whatever the variant's own action is.
        """
        options = self.options
        window = options.window_of(stage)
        if options.action == "mask":
            cells = (int(state.features.shape[-2]), int(state.features.shape[-1]))
            mask = torch.nn.functional.interpolate(
                actions.view(-1, 1, *cells), size=state.labels.shape[-2:], mode="bilinear", align_corners=False
            )
            return infer_labels_from_mask(
                state.labels,
                state.scribbles,
                state.classes,
                mask[:, 0],
                window=window,
                num_classes=self.num_classes,
                class_wise=options.window_class_wise,
                shape=options.window_shape,
            )
        return self.infer_candidates(
            state.labels,
            state.scribbles,
            state.classes,
            state.confidence,
            actions,
            window=window,
            per_class=per_class,
        )

    def infer_candidates(
        self,
        labels: torch.Tensor,
        scribbles: torch.Tensor,
        classes: torch.Tensor,
        confidence: torch.Tensor,
        actions: torch.Tensor,
        *,
        window: int | None,
        per_class: bool = False,
    ) -> torch.Tensor:
        """Returns M^{t+1}, uint8 `[B, H, W]` (Eq. 1-2), of maps `[B, H, W]` that need no state around them.

        Args:
            labels: M, uint8.
            scribbles: Y, uint8.
            classes: argmax of P, uint8.
            confidence: max of P, float in [0, 1].
            actions: thresholds `[B, A]` in [0, 1].
            window: its side in pixels; None is the whole image.
            per_class: the actions are one threshold per class `[B, K]`, whatever the variant's own action is.
        """
        options = self.options
        expanded = options.action_semantics == "grow" or per_class or options.action == "per_class"
        return infer_labels(
            labels,
            scribbles,
            classes,
            confidence,
            actions if expanded else expand_thresholds(actions, self.num_classes),
            window=window,
            num_classes=self.num_classes,
            class_wise=options.window_class_wise,
            shape=options.window_shape,
            semantics=options.action_semantics,
            otherwise=options.otherwise,
            anchor=scribbles if options.window_anchor == "scribbles" else None,
        )

    def infer_oracle(self, state: EILState, truth: torch.Tensor, stage: int) -> torch.Tensor:
        """Returns M^{t+1} where a window pixel is adopted exactly when the argmax is the truth, uint8 `[B, H, W]`.

        Source: yardstick.
        """
        return infer_labels_oracle(
            state.labels,
            state.scribbles,
            state.classes,
            truth,
            window=self.options.window_of(stage),
            num_classes=self.num_classes,
            class_wise=self.options.window_class_wise,
            shape=self.options.window_shape,
        )

    def infer_truth(self, state: EILState, truth: torch.Tensor, stage: int) -> torch.Tensor:
        """Returns M^{t+1} where every window pixel has its true label, uint8 `[B, H, W]`; where there is none, the old one.

        Source: yardstick.
        """
        known = truth < PADDING
        return infer_labels(
            state.labels,
            state.scribbles,
            torch.where(known, truth, 0),
            known.float(),
            torch.zeros(len(truth), self.num_classes, device=truth.device),
            window=self.options.window_of(stage),
            num_classes=self.num_classes,
            class_wise=self.options.window_class_wise,
            shape=self.options.window_shape,
        )

    def relabel(self, state: EILState, labels: torch.Tensor) -> EILState:
        """Returns (F, P, M'): the same networks' view with another label map, uint8 `[B, H, W]`."""
        cells = (int(state.features.shape[-2]), int(state.features.shape[-1]))
        return dataclasses.replace(state, labels=labels, counts=cell_counts(labels, self.num_classes, cells))

    def advance(self, segmenter: Segmenter, state: EILState, labels: torch.Tensor) -> EILState:
        """Returns s^{t+1}: F and P of the segmenter after `virtual_steps` SGD steps on each image's own M^{t+1}.

        Source: the paper's 'newly updated segmenter'; that the step is per image and on fast weights is a
        reconstruction.
        """
        options, training = self.options, self.settings.training
        if options.virtual_steps == 0:
            return self.relabel(state, labels)
        rate = options.virtual_learning_rate or training.optimiser.learning_rate * training.head_multiplier
        # Gradients cannot pass through inference tensors, so an actor's are copied here.
        with torch.inference_mode(False), self.workspace.autocast():
            output = virtual_step(
                segmenter,
                [_plain(tensor) for tensor in state.encoded],
                _plain(labels),
                (int(labels.shape[-2]), int(labels.shape[-1])),
                learning_rate=rate,
                steps=options.virtual_steps,
                clip_norm=options.virtual_clip_norm,
                scope=options.virtual_scope,
                images=_plain(state.images) if options.virtual_scope == "all" else None,
                weight_decay=training.optimiser.weight_decay,
            )
        return self._state(state.images, state.encoded, output, labels, state.scribbles)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
