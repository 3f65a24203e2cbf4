"""What a finished run is worth under a policy set to the paper's speed-up."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import cast

import torch

from gradalign.multiexit import policies
from gradalign.multiexit.evaluation import at_speed_up
from gradalign.multiexit.files import read_json, write_json
from gradalign.multiexit.inference import MultiExitModel, Policy, early_exit
from gradalign.multiexit.runs import Run
from gradalign.multiexit.workloads import Workload, judge_of, workload_of

WANTED = 1.95  # the paper's methods are set to between 1.8 and 2.1
_TIMED_ROWS = 64

POLICIES: dict[str, Policy] = {
    "patience": policies.Patience(1),
    "entropy": policies.Entropy(0.0),
    "max-probability": policies.MaxProbability(1.0),
}
_OF_METHODS = {"deebert": "entropy", "shallow-deep": "max-probability"}


@dataclass(frozen=True)
class Judged:
    """A run under a policy.

    Attributes:
        score: On test rows, by the task's main metric, per cent.
        layers: Speed-up in layers.
        macs: Speed-up in multiply-accumulates, heads counted.
        seconds: Speed-up in seconds, row by row; None where rows leave at one exit alone.
        policy: The calibrated policy, as it is written.
    """

    score: float
    layers: float
    macs: float
    seconds: float | None
    policy: str


def policy_of(method: str) -> str:
    """Return the name of the policy that a method's paper serves it with: patience unless it says otherwise."""
    return _OF_METHODS.get(method, "patience")


def judged(run: Run, policy: str, device: torch.device | str) -> Judged:
    """Return what a finished run is worth, and keep it in the run's folder, for seconds are not measured again.

    A network with one exit is taken as it is: its speed-up is that of its depth over its backbone's.

    Args:
        run: A finished run.
        policy: A name of ``POLICIES``, or "full" for the last exit of all rows.
        device: Where seconds are measured.
    """
    path = run.folder / f"judged-{policy}.json"
    if path.is_file():
        return Judged(**read_json(path))
    result, test = run.result, run.logits("test")
    full = policies.Budget(len(test[0]))
    kind = full if policy == "full" or len(test[0]) == 1 else POLICIES[policy]
    wanted = 1.0 if kind is full else min(WANTED, float(len(test[0])))
    outcome = at_speed_up(kind, run.logits("held_out")[0], test, wanted, result["costs"], judge_of(run.config))
    smaller = result["whole_depth"] / result["depth"]
    found = Judged(
        100 * outcome.score,
        outcome.speed_up * smaller,
        outcome.mac_speed_up * result["whole_cost"] / result["costs"][-1],
        None if kind is full else _seconds(run, outcome.policy, full, workload_of(run.config, device)),
        repr(outcome.policy),
    )
    write_json(path, asdict(found))
    return found


def _seconds(run: Run, policy: Policy, full: Policy, workload: Workload) -> float:
    """Return how many times less time test rows take under a policy than at full depth, one row at a time."""
    model = cast(MultiExitModel, workload.load(run.folder))
    spent = {policy: 0.0, full: 0.0}
    for row, inputs in enumerate(workload.rows("test", _TIMED_ROWS)):
        order = (policy, full) if row % 2 else (full, policy)  # in turn, for the machine's speed drifts
        for which in order:
            started = time.perf_counter()
            early_exit(model, inputs, which)
            spent[which] += time.perf_counter() - started
    return spent[full] / spent[policy]
