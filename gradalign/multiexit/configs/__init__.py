"""Configurations of runs: everything that decides how one comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gradalign.multiexit.configs.base import GRANULARITIES, PRECISIONS, SCOPES, Config
from gradalign.multiexit.configs.images import ImageConfig
from gradalign.multiexit.configs.text import TextConfig

__all__ = ["GRANULARITIES", "PRECISIONS", "SCOPES", "Config", "ImageConfig", "TextConfig", "config_of"]

_KINDS: dict[str, type[Config]] = {kind.kind: kind for kind in (ImageConfig, TextConfig)}


def config_of(values: Mapping[str, Any], where: str) -> Config:
    """Return the configuration that ``to_dict`` gave.

    Args:
        values: What ``to_dict`` returned.
        where: Where they were read, for the error.

    Raises:
        ValueError: A setting is missing or unknown, or there is no such kind.
    """
    kind = _KINDS.get(values.get("kind", ""))
    if kind is None:
        raise ValueError(f"`config` must be of kind {' or '.join(_KINDS)}, got {values.get('kind')!r} in {where!r}.")
    known = {"kind", *(f.name for f in fields(kind))}
    if set(values) != known:
        odd = sorted(set(values) ^ known)
        raise ValueError(f"`config` must hold {', '.join(sorted(known))}, got {where!r} that differs in {odd}.")
    return kind(**{name: value for name, value in values.items() if name != "kind"})
