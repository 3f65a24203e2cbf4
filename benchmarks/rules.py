"""What the weights cost: the median time of a call of every rule, with TorchJD's beside it in the same run.

    python benchmarks/rules.py --out benchmarks/results/rules.json    every rule at K = 2, 4, 8, 16, 32
    python benchmarks/rules.py --quick                                K = 2 and 16, few rounds

Each rule is called on a Gramian (rules of rows on rows of 4096 elements), float64, on one thread: of gradients drawn at
random, and of ill-conditioned ones, whose singular values fall from 1 to 1e-6. Rules and peers take turns, round after
round. A peer that has no such rule is "-", one that fails says with what. The solvers follow: of both programs, at
K = 16, the median, the ninth decile and the longest of their times over draws of each hard kind.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from provenance import commit, machine, write
from torch import Tensor
from torchjd import aggregation as jd

from gradalign import rules
from gradalign.solvers import dual_cone_projection, min_norm_in_simplex

SIZES = (2, 4, 8, 16, 32)
ELEMENTS = 4096
ROUNDS = 31
OURS: dict[str, Callable[[int], rules.BaseRule]] = {
    "constant": lambda K: rules.Constant([1.0] * K),
    "momentum-weights": lambda K: rules.MomentumWeights("mgda"),
    "nash-mtl": lambda K: rules.NashMTL(max_norm=1.0),
}
# What TorchJD calls on a Gramian, and (below) what it calls on the gradients.
ON_GRAMIANS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "aligned-mtl": lambda K: jd.AlignedMTLWeighting(),
    "cagrad": lambda K: jd.CAGradWeighting(c=0.4),
    "constant": lambda K: jd.ConstantWeighting(torch.ones(K, dtype=torch.float64)),
    "dual-proj": lambda K: jd.DualProjWeighting(),
    "fairgrad": lambda K: jd.FairGradWeighting(alpha=2.0),
    "gradvac": lambda K: jd.GradVacWeighting(),
    "imtl-g": lambda K: jd.IMTLGWeighting(),
    "krum": lambda K: jd.KrumWeighting(n_byzantine=0),
    "mean": lambda K: jd.MeanWeighting(),
    "mgda": lambda K: jd.MGDAWeighting(),
    "modo": lambda K: jd.MoDoWeighting(gamma=0.1),
    "momentum-weights": lambda K: jd.CRMOGMWeighting(jd.MGDAWeighting()),
    "pcd": lambda K: jd.PCDWeighting(),
    "pcgrad": lambda K: jd.PCGradWeighting(),
    "random-weights": lambda K: jd.RandomWeighting(),
    "sdmgrad": lambda K: jd.SDMGradWeighting(),
    "sum": lambda K: jd.SumWeighting(),
    "upgrad": lambda K: jd.UPGradWeighting(),
}
ON_GRADIENTS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "config": lambda K: jd.ConFIG(),
    "excess-mtl": lambda K: jd.ExcessMTL(),
    "graddrop": lambda K: jd.GradDrop(),
    "nash-mtl": lambda K: jd.NashMTL(n_tasks=K, max_norm=1.0),
    "trimmed-mean": lambda K: jd.TrimmedMean(trim_number=1),
}


def ill_conditioned(J: Tensor) -> Tensor:
    """Return J (K, P) with singular values from 1 to 1e-6."""
    U, _, V = torch.linalg.svd(J, full_matrices=False)
    return U * torch.logspace(0, -6, len(J), dtype=torch.float64) @ V


def gradients(K: int, *, ill: bool) -> Tensor:
    """Return J (K, ELEMENTS), float64."""
    J = torch.randn(K, ELEMENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    return ill_conditioned(J) if ill else J


def calls(name: str, K: int, J: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed: our rule's call, and TorchJD's where it has one."""
    G = J @ J.T
    rule = OURS[name](K) if name in OURS else rules.get(name)
    rule.check_groups(K, None)
    ours = J if isinstance(rule, rules.RowRule) else G
    timed: dict[str, Callable[[], object]] = {"gradalign": lambda: rule(ours)}  # type: ignore[operator]
    if name in ON_GRAMIANS:
        peer = ON_GRAMIANS[name](K)
        timed["torchjd"] = lambda: peer(G)
    elif name in ON_GRADIENTS:
        peer = ON_GRADIENTS[name](K)
        timed["torchjd"] = lambda: peer(J)
    return timed


