"""Our rules beside the papers' definitions, one line a rule: functions of (J, seed) that return both gradients d."""

from __future__ import annotations

import torch

from gradalign import rules
from tests.oracles.agem import agem
from tests.oracles.agreement import generator, steps_from
from tests.oracles.anchored_pcgrad import anchored_pcgrad
from tests.oracles.attittud import attittud
from tests.oracles.bloop import Bloop
from tests.oracles.cosine_gate import cosine_gate, gates
from tests.oracles.excess_mtl import ExcessMTL
from tests.oracles.ga import gradient_alignment
from tests.oracles.gem import gem
from tests.oracles.graddrop import graddrop
from tests.oracles.krum import krum
from tests.oracles.linear import gradient_mean, gradient_sum, weighted_sum
from tests.oracles.moco import MoCo
from tests.oracles.modo import MoDo
from tests.oracles.olaux import OLAux
from tests.oracles.pcd import Paper as PriorityDescent
from tests.oracles.pcgrad import pcgrad
from tests.oracles.sdmgrad import SDMGrad
from tests.oracles.trimmed_mean import trimmed_mean
from tests.oracles.weightings import momentum_weighting, random_weighting


def on_gramians(rule, steps):
    return torch.cat([J.T @ rule(J @ J.T) for J in steps])


def on_rows(rule, steps):
    return torch.cat([rule(J) for J in steps])


def on_vectors(paper, steps):
    return torch.cat([paper(J) for J in steps])


def gate_weights(J):
    return torch.tensor(gates(J, 0, hard=False), dtype=J.dtype)


def _draws(J, seed):
    return torch.randn(len(J), dtype=torch.float64, generator=generator(seed)).tolist()


def _constant(J, seed):
    weights = _draws(J, seed)
    return J.T @ rules.Constant(weights)(J @ J.T), weighted_sum(J, weights)


def _pcgrad(J, seed):
    G = J @ J.T
    return J.T @ rules.PCGrad(seed=seed)(G), pcgrad(J, rules.PCGrad(seed=seed)._orders(G).tolist())


def _momentum(J, seed):
    steps = steps_from(J, seed)
    ours = on_gramians(rules.MomentumWeights(rules.CosineGate()), steps)
    return ours, torch.cat(momentum_weighting(steps, gate_weights, 0.9))


def _random_weights(J, seed):
    return on_gramians(rules.RandomWeights(seed=seed), [J]), random_weighting(J, _draws(J, seed))


def _graddrop(J, seed):
    uniforms = rules.GradDrop(seed=seed)._uniform(J[0])
    return rules.GradDrop(seed=seed)(J), graddrop(J, uniforms.tolist(), 0.0)


def _gramian_case(name, paper):
    return lambda J, seed: (on_gramians(rules.get(name), [J]), paper(J))


def _stateful_case(run, name, paper):
    return lambda J, seed: (run(rules.get(name), steps_from(J, seed)), on_vectors(paper(), steps_from(J, seed)))


# J needs three rows or more: Krum and the trimmed mean take no fewer.
CASES = {
    "sum": _gramian_case("sum", gradient_sum),
    "mean": _gramian_case("mean", gradient_mean),
    "constant": _constant,
    "pcgrad": _pcgrad,
    "ga-soft": _gramian_case("ga-soft", lambda J: gradient_alignment(J, 0.3, 0, hard=False)),
    "ga-hard": _gramian_case("ga-hard", lambda J: gradient_alignment(J, 0.3, 0, hard=True)),
    "sdmgrad": _stateful_case(on_gramians, "sdmgrad", SDMGrad),
    "modo": _stateful_case(on_gramians, "modo", lambda: MoDo(0.1)),
    "random-weights": _random_weights,
    "momentum-weights": _momentum,
    "krum": _gramian_case("krum", krum),
    "anchored-pcgrad": _gramian_case("anchored-pcgrad", lambda J: anchored_pcgrad(J, 0.3, 0)),
    "agem": _gramian_case("agem", lambda J: agem(J, 0)),
    "gem": _gramian_case("gem", lambda J: gem(J, 0.0, 1e-3, 0)),
    "cosine-gate": _gramian_case("cosine-gate", lambda J: cosine_gate(J, 0, hard=False)),
    "pcd": _stateful_case(on_gramians, "pcd", PriorityDescent),
    "olaux": _stateful_case(on_gramians, "olaux", lambda: OLAux(1.0, 5, 1.0, relative=True)),
    "attittud": _gramian_case("attittud", lambda J: attittud(J, 0)),
    "graddrop": _graddrop,
    "trimmed-mean": lambda J, seed: (rules.TrimmedMean()(J), trimmed_mean(J, 1)),
    "bloop": _stateful_case(on_rows, "bloop", Bloop),
    "moco": _stateful_case(on_rows, "moco", MoCo),
    "excess-mtl": _stateful_case(on_rows, "excess-mtl", ExcessMTL),
}
