"""What ranks tell one another about a group, so that none waits for what another will never send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradalign.collectors.base import reaches_nothing
from gradalign.collectors.parameters import Layout
from gradalign.distributed import Ranks, Row


@contextmanager
def telling(tell: Callable[[], object] | None) -> Iterator[None]:
    """Tell the other ranks of an error within, at the place where they wait; None where nobody does.

    An interrupt goes untold: the others may be elsewhere, and whoever pressed the key would wait for them.
    """
    try:
        yield
    except Exception:
        if tell is not None:
            tell()
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
