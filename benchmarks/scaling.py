"""How the cost of an aligned step grows: with the number of loss groups K, and with the number of parameters P.

    python benchmarks/scaling.py --out benchmarks/results    K = 2 to 32, P = 66 thousand to 34 million
    python benchmarks/scaling.py --quick                     few and small ones

Against K the network stays the same, an MLP with 32 exits, whose cross-entropies are dealt to K groups. Against P the
groups stay the same, cross-entropy and distillation, and an MLP of 8 layers grows in width. Printed are each way's
median time and the medians of its ratios to the floor and to joint training of the same round.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import command_line
import plots
from models import Workload, mlp, pair, shares_of_exits
from provenance import record
from step_overhead import case, line
from ways import PEERS, WAYS

ROUNDS = 15
GROUPS = (2, 4, 8, 16, 32)
WIDTHS = (90, 181, 362, 724, 1448, 2048)
EXITS = 32
TITLES = {"K": "cost against K", "P": "cost against P, K = 2"}


def by_groups(K: int, device: str, *, quick: bool) -> Workload:
    """Return the network with 32 exits, and their losses in K groups."""
    return mlp(shares_of_exits(K), device, layers=EXITS, width=32 if quick else 256, num_exits=EXITS)


def by_width(width: int, device: str) -> Workload:
    """Return a network of 8 layers of this width with 4 exits, and two losses."""
    return mlp(pair, device, layers=8, width=width, num_exits=4)


def curves(entries: list[dict[str, object]], size: str) -> dict[str, list[tuple[float, float]]]:
    """Return the plot's curves: each way's ratio to the floor against K or P."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for way, figures in entry["ways"].items():
            if "of floor" in figures:
                lines.setdefault(way, []).append((entry[size], figures["of floor"]))
    return lines


def measure(workload: Workload, names: list[str], rounds: int, device: str) -> dict[str, object]:
    """Return an entry of the results, printing its table."""
    K, P = len(workload.losses()), sum(parameter.numel() for parameter in workload.parameters)
    print(
        f"\n{workload.title}: K = {K}, P = {P:,}\n  {'':26}{'ms':>10}{'of the floor':>14}{'of joint':>14}", flush=True
    )
    figures = case(workload, names, rounds, device)
    for way, of_way in figures.items():
        print(line(way, of_way), flush=True)
    return {"title": workload.title, "K": K, "P": P, "ways": figures}


def main() -> None:
    """Measure, print a table for each size, write JSON and a plot where asked."""
    made = command_line.parser(__doc__, ROUNDS)
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    options = made.parse_args()
    command_line.keep_freed_memory()
    warnings.filterwarnings("ignore")  # a peer's own, in every round
    rounds, device = command_line.rounds(options), options.device
    results: dict[str, object] = {"benchmark": "scaling", **record(device, PEERS), "rounds": rounds}
    command_line.show(results)
    sizes: Mapping[str, Sequence[int]] = {"K": GROUPS, "P": WIDTHS}
    results["cases"] = cases = {}
    for size, values in sizes.items():
        cases[size] = []
        for value in values[:2] if options.quick else values:
            workload = by_groups(value, device, quick=options.quick) if size == "K" else by_width(value, device)
            cases[size].append(measure(workload, options.ways, rounds, device))
    if path := command_line.save(options, "scaling", results):
        panels = {TITLES[size]: curves(entries, size) for size, entries in cases.items()}
        plots.curves(path, panels, list(cases), "time, as a multiple of the floor", log=True)


if __name__ == "__main__":
    main()
