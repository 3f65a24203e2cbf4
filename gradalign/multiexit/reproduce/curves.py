"""Figures 3 to 5: the angles between the gradients, and scores by depth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradalign.multiexit.configs import Config
from gradalign.multiexit.figures import angles_of, canvas, draw_angles, draw_depths
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.runs import Run

_RIGHT_ANGLE = 90.0
_CURVES = ("joint", "fastbert", "gaml-soft")


def _tasks(order: Order, papers: Sequence[str]) -> Sequence[str]:
    return order.tasks or papers


def _seeds(order: Order, method: str, task: str, **changed: object) -> list[Config]:
    return [order.text(method, task, seed, **changed) for seed in order.seeds]


def _figure3_needs(order: Order) -> list[Config]:
    return [
        config
        for task in _tasks(order, ("sst-2",))
        for method in order.methods or ("ml",)
        for config in _seeds(order, method, task)
    ]


def _figure3(order: Order, path: Path) -> list[Path]:
    found: dict[str, list[Run]] = {}
    rows = []
    for task in _tasks(order, ("sst-2",)):
        for method in order.methods or ("ml",):
            runs = order.finished(_seeds(order, method, task))
            of_seeds = [angles_of(run) for run in runs]
            above = [100 * statistics.fmean(angle > _RIGHT_ANGLE for angle in angles) for angles in of_seeds]
            middle = [statistics.median(angles) for angles in of_seeds]
            name = f"{method} on {task}"
            rows.append(
                (
                    name,
                    [Cell(above, len(order.seeds), 50.0 if task == "sst-2" else None), Cell(middle, len(order.seeds))],
                )
            )
            if runs:
                found[name] = runs
    notes = (
        "The angle between the gradients of cross-entropy and distillation at every step; the paper says of SST-2 that"
        " about half are above 90 degrees.",
    )
    table = Table("Figure 3: angles between the gradients", ("run", "above 90°, %", "median, °"), rows, notes)
    files = table.write(path)
    if found:
        figure, axes = canvas(len(found))
        for axis, (name, runs) in zip(axes, found.items(), strict=True):
            draw_angles(axis, name, runs)
        figure.savefig(path.with_suffix(".png"), dpi=120)
        files.append(path.with_suffix(".png"))
    return files


def _figure4_needs(order: Order) -> list[Config]:
    return [
        config
        for task in _tasks(order, ("cola", "sst-2"))
        for method in (*(order.methods or _CURVES), "single")
        for config in _seeds(order, method, task)
    ]


def _figure4(order: Order, path: Path) -> list[Path]:
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for task in _tasks(order, ("cola", "sst-2")):
        for method in order.methods or _CURVES:
            curves.setdefault(task, {})[method] = [scores(run) for run in order.finished(_seeds(order, method, task))]
        single = [scores(run)[-1:] for run in order.finished(_seeds(order, "single", task))]
        curves[task]["single, last exit"] = [score * order.depth(task) for score in single]
    return _depths(order, path, "Figure 4: score by depth, budgeted exiting", curves)


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
        return _seeds(order, "single", task)
    return _seeds(order, "pml-direct", task, pair_exit=exit)


def _figure5(order: Order, path: Path) -> list[Path]:
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for task in _tasks(order, ("cola", "sst-2")):
        depth = order.depth(task)
        columns = []
        for exit in range(1, depth + 1):
            found = {run.config.seed: scores(run)[exit - 1] for run in order.finished(_alone(order, task, exit))}
            columns.append(found)
        whole = set(order.seeds).intersection(*columns)
        curves[task] = {"fine-tuned to that layer": [[column[seed] for column in columns] for seed in sorted(whole)]}
    return _depths(order, path, "Figure 5: networks fine-tuned to a layer alone", curves)


def scores(run: Run) -> list[float]:
    """Return the main score of each exit on development rows, per cent."""
    result = run.result
    return [100 * score for score in result[f"test_{result['main']}"]]


def _depths(
    order: Order, path: Path, title: str, curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
) -> list[Path]:
    depth = max(order.depth(task) for task in curves)
    rows = []
    for task, of_task in curves.items():
        for name, of_name in of_task.items():
            by_exit = list(zip(*of_name, strict=True)) or [()] * depth
            rows.append((f"{task}, {name}", [Cell(values, len(order.seeds)) for values in by_exit]))
    columns = ("run", *(str(exit) for exit in range(1, depth + 1)))
    table = Table(
        title, columns, rows, ("Score of each exit on development rows, per cent; mean ± deviation over seeds.",)
    )
    figure, axes = canvas(len(curves))
    for axis, (task, of_task) in zip(axes, curves.items(), strict=True):
        draw_depths(axis, {name: of_name for name, of_name in of_task.items() if of_name}, task)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return [*table.write(path), path.with_suffix(".png")]


FIGURE3 = Piece("angles between the gradients at every step", _figure3_needs, _figure3)
FIGURE4 = Piece("score by depth, budgeted exiting", _figure4_needs, _figure4)
FIGURE5 = Piece("networks fine-tuned to a layer alone: over-thinking", _figure5_needs, _figure5)
