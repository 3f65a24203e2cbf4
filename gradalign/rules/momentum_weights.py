"""Momentum weights (CR-MOGM): the weights of any rule, averaged over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradalign.errors import finite_number
from gradalign.rules.base import Rule
from gradalign.rules.kinds import Memory, StatefulRule


@dataclass(frozen=True, eq=False)
class MomentumWeights(StatefulRule):
    """Average another rule's weights over the steps, w <- momentum w + (1 - momentum) rule(G).

    Guarantees: none about conflict; the weights correlate less with the noise of the batch that they are used on.

    Args:
        rule: The rule whose weights are averaged, or its name.
        momentum: The paper's alpha, in [0, 1).

    Note:
        The average begins at the first weights. With a momentum that rises towards 1 the paper proves convergence;
        here it is constant, as in its experiments.

    References:
        Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022,
        Algorithm 1.

    >>> from gradalign.rules import MGDA
    >>> rule = MomentumWeights(MGDA(), momentum=0.5)
    >>> rule(torch.diag(torch.tensor([1.0, 1.0]))), rule(torch.diag(torch.tensor([1.0, 3.0])))
    (tensor([0.5000, 0.5000]), tensor([0.6250, 0.3750]))
    """

    rule: Rule  # after __init__, which takes a name too
    momentum: float = 0.9

    name: ClassVar[str] = "momentum-weights"
    remembers: ClassVar[tuple[str, ...]] = ("weights", "calls")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rule, str):
            from gradalign.rules import get  # noqa: PLC0415, the table of names imports this file

            object.__setattr__(self, "rule", get(self.rule))
        if not isinstance(self.rule, Rule):
            kind = f"the class {self.rule.__name__}" if isinstance(self.rule, type) else type(self.rule).__name__
            raise TypeError(
                f"`rule` must be a Rule, which has weights to average, got {kind}; write MomentumWeights(MGDA()), say."
            )
        momentum = finite_number("momentum", self.momentum, 0.0)
        if momentum >= 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}.")
        object.__setattr__(self, "momentum", momentum)
        for declared in ("min_groups", "equivariant", "degree", "rescales_anchor"):
            object.__setattr__(self, declared, getattr(self.rule, declared))

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the averaged rule can take these groups."""
        super().check_groups(num_groups, names)
        self.rule.check_groups(num_groups, names)

    def _begin(self, G: Tensor) -> Memory:
        return {"weights": torch.zeros_like(G[..., 0]), "calls": torch.zeros_like(G[..., 0, 0], dtype=torch.int64)}

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        now = self.rule(G, names)
        first = (memory["calls"] == 0).unsqueeze(-1)
        w = torch.where(first, now, self.momentum * memory["weights"] + (1 - self.momentum) * now)
        return w, {"weights": w, "calls": memory["calls"] + 1}

    def support(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the support of the averaged rule."""
        return self.rule.support(names)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the plain weights of the averaged rule."""
        return self.rule.plain_weights(names)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the averaged rule's name and state."""
        return super().state_dict() | {"rule": self.rule.name, "rule_state": self.rule.state_dict()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if not isinstance(state["rule_state"], Mapping):
            raise ValueError(f"`state` must hold the averaged rule's state, got {state['rule_state']!r}.")
        if state["rule"] != self.rule.name:
            raise ValueError(
                f"`state` must average the weights of {self.rule.name!r}, got {state['rule']!r};"
                " make the rule around the one that was saved."
            )

    def _take_state(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule_state"])  # it may refuse: first
        super()._take_state(state)
