"""Weights kept for the steps between two alignments, as ``update_every`` asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradalign.collectors.base import Loss


class Weighted(NamedTuple):
    """What a step with kept weights differentiates, and the weights of what comes out."""

    losses: list[Loss]
    names: list[tuple[str, ...]]
    weights: Tensor
    support: Sequence[int]
    plain: Sequence[float]


class KeptWeights:
    """The weights of the last alignment, and how many steps they have served.

    Args:
        every: Weights are computed anew after this many steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.forget()

    def forget(self) -> None:
        """Let the next step compute weights."""
        self.weights: Tensor | None = None
        self.names: tuple[str, ...] = ()
        self._served = 0

    def serve(self, names: tuple[str, ...], num_blocks: int, *, anchor_alone: bool) -> bool:
        """Return whether the next step takes the weights that are kept.

        Args:
            names: Its groups.
            num_blocks: How many blocks there are.
            anchor_alone: A probe stands for the other groups.
        """
        if self.weights is None or self._served >= self.every or len(self.weights) != num_blocks:
            return False
        return names == (self.names[:1] if anchor_alone else self.names)

    def keep(self, weights: Tensor | None, names: tuple[str, ...]) -> None:
        """Keep the weights (B, K) of this step's groups for those that follow."""
        if self.every > 1:
            self.weights, self.names, self._served = weights, names, 1

    def spend(self) -> None:
        """Count a step that has taken the weights."""
        self._served += 1

    def apply(
        self,
        groups: Mapping[str, tuple[Tensor, ...]],
        support: Sequence[int],
        plain: Sequence[float],
        *,
        one_vector: bool,
    ) -> Weighted:
        """Return the losses of a step that takes these weights.

        Args:
            groups: The losses of the groups; those outside the support may be missing where the scope is "all".
            support: The groups whose weight can differ from zero.
            plain: K numbers, the weights outside the scope.
            one_vector: All parameters have the same weights. Then one backward on the weighted sum is enough; else
                each group is differentiated alone.
        """
        assert self.weights is not None
        names = self.names
        if one_vector:
            terms = tuple(term for k in support for term in groups[names[k]])
            w = [self.weights[0, k] for k in support for _ in groups[names[k]]]
            factors = tuple(
                weight.to(term.device, term.dtype).expand(term.shape) for weight, term in zip(w, terms, strict=True)
            )
            together = tuple(names[k] for k in support)
            return Weighted(
                [(" and ".join(together), terms, factors)], [together], self.weights.new_ones(1, 1), (0,), (1.0,)
            )
        needed = [k for k in range(len(names)) if names[k] in groups]
        return Weighted(
            [(names[k], groups[names[k]], None) for k in needed],
            [(names[k],) for k in needed],
            torch.stack([self.weights[:, k] for k in needed], 1),
            [place for place, k in enumerate(needed) if k in support],
            [plain[k] for k in needed],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"weights": self.weights, "names": list(self.names), "served": self._served}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; weights that another ``update_every`` kept may be used up."""
        weights, names, served = state["weights"], tuple(state.get("names", ())), state["served"]
        fits = weights is None or (isinstance(weights, Tensor) and weights.shape[1:] == (len(names),))
        if not fits or not isinstance(served, int):
            raise ValueError(
                "`state_dict` must hold weights of shape (blocks, K) or None, the K names, and the number of steps that"
                f" they have served, got {weights!r}, {names!r} and {served!r}."
            )
        self.weights, self.names, self._served = weights, names, served
