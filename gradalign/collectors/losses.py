"""The losses as the user names them, checked before any gradient is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

Losses = Mapping[str, Tensor | Sequence[Tensor]]
"""A group's name to a scalar loss, or to a sequence of scalar losses that are summed."""

Terms = tuple[Tensor, ...]
"""The scalar losses of one group."""


def check_losses(losses: object, *, source: Literal["losses", "probe"] = "losses") -> dict[str, Terms]:
    """Return each loss group's losses as a tuple, in order.

    Args:
        losses: What the user passed, or what the user's probe returned.
        source: Which of the two. A probe's losses need no graph.

    Raises:
        TypeError: ``losses`` is no mapping of names to tensors.
        ValueError: There is no group, a group is empty, or a loss is not scalar or has no graph.
    """
    what, example = _WORDS[source]
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"`{what}` must map each loss group's name to a scalar loss, got {type(losses).__name__}; write {example}."
        )
    if not losses:
        raise ValueError(f"`{what}` must hold at least one loss group, got none; write {example}.")
    return {_check_name(what, name): _check_group(what, name, group) for name, group in losses.items()}


_WORDS = {
    "losses": ("losses", 'backward({"main": loss})'),
    "probe": ("probe()", 'probe=lambda: {"kd": loss}'),
}


def _check_name(what: str, name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"`{what}` must have names (strings) as keys, got {name!r} ({type(name).__name__}).")
    return name


def _check_group(what: str, name: str, group: object) -> Terms:
    terms = (group,) if isinstance(group, Tensor) else group
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        raise TypeError(
            f"`{what}[{name!r}]` must be a scalar tensor or a sequence of them, got {type(group).__name__}."
        )
    if not terms:
        raise ValueError(f"`{what}[{name!r}]` must hold at least one loss, got an empty sequence; leave the group out.")
    for term in terms:
        _check_term(what, name, term)
    return tuple(terms)


def _check_term(what: str, name: str, term: object) -> None:
    if not isinstance(term, Tensor):
        raise TypeError(f"`{what}[{name!r}]` must be a scalar tensor, got {type(term).__name__} {term!r}.")
    if not term.is_floating_point():
        raise TypeError(
            f"`{what}[{name!r}]` must be a real floating-point tensor, got {term.dtype}; take .real or .abs()."
        )
    if term.numel() != 1:
        raise ValueError(
            f"`{what}[{name!r}]` must be scalar, got shape {tuple(term.shape)}; reduce it, with .mean() or .sum()."
        )
    if what == "losses" and not term.requires_grad:
        raise ValueError(
            f"`{what}[{name!r}]` must have a graph to differentiate, got a loss that requires no gradient; compute it"
            " from the parameters without detach() or torch.no_grad(), or leave the group out."
        )


def broken_groups(names: Sequence[tuple[str, ...]], squares: Tensor) -> list[tuple[str, ...]]:
    """Return the names of the groups whose gradient is not finite.

    Args:
        names: For each of the K gradients the names of its groups.
        squares: (n, K), numbers that are finite where the group's gradient is.
    """
    return [name for name, fine in zip(names, squares.isfinite().all(0).tolist(), strict=True) if not fine]
