"""Train several methods on the same data with the same seeds, and put them side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradalign.multiexit import policies
from gradalign.multiexit.configs import Config
from gradalign.multiexit.evaluation import Outcome, at_score
from gradalign.multiexit.files import write_json
from gradalign.multiexit.records import conflict_shares
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import train
from gradalign.multiexit.workloads import judge_of, workload_of


@dataclass(frozen=True)
class Row:
    """What one run came to.

    Attributes:
        method: The method.
        seed: The seed.
        main: The metric that the scores are of.
        mean_score: On test rows, mean over the exits.
        last_score: On test rows, of the last exit.
        conflicts: Share of the steps whose losses conflict, None with a single loss.
        reversals: Share of the steps with a weight below zero.
        equal: The fastest entropy policy that on held-out rows is as good as the first method's last exit, as it comes
            out on test rows; None where no setting is, and in regression, where there is no entropy.
        seconds: Training time.
    """

    method: str
    seed: int
    main: str
    mean_score: float
    last_score: float
    conflicts: float | None
    reversals: float
    equal: Outcome | None
    seconds: float


def compare(
    config: Config, methods: Sequence[str], seeds: Sequence[int], folder: Path, device: torch.device | str = "cpu"
) -> list[Row]:
    """Train each method with each seed, and return a row for each run.

    Runs that a folder holds already are taken as they are, or continued: so a comparison that was stopped goes on.

    Args:
        config: What the runs share; its method and seed are replaced, and what it leaves open is each method's own.
        methods: The methods; the score of the first one's last exit is what the others' speed-up is measured at.
        seeds: The seeds.
        folder: Holds a folder for each run, named METHOD-seedN with - for a colon, and comparison.json.
        device: Where to compute.

    Raises:
        ValueError: A method or a seed is given twice, or a run in the folder has another configuration.
    """
    for argument, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"`{argument}` must be different from one another, got {', '.join(map(str, values))}.")
    runs = {
        (method, seed): Run(_folder_of(folder, method, seed)).prepared(config.with_method(method, seed))
        for seed in seeds
        for method in methods
    }
    for run in runs.values():
        if not run.finished:
            train(run, workload_of(run.config, device))
    rows = []
    for seed in seeds:
        wanted = judge_of(config)(*_last_answers(*runs[methods[0], seed].logits("held_out")))
        rows += [_row(runs[method, seed], wanted) for method in methods]
    write_json(folder / "comparison.json", [_record(row) for row in rows])
    return rows


def runs_in(folder: Path) -> dict[str, list[Run]]:
    """Return all finished runs in a comparison's folder, by method."""
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*-seed*")):
        run = Run(path)
        if run.exists and run.finished:
            found.setdefault(run.config.method, []).append(run)
    return found


def runs_of(rows: Sequence[Row], folder: Path) -> dict[str, list[Run]]:
    """Return the runs that the rows of a comparison tell of, by method."""
    runs: dict[str, list[Run]] = {}
    for row in rows:
        runs.setdefault(row.method, []).append(Run(_folder_of(folder, row.method, row.seed)))
    return runs


def _folder_of(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method.replace(':', '-')}-seed{seed}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, a method a line: mean over the seeds ± standard deviation."""
    header = ("method", "seeds", "mean of exits", "last exit", "conflicting steps", "reversed steps", "speed-up")
    lines = [header, tuple("---" for _ in header)]
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        speed_ups = [row.equal.speed_up for row in of_method if row.equal is not None]
        paired = [row for row in of_method if row.conflicts is not None]
        lines.append(
            (
                method,
                str(len(of_method)),
                _spread([100 * row.mean_score for row in of_method], " %"),
                _spread([100 * row.last_score for row in of_method], " %"),
                _spread([100 * row.conflicts for row in paired if row.conflicts is not None], " %"),
                _spread([100 * row.reversals for row in paired], " %"),
                _spread(speed_ups, "x", digits=2) + _reached(len(speed_ups), len(of_method)),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _row(run: Run, wanted: float) -> Row:
    config, result = run.config, run.result
    shares = conflict_shares(run.metrics("step"))
    return Row(
        config.method,
        config.seed,
        result["main"],
        statistics.fmean(run.scores),
        run.scores[-1],
        None if shares is None else shares[0],
        0.0 if shares is None else shares[1],
        _at_score(run, wanted),
        result["seconds"],
    )


def _last_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return policies.Budget(len(logits)).decide(logits).labels, labels


def _at_score(run: Run, wanted: float) -> Outcome | None:
    held_out, test = run.logits("held_out"), run.logits("test")
    if held_out[0].shape[-1] == 1:
        return None
    return at_score(policies.Entropy(0.0), held_out, test, wanted, run.costs, judge_of(run.config))


def _record(row: Row) -> Mapping[str, object]:
    return {
        **asdict(row),
        "equal": None if row.equal is None else {**asdict(row.equal), "policy": repr(row.equal.policy)},
    }


def _spread(values: Sequence[float], unit: str, digits: int = 1) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "") + unit


def _reached(reached: int, of: int) -> str:
    return "" if reached in (0, of) else f" ({reached} of {of} seeds)"
