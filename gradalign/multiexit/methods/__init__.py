"""Training methods by name: which losses a multi-exit network is trained on, in which stages, and the rule for them."""

from __future__ import annotations

from gradalign.errors import unknown_name
from gradalign.multiexit.methods import mutual
from gradalign.multiexit.methods.base import Method, Objective, Settings, Stage, Step

__all__ = ["Method", "Objective", "Settings", "Stage", "Step", "get", "names"]

_TABLE = {method.name: method for method in mutual.METHODS}


def names(kind: str | None = None) -> list[str]:
    """Return the names of all methods, or of those for one kind, "images" or "text".

    >>> names()
    ['joint', 'ml', 'gaml-soft', 'gaml-hard']
    """
    return [name for name, method in _TABLE.items() if kind is None or kind in method.kinds]


def get(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ValueError: Unknown name; near ones are offered.

    >>> get("ml").stages[0].rule(Settings(alpha=0.25))
    Constant(weights=(0.75, 0.25))
    """
    if name not in _TABLE:
        raise unknown_name("method", name, names())
    return _TABLE[name]