def medians(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, float | str]:
    """Return each call's median time in ms, taken in turns, or the error that it ended in."""
    result: dict[str, float | str] = {}
    times: dict[str, list[float]] = {}
    for who, call in timed.items():
        try:
            for _ in range(3):
                call()
            times[who] = []
        except Exception as error:  # noqa: BLE001, a peer may fail with anything, and the table says so
            result[who] = type(error).__name__
    for _ in range(rounds):
        for who, taken in times.items():
            start = time.perf_counter()
            timed[who]()
            taken.append(time.perf_counter() - start)
    return result | {who: 1e3 * statistics.median(taken) for who, taken in times.items()}


def measure(sizes: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Return a record for every rule, kind of gradients and K that suits it, printing a line a rule and kind."""
    records: list[dict[str, object]] = []
    header = "".join(f"{f'K={K}':>20}" for K in sizes)
    for kind in ("random", "ill-conditioned"):
        print(f"\n{kind} gradients: ms, gradalign / torchjd\n{'':18}{header}")
        for name in rules.names():
            cells = []
            for K in sizes:
                J = gradients(K, ill=kind != "random")
                try:
                    timed = calls(name, K, J)
                except ValueError:  # too few groups for this rule
                    cells.append("-")
                    continue
                taken = medians(timed, rounds)
                records.append({"rule": name, "gradients": kind, "K": K, "ms": taken})
                cells.append(" / ".join(shown(taken.get(who)) for who in ("gradalign", "torchjd")))
            print(f"{name:18}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    return records


def shown(value: float | str | None) -> str:
    """Return a time, an error's name or a dash."""
    return "-" if value is None else value[:9] if isinstance(value, str) else f"{value:.3f}"


KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "full rank": lambda J, n: J,
    "rank-deficient": lambda J, n: J[:, : 1 + n % (len(J) - 1)],
    "duplicated": lambda J, n: torch.cat([J[: len(J) // 2], (-1) ** n * J[: len(J) - len(J) // 2]]),
    "zero rows": lambda J, n: J * (torch.arange(len(J)) % 3 > 0).unsqueeze(1),
    "badly scaled": lambda J, n: J * 10.0 ** (torch.arange(len(J)) % 25 - 12).unsqueeze(1),
    "nearly parallel": lambda J, n: J[:, :1].sign() * J[:1] + 10.0 ** -(4 + n % 4) * J,
    "ill-conditioned": lambda J, n: ill_conditioned(J),
}


def solvers(K: int, draws: int) -> list[dict[str, object]]:
    """Return a record for each kind of draws, printing its line."""
    records: list[dict[str, object]] = []
    print(f"\nsolvers, K = {K}, {draws} draws: ms, median / 90 % / longest\n{'':18}{'dual cone':>22}{'simplex':>22}")
    for kind, make in KINDS.items():
        times: dict[str, list[float]] = {"dual_cone_projection": [], "min_norm_in_simplex": []}
        for n in range(draws):
            J = make(torch.randn(K, 2 * K, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), n)
            G, u = J @ J.T, torch.full((K,), 1 / K, dtype=torch.float64)
            programs = {
                "dual_cone_projection": lambda G=G, u=u: dual_cone_projection(G, u),
                "min_norm_in_simplex": lambda G=G: min_norm_in_simplex(G),
            }
            for name, taken in medians(programs, 5).items():
                times[name].append(float(taken))
        cells = []
        for name, taken in times.items():
            taken.sort()
            three = [taken[draws // 2], taken[int(0.9 * draws)], taken[-1]]
            records.append({"solver": name, "gradients": kind, "K": K, "ms": three})
            cells.append(" / ".join(f"{ms:.2f}" for ms in three))
        print(f"{kind:18}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    return records


def main() -> None:
    """Measure, print, and write the results as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K = 2 and 16, few rounds")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # a peer's solvers warn in every round
    torch.set_num_threads(1)
    results: dict[str, object] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "torch": torch.__version__,
        "torchjd": version("torchjd"),
        "commit": commit(),
    }
    print(" ".join(f"{key} {value};" for key, value in results.items()))
    results["rules"] = measure((2, 16), 7) if options.quick else measure(SIZES, ROUNDS)
    results["solvers"] = solvers(16, 10 if options.quick else 60)
    if options.out:
        write(options.out, results)


if __name__ == "__main__":
    main()
