"""The aligner's arguments, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from gradalign import rules
from gradalign.errors import unknown_name
from gradalign.rules import BaseRule, RowRule, Rule
from gradalign.wrapper import WrappedOptimizer


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless this is a bare torch optimizer of real floating-point parameters."""
    if isinstance(optimizer, WrappedOptimizer) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer that is not wrapped yet, got {type(optimizer).__name__};"
            " write GradientAligner(torch.optim.AdamW(model.parameters()), rule)."
        )
    check_parameters(optimizer.param_groups)


def check_parameters(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError unless all parameters are real and floating-point."""
    for group in param_groups:
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise TypeError(
                    f"`optimizer` must hold real floating-point parameters, got {parameter.dtype} of shape"
                    f" {tuple(parameter.shape)}; keep it in another optimizer, or as its real view."
                )


def check_rule(rule: object) -> Rule | RowRule:
    """Return the rule, made by its name where that is given."""
    made = rules.get(rule) if isinstance(rule, str) else rule
    if not isinstance(made, Rule | RowRule):
        kind = f"the class {made.__name__}" if isinstance(made, type) else type(made).__name__
        example = (
            f"{made.__name__}(...)" if isinstance(made, type) and issubclass(made, BaseRule) else "GASoft(alpha=0.3)"
        )
        raise TypeError(
            f"`rule` must be a Rule, a RowRule, or the name of one, see gradalign.rules.names(), got {kind};"
            f" write {example}."
        )
    if not isinstance(getattr(made, "name", None), str):
        raise TypeError(
            f"`rule` must have a name, under which its state is saved, got {made!r} without one; declare"
            f' name: ClassVar[str] = "..." in {type(made).__name__}.'
        )
    return made


def check_choice(argument: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise unknown_name(argument, value, known)


def check_collector(collector: object) -> None:
    """Raise unless this names a collector that is there."""
    check_choice("collector", collector, ("auto", "stacked", "streamed", "probed"))
    if collector in ("streamed", "probed"):
        raise NotImplementedError(f'`collector` must be "auto" or "stacked": {collector!r} is not there yet.')


def check_update_every(update_every: object) -> None:
    """Raise unless weights are to be computed at every step."""
    if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
        raise ValueError(f"`update_every` must be an integer of at least 1, got {update_every!r}.")
    if update_every != 1:
        raise NotImplementedError(f"`update_every` must be 1, got {update_every}: rarer updates are not there yet.")


def check_process_group(process_group: object) -> None:
    """Raise unless gradients stay on this rank."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    if running and process_group is not None:
        raise NotImplementedError(
            "`process_group` must be None while torch.distributed runs: gradients are not averaged over ranks yet;"
            " process_group=None aligns this rank alone."
        )
    known = process_group is None or process_group == "auto"
    if not running and not known:
        raise ValueError(
            "`process_group` must be 'auto' or None while torch.distributed does not run, got"
            f" {type(process_group).__name__}; call torch.distributed.init_process_group first."
        )
