"""Aligned-MTL: the gradients' principal components are made equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import eigenvalues, rounding, wide
from gradalign.errors import unknown_name
from gradalign.rules.kinds import PreferenceRule

_SCALES = ("min", "median", "mean")


@dataclass(frozen=True, eq=False)
class AlignedMTL(PreferenceRule):
    """Replace the gradients by the nearest set of orthogonal ones of one length, and take their preferred sum.

    With G = V L V', w = B p, B = sqrt(s) V L^(-1/2) V' over the rank of G; s is the least, median or mean eigenvalue.

    Guarantees: where G is regular, B G B' = s I: the aligned gradients are orthogonal and have the condition number 1,
    so that none dominates.

    Args:
        scale: "min" (the paper's), "median" or "mean" eigenvalue, over the rank; squared gradient norm.
        preference: (K,) numbers >= 0; 1/K each where None.

    Note:
        Eigenvalues that can be rounding of the largest, 16 K eps of it, count as zero. The decomposition waits for the
        device on CUDA.

    References:
        Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, arXiv:2305.19000,
        Algorithm 1.

    >>> AlignedMTL()(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))  # both as long as the shorter one, halved
    tensor([0.5000, 0.2500])
    """

    scale: str = "min"

    name: ClassVar[str] = "aligned-mtl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in _SCALES:
            raise unknown_name("scale", self.scale, _SCALES)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        p = wide(self._preferred(G)).unsqueeze(-1)
        L, V = eigenvalues(wide(G))
        kept = rounding(G) * L[..., -1:] < L
        s = self._chosen(L, kept)
        B = torch.where(kept, (s / L).sqrt(), 0.0)
        w: Tensor = V @ (B.unsqueeze(-1) * (V.mT @ p))
        return w.squeeze(-1).to(G.dtype)

    def _chosen(self, L: Tensor, kept: Tensor) -> Tensor:
        """Return the eigenvalue that is the scale, (..., 1), of those kept."""
        if self.scale == "mean":
            return L.where(kept, 0.0).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
        if self.scale == "min":
            return torch.where(kept, L, torch.inf).amin(-1, keepdim=True).where(kept.any(-1, keepdim=True), 0.0)
        # Kept are the last of an ascending order; of an even number the lower of the middle two is the median.
        rank = kept.sum(-1, keepdim=True)
        middle = L.shape[-1] - rank + (rank - 1).clamp(min=0) // 2
        return L.gather(-1, middle.clamp(max=L.shape[-1] - 1)).where(rank > 0, 0.0)
