"""GradientAligner: a torch optimizer around a torch optimizer, whose backward takes named losses and aligns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradalign.arguments import (
    check_choice,
    check_collector,
    check_optimizer,
    check_own_state,
    check_probe,
    check_rule,
    check_update_every,
)
from gradalign.collectors.agreement import telling
from gradalign.collectors.base import Collector
from gradalign.collectors.losses import Losses, broken_groups, check_losses
from gradalign.collectors.parameters import Granularity, Scope, check_granularity, check_scope
from gradalign.collectors.probed import Probe
from gradalign.collectors.ranked import RankedStackedCollector
from gradalign.collectors.stacked import StackedCollector
from gradalign.distributed import RanksOf
from gradalign.errors import GradAlignError, not_finite
from gradalign.kept import Weighted
from gradalign.loss_scaling import check_scaler, scale_of
from gradalign.report import AlignmentReport
from gradalign.rules import RowRule, Rule
from gradalign.steps import Conditions, Step, Steps
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
    ``register_post_accumulate_grad_hook`` run once ``p.grad`` is written.

    Args:
        optimizer: Any ``torch.optim.Optimizer``. Only its parameters get a gradient.
        rule: A rule, or the name of one, ``gradalign.rules.names()``. What it remembers changes: each aligner its own.
        scope: Which parameters are aligned: "all"; "shared", those that two groups or more reach; or an iterable of
            parameters. One outside the scope gets its groups' gradients with the rule's plain weights.
        granularity: What shares one Gramian: "global"; "param_group"; "tensor"; or a list of lists of parameters,
            say one for each layer, where parameters that no list holds share one more block.
        collector: "stacked" keeps a row for each group. "batched" too, and takes all backwards in one, by vmap, for
            networks of many small operations. "streamed" keeps the anchor's alone and sees of the others
            their products with it, for rules that only rescale their anchor: no more memory than joint training.
            "probed" sees them without a backward of theirs, through the ``probe`` of ``backward``. "auto" is "probed"
            where a probe is given, else "streamed" where the rule allows it, else "stacked".
        update_every: Compute the weights at every n-th step only; between, one ordinary backward on the weighted sum,
            or, with blocks or a scope, one of each group that has a weight. A run may be resumed with another number:
            weights that have served as many steps are then made anew.
        nonfinite: What a group's NaN or infinity does: "raise" an error that names the group; "skip" the next step
            and count it in ``skipped_steps``; "propagate" it to ``p.grad`` without waiting for the device.
        process_group: With ``torch.distributed`` running, the ranks whose gradients are averaged: "auto" for all, a
            process group, or None for this rank alone. Wrapped in ``DistributedDataParallel`` or not, a model needs
            no other reduction; every rank has to pass the same loss groups.

    Attributes:
        report: The AlignmentReport of the last alignment, None before the first.
        skipped_steps: How many alignments were left out by ``nonfinite="skip"``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has no such value, or names a parameter that the optimizer does not have.

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
        collector: Literal["auto", "stacked", "batched", "streamed", "probed"] = "auto",
        update_every: int = 1,
        nonfinite: Literal["raise", "skip", "propagate"] = "raise",
        process_group: torch.distributed.ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        check_optimizer(optimizer)
        self._rule = check_rule(rule)
        self._scope = check_scope(scope, optimizer.param_groups)
        self._granularity = check_granularity(granularity, optimizer.param_groups)
        check_choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
        check_collector(collector, self._rule, self._scope, self._granularity)
        check_update_every(update_every, self._rule)
        self._choice: str = collector
        self._update_every = update_every
        self._nonfinite = nonfinite
        self._process_group = RanksOf(process_group)
        self._process_group()  # raises what is wrong with it
        super().__init__(optimizer)
        self.skipped_steps = 0
        self._groups: tuple[str, ...] | None = None
        self._accumulating = False
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to the step at hand."""
        self.report: AlignmentReport | None = None
        self._steps = Steps(self._rule, self._scope, self._granularity, self._choice, self._update_every)
        self._skip_step = False

    @property
    def rule(self) -> Rule | RowRule:
        """The rule."""
        return self._rule

    def backward(
        self, losses: Losses, *, probe: Probe | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Add the aligned gradient of the losses to ``p.grad``.

        Args:
            losses: Maps each loss group's name to a scalar loss, or to a sequence of them, which are summed.
            probe: Evaluates the auxiliaries, for a rule that only rescales its anchor: a function that returns such a
                mapping, while ``losses`` holds the anchor alone. It is called within ``backward``, once or more, must
                compute the same each time and write into no parameter; the global random generators are set back,
                buffers spared. How much of the batch it sees is its own choice, made before; a part stands for the
                whole.
            scaler: The ``torch.amp.GradScaler`` of float16 training, enabled or not. The losses are multiplied by its
                scale and so is what is added to ``p.grad``, but rule and report see the gradients without it. Then,
                as ever, ``scaler.unscale_(optimizer)`` where gradients are clipped, ``scaler.step(optimizer)`` and
                ``scaler.update()``. What is not finite counts as an overflow, whatever ``nonfinite`` says: it
                reaches ``p.grad``, and the scaler leaves the step out and lowers its scale.

        Raises:
            TypeError: ``losses`` is no mapping of names to tensors, ``probe`` no function that returns one, or
                ``scaler`` no GradScaler.
            ValueError: A loss is not scalar, has no graph or reaches no parameter; the rule cannot take these
                groups; the groups changed under a rule that remembers them; or the collector, the rule, the scope or
                the granularity does not go with a probe.
            NonFiniteError: A group's gradient holds NaN or infinity, with ``nonfinite="raise"`` and no ``scaler``.
            GradAlignError: Another rank has met an error.
        """
        waits = self._accumulating
        layout, ranks = self._steps.layout(self.param_groups, self._process_group(), accumulating=waits)
        compared = ranks if layout.shards is not None or not waits else None  # else nothing is sent
        with telling(None if compared is None else partial(compared.give_up, layout.device)):
            check_scaler(scaler)
            check_probe(probe, self._choice, self._rule, self._scope, self._granularity)
            groups = check_losses(losses)
            conditions = Conditions(self._groups, scale_of(scaler, groups), ranks, not waits, self._nonfinite)
            step = self._steps.begin(layout, groups, probe, conditions)
        if compared is not None:
            compared.check_same(tuple(groups), step.manner, layout.checksum, layout.device)
        if self._skip_step and all(p.grad is None for p in step.collector.parameters):
            self._skip_step = False  # whoever reset p.grad, say model.zero_grad(), began a new step
        step.collect()
        if not waits:
            try:
                self._align(step)
            finally:
                step.collector.discard()

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
            self._skip_step = False  # an earlier backward's does not concern this step: the closure calls its own
            return step_unless(self._inner, closure, self._take_skip)
        return None if self._take_skip() else self._inner.step()

    def _take_skip(self) -> bool:
        """Return whether this step is to be left out, once; raise where it comes too early."""
        if self._steps.pool.current is not None:
            self._steps.pool.current.check_nothing_waits()
        skip, self._skip_step = self._skip_step, False
        return skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``p.grad`` as the inner optimizer does, and drop micro-batches that wait.

        Args:
            set_to_none: Set ``p.grad`` to None rather than to zeros.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._skip_step = False
        if self._steps.pool.current is not None:
            self._steps.pool.current.discard()

    def _own_state(self) -> dict[str, Any]:
        return {
            "rule": self._rule.name,
            "rule_state": self._rule.state_dict(),
            "groups": None if self._groups is None else list(self._groups),
            "skipped_steps": self.skipped_steps,
            "kept": self._steps.kept.state_dict(),
            "shapes": [list(parameter.shape) for group in self.param_groups for parameter in group["params"]],
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        check_own_state(state, self._own_state())
        self._steps.kept.load_state_dict(state["kept"])
        self._rule.load_state_dict(state["rule_state"])
        self._groups = None if state["groups"] is None else tuple(state["groups"])
        self.skipped_steps = state["skipped_steps"]

    def _loaded(self) -> None:
        kept = self._steps.kept
        self._forget()
        self._steps.kept = kept

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: neither rows, nor report, nor hooks."""
        names = ("_rule", "_scope", "_granularity", "_choice", "_update_every", "_nonfinite", "_process_group")
        kept = {name: self.__dict__[name] for name in (*names, "_groups", "skipped_steps")}
        return super().__getstate__() | kept | {"_kept": self._steps.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``__getstate__`` returned."""
        kept = state.pop("_kept")
        super().__setstate__(state)
        self._accumulating = False
        self._forget()
        self._steps.kept = kept

    def __repr__(self) -> str:
        scope = self._scope if isinstance(self._scope, str) else f"{len(self._scope)} parameters"
        blocks = self._granularity if isinstance(self._granularity, str) else f"{len(self._granularity)} blocks"
        options = f"scope={scope!r}, granularity={blocks!r}, collector={self._choice!r}"
        options += f", update_every={self._update_every}, nonfinite={self._nonfinite!r}"
        return f"GradientAligner({self._rule!r}, {options})\n{self._inner!r}"

    def _align(self, step: Step) -> None:
        collector = step.collector
        collector.check_targets()
        names = self._steps.finish(step)
        if step.weighted is not None:
            self._write_kept(step, step.weighted)
            return
        gramians, outside = collector.gramians()
        broken = self._broken(collector, [(name,) for name in names], gramians, outside)
        if broken:
            weights = None if isinstance(self._rule, RowRule) else torch.full_like(gramians[..., 0], torch.nan)
        else:
            reached = [count > 0 for count in collector.counts()]
            weights = self._write(collector, gramians, names)
            self._steps.kept.keep(weights, names, reached, self._rule.plain_weights(names))
        self._groups = names
        gramians = collector.seen(gramians)
        if self._granularity == "global":
            gramians, weights = gramians[0], None if weights is None else weights[0]
        self.report = AlignmentReport(
            names, gramians, weights, bool(broken), collector=collector.name, derivative=collector.derivative
        )

    def _broken(
        self, collector: Collector, names: Sequence[tuple[str, ...]], gramians: Tensor, outside: Tensor
    ) -> list[str]:
        """Return the groups with a gradient that is not finite, for which the step is left out; or raise."""
        if self._propagates(collector):
            return []
        broken = [name for group in broken_groups(names, collector.squares(gramians, outside)) for name in group]
        if broken and self._nonfinite == "raise":
            raise not_finite(broken)
        if broken:
            self._skip_step = True
            self.skipped_steps += 1
        return broken

    def _write_kept(self, step: Step, weighted: Weighted) -> None:
        """Add to ``p.grad`` what the weights of an earlier step make of the gradients."""
        collector = step.collector
        if not self._propagates(collector) and self._broken(collector, weighted.names, *collector.gramians()):
            return
        collector.write(weighted.weights, weighted.support, weighted.plain)
        self._steps.kept.fill(collector.parameters)
        self._steps.kept.spend()

    def _write(self, collector: Collector, gramians: Tensor, names: tuple[str, ...]) -> Tensor | None:
        """Add the aligned gradient to ``p.grad``; return the weights, or None where the rule has none."""
        rule, plain, previous = self._rule, self._rule.plain_weights(names), self._rule.state_dict()

        def finite(what: str, made: Tensor) -> Tensor:
            if not self._propagates(collector) and not bool(made.isfinite().all()):
                raise GradAlignError(f"The {what} of {rule!r} must be finite, got {made} from finite gradients.")
            return made

        try:
            if isinstance(rule, RowRule):
                assert isinstance(collector, StackedCollector | RankedStackedCollector)
                collector.write_rows(lambda b, rows: finite("aligned gradient", rule(rows, names, block=b)), plain)
                return None
            weights = finite("weights", rule(gramians, names))
        except BaseException:
            rule.load_state_dict(previous)
            raise
        collector.write(weights, rule.support(names), plain)
        return weights

    def _propagates(self, collector: Collector) -> bool:
        """Return whether what is not finite goes on into ``p.grad``, for the user or a GradScaler to see."""
        return self._nonfinite == "propagate" or collector.scale is not None
