"""Any rule on a multi-exit step: over the two losses of mutual learning, or over one loss an exit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradalign import rules
from gradalign.errors import unknown_name
from gradalign.multiexit.methods.base import Method, Objective, Settings, Stage, Step
from gradalign.multiexit.methods.mutual import mutual_learning
from gradalign.multiexit.objectives import exit_losses

_NUM_LOSSES = 2  # ce and kd
_WITH_ALPHA = (rules.GASoft, rules.GAHard, rules.AnchoredPCGrad)  # FairGrad's alpha is something else


def exit_by_exit(step: Step) -> dict[str, Tensor]:
    """Return each exit's share of Eq. 1, m L_m / sum_m m, so that their sum is the loss of joint training."""
    losses = exit_losses(step.logits, step.labels)
    total = sum(range(1, len(losses) + 1))
    return {f"exit{m}": loss * (m / total) for m, loss in enumerate(losses.unbind(), 1)}


_FORMS: dict[str, tuple[Objective, int | str, str]] = {
    "kd": (mutual_learning, "ce", "cross-entropy and mutual distillation"),
    "exits": (exit_by_exit, -1, "one loss an exit"),
}


def rule_names() -> list[str]:
    """Return the names of the methods that are a rule on the losses of a form: "kd:RULE" and "exits:RULE".

    "kd" has the two loss groups of mutual learning, ``ce`` and ``kd``, the anchor is ``ce``; "exits" has one group an
    exit, ``exit1`` and so on, and the last is the anchor. Left out is what makes no sense: rules that need three
    groups under "kd", and ``constant`` under "exits", whose weights would be as many as exits.

    >>> [name for name in rule_names() if name.endswith("pcgrad")]
    ['kd:anchored-pcgrad', 'kd:pcgrad', 'exits:anchored-pcgrad', 'exits:pcgrad']
    """
    return [f"{form}:{rule}" for form in _FORMS for rule in rules.names() if not _why_not(form, rule)]


def of_rule(name: str) -> Method:
    """Return the method of a name "kd:RULE" or "exits:RULE".

    Raises:
        ValueError: There is no such form or rule, or they do not go together.
    """
    form, _, rule = name.partition(":")
    if form not in _FORMS:
        raise unknown_name("method", name, [f"{known}:RULE" for known in _FORMS])
    if rule not in rules.names():
        raise unknown_name("rule", rule, rules.names())
    if why_not := _why_not(form, rule):
        raise ValueError(why_not)
    objective, anchor, what = _FORMS[form]
    return Method(name, f"{what}, joined by {rule}", (Stage(objective, _maker(rule, anchor)),))


def _maker(name: str, anchor: int | str) -> Callable[[Settings], rules.Rule | rules.RowRule]:
    return lambda settings: _make(name, anchor, settings)


def _make(name: str, anchor: int | str, settings: Settings) -> Any:  # noqa: ANN401 (a rule of either kind)
    """Return the rule with what the settings say of it, and its own defaults for the rest."""
    if name == rules.Constant.name:
        return rules.Constant((1 - settings.alpha, settings.alpha))
    if name == rules.MomentumWeights.name:
        return rules.MomentumWeights(rules.MGDA())
    rule: Any = rules.get(name)
    given: dict[str, Any] = {}
    if hasattr(rule, "anchor"):
        given["anchor"] = anchor
    if isinstance(rule, _WITH_ALPHA):
        given["alpha"] = settings.alpha
    if isinstance(rule, rules.GASoft):
        given["clamp"] = settings.clamp
    if isinstance(rule, rules.GAHard):
        given["full_step"] = settings.full_step
    return dataclasses.replace(rule, **given)


def _why_not(form: str, rule: str) -> str:
    """Return why a rule does not go with a form, nothing where it does."""
    if form == "exits":
        if rule != rules.Constant.name:
            return ""
        return "`rule` must have a weight for each exit, which `constant` has not under exits:RULE; take exits:sum."
    try:
        _make(rule, _FORMS[form][1], Settings()).check_groups(_NUM_LOSSES, ("ce", "kd"))
    except ValueError as error:
        return f"{error} Or take exits:{rule}, one group an exit."
    return ""
