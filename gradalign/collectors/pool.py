"""The collectors of one aligner, each made once for the parameters and groups that it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from gradalign.collectors.base import Collector
from gradalign.collectors.parameters import Layout, layout_key, make_layout, quick_key

_C = TypeVar("_C", bound=Collector)


class CollectorPool:
    """Make collectors, and the layout that they share; make them anew when the parameters change.

    Args:
        scope: Which parameters are aligned, checked.
        granularity: What shares one Gramian, checked.
        check: Raises where an optimizer's parameters cannot be served.
    """

    def __init__(
        self,
        scope: str | tuple[Tensor, ...],
        granularity: str | tuple[tuple[Tensor, ...], ...],
        check: Callable[[Sequence[Mapping[str, Any]]], None],
    ) -> None:
        self.current: Collector | None = None
        """The collector of the last backward."""
        self._scope = scope
        self._granularity = granularity
        self._check = check
        self._quick: object = None
        self._key: tuple[object, ...] = ()
        self._layout: Layout | None = None
        self._made: dict[tuple[object, ...], Collector] = {}

    def layout(self, param_groups: Sequence[Mapping[str, Any]]) -> Layout:
        """Return the layout of the parameters that require a gradient now.

        Raises:
            ValueError: None does.
            RuntimeError: They changed while micro-batches wait.
        """
        quick = quick_key(param_groups)
        if self._layout is not None and quick == self._quick:
            return self._layout
        key = layout_key(param_groups)
        if not key:
            raise ValueError(
                "`optimizer` must hold a parameter that requires a gradient, got none; call requires_grad_()"
                " on those to be trained."
            )
        if self._layout is None or key != self._key:
            if self.waiting:
                raise RuntimeError(
                    "The optimizer's parameters must stay the same while micro-batches wait, but some were added,"
                    " frozen or moved; call zero_grad() and start the accumulation again."
                )
            self._check(param_groups)
            self._layout = make_layout(param_groups, self._scope, self._granularity)
            self._key, self._made, self.current = key, {}, None
        self._quick = quick
        return self._layout

    @property
    def waiting(self) -> bool:
        """Micro-batches wait, or were lost."""
        return self.current is not None and (self.current.pending > 0 or self.current.spoiled)

    def get(self, key: tuple[object, ...], make: Callable[[], _C]) -> _C:
        """Return the collector of this key as the current one, made where there is none."""
        if key not in self._made:
            # Groups that come and go would otherwise leave rows behind.
            self._made = {other: kept for other, kept in self._made.items() if other[0] != key[0]}
            self._made[key] = make()
        self.current = self._made[key]
        return self.current  # type: ignore[return-value]
