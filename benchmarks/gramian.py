"""What the Gramian costs, beside the time that a copy of the same rows takes, and how exact it is.

    python benchmarks/gramian.py --out benchmarks/results    K = 2 to 32 rows, P = 4 thousand to 22.6 million elements
    python benchmarks/gramian.py --quick                     few and small ones

Measured in turn: gradalign's Gramian by torch's operations, on rows that lie in one piece each and on the same rows in
up to 200 parts, as a network's parameters are; the same by gradalign's Triton kernel, on CUDA; and one float32 product,
J @ J.T. What depends on the shapes alone is made once, as in training. A Gramian reads every row once. Its *share of
copy bandwidth* is the bytes of the rows over its time, divided by the bytes that torch's ``copy_`` read and wrote over
the time of that, in the same round. Errors are relative to the norms,
max_ij |G_ij - exact| / (|g_i| |g_j|), against a float64 product by short pieces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module

import command_line
import plots
import torch
from provenance import record
from timing import Figures, failure, measure
from torch import Tensor

from gradalign.gramian import GramianPlan, make_scratch

ROUNDS = 15
GROUPS = (2, 4, 6, 12, 16, 32)
ELEMENTS = (4_096, 65_536, 850_000, 22_600_000)  # the last two: ResNet-56, and a BERT of 6 x 384
PARTS = 200
SHORTEST = 256
"""What the parts have on average at least: a short row is in fewer than PARTS."""
COPIED = 2**26
"""A copy takes so many elements at most: enough for its bandwidth, whatever the rows."""

_PIECE = 1000
_GIBIBYTE = 2**30


def exact(J: Tensor) -> Tensor:
    """Return J J^T in float64, summed over short pieces first."""
    return torch.stack([(piece := part.double()) @ piece.T for part in J.split(_PIECE, dim=1)]).sum(0)


def relative_error(G: Tensor, reference: Tensor) -> float:
    """Return the largest error of G (K, K), relative to the norms."""
    norms = reference.diagonal().sqrt()
    return float(((G.double() - reference).abs() / norms / norms[:, None]).max())


def in_parts(J: Tensor) -> list[list[Tensor]]:
    """Return the rows of J (K, P), each as parts of uneven lengths, the same for all rows."""
    P = J.shape[1]
    number = max(1, min(PARTS, P // SHORTEST))
    cuts = torch.randint(1, P, (number - 1,), generator=torch.Generator().manual_seed(0)).unique()
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([P])]).diff().tolist()
    return [list(row.split(lengths)) for row in J]


def planned(rows: Sequence[Sequence[Tensor]]) -> Callable[[], Tensor]:
    """Return a call of gradalign's Gramian of rows in parts, its plan made beforehand."""
    first = rows[0]
    plan = GramianPlan([part.shape for part in first], len(rows), make_scratch(first[0].device, len(rows)))
    return lambda: plan(rows)


def calls(J: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed: a copy first, then the Gramians of J."""
    source = J.flatten()[:COPIED]
    copy = torch.empty_like(source)
    whole, parts = [[row] for row in J], in_parts(J)
    timed: dict[str, Callable[[], object]] = {
        "copy": lambda: copy.copy_(source),
        "J @ J.T": lambda: J @ J.T,
        "gradalign": planned(whole),
        "gradalign, in parts": planned(parts),
    }
    if J.is_cuda:
        kernel = "gradalign.kernels.gramian"
        timed["gradalign, triton"] = lambda: import_module(kernel).gramian(whole)
        timed["gradalign, triton, in parts"] = lambda: import_module(kernel).gramian(parts)
    return timed


def share_of_copy(figures: Figures, J: Tensor) -> float:
    """Return the bandwidth of a call that read J once, as a share of the copy's, which read and wrote its elements."""
    return J.numel() / (2 * min(J.numel(), COPIED)) / figures["of copy"]


def free_bytes(device: str) -> int:
    """Return how much memory is free; on systems that do not say, the CPU's is taken to suffice."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**62


def case(K: int, P: int, rounds: int, device: str) -> dict[str, Figures]:
    """Return the figures of every call on K rows of P normal numbers."""
    needed = 4 * K * P + 4 * min(K * P, COPIED) + _GIBIBYTE
    if needed > free_bytes(device):
        reason = f"needs {needed / _GIBIBYTE:.1f} GiB of free memory"
        return {"copy": {"failed": reason}}
    J = torch.randn(K, P, generator=torch.Generator(device).manual_seed(0), device=device)
    timed = calls(J)
    measured = measure(timed, rounds, device, ("copy",))
    reference = exact(J)
    for name, figures in measured.items():
        if "failed" in figures or name == "copy":
            continue
        figures["share of copy bandwidth"] = share_of_copy(figures, J)
        figures["relative error"] = relative_error(timed[name](), reference)
    return measured


def line(K: int, P: int, name: str, figures: Figures) -> str:
    """Return a call's line of the printed table."""
    start = f"{K:3} {P:10} {name:27}"
    if "failed" in figures:
        return f"{start} {figures['failed']}"
    share, error = figures.get("share of copy bandwidth"), figures.get("relative error")
    end = "" if share is None else f"{100 * share:12.0f} %{error:12.1e}"
    return f"{start}{1e3 * figures['seconds']:10.3f}{end}"


def curves(entries: Sequence[dict[str, object]], P: int) -> dict[str, list[tuple[float, float]]]:
    """Return the plot's curves at one P: each call's share of copy bandwidth against K."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, figures in entry["calls"].items():
            if entry["P"] == P and "share of copy bandwidth" in figures:
                lines.setdefault(name, []).append((entry["K"], figures["share of copy bandwidth"]))
    return lines


def main() -> None:
    """Measure, print a line for each K, P and call, write JSON and a plot where asked."""
    options = command_line.parser(__doc__, ROUNDS).parse_args()
    rounds = command_line.rounds(options)
    groups, elements = ((2, 6), (4_096, 850_000)) if options.quick else (GROUPS, ELEMENTS)
    results: dict[str, object] = {"benchmark": "gramian", **record(options.device), "rounds": rounds, "parts": PARTS}
    command_line.show(results)
    results["cases"] = entries = []
    print(f"\n{'K':>3} {'P':>10} {'':27}{'ms':>10}{'of copy':>14}{'error':>12}")
    for P in elements:
        for K in groups:
            try:
                figures = case(K, P, rounds, options.device)
            except RuntimeError as error:  # memory gave out all the same
                figures = {"copy": {"failed": failure(error)}}
            entries.append({"K": K, "P": P, "calls": figures})
            for name, of_call in figures.items():
                print(line(K, P, name, of_call), flush=True)
    if path := command_line.save(options, "gramian", results):
        panels = {f"P = {P:,}": curves(entries, P) for P in elements}
        plots.curves(path, panels, ["K"] * len(panels), "share of copy bandwidth")


if __name__ == "__main__":
    main()
