"""Rules of gradient surgery, each a function of the Gramian alone, and the table of their names."""

from __future__ import annotations

import dataclasses

from gradalign.errors import unknown_name
from gradalign.rules.base import AnchoredRule, RandomRule, Rule
from gradalign.rules.ga import GAHard, GASoft
from gradalign.rules.linear import Constant, Mean, Sum
from gradalign.rules.pcgrad import PCGrad

__all__ = [
    "AnchoredRule",
    "Constant",
    "GAHard",
    "GASoft",
    "Mean",
    "PCGrad",
    "RandomRule",
    "Rule",
    "Sum",
    "get",
    "names",
]

_TABLE: dict[str, type[Rule]] = {rule.name: rule for rule in (Constant, GAHard, GASoft, Mean, PCGrad, Sum)}


def names() -> list[str]:
    """Return the names of all rules, sorted.

    >>> names()
    ['constant', 'ga-hard', 'ga-soft', 'mean', 'pcgrad', 'sum']
    """
    return sorted(_TABLE)


def get(name: str, **hyper_parameters: object) -> Rule:
    """Make the rule of this name.

    Args:
        name: One of ``names()``.
        **hyper_parameters: Those of the rule's class; what is left out keeps its default.

    Raises:
        ValueError: Unknown name (near ones are offered), or a hyper-parameter out of range.
        TypeError: A hyper-parameter that the rule does not have, or one without default that is missing.

    >>> get("ga-soft", alpha=0.1)
    GASoft(anchor=0, alpha=0.1, clamp=False)
    """
    if not isinstance(name, str) or name not in _TABLE:
        raise unknown_name("rule", name, names())
    rule = _TABLE[name]
    fields = {f.name: f for f in dataclasses.fields(rule) if f.init}  # type: ignore[arg-type]
    for key in hyper_parameters:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise TypeError(f"`{name}` must be given hyper-parameters it has ({known}), got {key!r}.")
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in hyper_parameters]
    if missing:
        raise TypeError(
            f"`{name}` must be given {', '.join(missing)}, got nothing;"
            f' write rules.get("{name}", {missing[0]}=...) or {rule.__name__}(...).'
        )
    return rule(**hyper_parameters)
