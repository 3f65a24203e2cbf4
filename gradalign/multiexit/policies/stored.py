"""Policies as plain values, that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from gradalign.errors import unknown_name
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.policies.agreement import Patience
from gradalign.multiexit.policies.budget import Budget
from gradalign.multiexit.policies.confidence import Entropy, MaxProbability, PatientConfidence
from gradalign.multiexit.policies.temperatures import Calibrated

_KINDS: dict[str, type[Policy]] = {
    kind.__name__: kind for kind in (Budget, Calibrated, Entropy, MaxProbability, Patience, PatientConfidence)
}


def to_dict(policy: Policy) -> dict[str, Any]:
    """Return a policy's name and fields as values that JSON can hold; ``from_dict`` makes an equal policy of them.

    Args:
        policy: One of this package, not of a subclass.

    Raises:
        TypeError: ``policy`` is none of this package's.

    >>> from gradalign.multiexit.policies import Entropy
    >>> to_dict(Entropy(0.3))
    {'name': 'Entropy', 'threshold': 0.3, 'normalized': False}
    """
    if type(policy) not in _KINDS.values():
        raise TypeError(
            f"`policy` must be one of gradalign's, {_listed(_KINDS)}, got {policy!r}; store the fields of a policy of"
            " your own yourself."
        )
    return {"name": type(policy).__name__} | {
        field.name: _plain(getattr(policy, field.name)) for field in fields(policy)
    }


def from_dict(mapping: Mapping[str, Any]) -> Policy:
    """Return the policy that ``to_dict`` made ``mapping`` of.

    Args:
        mapping: "name" and the fields of that policy; those with a default may be left out.

    Raises:
        TypeError: ``mapping`` is no mapping, or a field of the wrong type.
        ValueError: The name is none of gradalign's, a field is unknown, missing or out of range.

    >>> from_dict({"name": "Calibrated", "policy": {"name": "Entropy", "threshold": 0.3}, "temperatures": [1.5, 1.0]})
    Calibrated(policy=Entropy(threshold=0.3, normalized=False), temperatures=(1.5, 1.0))
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"`mapping` must be a mapping as to_dict makes it, got {mapping!r}.")
    given = dict(mapping)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in _KINDS:
        raise unknown_name("name", name, _KINDS)
    kind = _KINDS[name]
    known = {field.name: field for field in fields(kind)}
    needed = [field for field in known if known[field].default is MISSING]
    wrong = [field for field in given if field not in known] or [field for field in needed if field not in given]
    if wrong:
        raise ValueError(
            f"`mapping` must hold the fields of {name}, {_listed(known)}, got {_listed(given) or 'none'}; look at"
            f" {_listed(wrong)}."
        )
    for field, value in given.items():
        if known[field].default is False and not isinstance(value, bool):
            raise TypeError(f"`{field}` must be true or false, got {value!r}.")
    if kind is Calibrated:
        given["policy"] = from_dict(given["policy"])
    return kind(**given)


def _plain(value: object) -> object:
    if isinstance(value, Policy):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
