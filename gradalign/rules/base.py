"""What every rule is: hyper-parameters fixed at birth, and a map from a Gramian to weights.

Shapes: G is (..., K, K), weights are (..., K); the leading dimensions are blocks that a rule treats alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class BaseRule(ABC):
    """What rules of Gramians (``Rule``) and rules of rows (``RowRule``) share: names, checks and state.

    A rule is a frozen dataclass: its fields are the hyper-parameters. What it declares in the class variables below,
    the contract tests hold it to.

    Attributes:
        name: The rule's name in the table of names.
        min_groups: Smallest K that makes sense.
        stateful: Remembers earlier steps group by group, so that the groups must stay the same.
        equivariant: Permuting the groups permutes the weights (an anchor moves along).
        degree: Degree of the aligned gradient in the scale of the losses: J -> s J gives d -> s^degree d; NaN where it
            has none.
    """

    name: ClassVar[str]
    min_groups: ClassVar[int] = 1
    stateful: ClassVar[bool] = False
    equivariant: ClassVar[bool] = True
    degree: ClassVar[float] = 1.0

    def __post_init__(self) -> None:  # noqa: B027, the end of a chain to which each kind of rule adds its checks
        pass

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the weights of the weighted sum that the rule corrects, one for each of the K ``names``.

        Parameters outside the aligner's scope get their gradients with these. Here the mean's, 1/K each.
        """
        return (1 / len(names),) * len(names)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the rule can take this many loss groups, of these names where known."""
        if num_groups < self.min_groups:
            raise ValueError(
                f"`{type(self).__name__}` must have at least {self.min_groups} loss groups, got {num_groups}"
                f"{listed(names)}; pass another group to backward, or choose a rule that takes fewer."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers between calls: tensors and plain values, empty for most rules."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that ``state_dict`` of the same rule returned.

        Raises:
            ValueError: ``state`` has other keys than this rule's, or does not fit it; the rule is unchanged.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"`state` must hold {sorted(self.state_dict())} for {type(self).__name__}, got {sorted(state)};"
                " load the state into the rule that saved it."
            )
        self._check_state(state)
        self._take_state(state)

    def _check_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027, most rules have none
        """Raise ValueError unless the values of ``state`` fit this rule."""

    def _take_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027, most rules have none
        """Take over a checked ``state``."""


class Rule(BaseRule):
    """Map the Gramian of K loss groups to the weights of their gradients.

    A subclass is a frozen dataclass that writes one method, ``_weights``, and ``plain_weights`` where 1/K is not right.

    Attributes:
        rescales_anchor: The weights are zero except the anchor's, the only group of ``support``, and they depend on
            the anchor's row of G alone: no other gradient is ever summed, and G may hold zeros elsewhere.
        non_conflicting_groups: Gw >= 0 holds up to this K (0: never promised; ``math.inf``: always).
    """

    rescales_anchor: ClassVar[bool] = False
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
            ValueError: ``gramian`` is not (..., K, K), or K does not fit the rule, its memory or ``names``.
        """
        self._check(gramian, names)
        # Half precision holds no squared norm: compute in float32, return what was asked for.
        G = gramian.float() if gramian.element_size() < torch.float32.itemsize else gramian
        poison = (G * 0).sum((-2, -1)).unsqueeze(-1)  # 0, or NaN where the block is not finite
        return (made(self._weights(G, names), G.shape[:-1], f"{type(self).__name__}._weights") + poison).to(
            gramian.dtype
        )

    @abstractmethod
    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        """Return the weights (..., K) of a checked Gramian (..., K, K)."""

    def support(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the indices of the groups whose weight can differ from zero."""
        return tuple(range(len(names)))

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


def made(result: object, shape: Sequence[int], by: str) -> Tensor:
    """Return what a rule's own method made, or raise TypeError unless it is a tensor of this shape."""
    if not isinstance(result, Tensor) or result.shape != tuple(shape):
        got = f"one of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"`{by}` must return a tensor of shape {tuple(shape)}, got {got}.")
    return result


def listed(names: Sequence[str] | None) -> str:
    """Return the names for the end of a phrase, nothing where they are not known."""
    return f" ({', '.join(map(repr, names))})" if names else ""
