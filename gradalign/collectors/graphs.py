"""What a loss's graph must not hold, found before gradients are lost in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gradalign.collectors.losses import Terms

# torch's own, and those of others that took its name over with its body.
_REENTRANT = "CheckpointFunctionBackward"
_COMPILED = "CompiledFunctionBackward"


def edges(terms: Iterable[Tensor], seen: set[Any] | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield every edge of the losses' graphs, a node and one that its gradient flows on to; depth first.

    Args:
        terms: The losses.
        seen: Nodes whose edges have been yielded; those of this walk are added. None for none.
    """
    seen = set() if seen is None else seen
    nodes: list[Any] = [term.grad_fn for term in terms if term.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        for following, _ in node.next_functions:
            if following is not None:
                yield node, following
                if following not in seen:
                    seen.add(following)
                    nodes.append(following)


def leads_to(terms: Iterable[Tensor], parameters: Iterable[Tensor]) -> bool:
    """Return whether a loss's gradient flows to one of the parameters; it stops at the first."""
    sought = {id(parameter) for parameter in parameters}
    return any(id(term) in sought for term in terms) or any(
        id(getattr(following, "variable", None)) in sought for _, following in edges(terms)
    )


def check_graphs(groups: Mapping[str, Terms], *, batched: bool) -> None:
    """Raise ValueError where a loss passes through what ``torch.autograd.grad`` does not see through.

    Parameters within a reentrant checkpoint are no part of the loss's graph: its backward makes a graph of its own and
    calls ``backward`` on that. ``torch.autograd.grad`` raises where it comes by; but it goes only where parameters are,
    and where none lie before the checkpoint it never comes by, and what is within gets no gradient and no word.

    The walk takes some tenths of a microsecond a node, of which a backward takes several.

    Args:
        groups: The losses, checked.
        batched: All backwards are taken in one, by vmap, which code that was generated for one knows nothing of.
    """
    seen: set[Any] = set()
    kinds: set[type] = set()
    for name, terms in groups.items():
        kinds.update(type(node) for node, _ in edges(terms, seen))
        found = {kind.__name__ for kind in kinds}
        if _REENTRANT in found:
            raise ValueError(
                f"`losses[{name!r}]` must not pass through reentrant activation checkpointing, which hides parameters"
                " from torch.autograd.grad, got one that does; pass use_reentrant=False to"
                " torch.utils.checkpoint.checkpoint (transformers:"
                " gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if batched and _COMPILED in found:
            raise ValueError(
                f"`losses[{name!r}]` must not pass through a compiled model with collector='batched', got one that"
                " does; take collector='stacked'."
            )
