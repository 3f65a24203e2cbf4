"""Table 8: the methods on images."""

from __future__ import annotations

from pathlib import Path

from gradalign.multiexit.configs import Config
from gradalign.multiexit.reproduce import published
from gradalign.multiexit.reproduce.drawing import draw_table
from gradalign.multiexit.reproduce.judged import policy_of
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.reproduce.text_tables import judge, speed_cells


def _methods(order: Order) -> tuple[str, ...]:
    return tuple(order.methods) or tuple(published.TABLE8)


def _needs(order: Order) -> list[Config]:
    return [order.images(method, seed) for seed in order.seeds for method in _methods(order)]


def _make(order: Order, path: Path) -> list[Path]:
    rows = []
    for method in _methods(order):
        policy = "full" if method == "single" else policy_of(method)
        scored = judge(order, [order.images(method, seed) for seed in order.seeds], policy)
        speed_up, accuracy = published.TABLE8.get(method, {}).get("cifar-10", (None, None))
        wanted = len(order.seeds)
        rows.append(
            (method, [Cell([row.score for row in scored], wanted, accuracy), *speed_cells(scored, wanted, speed_up)])
        )
    table = Table(
        "Table 8: a ResNet with exits",
        ("method", "accuracy", "layers x", "MACs x", "seconds x"),
        rows,
        ("Accuracy on test images, per cent; mean ± deviation over the seeds; the paper's for CIFAR-10 in brackets.",),
    )
    return [*table.write(path), draw_table(table, ["accuracy"], path)]


TABLE8 = Piece("the methods on images", _needs, _make, kind="images")
