"""What gradient surgery holds beside joint training: the peak of the memory in use, each way in its own process.

    python benchmarks/memory.py --out benchmarks/results           every case that the device takes
    python benchmarks/memory.py --cases bert --ways "stacked PCGrad" "torchjd PCGrad, lean"
    python benchmarks/memory.py --quick                            one small case in one order

On the CPU the peak is that of the resident set, on CUDA that of the memory that torch's allocator gave out. Printed is
the peak less that of joint training in a process of its own, in MiB and in units of P, one group's gradient. Both
orders of a training loop are taken: gradients reset before the forward, and after it, right before the backward; the
last step's gradients then live through the forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import command_line
import plots
import torch
from models import CASES, Workload, cases
from provenance import record
from timing import failure
from ways import PEERS, WAYS, make, suitable

ROUNDS = 1  # what a step allocates is the same every time
CALLS = 3  # the first makes the inner optimizer's state; what grows from step to step shows
ORDERS = {"reset before the forward": False, "reset before the backward": True}
MIB = 2**20
# Left to itself, glibc keeps freed blocks for later, more and more of them up to 32 MiB each, and the resident set then
# shows what was in use once. With these, what is freed goes back to the system at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak(device: str) -> int:
    """Return the peak of this process's memory in use so far, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # In KiB on Linux, in bytes on macOS. A process starts with its parent's peak: the parent has to stay small.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(workload: Workload, name: str, device: str, *, zero_late: bool) -> dict[str, object]:
    """Take steps in this process and return its peak, or how the way failed, or that this case has no such way."""
    if not suitable([name], workload):
        return {"unsuitable": True}
    # All are made, and so imported, in every process: a peer's code must not count as what its steps hold.
    made, failed = make(WAYS, workload)
    if name in failed:
        return {"failed": failed[name]}
    way = made[name]
    way.zero_late = zero_late
    try:
        for _ in range(CALLS):
            way()
    except Exception as error:  # noqa: BLE001, a peer may fail with anything, and the table says so
        return {"failed": failure(error)}
    return {
        "bytes": peak(device),
        "title": workload.title,
        "K": len(workload.losses()),
        "gradient bytes": workload.gradient_bytes,
        **way.report(),
    }


def in_a_process(options: argparse.Namespace, case: str, name: str, order: str) -> dict[str, object]:
    """Return what ``child`` returned in a process of its own."""
    quick = ["--quick"] if options.quick else []
    arguments = ["--child", "--device", options.device, "--cases", case, "--ways", name, "--orders", order, *quick]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def repeated(options: argparse.Namespace, case: str, name: str, order: str) -> dict[str, object]:
    """Return the outcome with the median peak of several processes."""
    outcomes = [in_a_process(options, case, name, order) for _ in range(command_line.rounds(options))]
    for outcome in outcomes:
        if "bytes" not in outcome:
            return outcome
    return outcomes[0] | {"bytes": statistics.median(outcome["bytes"] for outcome in outcomes)}


def over_joint(outcome: dict[str, object], joint: dict[str, object]) -> dict[str, object]:
    """Return what an outcome took over joint training: in MiB, and in units of P; or how either failed."""
    for one in (outcome, joint):
        if "failed" in one:
            return {"failed": one["failed"]}
    extra = outcome["bytes"] - joint["bytes"]
    return {
        "MiB": outcome["bytes"] / MIB,
        "MiB over joint": extra / MIB,
        "P over joint": extra / joint["gradient bytes"],
        **{key: outcome[key] for key in ("collector", "derivative") if key in outcome},
    }


def measure(options: argparse.Namespace, case: str) -> dict[str, object]:
    """Return a case's figures in both orders, printing a line for each way."""
    table: dict[str, object] = {"orders": {}}
    for order in options.orders:
        joint = repeated(options, case, "joint", order)
        table |= {key: joint[key] for key in ("title", "K", "gradient bytes") if key in joint}
        if "title" in joint and order == options.orders[0]:
            print(f"\n{joint['title']}, K = {joint['K']}, P = {joint['gradient bytes'] / MIB:.1f} MiB")
        print(f"  {order}\n  {'':26}{'MiB':>10}{'over joint':>14}{'in P':>10}", flush=True)
        figures = table["orders"][order] = {}
        for name in options.ways:
            outcome = joint if name == "joint" else repeated(options, case, name, order)
            if "unsuitable" in outcome:
                continue
            figures[name] = over_joint(outcome, joint)
            print(line(name, figures[name]), flush=True)
    return table


def line(name: str, figures: dict[str, object]) -> str:
    """Return a way's line of the printed table."""
    if "failed" in figures:
        return f"  {name:26} {figures['failed']}"
    return f"  {name:26}{figures['MiB']:10.1f}{figures['MiB over joint']:14.1f}{figures['P over joint']:10.2f}"


def default_cases(device: str) -> list[str]:
    """Return the cases whose gradients are large beside what a process holds anyway."""
    return [name for name in cases(device) if name.startswith("bert")]


def panels(tables: dict[str, dict[str, object]]) -> dict[str, dict[str, float]]:
    """Return the plot's bars, a panel for each case and order."""
    return {
        f"{table['title']}, K = {table['K']}\n{order}": {
            way: of["P over joint"] for way, of in figures.items() if "P over joint" in of
        }
        for table in tables.values()
        for order, figures in table["orders"].items()
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = command_line.parser(__doc__, ROUNDS)
    made.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    made.add_argument(
        "--orders", nargs="+", choices=ORDERS, default=list(ORDERS), metavar="ORDER", help=" or ".join(ORDERS)
    )
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure, print a table a case, write JSON and a plot where asked; or be one of the processes."""
    options = parser().parse_args()
    if options.child:
        warnings.filterwarnings("ignore")
        (case,), (name,), (order,) = options.cases, options.ways, options.orders
        workload = CASES[case](options.device, options.quick)
        print(json.dumps(child(workload, name, options.device, zero_late=ORDERS[order])))
        return
    results: dict[str, object] = {"benchmark": "memory", **record(options.device, PEERS)}
    results |= {"rounds": command_line.rounds(options), "calls": CALLS, "allocator": ALLOCATOR}
    command_line.show(results)
    cases_here = options.cases or default_cases(options.device)
    if options.quick:
        cases_here, options.orders = cases_here[:1], options.orders[:1]
    results["cases"] = {case: measure(options, case) for case in cases_here}
    if path := command_line.save(options, "memory", results):
        plots.bars(path, panels(results["cases"]), "peak over joint training, in units of P")


if __name__ == "__main__":
    main()
