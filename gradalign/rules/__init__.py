"""Rules of gradient surgery, most of them functions of the Gramian alone, and the table of their names."""

from __future__ import annotations

import dataclasses

from gradalign.errors import unknown_name
from gradalign.rules.agem import AGEM
from gradalign.rules.aligned_mtl import AlignedMTL
from gradalign.rules.anchored_pcgrad import AnchoredPCGrad
from gradalign.rules.attittud import ATTITTUD
from gradalign.rules.base import BaseRule, Rule
from gradalign.rules.bloop import Bloop
from gradalign.rules.cagrad import CAGrad
from gradalign.rules.config import ConFIG
from gradalign.rules.cosine_gate import CosineGate
from gradalign.rules.dual_proj import DualProj
from gradalign.rules.excess_mtl import ExcessMTL
from gradalign.rules.fairgrad import FairGrad
from gradalign.rules.ga import GAHard, GASoft
from gradalign.rules.gem import GEM
from gradalign.rules.graddrop import GradDrop
from gradalign.rules.gradvac import GradVac
from gradalign.rules.imtl_g import IMTLG
from gradalign.rules.kinds import AnchoredRule, PreferenceRule, RandomRule, StatefulRule
from gradalign.rules.krum import Krum
from gradalign.rules.linear import Constant, Mean, Sum
from gradalign.rules.mgda import MGDA
from gradalign.rules.moco import MoCo
from gradalign.rules.modo import MoDo
from gradalign.rules.momentum_weights import MomentumWeights
from gradalign.rules.nash_mtl import NashMTL
from gradalign.rules.olaux import OLAux
from gradalign.rules.pcd import PCD
from gradalign.rules.pcgrad import PCGrad
from gradalign.rules.random_weights import RandomWeights
from gradalign.rules.rows import RowRule, StatefulRowRule
from gradalign.rules.sdmgrad import SDMGrad
from gradalign.rules.trimmed_mean import TrimmedMean
from gradalign.rules.upgrad import UPGrad

__all__ = [
    "AGEM",
    "ATTITTUD",
    "GEM",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "AnchoredPCGrad",
    "AnchoredRule",
    "BaseRule",
    "Bloop",
    "CAGrad",
    "ConFIG",
    "Constant",
    "CosineGate",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GAHard",
    "GASoft",
    "GradDrop",
    "GradVac",
    "Krum",
    "Mean",
    "MoCo",
    "MoDo",
    "MomentumWeights",
    "NashMTL",
    "OLAux",
    "PCGrad",
    "PreferenceRule",
    "RandomRule",
    "RandomWeights",
    "RowRule",
    "Rule",
    "SDMGrad",
    "StatefulRowRule",
    "StatefulRule",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "get",
    "names",
]

_RULES: tuple[type[BaseRule], ...] = (
    Sum,
    Mean,
    Constant,
    RandomWeights,
    MomentumWeights,
    GASoft,
    GAHard,
    AnchoredPCGrad,
    AGEM,
    GEM,
    CosineGate,
    PCD,
    Bloop,
    OLAux,
    ATTITTUD,
    PCGrad,
    GradVac,
    MGDA,
    CAGrad,
    NashMTL,
    FairGrad,
    IMTLG,
    AlignedMTL,
    DualProj,
    UPGrad,
    ConFIG,
    SDMGrad,
    MoDo,
    MoCo,
    ExcessMTL,
    GradDrop,
    TrimmedMean,
    Krum,
)
_TABLE: dict[str, type[BaseRule]] = {rule.name: rule for rule in _RULES}


def names() -> list[str]:
    """Return the names of all rules, sorted.

    >>> names()[:4]
    ['agem', 'aligned-mtl', 'anchored-pcgrad', 'attittud']
    """
    return sorted(_TABLE)


def get(name: str, **hyper_parameters: object) -> BaseRule:
    """Make the rule of this name.

    Args:
        name: One of ``names()``.
        **hyper_parameters: Those of the rule's class; what is left out keeps its default.

    Raises:
        ValueError: Unknown name (near ones are offered), or a hyper-parameter out of range.
        TypeError: A hyper-parameter that the rule does not have, or one without default that is missing.

    >>> get("ga-soft", alpha=0.1)
    GASoft(anchor=0, alpha=0.1, clamp=False)
    """
    if not isinstance(name, str) or name not in _TABLE:
        raise unknown_name("rule", name, names())
    rule = _TABLE[name]
    fields = {f.name: f for f in dataclasses.fields(rule) if f.init}  # type: ignore[arg-type]
    for key in hyper_parameters:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise TypeError(f"`{name}` must be given hyper-parameters it has ({known}), got {key!r}.")
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in hyper_parameters]
    if missing:
        raise TypeError(
            f"`{name}` must be given {', '.join(missing)}, got nothing;"
            f' write rules.get("{name}", {missing[0]}=...) or {rule.__name__}(...).'
        )
    return rule(**hyper_parameters)
