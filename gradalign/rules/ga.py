"""Gradient alignment of GAML-BERT: the auxiliaries may change the length of the anchor's step, never its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number, flag
from gradalign.rules.kinds import AnchoredRule


@dataclass(frozen=True, eq=False)
class _GradientAlignment(AnchoredRule):
    """What both versions share: alpha, the projections on the anchor, weights that are zero but for the anchor."""

    alpha: float = 0.3

    min_groups: ClassVar[int] = 2
    rescales_anchor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", finite_number("alpha", self.alpha, 0.0, 1.0))

    def _projections(self, G: Tensor, a: int) -> Tensor:
        """Return <g_k, g_a> / <g_a, g_a>, (..., K): each projection's length in units of g_a (Eq. 5), 0 of g_a = 0."""
        return quotient(G[..., a], G[..., a, a].unsqueeze(-1))

    def _on_anchor(self, weight: Tensor, G: Tensor, a: int) -> Tensor:
        """Return (..., K) with ``weight`` (...) at the anchor and zeros elsewhere."""
        weights = torch.zeros_like(G[..., 0])
        weights[..., a] = weight
        return weights

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 - alpha for the anchor and alpha for every auxiliary, the weights of Eq. 2."""
        a = self.anchor_index(len(names), names)
        return tuple(1 - self.alpha if k == a else self.alpha for k in range(len(names)))

    def support(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the anchor's index alone."""
        return (self.anchor_index(len(names), names),)


@dataclass(frozen=True, eq=False)
class GASoft(_GradientAlignment):
    """Replace each auxiliary gradient by its projection on the anchor's (Eq. 6).

    d = (1 - alpha) g_a + alpha sum_k <g_k, g_a> / <g_a, g_a> g_a over the auxiliaries k, that is
    w_a = (1 - alpha) + alpha sum_k G_ka / G_aa and w_k = 0.

    Guarantees: d is parallel to g_a. It points the other way, a *reversal*, when the auxiliaries conflict so much
    that w_a < 0, iff sum_k G_ka / G_aa < -(1 - alpha) / alpha; ``clamp`` excludes that.

    Args:
        alpha: Weight of the auxiliaries, in [0, 1]; the paper's alpha.
        clamp: Stop w_a at 0 instead of reversing the step.
        anchor: The main group's index or name; the paper's cross-entropy.

    Raises:
        ValueError: ``alpha`` is outside [0, 1]; when called, fewer than two groups or no such anchor.

    Note:
        The paper has one auxiliary, the summed distillation loss; a sum over several is the same formula, for
        projection is linear. G_aa = 0 (the paper divides by it) counts as projection 0. A parameter that only an
        auxiliary reaches gets a zero gradient; the aligner's ``scope="shared"`` leaves such parameters out.

    References:
        Zhu et al., GAML-BERT: Improving BERT Early Exiting by Gradient Aligned Mutual Learning, EMNLP 2021,
        Eq. 5 and 6.

    >>> GASoft(alpha=0.5)(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))  # .5 + .5 * -2/1: reversed
    tensor([-0.5000,  0.0000])
    """

    clamp: bool = False

    name: ClassVar[str] = "ga-soft"

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("clamp", self.clamp)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        projections = self._projections(G, a)
        projections[..., a] = 0.0
        weight = (1 - self.alpha) + self.alpha * projections.sum(-1)
        return self._on_anchor(weight.clamp(min=0) if self.clamp else weight, G, a)


@dataclass(frozen=True, eq=False)
class GAHard(_GradientAlignment):
    """Replace each auxiliary gradient by its projection on the anchor's, and drop those that conflict (Eq. 7).

    w_a = (1 - alpha) + alpha sum_k G_ka / G_aa over the auxiliaries k with G_ka >= 0; where none is left, w_a = 1.

    Guarantees: d is parallel to g_a and never reversed, w_a >= 0.

    Args:
        alpha: Weight of the auxiliaries, in [0, 1]; the paper's alpha.
        full_step: Where every auxiliary is dropped, take the anchor at weight 1, as Eq. 7 is printed; False takes
            1 - alpha, so that the weight does not jump as an auxiliary crosses 90 degrees.
        anchor: The main group's index or name; the paper's cross-entropy.

    Raises:
        ValueError: ``alpha`` is outside [0, 1]; when called, fewer than two groups or no such anchor.

    Note:
        The paper has one auxiliary; with several, each is kept or dropped alone. G_aa = 0 counts as projection 0.

    References:
        Zhu et al., GAML-BERT: Improving BERT Early Exiting by Gradient Aligned Mutual Learning, EMNLP 2021,
        Eq. 5 and 7.

    >>> GAHard(alpha=0.5)(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))  # the auxiliary conflicts: dropped
    tensor([1., 0.])
    """

    full_step: bool = True

    name: ClassVar[str] = "ga-hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("full_step", self.full_step)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        kept = G[..., a] >= 0
        kept[..., a] = False
        projections = self._projections(G, a).where(kept, 0.0)
        weight = (1 - self.alpha) + self.alpha * projections.sum(-1)
        if self.full_step:
            weight = weight.where(kept.any(-1), 1.0)
        return self._on_anchor(weight, G, a)
