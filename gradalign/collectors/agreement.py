"""What ranks tell one another about a group, so that none waits for what another will never send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradalign.collectors.base import check_target, reaches_nothing
from gradalign.collectors.parameters import Layout
from gradalign.distributed import Ranks, Row


@contextmanager
def telling(ranks: Ranks | None, layout: Layout, *, last: bool = True) -> Iterator[None]:
    """Let the other ranks know of an error within, at the place where they wait for ``agreed``.

    Args:
        ranks: The ranks; None for this one alone.
        layout: The parameters. One with a ``p.grad`` that cannot be added to is an error here already.
        last: The micro-batch is the last one of its step; before, nobody waits.
    """
    if ranks is None or not last:
        yield
        return
    try:
        for parameter in layout.parameters:
            check_target(parameter)
        yield
    except BaseException:
        ranks.agree(layout, None)
        raise


def agreed(ranks: Ranks, layout: Layout, name: str, row: Row) -> list[bool]:
    """Return which parameters the group of this name reaches on any rank; raise on all where it reaches none.

    Raises:
        ValueError: The group reaches no parameter on any rank.
        GradAlignError: Another rank has met an error.
    """
    reached = ranks.agree(layout, [gradient is not None for gradient in row])
    if not any(reached):
        raise reaches_nothing(name)
    return reached
