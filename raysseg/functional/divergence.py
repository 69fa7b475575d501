"""Kullback-Leibler divergences between many distributions at once, and their histograms (RALIS, Sec. 3.3).

KL(p‖q) = Σ p ln p − Σ p ln q is a number per p and one matrix product, so that a chunk of all pairs takes little more
than its memory's bandwidth, and no pair outlives its chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysseg.errors import InputError, NonFiniteError

_ROWS = 256
"""p's per chunk: their counters stay in a core's cache."""
_LARGEST = torch.iinfo(torch.int16).max


@torch.no_grad()
def kl_matrix(p: Tensor, q: Tensor) -> Tensor:
    """Computes KL(p‖q) of every p with every q.

    Args:
        p: float [M, C], each row's sum 1; may hold zeros.
        q: float [L, C], each row's sum 1, all above 0.
    Returns:
        float32 [M, L] in nats, 0 or more; within about 1e-5 of the exact value. Carries no gradient.
    Raises:
        InputError: where the shapes do not fit, p is below 0 or q not above 0.
        NonFiniteError: where p or q is not finite.
    Source: RALIS, Sec. 3.3 (as one matrix product: reconstruction).
    """
    negative_entropies, minus_logs = _factors(p, q, 1.0)
    with torch.autocast(p.device.type, enabled=False):
        return torch.addmm(negative_entropies[:, None], p.float(), minus_logs.T).clamp_min_(0)


@torch.no_grad()
def divergence_histograms(p: Tensor, q: Tensor, *, bins: int, limit: float, chunk_elements: int = 1 << 20) -> Tensor:
    """Computes, for every p, the histogram of its divergences KL(p‖q) from all q.

    Args:
        p: float [M, C], each row's sum 1; may hold zeros.
        q: float [L, C], each row's sum 1, all above 0.
        bins: S, 2…32767 equal bins of 0…limit; bin s holds [s, s + 1) · limit / S.
        limit: upper edge of the last bin in nats; larger divergences are counted in the last bin.
        chunk_elements: divergences that are held at a time, 6 bytes each.
    Returns:
        float32 [M, S] in [0, 1], the share of the q's in each bin, 1 in sum; all zeros where there is no q. Counts are
        exact; a divergence within rounding (about 1e-5) of an edge may be counted on either side of it.
    Raises:
        InputError: where the shapes do not fit, p is below 0 or q not above 0, or for other bins, limits or chunks.
        NonFiniteError: where p or q is not finite.
    Source: RALIS, Sec. 3.3 (32 bins: the authors' code; fixed edges: reconstruction, theirs move from row to row).
    """
    if not 2 <= bins <= _LARGEST:
        raise InputError(f"bins is {bins}, expected 2 to {_LARGEST}")
    if not 0 < limit < math.inf:
        raise InputError(f"limit is {limit}, expected a number of nats above 0")
    if chunk_elements < 1:
        raise InputError(f"chunk_elements is {chunk_elements}, expected at least 1")
    negative_entropies, minus_logs = _factors(p, q, bins / limit)
    # The numbers row · bins + bin of a chunk fit 16 bits, which halves what counting reads.
    rows = min(_ROWS, _LARGEST // bins, chunk_elements)
    columns = chunk_elements // rows
    counts = torch.zeros(p.shape[0], bins, dtype=torch.int64, device=p.device)
    with torch.autocast(p.device.type, enabled=False):
        for top in range(0, p.shape[0], rows):
            part, added = p[top : top + rows].float(), negative_entropies[top : top + rows]
            into = counts[top : top + rows].view(-1)
            first = torch.arange(0, into.numel(), bins, dtype=torch.int16, device=p.device)
            for left in range(0, q.shape[0], columns):
                # q by q, with the p's side by side: successive counts then fall into different rows, and the processor
                # need not wait for the counter that it has just written.
                scaled = torch.addmm(added, minus_logs[left : left + columns], part.T)
                index = scaled.clamp_(0, bins - 1).to(torch.int16).add_(first)
                into += torch.bincount(index.view(-1), minlength=into.numel())
    return counts / max(1, q.shape[0])


def _factors(p: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ p ln p float32 [M] and −ln q float32 [L, C], both times `scale`."""
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1]:
        raise InputError(f"p is {list(p.shape)} and q {list(q.shape)}, expected [M, C] and [L, C]")
    for name, values in (("p", p), ("q", q)):
        if not values.isfinite().all():
            raise NonFiniteError(f"{name} {list(values.shape)} is not finite, expected shares of classes")
    if (p < 0).any():
        raise InputError(f"p holds {p.min().item():g}, expected shares of 0 or more")
    if (q <= 0).any():
        raise InputError(f"q holds {q.min().item():g}, expected shares above 0: classes that do not occur are smoothed")
    exact = p.double()
    return (torch.xlogy(exact, exact).sum(dim=1) * scale).float(), q.double().log().mul_(-scale).float()
