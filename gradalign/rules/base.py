"""What every rule is: a map from a Gramian to weights, with its hyper-parameters fixed at birth.

Shapes: G is (..., K, K), weights are (..., K); the leading dimensions are blocks that a rule treats alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradalign.errors import check_seed, unknown_name


class Rule(ABC):
    """Map the Gramian of K loss groups to the weights of their gradients.

    A subclass is a frozen dataclass: its fields are the hyper-parameters, and it writes one method, ``_weights``.
    What it declares in the class variables below, the contract tests hold it to.

    Attributes:
        name: The rule's name in the table of names.
        min_groups: Smallest K that makes sense.
        rescales_anchor: The weights are zero except the anchor's, so that no other gradient is ever summed.
        stateful: Remembers earlier steps group by group, so that the groups must stay the same.
        equivariant: Permuting the groups permutes the weights (an anchor moves along).
        degree: Degree of the aligned gradient in the scale of the losses: J -> s J gives d -> s^degree d.
        non_conflicting_groups: Gw >= 0 holds up to this K (0: never promised; ``math.inf``: always).
    """

    name: ClassVar[str]
    min_groups: ClassVar[int] = 1
    rescales_anchor: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    equivariant: ClassVar[bool] = True
    degree: ClassVar[float] = 1.0
    non_conflicting_groups: ClassVar[float] = 0

    def __call__(self, gramian: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Return the weights of the gradients.

        Args:
            gramian: (..., K, K), floating, symmetric positive semi-definite up to rounding; squared gradient norm.
                It is not changed.
            names: The K groups' names, needed only by an anchor given by name.

        Returns:
            (..., K), dimensionless, dtype and device of ``gramian``. Where a block of ``gramian`` holds NaN or
            infinity, that block's weights are NaN: no rule turns a broken gradient into a healthy weight.

        Raises:
            TypeError: ``gramian`` is no floating-point tensor.
            ValueError: ``gramian`` is not (..., K, K), or K does not fit the rule or ``names``.
        """
        self._check(gramian, names)
        # Half precision holds no squared norm: compute in float32, return what was asked for.
        G = gramian.float() if gramian.element_size() < torch.float32.itemsize else gramian
        poison = (G * 0).sum((-2, -1)).unsqueeze(-1)  # 0, or NaN where the block is not finite
        return (self._weights(G, names) + poison).to(gramian.dtype)

    @abstractmethod
    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        """Return the weights (..., K) of a checked Gramian (..., K, K)."""

    @abstractmethod
    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the weights of the weighted sum that the rule corrects, one for each of the K ``names``.

        Parameters outside the aligner's scope get their gradients with these.
        """

    def support(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the indices of the groups whose weight can differ from zero."""
        return tuple(range(len(names)))

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the rule can take this many loss groups, of these names where known."""
        if num_groups < self.min_groups:
            raise ValueError(
                f"`{type(self).__name__}` must have at least {self.min_groups} loss groups, got {num_groups}"
                f"{_listed(names)}; pass another group to backward, or choose a rule that takes one."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers between calls: tensors and plain values, empty for most rules."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that ``state_dict`` of the same rule returned.

        Raises:
            ValueError: ``state`` has other keys than this rule's; the rule is unchanged.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"`state` must hold {sorted(self.state_dict())} for {type(self).__name__}, got {sorted(state)};"
                " load the state into the rule that saved it."
            )

    def _check(self, gramian: Tensor, names: Sequence[str] | None) -> None:
        if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
            kind = gramian.dtype if isinstance(gramian, Tensor) else type(gramian).__name__
            raise TypeError(f"`gramian` must be a floating-point tensor, got {kind}; pass J @ J.T of float gradients.")
        shape = tuple(gramian.shape)
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
            raise ValueError(f"`gramian` must have shape (..., K, K) with K >= 1, got {shape}; pass J @ J.T.")
        if names is not None and len(names) != shape[-1]:
            raise ValueError(f"`names` must name the {shape[-1]} groups of `gramian`, got {list(names)}.")
        self.check_groups(shape[-1], names)


def _listed(names: Sequence[str] | None) -> str:
    return f" ({', '.join(map(repr, names))})" if names else ""


@dataclass(frozen=True, eq=False)
class AnchoredRule(Rule):
    """A rule with a main loss group, the anchor, that the others, the auxiliaries, must not pull away.

    Args:
        anchor: The anchor's index, or its name among the loss groups.
    """

    anchor: int | str = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.anchor, bool) or not isinstance(self.anchor, int | str):
            raise TypeError(f"`anchor` must be a group's index or name, got {self.anchor!r}.")

    def anchor_index(self, num_groups: int, names: Sequence[str] | None) -> int:
        """Return the anchor's index in [0, K).

        Raises:
            ValueError: No such group, or the anchor is a name and ``names`` is None.
        """
        if isinstance(self.anchor, str):
            if names is None:
                raise ValueError(
                    f"`names` must name the groups when the anchor is a name, got None for anchor={self.anchor!r};"
                    " pass names=(...) beside the Gramian, or the anchor's index."
                )
            if self.anchor not in names:
                raise unknown_name("anchor", self.anchor, names)
            return list(names).index(self.anchor)
        if not -num_groups <= self.anchor < num_groups:
            raise ValueError(
                f"`anchor` must be an index below the number of loss groups, {num_groups}, got {self.anchor}."
            )
        return self.anchor % num_groups

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless there are enough groups and the anchor is one of them."""
        super().check_groups(num_groups, names)
        self.anchor_index(num_groups, names)


@dataclass(frozen=True, eq=False)
class RandomRule(Rule):
    """A rule that draws random numbers, from a generator of its own, so that ranks with one seed draw alike.

    Args:
        seed: Seed of the generator.
    """

    seed: int = field(default=0, kw_only=True)
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(check_seed(self.seed)))

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state: ``{"generator": uint8 tensor}``."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the generator's state, so that the next draws are those of the rule that saved it.

        Raises:
            ValueError: ``state`` is not a state of this rule; the rule is unchanged.
        """
        super().load_state_dict(state)
        try:
            self._generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"`state` must hold a generator's state as torch saves it: {error}") from error
