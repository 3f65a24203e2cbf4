"""Figures 3 to 5: the angles between the gradients, and scores by depth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradalign.multiexit import methods
from gradalign.multiexit.configs import Config
from gradalign.multiexit.figures import angles_of, canvas, draw_angles, draw_depths
from gradalign.multiexit.methods import Settings
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.runs import Run
from gradalign.rules import Sum

_RIGHT_ANGLE = 90.0
_CURVES = ("joint", "fastbert", "gaml-soft")
_TUNED = "fine-tuned to that layer"
_Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name to scores by exit, one sequence a seed."""


def _tasks(order: Order, papers: Sequence[str]) -> Sequence[str]:
    return order.tasks or papers


def _figure3_needs(order: Order) -> list[Config]:
    for name in order.methods:
        _check_pair(name)
    return [
        config
        for task in _tasks(order, ("sst-2",))
        for method in order.methods or ("ml",)
        for config in order.each_seed(method, task)
    ]


def _figure3(order: Order, path: Path) -> list[Path]:
    found: dict[str, list[Run]] = {}
    rows = []
    for task in _tasks(order, ("sst-2",)):
        for method in order.methods or ("ml",):
            name = f"{method} on {task}"
            found[name] = order.finished(order.each_seed(method, task))
            of_seeds = [angles for run in found[name] if (angles := angles_of(run))]
            above = [100 * statistics.fmean(angle > _RIGHT_ANGLE for angle in angles) for angles in of_seeds]
            middle = [statistics.median(angles) for angles in of_seeds]
            paper = 50.0 if (method, task) == ("ml", "sst-2") else None
            rows.append((name, [Cell(above, len(order.seeds), paper), Cell(middle, len(order.seeds))]))
    notes = (
        "The angle between the gradients of cross-entropy and distillation at every step. The paper says of mutual"
        " learning on SST-2 that about half are above 90 degrees.",
        "Mean ± deviation over the seeds.",
    )
    table = Table("Figure 3: angles between the gradients", ("run", "above 90°, %", "median, °"), rows, notes)
    figure, axes = canvas(len(found))
    for axis, (name, runs) in zip(axes, found.items(), strict=True):
        draw_angles(axis, name, runs)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return [*table.write(path), path.with_suffix(".png")]


def _check_pair(name: str) -> None:
    """Raise ValueError unless a method trains on cross-entropy and distillation from its first step on."""
    rule = methods.get(name).stages[0].rule(Settings())
    if name.startswith("exits:") or (isinstance(rule, Sum) and not name.startswith("kd:")):
        raise ValueError(
            f"`methods` must have cross-entropy and distillation from the first step on for figure3, got {name}; take"
            " ml or gaml-soft, say."
        )


def _figure4_needs(order: Order) -> list[Config]:
    for name in order.methods:
        if methods.get(name).kinds == ("text",):  # the smaller encoders
            raise ValueError(
                f"`methods` must keep an exit after each layer for figure4, got {name}, which ends with one; leave it"
                " out."
            )
    return [
        config
        for task in _tasks(order, ("cola", "sst-2"))
        for method in (*(order.methods or _CURVES), "single")
        for config in order.each_seed(method, task)
    ]


def _figure4(order: Order, path: Path) -> list[Path]:
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for task in _tasks(order, ("cola", "sst-2")):
        depth = order.depth(task)
        curves[task] = {
            method: [scores(run) for run in order.finished(order.each_seed(method, task))]
            for method in order.methods or _CURVES
        }
        single = [scores(run)[-1:] for run in order.finished(order.each_seed("single", task))]
        curves[task]["single, last exit"] = [score * depth for score in single]
    cells = {task: {name: list(zip(*of, strict=True)) for name, of in named.items()} for task, named in curves.items()}
    return _depths(order, path, "Figure 4: score by depth, budgeted exiting", cells, curves)


def _figure5_needs(order: Order) -> list[Config]:
    return [
        config
        for task in _tasks(order, ("cola", "sst-2"))
        for exit in range(1, order.depth(task) + 1)
        for config in _alone(order, task, exit)
    ]


def _alone(order: Order, task: str, exit: int) -> list[Config]:
    """Return the runs of a network that ends at an exit; the whole one is the method single."""
    if exit == order.depth(task):
        return order.each_seed("single", task)
    return order.each_seed("pml-direct", task, pair_exit=exit)


def _figure5(order: Order, path: Path) -> list[Path]:
    cells, curves = {}, {}
    for task in _tasks(order, ("cola", "sst-2")):
        columns = [
            {run.config.seed: scores(run)[exit - 1] for run in order.finished(_alone(order, task, exit))}
            for exit in range(1, order.depth(task) + 1)
        ]
        whole = [seed for seed in order.seeds if all(seed in column for column in columns)]
        cells[task] = {_TUNED: [list(column.values()) for column in columns]}
        curves[task] = {_TUNED: [[column[seed] for column in columns] for seed in whole]}
    return _depths(order, path, "Figure 5: networks fine-tuned to a layer alone", cells, curves)


def scores(run: Run) -> list[float]:
    """Return the main score of each exit on development rows, per cent."""
    return [100 * score for score in run.scores]


def _depths(
    order: Order,
    path: Path,
    title: str,
    cells: Mapping[str, _Curves],
    curves: Mapping[str, _Curves],
) -> list[Path]:
    """Write the scores by exit, one value a seed, of each name on each task, and draw the seeds' whole curves."""
    depth = order.depth(next(iter(cells)))
    rows = [
        (f"{task}, {name}", [Cell(values, len(order.seeds)) for values in by_exit or [()] * depth])
        for task, of_task in cells.items()
        for name, by_exit in of_task.items()
    ]
    columns = ("run", *(str(exit) for exit in range(1, depth + 1)))
    note = "Score of each exit on development rows, per cent. Mean ± deviation over the seeds."
    table = Table(title, columns, rows, (note,))
    figure, axes = canvas(len(curves))
    for axis, (task, of_task) in zip(axes, curves.items(), strict=True):
        draw_depths(axis, {name: of_name for name, of_name in of_task.items() if of_name}, task)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return [*table.write(path), path.with_suffix(".png")]


FIGURE3 = Piece("angles between the gradients at every step", _figure3_needs, _figure3)
FIGURE4 = Piece("score by depth, budgeted exiting", _figure4_needs, _figure4)
FIGURE5 = Piece(
    "networks fine-tuned to a layer alone: over-thinking", _figure5_needs, _figure5, compares=False, sets=("pair_exit",)
)
