"""Tables 1 to 5: which runs each takes, and the cells that the finished ones fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gradalign.multiexit.configs import Config
from gradalign.multiexit.reproduce import published
from gradalign.multiexit.reproduce.drawing import draw_table
from gradalign.multiexit.reproduce.judged import WANTED, Judged, judged, policy_of
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.runs import Run

_ALPHAS = (0.1, 0.3, 0.5, 0.8)
_PAIR_SETTINGS: Mapping[str, tuple[str, str]] = {  # as the paper's columns go, for either exit of the pair
    "alone": ("pml-direct", "single"),
    "jointly": ("pml-joint", "pml-joint"),
    "taught by the other": ("pml-kd-early", "pml-kd-late"),
    "mutually": ("pml-mutual", "pml-mutual"),
}
_STRATEGIES = tuple(published.TABLE5)
_SPEEDS = ("layers x", "MACs x", "seconds x")
_MEANS = "Mean ± deviation over the seeds; the paper's figure, of 12 layers, in brackets."
_SCORES = f"Scores on development rows, per cent. {_MEANS}"
_HOW = (
    f"A policy's setting is the one whose speed-up in layers is nearest {WANTED} on held-out rows; the speed-ups are"
    " those on development rows, seconds row by row."
)


def speed_cells(rows: Sequence[Judged], wanted: int, paper: float | None = None) -> list[Cell]:
    """Return the speed-ups in layers, multiply-accumulates and seconds."""
    timed = [row.seconds for row in rows if row.seconds is not None]
    return [
        Cell([row.layers for row in rows], wanted, paper, digits=2),
        Cell([row.macs for row in rows], wanted, digits=2),
        Cell(timed, wanted, digits=2),
    ]


def judge(order: Order, configs: Sequence[Config], policy: str) -> list[Judged]:
    """Return what the finished runs are worth."""
    return [judged(run, policy, order.device) for run in order.finished(configs)]


def _seeds(order: Order, method: str, task: str, **changed: object) -> list[Config]:
    return [order.text(method, task, seed, **changed) for seed in order.seeds]


def _scores_at(runs: Sequence[Run], exit: int) -> list[float]:
    """Return the score of an exit in each run, per cent; -1 is the last."""
    return [100 * run.result[f"test_{run.result['main']}"][exit] for run in runs]


def _pairs(order: Order, task: str) -> list[int]:
    """Return the early exits: the first, and the one in the middle, of as many as the network has."""
    depth = order.depth(task)
    return [1, depth // 2]


def _table1_needs(order: Order) -> list[Config]:
    configs: dict[Config, None] = {}
    for task in order.tasks or ("sst-2", "cola"):
        for early in _pairs(order, task):
            for methods in _PAIR_SETTINGS.values():
                for method in methods:
                    changed = {} if method == "single" else {"pair_exit": early}
                    configs.update(dict.fromkeys(_seeds(order, method, task, **changed)))
    return list(configs)


def _table1(order: Order, path: Path) -> list[Path]:
    rows = []
    for task in order.tasks or ("sst-2", "cola"):
        for early, of_12 in zip(_pairs(order, task), (1, 6), strict=True):
            for which, exit in ((0, early - 1), (1, -1)):
                papers = published.TABLE1.get((task, of_12, ("early", "last")[which]), (None,) * len(_PAIR_SETTINGS))
                cells = []
                for methods, paper in zip(_PAIR_SETTINGS.values(), papers, strict=True):
                    method = methods[which]
                    changed = {} if method == "single" else {"pair_exit": early}
                    runs = order.finished(_seeds(order, method, task, **changed))
                    cells.append(Cell(_scores_at(runs, exit), len(order.seeds), paper))
                last = order.depth(task)
                rows.append((f"{task}, exits {early} and {last}: exit {early if which == 0 else last}", cells))
    table = Table("Table 1: learning between a pair of exits", ("exit", *_PAIR_SETTINGS), rows, (_SCORES,))
    return [*table.write(path), draw_table(table, list(_PAIR_SETTINGS), path)]


def _table2_methods(order: Order) -> Sequence[str]:
    return order.methods or tuple(published.TABLE2)


def _table2_tasks(order: Order) -> Sequence[str]:
    return order.tasks or tuple(published.TABLE2["single"][1])


def _table2_needs(order: Order) -> list[Config]:
    return [
        config
        for task in _table2_tasks(order)
        for method in _table2_methods(order)
        for config in _seeds(order, method, task)
    ]


def _table2(order: Order, path: Path) -> list[Path]:
    tasks, rows = _table2_tasks(order), []
    for method in _table2_methods(order):
        speed_up, papers = published.TABLE2.get(method, (None, {}))
        policy = "full" if method == "single" else policy_of(method)
        of_tasks = {task: judge(order, _seeds(order, method, task), policy) for task in tasks}
        cells = [Cell([row.score for row in of_tasks[task]], len(order.seeds), papers.get(task)) for task in tasks]
        every = [row for of_task in of_tasks.values() for row in of_task]
        rows.append((method, [*cells, *speed_cells(every, len(order.seeds) * len(tasks), speed_up)]))
    table = Table("Table 2: dynamic exiting", ("method", *tasks, *_SPEEDS), rows, (_SCORES, _HOW))
    return [*table.write(path), draw_table(table, tasks, path)]


def _table3_needs(order: Order) -> list[Config]:
    return [
        config
        for task in order.tasks or ("cola",)
        for alpha in _ALPHAS
        for method in order.methods or ("ml", "gaml-soft")
        for config in _seeds(order, method, task, alpha=alpha)
    ]


def _table3(order: Order, path: Path) -> list[Path]:
    rows = []
    methods = order.methods or ("ml", "gaml-soft")
    for task in order.tasks or ("cola",):
        for alpha in _ALPHAS:
            cells = []
            for method in methods:
                scored = judge(order, _seeds(order, method, task, alpha=alpha), policy_of(method))
                paper = published.TABLE3.get((method, alpha)) if task == "cola" else None
                cells.append(Cell([row.score for row in scored], len(order.seeds), paper))
            rows.append((f"{task}, alpha {alpha}", cells))
    table = Table("Table 3: the weight of the distillation", ("task", *methods), rows, (_SCORES, _HOW))
    return [*table.write(path), draw_table(table, methods, path)]


def _table4_needs(order: Order) -> list[Config]:
    return [
        config
        for task in order.tasks or ("cola", "sst-2")
        for method in order.methods or tuple(published.TABLE4)
        for config in _seeds(order, method, task)
    ]


def _table4(order: Order, path: Path) -> list[Path]:
    tasks, rows = order.tasks or ("cola", "sst-2"), []
    for method in order.methods or tuple(published.TABLE4):
        steps, seconds = [], []
        for task in tasks:
            results = [run.result for run in order.finished(_seeds(order, method, task))]
            paper = published.TABLE4.get(method, {}).get(task)
            steps.append(Cell([result["steps"] for result in results], len(order.seeds), paper, digits=0))
            seconds.append(Cell([result["seconds"] for result in results], len(order.seeds), digits=0))
        rows.append((method, [*steps, *seconds]))
    columns = ("method", *(f"{task} steps" for task in tasks), *(f"{task} seconds" for task in tasks))
    notes = ("Optimizer steps and seconds until training stopped, all stages together.", _MEANS)
    table = Table("Table 4: cost of training", columns, rows, notes)
    return [*table.write(path), draw_table(table, columns[1:], path)]


def _table5_needs(order: Order) -> list[Config]:
    methods = dict.fromkeys(method for _, method in _STRATEGIES)
    return [
        config
        for task in order.tasks or ("mnli", "mrpc", "sst-2")
        for method in methods
        for config in _seeds(order, method, task)
    ]


def _table5(order: Order, path: Path) -> list[Path]:
    tasks, rows = order.tasks or ("mnli", "mrpc", "sst-2"), []
    for policy, method in _STRATEGIES:
        speed_up, papers = published.TABLE5[policy, method]
        of_tasks = {task: judge(order, _seeds(order, method, task), policy) for task in tasks}
        cells = [Cell([row.score for row in of_tasks[task]], len(order.seeds), papers.get(task)) for task in tasks]
        every = [row for of_task in of_tasks.values() for row in of_task]
        speeds = speed_cells(every, len(order.seeds) * len(tasks), speed_up)
        rows.append((f"{policy}, {method}", [*cells, *speeds]))
    table = Table("Table 5: other exit policies", ("policy, method", *tasks, *_SPEEDS), rows, (_SCORES, _HOW))
    return [*table.write(path), draw_table(table, tasks, path)]


TABLE1 = Piece("a pair of exits that learn from each other", _table1_needs, _table1)
TABLE2 = Piece("methods under dynamic exiting", _table2_needs, _table2)
TABLE3 = Piece("the weight of the distillation, with and without alignment", _table3_needs, _table3)
TABLE4 = Piece("steps and seconds until training stops", _table4_needs, _table4)
TABLE5 = Piece("other exit policies", _table5_needs, _table5)
