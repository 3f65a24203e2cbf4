"""The rules without an anchor beside their oracles: functions of (J, seed) that return our d and the paper's."""

from __future__ import annotations

import torch

from gradalign import rules
from tests.oracles import aligned_mtl, cagrad, config, dual_cone, fairgrad, gradvac, imtl_g, mgda, nash_mtl
from tests.oracles.agreement import steps_from
from tests.strategies import gramian_of


def mean(J):
    """The preference that a rule has by default."""
    return torch.full((len(J),), 1 / len(J), dtype=J.dtype)


def gradvac_steps(steps, seed, beta=0.5):
    """The last of our aligned gradients over some steps, and the paper's, in the same random orders."""
    twin = rules.GradVac(seed=seed)
    orders = [twin._orders(gramian_of(J)).tolist() for J in steps]
    rule = rules.GradVac(beta, seed=seed)
    ours = [J.T @ rule(gramian_of(J)) for J in steps]
    return ours[-1], gradvac.aligned_gradients(steps, orders, beta)[-1]


def _case(rule, oracle):
    def compare(J, seed):  # seed: for the random rules alone
        return J.T @ rule(gramian_of(J)), oracle(J)

    return compare


CASES = {
    "gradvac": lambda J, seed: gradvac_steps(steps_from(J, seed, count=4), seed),
    "mgda": _case(rules.MGDA(), mgda.aligned_gradient),
    "cagrad": _case(rules.CAGrad(), lambda J: cagrad.aligned_gradient(J, 0.4, mean(J))),
    # None from an oracle: the paper's step does not exist, for these two and IMTL-G, or is out of its reach.
    "nash-mtl": _case(rules.NashMTL(), nash_mtl.aligned_gradient),
    "fairgrad": _case(rules.FairGrad(), lambda J: fairgrad.aligned_gradient(J, 2.0)),
    "imtl-g": _case(rules.IMTLG(), imtl_g.aligned_gradient),
    "aligned-mtl": _case(rules.AlignedMTL(), lambda J: aligned_mtl.aligned_gradient(J, mean(J))),
    "dual-proj": _case(rules.DualProj(), lambda J: dual_cone.dual_proj(J, mean(J))),
    "upgrad": _case(rules.UPGrad(), lambda J: dual_cone.upgrad(J, mean(J))),
    "config": _case(rules.ConFIG(), config.aligned_gradient),
}
