"""What a finished run is worth under a policy set to the paper's speed-up.

Shapes: M exits.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import cast

import torch

from gradalign.multiexit import policies
from gradalign.multiexit.evaluation import at_speed_up, policy_of
from gradalign.multiexit.files import read_json, write_json
from gradalign.multiexit.inference import MultiExitModel, Policy, early_exit
from gradalign.multiexit.runs import Run
from gradalign.multiexit.workloads import Workload, judge_of, workload_of

WANTED = 1.95  # the paper's methods on text are set to between 1.8 and 2.1
TIMED_ROWS = 64
FULL = "full"
"""The policy that has all rows leave at the last exit."""
_WARM_UP = 3  # rows that are run before any is timed
_OF_METHODS = {"deebert": "entropy", "shallow-deep": "max-probability", "single": FULL}


@dataclass(frozen=True)
class Judged:
    """A run under a policy.

    Attributes:
        score: On test rows, by the task's main metric, per cent.
        layers: Speed-up in layers over the network that the run began with.
        macs: Speed-up in multiply-accumulates over the same, with the heads that are asked.
        seconds: Speed-up in seconds over the same, row by row.
        policy: The calibrated policy, as it is written.
    """

    score: float
    layers: float
    macs: float
    seconds: float
    policy: str


def served_by(method: str) -> str:
    """Return the name of the policy that a method's paper serves it with: patience unless it says otherwise."""
    return _OF_METHODS.get(method, "patience")


def judged(run: Run, policy: str, device: torch.device | str, wanted: float = WANTED) -> Judged:
    """Return what a finished run is worth, and keep it in the run's folder, for seconds are not measured again.

    A network with one exit is taken as it is: its speed-up is that of its depth over its backbone's.

    Args:
        run: A finished run.
        policy: A name of ``evaluation.POLICIES``, or ``FULL``.
        device: Where seconds are measured.
        wanted: Speed-up in layers on held-out rows that the policy is set to; M where there are fewer exits.

    Raises:
        ValueError: The policy needs classes, and the task is a regression.
    """
    result, costs = run.result, run.costs
    M = len(costs.exits)
    full = policy == FULL or M == 1
    path = run.folder / f"judged-{FULL if full else f'{policy}-{wanted}'}.json"
    if path.is_file():
        return Judged(**read_json(path))
    held_out, test = run.logits("held_out"), run.logits("test")
    kind = policy_of("budget" if full else policy, held_out)
    outcome = at_speed_up(kind, held_out[0], test, 1.0 if full else min(wanted, M), costs, judge_of(run.config))
    workload = workload_of(run.config, device)
    found = Judged(
        100 * outcome.score,
        outcome.speed_up * result["whole_depth"] / result["depth"],
        outcome.mac_speed_up * result["whole_cost"] / costs.bare,
        1.0 if policy == FULL else seconds_saved(run, outcome.policy, workload),  # the same network
        repr(outcome.policy),
    )
    write_json(path, asdict(found))
    return found


def seconds_saved(run: Run, policy: Policy, workload: Workload) -> float:
    """Return how many times less time a run's network takes under a policy than the one it began with at full depth.

    The first test rows are run one at a time by either network, in turn, for a machine's speed drifts.
    """
    whole, model = (cast(MultiExitModel, network) for network in (workload.make_model(), workload.load(run.folder)))
    runs = ((whole, policies.Budget(whole.num_exits)), (model, policy))
    rows = list(workload.rows("test", TIMED_ROWS))
    for network, decides in runs:  # the first calls allocate and choose kernels
        for inputs in rows[:_WARM_UP]:
            early_exit(network, inputs, decides)
    spent = [0.0, 0.0]
    for row, inputs in enumerate(rows):
        for which in (0, 1) if row % 2 else (1, 0):
            started = time.perf_counter()
            early_exit(runs[which][0], inputs, runs[which][1])
            spent[which] += time.perf_counter() - started
    return spent[0] / spent[1]
