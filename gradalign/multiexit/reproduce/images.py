"""Table 8: the methods on images."""

from __future__ import annotations

from pathlib import Path

from gradalign.multiexit.configs import Config
from gradalign.multiexit.reproduce import published
from gradalign.multiexit.reproduce.drawing import draw_table
from gradalign.multiexit.reproduce.judged import served_by
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.reproduce.text_tables import SPEEDS, how, judge, speed_cells


def _methods(order: Order) -> tuple[str, ...]:
    return tuple(order.methods) or tuple(published.TABLE8)


def _needs(order: Order) -> list[Config]:
    return [order.images(method, seed) for seed in order.seeds for method in _methods(order)]


def _paper(order: Order) -> tuple[str, str, float]:
    """Return the data's name, the paper's data to stand beside them, and its speed-up there."""
    ours = Path(order.images("joint", 0).data).stem
    theirs = "cifar-100" if "100" in ours else "cifar-10"
    return ours, theirs, published.TABLE8["gaml-soft"][theirs][0]


def _make(order: Order, path: Path) -> list[Path]:
    rows = []
    ours, theirs, speed = _paper(order)
    column = f"accuracy on {ours}"
    for method in _methods(order):
        configs = [order.images(method, seed) for seed in order.seeds]
        scored = judge(order, configs, served_by(method), speed)
        speed_up, accuracy = published.TABLE8.get(method, {}).get(theirs, (None, None))
        wanted = len(order.seeds)
        rows.append(
            (method, [Cell([row.score for row in scored], wanted, accuracy), *speed_cells(scored, wanted, speed_up)])
        )
    table = Table(
        "Table 8: a ResNet with exits",
        ("method", column, *SPEEDS),
        rows,
        (
            "Accuracy on test images, per cent. Mean ± deviation over the seeds; in brackets the paper's figure, of a"
            f" ResNet-56 on {theirs.upper()}.",
            how(speed),
        ),
    )
    return [*table.write(path), draw_table(table, [column], path)]


TABLE8 = Piece("the methods on images", _needs, _make, kind="images")
