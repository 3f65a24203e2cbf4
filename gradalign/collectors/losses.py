"""The losses as the user names them, checked before any gradient is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Losses = Mapping[str, Tensor | Sequence[Tensor]]
"""A group's name to a scalar loss, or to a sequence of scalar losses that are summed."""


def check_losses(losses: object) -> dict[str, tuple[Tensor, ...]]:
    """Return each loss group's losses as a tuple, in order.

    Raises:
        TypeError: ``losses`` is no mapping of names to tensors.
        ValueError: There is no group, a group is empty, or a loss is not scalar or has no graph.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(
            "`losses` must map each loss group's name to a scalar loss, got"
            f' {type(losses).__name__}; write backward({{"main": loss}}).'
        )
    if not losses:
        raise ValueError('`losses` must hold at least one loss group, got none; write backward({"main": loss}).')
    return {_check_name(name): _check_group(name, group) for name, group in losses.items()}


def _check_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"`losses` must have names (strings) as keys, got {name!r} ({type(name).__name__}).")
    return name


def _check_group(name: str, group: object) -> tuple[Tensor, ...]:
    terms = (group,) if isinstance(group, Tensor) else group
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        raise TypeError(
            f"`losses[{name!r}]` must be a scalar tensor or a sequence of them, got {type(group).__name__}."
        )
    if not terms:
        raise ValueError(f"`losses[{name!r}]` must hold at least one loss, got an empty sequence; leave the group out.")
    for term in terms:
        _check_term(name, term)
    return tuple(terms)


def _check_term(name: str, term: object) -> None:
    if not isinstance(term, Tensor):
        raise TypeError(f"`losses[{name!r}]` must be a scalar tensor, got {type(term).__name__} {term!r}.")
    if not term.is_floating_point():
        raise TypeError(
            f"`losses[{name!r}]` must be a real floating-point tensor, got {term.dtype}; take .real or .abs()."
        )
    if term.numel() != 1:
        raise ValueError(
            f"`losses[{name!r}]` must be scalar, got shape {tuple(term.shape)}; reduce it, with .mean() or .sum()."
        )
    if not term.requires_grad:
        raise ValueError(
            f"`losses[{name!r}]` must have a graph to differentiate, got a loss that requires no gradient; compute it"
            " from the parameters without detach() or torch.no_grad(), or leave the group out."
        )


def broken_groups(names: Sequence[str], gramians: Tensor, outside: Tensor) -> list[str]:
    """Return the names of the groups whose squared norm, in or outside the scope, is not finite.

    Args:
        names: K names.
        gramians: (B, K, K), of the blocks.
        outside: (K, K), of the parameters outside the scope.
    """
    squares = torch.cat([gramians, outside.unsqueeze(0)]).diagonal(dim1=-2, dim2=-1)
    return [name for name, fine in zip(names, squares.isfinite().all(0).tolist(), strict=True) if not fine]
