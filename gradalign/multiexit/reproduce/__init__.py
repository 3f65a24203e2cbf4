"""Run the tables and figures of the GAML-BERT paper again, on whatever backbone and data are at hand."""

from __future__ import annotations

from pathlib import Path

from gradalign.errors import unknown_name
from gradalign.multiexit.reproduce import curves, text_tables
from gradalign.multiexit.reproduce.images import TABLE8
from gradalign.multiexit.reproduce.orders import Order, Piece

__all__ = ["PIECES", "Order", "Piece", "reproduce"]

PIECES: dict[str, Piece] = {
    "table1": text_tables.TABLE1,
    "table2": text_tables.TABLE2,
    "table3": text_tables.TABLE3,
    "table4": text_tables.TABLE4,
    "table5": text_tables.TABLE5,
    "table8": TABLE8,
    "figure3": curves.FIGURE3,
    "figure4": curves.FIGURE4,
    "figure5": curves.FIGURE5,
}


def reproduce(name: str, order: Order, *, training: bool = True) -> list[Path]:
    """Train what a table or figure needs and is not finished, make it, and return its files.

    Args:
        name: A name of ``PIECES``.
        order: With what.
        training: False makes it of the runs that are finished; what is missing is said.

    Raises:
        ValueError: There is no such piece, or a setting makes no sense.
        Interrupted: Ctrl-C; the same call goes on.
    """
    if name not in PIECES:
        raise unknown_name("name", name, PIECES)
    piece = PIECES[name]
    if piece.kind == "images" and order.tasks:
        raise ValueError(f"`tasks` must be left out for {name}, which is on images, got {', '.join(order.tasks)}.")
    if order.methods and not piece.compares:
        raise ValueError(f"`methods` must be left out for {name}, which has its own, got {', '.join(order.methods)}.")
    for setting in piece.sets:
        if setting in order.settings:
            raise ValueError(
                f"`{setting}` must be left out for {name}, which goes through its own, got {order.settings[setting]}."
            )
    needed = piece.needs(order)
    order.folder.mkdir(parents=True, exist_ok=True)
    if training:
        order.train(needed)
    return piece.make(order, order.folder / name)
