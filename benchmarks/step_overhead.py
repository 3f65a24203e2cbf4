"""What a step of gradient surgery costs, against the floor (a forward, K backwards, the inner step) and joint training.

    python benchmarks/step_overhead.py --out benchmarks/results     every case that the device takes
    python benchmarks/step_overhead.py --cases bert resnet          some of them
    python benchmarks/step_overhead.py --quick                      small batches, few rounds

The floor, joint training, gradalign's collectors and the peers take their steps in turn, round after round, with one
model and one inner optimizer. Printed are each one's median time and the medians of its ratios to the floor and to
joint training of the same round. A case is a network and its loss groups: cross-entropy and distillation, K = 2, or
("-exits") one group an exit. What runs only on some machines says how it failed.
"""

from __future__ import annotations

import argparse
import warnings

import command_line
import plots
from models import CASES, Workload, cases
from provenance import record
from timing import Figures, measure
from ways import PEERS, REFERENCES, WAYS, in_order, make, suitable

ROUNDS = 15
LONGEST_BAR = 3.0


def case(workload: Workload, names: list[str], rounds: int, device: str) -> dict[str, Figures]:
    """Return the figures of every way that suits the workload, in the order of the names."""
    wanted = suitable(names, workload)
    made, failed = make(wanted, workload)
    measured = measure(made, rounds, device, REFERENCES, workload.clear)
    for name, figures in measured.items():
        if "failed" not in figures:
            figures.update(made[name].report())
    return in_order(wanted, measured, {name: {"failed": reason} for name, reason in failed.items()})


def line(name: str, figures: Figures) -> str:
    """Return a way's line of the printed table."""
    if "failed" in figures:
        return f"  {name:26} {figures['failed']}"
    ratios = "".join(f"{figures.get(f'of {reference}', float('nan')):14.3f}" for reference in REFERENCES)
    return f"  {name:26}{1e3 * figures['seconds']:10.1f}{ratios}"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = command_line.parser(__doc__, ROUNDS)
    made.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    return made


def main() -> None:
    """Measure, print a table a case, write JSON and a plot where asked."""
    options = parser().parse_args()
    command_line.keep_freed_memory()
    warnings.filterwarnings("ignore")  # a peer's own, in every round
    rounds = command_line.rounds(options)
    results: dict[str, object] = {"benchmark": "step_overhead", **record(options.device, PEERS), "rounds": rounds}
    command_line.show(results)
    results["cases"] = tables = {}
    for name in options.cases or cases(options.device):
        workload = CASES[name](options.device, options.quick)
        K = len(workload.losses())
        title = f"{workload.title}, K = {K}"
        print(f"\n{title}\n  {'':26}{'ms':>10}{'of the floor':>14}{'of joint':>14}", flush=True)
        figures = case(workload, options.ways, rounds, options.device)
        tables[name] = {"title": title, "K": K, "gradient bytes": workload.gradient_bytes, "ways": figures}
        for way, of_way in figures.items():
            print(line(way, of_way), flush=True)
    if path := command_line.save(options, "step_overhead", results):
        panels = {
            table["title"]: {way: of["of floor"] for way, of in table["ways"].items() if "of floor" in of}
            for table in tables.values()
        }
        plots.bars(path, panels, f"time, of the floor; bars end at {LONGEST_BAR:g}", line=1.0, most=LONGEST_BAR)


if __name__ == "__main__":
    main()
