"""Print the largest deviation of every rule from its paper on raw gradients: python -m tests.oracles.

Deviations are norm(d - paper's d) relative to sum_i norm(g_i), or to the paper's own d where that is longer, over
gradients of each hard kind at K = 3 to 6. "-" stands for a kind where the paper's step never existed. Nearly parallel
gradients differ by 1e-4 to 1e-10 of their length; what tells them apart is squared in G, and there below or close to
its rounding.
"""

from __future__ import annotations

import torch

from tests.oracles import cases_others, cases_symmetric

DRAWS = 40


def normal(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def full_rank(K, generator):
    return normal(generator, K, K + 3)


def rank_deficient(K, generator):
    return normal(generator, K, K - 1)


def nearly_parallel(K, generator):
    noise = (1e-4, 1e-7, 1e-10)[int(torch.randint(3, (), generator=generator))]
    return normal(generator, K, 1).sign() * normal(generator, 1, 6) + noise * normal(generator, K, 6)


def duplicated(K, generator):
    J = normal(generator, K, 5)
    J[1] = -J[0] if torch.rand((), generator=generator) < 0.5 else J[0]
    return J


def with_zeros(K, generator):
    J = normal(generator, K, 5)
    J[0] = 0.0
    return J


def badly_scaled(K, generator):
    return normal(generator, K, 5) * 10.0 ** torch.randint(-12, 13, (K, 1), generator=generator)


def conflicting(K, generator):
    return torch.eye(K, dtype=torch.float64) * (1 + 1 / (K - 1)) - 1 / (K - 1) + 0.1 * normal(generator, K, K)


KINDS = (full_rank, conflicting, rank_deficient, duplicated, with_zeros, badly_scaled, nearly_parallel)


def largest(case, kind):
    """Return the largest deviation over the draws, None where there was nothing to compare with."""
    worst = None
    for seed in range(DRAWS):
        J = kind(3 + seed % 4, torch.Generator().manual_seed(seed))
        try:
            ours, paper = case(J, seed)
        except torch.linalg.LinAlgError:  # the paper's own formula has no value
            continue
        if paper is None:
            continue
        size = max(float(J.norm(dim=1).sum()), float(paper.norm()))
        deviation = float((ours - paper).norm()) / size if size else 0.0
        worst = deviation if worst is None else max(worst, deviation)
    return worst


def main():
    cases = {**cases_symmetric.CASES, **cases_others.CASES}
    print(f"{'':18}" + "".join(f"{kind.__name__.replace('_', ' '):>17}" for kind in KINDS))  # noqa: T201, a report
    for name in sorted(cases):
        cells = [largest(cases[name], kind) for kind in KINDS]
        print(f"{name:18}" + "".join(f"{'-' if c is None else f'{c:.0e}':>17}" for c in cells), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
