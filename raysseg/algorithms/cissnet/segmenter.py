"""A trained variant as a segmenter: the image alone, then the contexts of its own predictions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raysseg.algorithms.cissnet.config import CiSSNetOptions
from raysseg.algorithms.cissnet.episode import ContextEpisode, labels_of_positions
from raysseg.algorithms.cissnet.features import domain_features, feature_shape
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.algorithms.cissnet.policies import Choice
from raysseg.segmenters import Segmenter, SegmenterOutput


class ContextSegmenter(nn.Module):
    """S-Net and C-Net behind the interface of a segmenter; its logits are those after `inference.steps` contexts.

    Args:
        segmenter: that X is from.
        networks: on X.
        options: the variant's.

    Source: CiSS-Net, Sec. 3.4 (t = 2 at inference).
    """

    def __init__(self, segmenter: Segmenter, networks: ContextNetworks, options: CiSSNetOptions) -> None:
        super().__init__()
        self.segmenter, self.networks, self.options = segmenter, networks, options
        self.num_classes = segmenter.num_classes

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Returns X and the logits of images float `[B, 3, H, W]`, ImageNet-normalised, at the stride of X.

        Raises:
            InputError: the variant's policy needs label maps.
        """
        episode = self.play(images)
        while episode.step < self.options.inference_steps:
            episode.advance(self.choose(episode).actions)
        return SegmenterOutput(episode.features, episode.logits)

    def play(self, images: Tensor, labels: Tensor | None = None) -> ContextEpisode:
        """Returns the episode of images float `[B, 3, H, W]` before its first step, with labels uint8 `[B, H, W]` or without."""
        features = domain_features(self.segmenter, images, self.options.network.features)
        cells = (int(features.shape[-2]), int(features.shape[-1]))
        if labels is not None:
            _, stride = feature_shape(self.segmenter, self.options.network.features)
            labels = labels_of_positions(labels, cells, stride)
        return ContextEpisode(self.networks, self.options, features, labels)

    def step_logits(self, images: Tensor, steps: Sequence[int], labels: Tensor | None = None) -> list[Tensor]:
        """Returns the logits at several t from one episode.

        Args:
            images: float `[B, 3, H, W]`, ImageNet-normalised.
            steps: t, rising.
            labels: uint8 `[B, H, W]`, for the policy 'oracle'.

        Returns:
            float32 `[B, N_c, h, w]` for every t.
        """
        episode, result = self.play(images, labels), []
        for step in steps:
            while episode.step < step:
                episode.advance(self.choose(episode).actions)
            result.append(episode.logits)
        return result

    def choose(self, episode: ContextEpisode) -> Choice:
        """Returns the choice of a step: the likelier actions, or drawn ones under a seed that is a function of the p-map."""
        if self.options.inference.action == "greedy":
            return episode.choose()
        return episode.choose(episode.predictions.flatten(1).long().sum(1))
