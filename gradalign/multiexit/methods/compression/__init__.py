"""Smaller encoders, the baselines of early exiting: fewer layers, learned in one way or another, or fewer heads."""

from gradalign.multiexit.methods.compression import distillation, head_pruning, layerdrop, theseus

__all__ = ["METHODS"]

METHODS = (*distillation.METHODS, *layerdrop.METHODS, *theseus.METHODS, *head_pruning.METHODS)
