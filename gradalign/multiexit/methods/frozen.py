"""The network by its last exit alone, and methods that then train the other exits on the frozen network.

What all exits share, an encoder's shared pooler say, belongs to the network: it is trained first and frozen then.

References: Liu et al., FastBERT, ACL 2020, arXiv:2004.02178; Xin et al., DeeBERT, ACL 2020, arXiv:2004.12993; Kaya et
al., Shallow-Deep Networks, ICML 2019, arXiv:1810.07052, whose frozen networks' exits have 25 epochs beside 100.
"""

from __future__ import annotations

from torch import Tensor

from gradalign.multiexit.methods.base import Method, Stage, Step
from gradalign.multiexit.methods.networks import all_but_internal_heads, internal_heads, last_exit
from gradalign.multiexit.objectives import distillation, exit_losses
from gradalign.rules import Sum


def last_loss(step: Step) -> dict[str, Tensor]:
    """Return the last exit's loss."""
    return {"ce": exit_losses(step.logits[-1:], step.labels).sum()}


def internal_losses(step: Step) -> dict[str, Tensor]:
    """Return the sum of all exits' losses but the last one's."""
    return {"ce": exit_losses(step.logits[:-1], step.labels).sum()}


def self_distillation(step: Step) -> dict[str, Tensor]:
    """Return the sum over the other exits of what the last one teaches them."""
    return {"kd": distillation(step.logits[:-1], step.logits[-1], step.settings.temperature).sum()}


BACKBONE = Stage(last_loss, lambda settings: Sum(), all_but_internal_heads, last_exit, judged="last")

METHODS = (
    Method("single", "the last exit alone, as a network without exits is trained", (BACKBONE,)),
    Method(
        "fastbert",
        "the last exit first, then the others distil it on the frozen network, at ten times the learning rate",
        (
            BACKBONE,
            Stage(self_distillation, lambda settings: Sum(), internal_heads, epochs=2.0, learning_rate=10.0),
        ),
        exit="fastbert",
    ),
    Method(
        "deebert",
        "the last exit first, then the others' cross-entropy on the frozen network",
        (BACKBONE, Stage(internal_losses, lambda settings: Sum(), internal_heads)),
        exit="deebert",
    ),
    Method(
        "shallow-deep-frozen",
        "the last exit first, then the others' cross-entropy on the frozen network, for a quarter of the epochs",
        (BACKBONE, Stage(internal_losses, lambda settings: Sum(), internal_heads, epochs=0.25)),
    ),
)
