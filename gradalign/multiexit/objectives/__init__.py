"""What the exits are trained on: weighted losses on the labels, and distillation.

Shapes: M exits, B rows, C classes; stacked logits are (M, B, C), exit 1 first. One output, C = 1, is a predicted value:
regression.
"""

from gradalign.multiexit.objectives.checks import check_count, check_labels, check_logits
from gradalign.multiexit.objectives.distillation import distillation, mutual_distillation
from gradalign.multiexit.objectives.supervised import exit_losses, weighted_cross_entropy, weighted_loss

__all__ = [
    "check_count",
    "check_labels",
    "check_logits",
    "distillation",
    "exit_losses",
    "mutual_distillation",
    "weighted_cross_entropy",
    "weighted_loss",
]
