"""AlignmentReport: what the last alignment saw and did.

Shapes: a global alignment has a Gramian (K, K) and weights (K,); one by blocks has (blocks, K, K) and (blocks, K).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AlignmentReport:
    """What one alignment saw and did. Tensors stay on their device; what counts or names waits for it when read.

    Attributes:
        names: The K loss groups' names, in the order of the losses.
        gramian: (K, K) or (blocks, K, K), squared gradient norm, over the parameters of the scope.
        weights: (K,) or (blocks, K), dimensionless; NaN where the step was skipped; None where the rule is no function
            of the Gramian and the aligned gradient no weighted sum.
        skipped: The step is left out, for a loss group was not finite (``nonfinite="skip"``).
        collector: "stacked", "batched", "streamed" or "probed", which saw the gradients. The last two do not see all
            products: those of two auxiliaries, and their squares in "probed" and in "streamed" over ranks, are NaN in
            ``gramian`` and what follows. "batched" is "stacked" over ranks.
        derivative: How "probed" saw the auxiliaries: "forward-mode" or "central-differences"; None for the others.
    """

    names: tuple[str, ...]
    gramian: Tensor
    weights: Tensor | None
    skipped: bool = False
    collector: str = "stacked"
    derivative: str | None = None

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the gradients, (K,) or (blocks, K)."""
        return self.gramian.diagonal(dim1=-2, dim2=-1).sqrt()

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines between the gradients, (K, K) or (blocks, K, K), in [-1, 1]; NaN where one is zero."""
        scaled = self.gramian / self.norms.unsqueeze(-1) / self.norms.unsqueeze(-2)
        return scaled.clamp(-1.0, 1.0)

    @cached_property
    def angles(self) -> Tensor:
        """Angles between the gradients, (K, K) or (blocks, K, K), in degrees; NaN where a gradient is zero.

        GAML-BERT, Eq. 4; an angle above 90 degrees is a conflict.
        """
        return torch.rad2deg(torch.acos(self.cosines))

    @cached_property
    def conflicts(self) -> tuple[tuple[str, str], ...]:
        """The pairs of names whose gradients conflict, G_ij < 0, in any of the blocks."""
        K = len(self.names)
        negative = (self.gramian < 0).reshape(-1, K, K).any(0).tolist()
        return tuple((self.names[i], self.names[j]) for i in range(K) for j in range(i + 1, K) if negative[i][j])

    @cached_property
    def reversals(self) -> int:
        """Number of weights below zero, over all blocks; such a group's gradient entered with its sign turned."""
        return 0 if self.weights is None else int((self.weights < 0).sum())

    def __repr__(self) -> str:
        pairs = ", ".join(" x ".join(pair) for pair in self.conflicts) or "none"
        skipped = ", skipped" if self.skipped else ""
        return f"AlignmentReport({', '.join(self.names)}: weights {self._shown()}, conflicts {pairs}{skipped})"

    def _shown(self) -> str:
        if self.weights is None:
            return "none"
        if self.weights.ndim > 1:
            return f"{len(self.weights)} blocks"
        return str([round(weight, 4) for weight in self.weights.tolist()])
