"""What is known of regions: every image passes the segmenter once per step, and whatever a policy looks at comes from that pass.

D_S's images ───────┐                 ┌─ class shares, pooled entropies ─▶ state [S, d]
                    ├─▶ one pass each ─┤
candidates' images ─┘                 ├─ the same, and both histograms ──▶ candidates [K, N, F]
                                      └─ scores, mean features ──────────▶ the baselines
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from raysseg.algorithms.ralis.config import RALISOptions
from raysseg.algorithms.ralis.maps import Autocast, EncoderMaps
from raysseg.algorithms.ralis.pools import Pools
from raysseg.core.seeding import generator
from raysseg.errors import InputError, NonFiniteError
from raysseg.functional.acquisition import BaldSums, add_bald_pass, bald_map, margin_map
from raysseg.functional.divergence import divergence_histograms
from raysseg.functional.label_inference import predicted_classes
from raysseg.functional.regions import class_shares, entropy_map_of_logits, pooled_entropies, region_means
from raysseg.segmenters import Segmenter, SegmenterOutput, evaluation_mode, upsample_logits

Score = Literal["entropy", "margin", "bald"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a policy looks at; nothing else is computed.

    Args:
        description: state and candidates' features, as the query network sees them.
        score: uncertainty of every candidate.
        features: mean features F of the candidates and of what is labelled.
    """

    description: bool = False
    score: Score | None = None
    features: bool = False

    @property
    def anything(self) -> bool:
        """Whether candidates are looked at at all."""
        return self.description or self.features or self.score is not None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descriptions:
    """What is known of the R regions of M images, float32; None where it was not asked for.

    Args:
        shares: of the predicted classes `[M, R, C]`.
        entropies: pooled, in nats `[M, R, E]`.
        scores: larger is more uncertain `[M, R]`.
        features: mean F `[M, R, D]`.
    """

    shares: Tensor | None = None
    entropies: Tensor | None = None
    scores: Tensor | None = None
    features: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What a policy chooses by at one step; None where it did not ask.

    Args:
        pools: the candidates.
        state: float32 `[S, d]`, rounded to half precision, in which it is stored.
        candidates: float32 `[K, N, F]`, rounded likewise.
        scores: float32 `[K, N]`.
        points: mean features of the candidates, float32 `[K, N, D]`.
        covered: those of the regions that are labelled, before the episode or in it, float32 `[L, D]`.
    """

    pools: Pools
    state: Tensor | None = None
    candidates: Tensor | None = None
    scores: Tensor | None = None
    points: Tensor | None = None
    covered: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledRegions:
    """What is known of the regions labelled so far.

    Args:
        shares: of the classes that their labels have, float32 `[L, C]`.
        features: mean F, each as it was when the region was chosen, float32 `[L, D]`; None where no policy asked for it.
    """

    shares: Tensor
    features: Tensor | None = None


class RegionDescriber:
    """Passes images through a segmenter and describes their regions.

    Args:
        options: the method's.
        num_classes: C.
        autocast: the precision.
    """

    def __init__(self, options: RALISOptions, num_classes: int, autocast: Autocast) -> None:
        self._options, self._num_classes, self._autocast = options, num_classes, autocast

    @torch.no_grad()
    def describe(
        self, segmenter: Segmenter, maps: EncoderMaps, rows: np.ndarray, wanted: Wanted, *, seed: int = 0
    ) -> Descriptions:
        """Describes all regions of some images.

        Args:
            segmenter: f.
            maps: gives the images' encoder maps.
            rows: int64 `[M]`.
            wanted: what is needed.
            seed: of the dropout passes of the score `bald`.

        Raises:
            InputError: the score is `bald`, but nothing of the segmenter's decoder is dropped.
            NonFiniteError: what the segmenter says is not finite.

        Source: RALIS, Sec. 3.2 and 3.3.
        """
        found: dict[str, Tensor] = {}
        with evaluation_mode(segmenter):
            for batch in maps.batches(segmenter, rows):
                parts: dict[str, Tensor] = {}
                if wanted.features or wanted.description or wanted.score != "bald":
                    with self._autocast():
                        output = segmenter.decode(batch.maps, batch.size)
                    parts = self._of_batch(output, batch.size, wanted)
                if wanted.score == "bald":
                    # The first row names the batch, so that the draws depend on nothing but the order of rows.
                    own_seed = int(generator(seed, "dropout", int(batch.places[0])).integers(2**62))
                    parts["scores"] = self._bald(segmenter, batch.maps, batch.size, own_seed)
                for name, part in parts.items():
                    if name not in found:
                        found[name] = part.new_empty(len(rows), *part.shape[1:])
                    found[name][torch.as_tensor(batch.places, device=part.device)] = part
        for name, part in found.items():
            if not bool(torch.isfinite(part).all()):
                bad = (~torch.isfinite(part.flatten(1)).all(1)).nonzero()[0].item()
                raise NonFiniteError(f"The {name} of the regions of the image in row {rows[int(bad)]} are not finite.")
        return Descriptions(**found)

    def _of_batch(self, output: SegmenterOutput, size: tuple[int, int], wanted: Wanted) -> dict[str, Tensor]:
        """Returns what one pass says of every region, `[B, R, …]` each."""
        regions = self._options.regions
        grid = (regions.rows, regions.columns)
        parts: dict[str, Tensor] = {}
        if wanted.features:
            parts["features"] = F.adaptive_avg_pool2d(output.features.float(), grid).flatten(2).transpose(1, 2)
        if not (wanted.description or wanted.score in ("entropy", "margin")):
            return parts
        logits = upsample_logits(output.logits, size)
        if wanted.score == "margin":
            parts["scores"] = region_means(margin_map(logits.softmax(1)), *grid)
        if wanted.score == "entropy" or wanted.description:
            entropy = entropy_map_of_logits(logits)
            if wanted.score == "entropy":
                parts["scores"] = region_means(entropy, *grid)
            if wanted.description:
                classes = predicted_classes(logits)
                parts["shares"] = class_shares(classes, self._num_classes, *grid, regions.smoothing)
                cells, poolings = regions.entropy_cells, regions.entropy_poolings
                parts["entropies"] = pooled_entropies(entropy, *grid, cells, poolings)
        return parts

    def _bald(self, segmenter: Segmenter, maps: list[Tensor], size: tuple[int, int], seed: int) -> Tensor:
        """Returns the mean mutual information of every region `[B, R]`, from passes of the decoder with dropout."""
        decoder = segmenter.decoder
        dropouts = [part for part in decoder.modules() if isinstance(part, _DropoutNd) and part.p > 0]
        if not dropouts:
            raise InputError(
                "The policy is 'bald', but the segmenter drops nothing: segmenter.dropout must be above 0."
            )
        sums: BaldSums | None = None
        devices = [maps[0].device] if maps[0].is_cuda else []
        with torch.random.fork_rng(devices), evaluation_mode(segmenter), self._autocast():
            torch.manual_seed(seed)
            for layer in dropouts:
                layer.train()
            # Dropout right before the classifier leaves everything up to there the same in all passes.
            fixed = decoder.represent(maps) if decoder.dropout in dropouts else None
            for _ in range(self._options.dropout_passes):
                representation = decoder.represent(maps) if fixed is None else fixed
                output = decoder.classify(representation, maps, size)
                probabilities = upsample_logits(output.logits, size).softmax(1)
                sums = add_bald_pass(sums, probabilities)
        assert sums is not None
        return region_means(bald_map(sums), self._options.regions.rows, self._options.regions.columns)

    @torch.no_grad()
    def observe(
        self,
        segmenter: Segmenter,
        pools: Pools,
        wanted: Wanted,
        *,
        maps: EncoderMaps,
        state_rows: np.ndarray,
        known_rows: np.ndarray,
        labelled: LabelledRegions,
        seed: int,
    ) -> Observation:
        """Looks at D_S and at the candidates' images, each once; for the core-set also at the images labelled from the start.

        Args:
            segmenter: f.
            pools: the candidates.
            wanted: what the policy looks at.
            maps: gives the encoder maps of all images.
            state_rows: D_S, int64 `[|D_S|]`.
            known_rows: images that are labelled from the start, int64 `[M]`.
            labelled: what was labelled since.
            seed: of this step.

        Source: RALIS, Sec. 3.2 and 3.3.
        """
        if not wanted.anything:
            return Observation(pools=pools)
        images, places = pools.images()
        seen = self.describe(segmenter, maps, images, wanted, seed=seed)
        index = torch.as_tensor(places * self._options.regions.count + pools.regions)
        state = candidates = points = covered = None
        if wanted.description:
            known = self.describe(segmenter, maps, state_rows, dataclasses.replace(wanted, score=None, features=False))
            assert known.shares is not None
            assert known.entropies is not None
            state = torch.cat([known.shares, known.entropies], 2).flatten(0, 1)
            state = _stored(state)
            candidates = _stored(self._candidates(seen, index, pools.distinct, labelled.shares))
        if wanted.features:
            points = _at(seen.features, index)
            covered = points.new_zeros(0, points.shape[-1]) if labelled.features is None else labelled.features
            if len(known_rows):
                features = self.describe(segmenter, maps, known_rows, Wanted(features=True)).features
                assert features is not None
                covered = torch.cat([features.flatten(0, 1), covered])
        scores = None if seen.scores is None else _at(seen.scores, index)
        return Observation(
            pools=pools, state=state, candidates=candidates, scores=scores, points=points, covered=covered
        )

    def _candidates(self, seen: Descriptions, index: Tensor, distinct: int, labelled: Tensor) -> Tensor:
        """Returns the features of candidates `[K, N, F]`: class shares, pooled entropies, histograms to L_t and to P_t."""
        regions = self._options.regions
        shares, entropies = _at(seen.shares, index), _at(seen.entropies, index)
        parts = [shares, entropies]
        if regions.divergences:
            # Places that repeat a candidate are no further members of the set that it is compared with.
            own = shares[:, :distinct].flatten(0, 1)
            repeat = torch.arange(index.shape[1], device=shares.device) % distinct
            for others in (labelled, own):
                histogram = divergence_histograms(
                    own, others, bins=regions.divergence_bins, limit=regions.divergence_limit
                )
                parts.append(histogram.unflatten(0, (-1, distinct))[:, repeat])
        return torch.cat(parts, 2)


def _at(values: Tensor | None, index: Tensor) -> Tensor:
    """Picks the candidates `[K, N, …]` out of what is known of all regions `[M, R, …]`."""
    assert values is not None
    return values.flatten(0, 1)[index.to(values.device)]


def _stored(values: Tensor) -> Tensor:
    """Rounds to half precision: the policy sees what the learner will read from replay."""
    return values.half().float()
