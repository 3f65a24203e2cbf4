"""Multi-exit networks: models, losses, training methods, exit policies and early exiting.

Everything named here needs torch alone. Data, training, figures and the command line need the extra "multiexit".
"""

from gradalign.multiexit import methods, metrics, objectives, policies
from gradalign.multiexit.inference import Decision, MultiExitModel, Policy, early_exit
from gradalign.multiexit.resnet import MultiExitResNet

__all__ = [
    "Decision",
    "MultiExitModel",
    "MultiExitResNet",
    "Policy",
    "early_exit",
    "methods",
    "metrics",
    "objectives",
    "policies",
]
