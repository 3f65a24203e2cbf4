"""Weights kept for the steps between two alignments, as ``update_every`` asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradalign.collectors.base import Loss
from gradalign.collectors.parameters import Layout


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
        self._reached: tuple[bool, ...] = ()
        self._served = 0

    def serve(self, names: tuple[str, ...], layout: Layout, *, anchor_alone: bool) -> bool:
        """Return whether the next step takes the weights that are kept.

        Args:
            names: Its groups.
            layout: Its parameters and their blocks.
            anchor_alone: A probe stands for the other groups.
        """
        if self.weights is None or self._served >= self.every:
            return False
        if len(self.weights) != layout.num_blocks or len(self._reached) != len(layout.parameters):
            return False  # loaded, and those of other parameters
        return names == (self.names[:1] if anchor_alone else self.names)

    def keep(
        self, weights: Tensor | None, names: tuple[str, ...], reached: Sequence[bool], plain: Sequence[float]
    ) -> None:
        """Keep the weights of this step's groups for those that follow.

        Args:
            weights: (B, K); None where the rule has none.
            names: The K names.
            reached: For each parameter whether a group reached it.
            plain: K numbers. Where a block's weights are not finite, as an overflow under a GradScaler makes them,
                those from before stay, or else these are kept: without waiting for the device.
        """
        if self.every > 1 and weights is not None:
            # Loaded weights may lie on another device.
            before = self.weights.to(weights) if self.weights is not None and self.names == names else None
            if before is None or before.shape != weights.shape:
                before = torch.stack([weights.new_full(weights.shape[:-1], weight) for weight in plain], -1)
            healthy = weights.isfinite().all(-1, keepdim=True)
            self.weights = torch.where(healthy, weights, before)
            self.names, self._reached, self._served = names, tuple(reached), 1

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
        everything: bool,
    ) -> Weighted:
        """Return the losses of a step that takes these weights.

        Args:
            groups: The losses of the groups; those outside the support may be missing beside a probe.
            support: The groups whose weight can differ from zero.
            plain: K numbers, the weights outside the scope.
            one_vector: All parameters have the same weights. Then one backward on the weighted sum is enough; else
                each group is differentiated alone.
            everything: No parameter is outside the scope, so that no group counts without a weight.
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
        needed = list(support) if everything else list(range(len(names)))
        return Weighted(
            [(names[k], groups[names[k]], None) for k in needed],
            [(names[k],) for k in needed],
            torch.stack([self.weights[:, k] for k in needed], 1),
            [place for place, k in enumerate(needed) if k in support],
            [plain[k] for k in needed],
        )

    @torch.no_grad()
    def fill(self, parameters: Sequence[Tensor]) -> None:
        """Give a gradient of zero to parameters that groups without a weight reached when the weights were computed."""
        for parameter, reached in zip(parameters, self._reached, strict=True):
            if reached and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "weights": self.weights,
            "names": list(self.names),
            "reached": list(self._reached),
            "served": self._served,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; weights that another ``update_every`` kept may be used up.

        With ``every`` 1 none are taken over.

        Raises:
            ValueError: ``state`` is something else; nothing is loaded then.
        """
        if not _fits(state, self.state_dict().keys()):
            raise ValueError(
                "`state_dict` must hold weights of shape (blocks, K) or None, the K names, what they reached, and the"
                f" number of steps that they have served under 'kept', got {state!r}; drop the key 'gradalign' to start"
                " afresh."
            )
        self.forget()
        if self.every > 1:  # else they would lie here until a later run takes them for new ones
            self.weights, self.names, self._served = state["weights"], tuple(state["names"]), state["served"]
            self._reached = tuple(state["reached"])


def _fits(state: object, keys: Collection[str]) -> bool:
    if not isinstance(state, Mapping) or state.keys() != set(keys):
        return False
    weights, names = state["weights"], state["names"]
    lists = isinstance(names, list) and isinstance(state["reached"], list)
    fits = weights is None or (isinstance(weights, Tensor) and lists and weights.shape[1:] == (len(names),))
    return lists and fits and isinstance(state["served"], int)
