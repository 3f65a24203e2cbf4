"""The aligner's arguments, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def check_collector(collector: object, rule: BaseRule, scope: object, granularity: object) -> None:
    """Raise unless this names a collector that can serve the rule, the scope and the granularity."""
    check_choice("collector", collector, ("auto", "stacked", "batched", "streamed", "probed"))
    if collector == "batched" and scope == "shared":
        raise ValueError(
            "`collector` must be 'stacked' or 'auto' with scope='shared', got 'batched'; that one does not tell which"
            " groups reach a parameter. Or list the shared parameters in `scope`."
        )
    if collector in ("streamed", "probed") and not rescales_anchor(rule):
        raise ValueError(
            f"`collector` must be 'stacked' or 'auto' with {rule!r}, got {collector!r}; that one sees an auxiliary only"
            " through its product with the anchor's gradient, which is enough for GASoft and GAHard."
        )
    if collector == "probed":
        check_whole(scope, granularity, "with collector='probed'")


def check_whole(scope: object, granularity: object, when: str) -> None:
    """Raise ValueError unless one Gramian over all parameters is asked for, the only one that a probe can see."""
    for argument, value, needed in (("scope", scope, "all"), ("granularity", granularity, "global")):
        if value != needed:
            got = repr(value) if isinstance(value, str) else "parameters of your choice"
            raise ValueError(f"`{argument}` must be {needed!r} {when}, got {got}; or take collector='streamed'.")


def check_probe(probe: object, collector: str, rule: BaseRule, scope: object, granularity: object) -> None:
    """Raise unless this is a callable that the aligner's collector, rule, scope and granularity can use."""
    if probe is None:
        if collector == "probed":
            raise ValueError(
                "`probe` must be given with collector='probed', got None; write"
                ' backward({"ce": ce}, probe=lambda: {"kd": ...}), or take collector=\'streamed\'.'
            )
        return
    if not callable(probe):
        raise TypeError(
            f"`probe` must be a function without arguments that returns losses, got {type(probe).__name__};"
            ' write probe=lambda: {"kd": ...}.'
        )
    if collector in ("stacked", "batched", "streamed"):
        raise ValueError(
            f"`probe` must be None with collector={collector!r}, got a function; make the aligner with"
            " collector='probed' or 'auto', or pass the losses."
        )
    if not rescales_anchor(rule):
        raise ValueError(
            f"`probe` must be None with {rule!r}, which combines all gradients, got a function; pass the losses, or"
            " take a rule that only rescales its anchor, such as GASoft or GAHard."
        )
    check_whole(scope, granularity, "with a `probe`")


def check_mesh(size: int, wanted: int) -> None:
    """Raise ValueError unless the parameters' mesh of so many ranks holds as many as are to be averaged over."""
    if wanted > size:
        raise ValueError(
            f"`process_group` must be None, or no larger than the parameters' device mesh of {size} ranks, got"
            f" {wanted} ranks; data parallelism beside tensor parallelism is a dimension of the mesh here: fully_shard"
            " the model over it."
        )


def check_sharded(rule: BaseRule, collector: str, probe: object) -> None:
    """Raise ValueError where this asks for more of DTensors than each rank's part of every group's gradient."""
    if not isinstance(rule, Rule):
        raise ValueError(
            f"`rule` must be a function of the Gramian where parameters are DTensors, got {rule!r}, which needs whole"
            " gradients, and no rank holds them; take another rule, or DistributedDataParallel."
        )
    if collector not in ("auto", "stacked"):
        raise ValueError(
            f"`collector` must be 'stacked' or 'auto' where parameters are DTensors, got {collector!r}; only"
            " loss.backward(), one for each group, makes their gradients."
        )
    if probe is not None:
        raise ValueError("`probe` must be None where parameters are DTensors, got a function; pass all losses.")


def rescales_anchor(rule: BaseRule) -> bool:
    """Return whether the rule's weights are zero but for the anchor's, and need the anchor's row of G alone."""
    return isinstance(rule, Rule) and rule.rescales_anchor


def check_anchor(rule: BaseRule, names: Sequence[str]) -> None:
    """Raise ValueError unless the first of these groups, the one beside the probe's, is the rule's anchor."""
    if isinstance(rule, Rule) and rule.support(names) != (0,):
        raise ValueError(
            f"`losses` must hold the anchor of {rule!r} beside a `probe`, got {names[0]!r}; pass the anchor's loss, and"
            " let the probe return the others."
        )


def check_update_every(update_every: object, rule: BaseRule) -> None:
    """Raise unless this is a number of steps, and the rule has weights that can be kept for them."""
    if isinstance(update_every, bool) or not isinstance(update_every, int):
        raise TypeError(f"`update_every` must be an integer of at least 1, got {update_every!r}; 1 is every step.")
    if update_every < 1:
        raise ValueError(f"`update_every` must be an integer of at least 1, got {update_every}; 1 is every step.")
    if update_every > 1 and not isinstance(rule, Rule):
        raise ValueError(
            f"`update_every` must be 1 with {rule!r}, which has no weights to keep, got {update_every}; choose a rule"
            " of the Gramian."
        )


def check_own_state(state: object, now: Mapping[str, Any]) -> None:
    """Raise ValueError unless this was saved, under its key of ``state_dict``, by an aligner like this one.

    Args:
        state: What was saved.
        now: What this aligner would save.
    """
    if not isinstance(state, Mapping) or set(state) != set(now):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else repr(state)
        raise ValueError(
            f"`state_dict` must hold {sorted(now)} under 'gradalign', got {got};"
            " drop that key to load the inner optimizer's state alone."
        )
    if state["rule"] != now["rule"]:
        raise ValueError(
            f"`state_dict` must come from an aligner with the rule {now['rule']!r}, got one with"
            f" {state['rule']!r}; make the aligner with that rule, or drop the key 'gradalign' to start afresh."
        )
    _check_shapes(state["shapes"], now["shapes"])
    groups, skipped = state["groups"], state["skipped_steps"]
    if not (groups is None or isinstance(groups, list)) or not isinstance(skipped, int):
        raise ValueError(
            "`state_dict` must hold under 'gradalign' a list of `groups` or None and a number of `skipped_steps`,"
            f" got {groups!r} and {skipped!r}."
        )
    if not isinstance(state["rule_state"], Mapping):
        raise ValueError(
            f"`state_dict` must hold under 'gradalign' a dictionary as `rule_state`, got {state['rule_state']!r}."
        )


def _check_shapes(saved: object, now: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the parameters that were saved have the shapes of those of now."""
    if saved == now:
        return
    mend = "make the model and its optimizer as they were when that was saved."
    if not isinstance(saved, list) or len(saved) != len(now):
        number = len(saved) if isinstance(saved, list) else repr(saved)
        raise ValueError(
            f"`state_dict` must come from an aligner of {len(now)} parameters, got one of {number}; {mend}"
        )
    at = next(i for i, (one, two) in enumerate(zip(saved, now, strict=True)) if one != two)
    raise ValueError(
        f"`state_dict` must come from an aligner whose parameter {at} has the shape {now[at]}, got one of {saved[at]};"
        f" {mend}"
    )
