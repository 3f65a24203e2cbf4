"""GradientAligner: a torch optimizer around a torch optimizer, whose backward takes named losses and aligns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradalign.arguments import (
    check_choice,
    check_collector,
    check_optimizer,
    check_parameters,
    check_process_group,
    check_rule,
    check_update_every,
)
from gradalign.collectors.losses import Losses, broken_groups, check_losses
from gradalign.collectors.parameters import (
    Granularity,
    Scope,
    check_granularity,
    check_scope,
    layout_key,
    make_layout,
)
from gradalign.collectors.stacked import StackedCollector
from gradalign.errors import GradAlignError, NonFiniteError
from gradalign.report import AlignmentReport
from gradalign.rules import RowRule, Rule
from gradalign.wrapper import WrappedOptimizer, step_unless


class GradientAligner(WrappedOptimizer):
    """Wrap an optimizer so that the gradients of several losses are aligned by a rule before its step.

    It is the inner optimizer in all but ``backward``: ``param_groups``, ``state`` and ``defaults`` are the inner
    one's own, and nothing is written into its state. One ``backward(losses)``:

    1. checks the losses, by name;
    2. computes each group's gradient with ``torch.autograd.grad``, which leaves ``p.grad`` alone;
    3. computes the Gramian of the gradients, one for each block of ``granularity``;
    4. asks the rule for the weights;
    5. adds the weighted sum to ``p.grad``, as ``loss.backward()`` would, and keeps a ``report``.

    Up to step 5 an error leaves parameters, ``p.grad`` and the optimizer's state as they were.

    Of hooks on a parameter, those of ``register_hook`` see each group's gradient, those of
    ``register_post_accumulate_grad_hook`` run once ``p.grad`` is written. Under a GradScaler pass
    ``nonfinite="propagate"``: the scaler has to see an overflow in ``p.grad``.

    Args:
        optimizer: Any ``torch.optim.Optimizer``. Only its parameters get a gradient.
        rule: A rule, or the name of one, ``gradalign.rules.names()``.
        scope: Which parameters are aligned: "all"; "shared", those that two groups or more reach; or an iterable of
            parameters. One outside the scope gets its groups' gradients with the rule's plain weights.
        granularity: What shares one Gramian: "global"; "param_group"; "tensor"; or a list of lists of parameters,
            say one for each layer, where parameters that no list holds share one more block.
        collector: "stacked" keeps a row for each group; "auto" is "stacked".
        update_every: 1.
        nonfinite: What a group's NaN or infinity does: "raise" an error that names the group; "skip" the next step
            and count it in ``skipped_steps``; "propagate" it to ``p.grad`` without waiting for the device.
        process_group: With ``torch.distributed`` running, the ranks to average over; None for this rank alone.

    Attributes:
        report: The AlignmentReport of the last alignment, None before the first.
        skipped_steps: How many alignments were left out by ``nonfinite="skip"``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has no such value, or names a parameter that the optimizer does not have.
        NotImplementedError: The argument's value is not supported yet.

    >>> from gradalign.rules import GASoft
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = GradientAligner(torch.optim.SGD([weight], lr=0.1), GASoft(alpha=0.5))
    >>> optimizer.backward({"ce": weight[0] * 2, "kd": weight.sum()})
    >>> weight.grad  # kd projected on ce is half of it: .5 + .5 * .5 = .75
    tensor([1.5000, 0.0000])
    >>> optimizer.report
    AlignmentReport(ce, kd: weights [0.75, 0.0], conflicts none)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule | RowRule | str,
        *,
        scope: Scope = "all",
        granularity: Granularity = "global",
        collector: Literal["auto", "stacked", "streamed", "probed"] = "auto",
        update_every: int = 1,
        nonfinite: Literal["raise", "skip", "propagate"] = "raise",
        process_group: torch.distributed.ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        check_optimizer(optimizer)
        self._rule = check_rule(rule)
        self._scope = check_scope(scope, optimizer.param_groups)
        self._granularity = check_granularity(granularity, optimizer.param_groups)
        check_choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
        check_collector(collector)
        check_update_every(update_every)
        check_process_group(process_group)
        self._nonfinite = nonfinite
        self._process_group = process_group
        super().__init__(optimizer)
        self.skipped_steps = 0
        self._groups: tuple[str, ...] | None = None
        self._accumulating = False
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to the step at hand."""
        self.report: AlignmentReport | None = None
        self._collector: StackedCollector | None = None
        self._collector_key: tuple[object, ...] = ()
        self._skip_step = False

    @property
    def rule(self) -> Rule | RowRule:
        """The rule."""
        return self._rule

    def backward(self, losses: Losses, *, probe: object = None, scaler: object = None) -> None:
        """Add the aligned gradient of the losses to ``p.grad``.

        Args:
            losses: Maps each loss group's name to a scalar loss, or to a sequence of them, which are summed.
            probe: None.
            scaler: None.

        Raises:
            TypeError: ``losses`` is no mapping of names to tensors.
            ValueError: A loss is not scalar, has no graph or reaches no parameter; the rule cannot take these
                groups; or the groups changed under a rule that remembers them.
            NonFiniteError: A group's gradient holds NaN or infinity, with ``nonfinite="raise"``.
            NotImplementedError: ``probe`` or ``scaler`` is given.
        """
        if probe is not None:
            raise NotImplementedError("`probe` must be None: the probed collector is not there yet.")
        if scaler is not None:
            raise NotImplementedError(
                "`scaler` must be None: losses are not unscaled here yet; pass scaler.scale(loss) for each loss, and"
                ' nonfinite="propagate" to the aligner.'
            )
        check_process_group(self._process_group)
        groups = check_losses(losses)
        names = tuple(groups)
        self._check_groups(names)
        collector = self._collector_for(len(names))
        if self._skip_step and all(p.grad is None for p in collector.layout.parameters):
            self._skip_step = False  # whoever reset p.grad, say model.zero_grad(), began a new step
        collector.collect(list(groups.items()))
        if not self._accumulating:
            try:
                self._align(collector, names)
            finally:
                collector.discard()
        self._groups = names

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let ``backward`` only add up group gradients: for all micro-batches but the last.

        The next ``backward`` outside adds its own and aligns the sums once, as for one large batch. As with plain
        accumulation, divide each micro-batch's losses by their number for a mean.
        """
        outer, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = outer

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the inner optimizer's step, unless ``nonfinite="skip"`` leaves it out.

        Args:
            closure: Evaluates the losses, calls ``backward`` and returns a loss.

        Returns:
            The closure's loss, as the inner step returns it.

        Raises:
            RuntimeError: Micro-batches wait for the last ``backward``, the one outside ``accumulate()``.
        """
        if closure is not None:
            return step_unless(self._inner, closure, self._take_skip)
        return None if self._take_skip() else self._inner.step()

    def _take_skip(self) -> bool:
        """Return whether this step is to be left out, once; raise where it comes too early."""
        if self._collector is not None:
            self._collector.check_nothing_waits()
        skip, self._skip_step = self._skip_step, False
        return skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``p.grad`` as the inner optimizer does, and drop micro-batches that wait.

        Args:
            set_to_none: Set ``p.grad`` to None rather than to zeros.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._skip_step = False
        if self._collector is not None:
            self._collector.discard()

    def _own_state(self) -> dict[str, Any]:
        return {
            "rule": self._rule.name,
            "rule_state": self._rule.state_dict(),
            "groups": None if self._groups is None else list(self._groups),
            "skipped_steps": self.skipped_steps,
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        known = set(self._own_state())
        if set(state) != known:
            raise ValueError(
                f"`state_dict` must hold {sorted(known)} under 'gradalign', got {sorted(state)};"
                " drop that key to load the inner optimizer's state alone."
            )
        if state["rule"] != self._rule.name:
            raise ValueError(
                f"`state_dict` must come from an aligner with the rule {self._rule.name!r}, got one with"
                f" {state['rule']!r}; make the aligner with that rule, or drop the key 'gradalign' to start afresh."
            )
        groups, skipped = state["groups"], state["skipped_steps"]
        if not (groups is None or isinstance(groups, list)) or not isinstance(skipped, int):
            raise ValueError(
                "`state_dict` must hold under 'gradalign' a list of `groups` or None and a number of `skipped_steps`,"
                f" got {groups!r} and {skipped!r}."
            )
        self._rule.load_state_dict(state["rule_state"])
        self._groups = None if groups is None else tuple(groups)
        self.skipped_steps = skipped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state and the rule's; micro-batches that wait are dropped.

        Args:
            state_dict: From ``state_dict()`` of an aligner with the same rule, or of the bare inner optimizer: the rule
                then stays as it is.

        Raises:
            ValueError: The state does not fit; nothing is loaded then.
        """
        super().load_state_dict(state_dict)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: neither rows, nor report, nor hooks."""
        kept = ("_rule", "_scope", "_granularity", "_nonfinite", "_process_group", "_groups", "skipped_steps")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``__getstate__`` returned."""
        super().__setstate__(state)
        self._accumulating = False
        self._forget()

    def __repr__(self) -> str:
        scope = self._scope if isinstance(self._scope, str) else f"{len(self._scope)} parameters"
        blocks = self._granularity if isinstance(self._granularity, str) else f"{len(self._granularity)} blocks"
        options = f"scope={scope!r}, granularity={blocks!r}, nonfinite={self._nonfinite!r}"
        return f"GradientAligner({self._rule!r}, {options})\n{self._inner!r}"

    def _check_groups(self, names: tuple[str, ...]) -> None:
        """Raise ValueError unless the rule, its memory and the micro-batches that wait fit these groups."""
        self._rule.check_groups(len(names), names)
        if self._groups is None or names == self._groups:
            return
        waiting = self._collector is not None and self._collector.pending
        if self._rule.stateful or waiting:
            why = "while micro-batches wait" if waiting else f"under {self._rule!r}, which remembers them"
            raise ValueError(
                f"`losses` must keep the loss groups {list(self._groups)} {why}, got {list(names)};"
                " pass the same names in the same order, or make a new aligner."
            )

    def _collector_for(self, num_groups: int) -> StackedCollector:
        """Return the collector of the last step, or a new one where parameters or groups have changed."""
        key = (num_groups, *layout_key(self.param_groups))
        if self._collector is None or key != self._collector_key:
            if len(key) == 1:
                raise ValueError(
                    "`optimizer` must hold a parameter that requires a gradient, got none; call requires_grad_()"
                    " on those to be trained."
                )
            if self._collector is not None and (self._collector.pending or self._collector.spoiled):
                raise RuntimeError(
                    "The optimizer's parameters must stay the same while micro-batches wait, but some were added,"
                    " frozen or moved; call zero_grad() and start the accumulation again."
                )
            check_parameters(self.param_groups)
            layout = make_layout(self.param_groups, self._scope, self._granularity)
            self._collector = StackedCollector(layout, num_groups, shared_only=self._scope == "shared")
            self._collector_key = key
        return self._collector

    def _align(self, collector: StackedCollector, names: tuple[str, ...]) -> None:
        collector.check_targets()
        gramians, outside = collector.gramians()
        broken = [] if self._nonfinite == "propagate" else broken_groups(names, gramians, outside)
        if broken and self._nonfinite == "raise":
            raise NonFiniteError(
                f"The gradient of loss group {' and '.join(map(repr, broken))} must be finite, got NaN or infinity;"
                ' look at that loss, or pass nonfinite="skip" to leave such steps out, "propagate" under a GradScaler.',
                tuple(broken),
            )
        if broken:
            weights = None if isinstance(self._rule, RowRule) else torch.full_like(gramians[..., 0], torch.nan)
            self._skip_step = True
            self.skipped_steps += 1
        else:
            weights = self._write(collector, gramians, names)
        if self._granularity == "global":
            gramians, weights = gramians[0], None if weights is None else weights[0]
        self.report = AlignmentReport(names, gramians, weights, skipped=bool(broken))

    def _write(self, collector: StackedCollector, gramians: Tensor, names: tuple[str, ...]) -> Tensor | None:
        """Add the aligned gradient to ``p.grad``; return the weights, or None where the rule has none."""
        rule, plain, previous = self._rule, self._rule.plain_weights(names), self._rule.state_dict()
        finite = self._finite
        try:
            if isinstance(rule, RowRule):
                collector.write_rows(lambda b, rows: finite("aligned gradient", rule(rows, names, block=b)), plain)
                return None
            weights = finite("weights", rule(gramians, names))
        except BaseException:
            rule.load_state_dict(previous)
            raise
        collector.write(weights, rule.support(names), plain)
        return weights

    def _finite(self, what: str, made: Tensor) -> Tensor:
        """Return what the rule made, or raise where that is not finite."""
        if self._nonfinite != "propagate" and not bool(made.isfinite().all()):
            raise GradAlignError(f"The {what} of {self._rule!r} must be finite, got {made} from finite gradients.")
        return made
