"""Tables 1 to 5: which runs each takes, and the cells that the finished ones fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gradalign.multiexit.configs import Config
from gradalign.multiexit.reproduce import published
from gradalign.multiexit.reproduce.drawing import draw_table
from gradalign.multiexit.reproduce.judged import FULL, TIMED_ROWS, WANTED, Judged, judged, served_by
from gradalign.multiexit.reproduce.orders import Order, Piece
from gradalign.multiexit.reproduce.tables import Cell, Table
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text import glue

_MANY_EPOCHS = 30
_ALPHAS = (0.1, 0.3, 0.5, 0.8)
_PAIR_SETTINGS: Mapping[str, tuple[str, str]] = {  # as the paper's columns go, for either exit of the pair
    "alone": ("pml-direct", "single"),
    "jointly": ("pml-joint", "pml-joint"),
    "taught by the other": ("pml-kd-early", "pml-kd-late"),
    "mutually": ("pml-mutual", "pml-mutual"),
}
_STRATEGIES = tuple(published.TABLE5)
SPEEDS = ("layers x", "MACs x", "seconds x")
_MEANS = "Mean ± deviation over the seeds; in brackets the paper's figure, of BERT-base with its 12 layers on all rows."
_SCORES = f"Scores on development rows, per cent. {_MEANS}"


_EACH_ITS_POLICY = (
    "Rows leave by patience; deebert's by entropy, shallow-deep's by the largest probability; those of single and of"
    " networks with one exit at the last."
)


def how(wanted: float, policies: str = _EACH_ITS_POLICY) -> str:
    """Return what is to be said of speed-ups."""
    return (
        f"{policies} A policy's setting is the one whose speed-up in layers is nearest"
        f" {wanted} on held-out rows, and patience has few settings. Speed-ups are over the network that training began"
        f" with, all its layers run, on the rows of the scores; seconds row by row on the first {TIMED_ROWS}, without"
        " tokenisation, and 1 for single, which is that network."
    )


def speed_cells(rows: Sequence[Judged], wanted: int, paper: float | None = None, unit: str = "seeds") -> list[Cell]:
    """Return the speed-ups in layers, multiply-accumulates and seconds."""
    return [
        Cell([row.layers for row in rows], wanted, paper, 2, unit),
        Cell([row.macs for row in rows], wanted, None, 2, unit),
        Cell([row.seconds for row in rows], wanted, None, 2, unit),
    ]


def judge(order: Order, configs: Sequence[Config], policy: str, wanted: float = WANTED) -> list[Judged]:
    """Return what the finished runs are worth."""
    return [judged(run, policy, order.device, wanted) for run in order.finished(configs)]


def _served_by(method: str, task: str) -> str:
    """Return the name of a method's policy on a task; in regression, where exits have no entropy, patience."""
    policy = served_by(method)
    return policy if policy == FULL or glue.task(task).labels else "patience"


def _scores_at(runs: Sequence[Run], exit: int) -> list[float]:
    """Return the score of an exit in each run, per cent; -1 is the last."""
    return [100 * run.scores[exit] for run in runs]


def _pairs(order: Order, task: str) -> dict[int, int]:
    """Return the early exits, the first and the one in the middle, and which of the paper's twelve each stands for.

    Raises:
        ValueError: There is no exit before the last.
    """
    depth = order.depth(task)
    if depth < 2:
        raise ValueError(f"`backbone` must have two layers at least for a pair of exits, got {depth}.")
    return {1: 1} if depth // 2 == 1 else {1: 1, depth // 2: 6}


def _table1_needs(order: Order) -> list[Config]:
    configs: dict[Config, None] = {}
    for task in order.tasks or ("sst-2", "cola"):
        for early in _pairs(order, task):
            for methods in _PAIR_SETTINGS.values():
                for method in methods:
                    changed = {} if method == "single" else {"pair_exit": early}
                    configs.update(dict.fromkeys(order.each_seed(method, task, **changed)))
    return list(configs)


def _table1(order: Order, path: Path) -> list[Path]:
    rows = []
    for task in order.tasks or ("sst-2", "cola"):
        for early, of_12 in _pairs(order, task).items():
            for which, exit in ((0, early - 1), (1, -1)):
                papers = published.TABLE1.get((task, of_12, ("early", "last")[which]), (None,) * len(_PAIR_SETTINGS))
                cells = []
                for methods, paper in zip(_PAIR_SETTINGS.values(), papers, strict=True):
                    method = methods[which]
                    changed = {} if method == "single" else {"pair_exit": early}
                    runs = order.finished(order.each_seed(method, task, **changed))
                    cells.append(Cell(_scores_at(runs, exit), len(order.seeds), paper))
                last = order.depth(task)
                rows.append((f"{task}, exits {early} and {last}: exit {early if which == 0 else last}", cells))
    notes = (_SCORES, "The paper's pairs are exits 1 and 12, and 6 and 12; they stand beside ours in that order.")
    table = Table("Table 1: learning between a pair of exits", ("exit", *_PAIR_SETTINGS), rows, notes)
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
        for config in order.each_seed(method, task)
    ]


