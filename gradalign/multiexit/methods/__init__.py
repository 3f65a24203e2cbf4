"""Training methods by name: which losses a multi-exit network is trained on, in which stages, and the rule for them."""

from __future__ import annotations

from gradalign.errors import unknown_name
from gradalign.multiexit.methods import compression, equilibrium, frozen, mutual, pairs, taught, weighted
from gradalign.multiexit.methods.base import Method, Objective, Settings, Stage, Step
from gradalign.multiexit.methods.rules import of_rule, rule_names

__all__ = ["Method", "Objective", "Settings", "Stage", "Step", "get", "names", "rule_names"]

_METHODS = (
    *mutual.METHODS,
    *frozen.METHODS,
    *taught.METHODS,
    *weighted.METHODS,
    *equilibrium.METHODS,
    *pairs.METHODS,
    *compression.METHODS,
)
_TABLE = {method.name: method for method in _METHODS}


def names(kind: str | None = None) -> list[str]:
    """Return the names of all methods, or of those for one kind, "images" or "text".

    ``get`` takes those of ``rule_names()`` too, any rule on the losses of a step, as "kd:pcgrad" or "exits:mgda".

    >>> names()[:4]
    ['joint', 'ml', 'gaml-soft', 'gaml-hard']
    """
    return [name for name, method in _TABLE.items() if kind is None or kind in method.kinds]


def get(name: str) -> Method:
    """Return the method of this name, one of ``names()`` or ``rule_names()``.

    Raises:
        ValueError: Unknown name; near ones are offered.

    >>> get("ml").stages[0].rule(Settings(alpha=0.25))
    Constant(weights=(0.75, 0.25))
    >>> get("kd:ga-soft").stages[0].rule(Settings(alpha=0.25))
    GASoft(anchor='ce', alpha=0.25, clamp=False)
    """
    if ":" in name:
        return of_rule(name)
    if name not in _TABLE:
        raise unknown_name("method", name, [*names(), "kd:RULE", "exits:RULE"])
    return _TABLE[name]