def _table2(order: Order, path: Path) -> list[Path]:
    tasks, rows = _table2_tasks(order), []
    for method in _table2_methods(order):
        speed_up, papers = published.TABLE2.get(method, (None, {}))
        of_tasks = {task: judge(order, order.each_seed(method, task), _served_by(method, task)) for task in tasks}
        cells = [Cell([row.score for row in of_tasks[task]], len(order.seeds), papers.get(task)) for task in tasks]
        every = [row for of_task in of_tasks.values() for row in of_task]
        rows.append((method, [*cells, *speed_cells(every, len(order.seeds) * len(tasks), speed_up, "runs")]))
    notes = (_SCORES, f"{how(WANTED)} They are means over all runs of a row, tasks and seeds.")
    table = Table("Table 2: dynamic exiting", ("method", *tasks, *SPEEDS), rows, notes)
    return [*table.write(path), draw_table(table, tasks, path)]


def _table3_needs(order: Order) -> list[Config]:
    return [
        config
        for task in order.tasks or ("cola",)
        for alpha in _ALPHAS
        for method in order.methods or ("ml", "gaml-soft")
        for config in order.each_seed(method, task, alpha=alpha)
    ]


def _table3(order: Order, path: Path) -> list[Path]:
    rows = []
    methods = order.methods or ("ml", "gaml-soft")
    for task in order.tasks or ("cola",):
        for alpha in _ALPHAS:
            cells = []
            for method in methods:
                scored = judge(order, order.each_seed(method, task, alpha=alpha), _served_by(method, task))
                paper = published.TABLE3.get((method, alpha)) if task == "cola" else None
                cells.append(Cell([row.score for row in scored], len(order.seeds), paper))
            rows.append((f"{task}, alpha {alpha}", cells))
    table = Table("Table 3: the weight of the distillation", ("task", *methods), rows, (_SCORES, how(WANTED)))
    return [*table.write(path), draw_table(table, methods, path)]


def _until_it_stops(order: Order) -> Order:
    """Return the order with so many epochs, unless the user says otherwise, that training stops before them."""
    return replace(order, settings={"epochs": _MANY_EPOCHS, **order.settings})


def _table4_needs(order: Order) -> list[Config]:
    order = _until_it_stops(order)
    return [
        config
        for task in order.tasks or ("cola", "sst-2")
        for method in order.methods or tuple(published.TABLE4)
        for config in order.each_seed(method, task)
    ]


def _table4(order: Order, path: Path) -> list[Path]:
    order = _until_it_stops(order)
    tasks, rows = order.tasks or ("cola", "sst-2"), []
    for method in order.methods or tuple(published.TABLE4):
        steps, seconds = [], []
        for task in tasks:
            results = [run.result for run in order.finished(order.each_seed(method, task))]
            paper = published.TABLE4.get(method, {}).get(task)
            steps.append(Cell([result["steps"] for result in results], len(order.seeds), paper, digits=0))
            seconds.append(Cell([result["seconds"] for result in results], len(order.seeds), digits=0))
        rows.append((method, [*steps, *seconds]))
    columns = ("method", *(f"{task} steps" for task in tasks), *(f"{task} seconds" for task in tasks))
    config = order.text("joint", tasks[0], order.seeds[0])
    stops = f"after {config.patience} epochs without a better score, {config.epochs} epochs at most"
    if config.patience is None or config.epochs <= config.patience:
        stops += "; with these it never stopped early: give more --epochs or a smaller --patience"
    notes = (f"Optimizer steps and seconds until training stopped, all stages together: {stops}.", _MEANS)
    table = Table("Table 4: cost of training", columns, rows, notes)
    return [*table.write(path), draw_table(table, columns[1:], path)]


def _table5_needs(order: Order) -> list[Config]:
    for task in order.tasks:
        if not glue.task(task).labels:
            raise ValueError(f"`tasks` must have classes for table5, got {task}, a regression; leave it out.")
    methods = dict.fromkeys(method for _, method in _STRATEGIES)
    return [
        config
        for task in order.tasks or ("mnli", "mrpc", "sst-2")
        for method in methods
        for config in order.each_seed(method, task)
    ]


def _table5(order: Order, path: Path) -> list[Path]:
    tasks, rows = order.tasks or ("mnli", "mrpc", "sst-2"), []
    for policy, method in _STRATEGIES:
        speed_up, papers = published.TABLE5[policy, method]
        of_tasks = {task: judge(order, order.each_seed(method, task), policy) for task in tasks}
        cells = [Cell([row.score for row in of_tasks[task]], len(order.seeds), papers.get(task)) for task in tasks]
        every = [row for of_task in of_tasks.values() for row in of_task]
        speeds = speed_cells(every, len(order.seeds) * len(tasks), speed_up, "runs")
        rows.append((f"{policy}, {method}", [*cells, *speeds]))
    notes = (_SCORES, how(WANTED, "Rows leave by the policy that a line names."))
    table = Table("Table 5: other exit policies", ("policy, method", *tasks, *SPEEDS), rows, notes)
    return [*table.write(path), draw_table(table, tasks, path)]


TABLE1 = Piece(
    "a pair of exits that learn from each other", _table1_needs, _table1, compares=False, sets=("pair_exit",)
)
TABLE2 = Piece("methods under dynamic exiting", _table2_needs, _table2)
TABLE3 = Piece("the weight of the distillation, with and without alignment", _table3_needs, _table3, sets=("alpha",))
TABLE4 = Piece("steps and seconds until training stops", _table4_needs, _table4)
TABLE5 = Piece("other exit policies", _table5_needs, _table5, compares=False)
