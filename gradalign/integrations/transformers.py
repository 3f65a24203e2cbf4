"""A transformers Trainer whose ``compute_loss`` returns named losses, which a rule aligns.

The Trainer's own code runs: what ``compute_loss`` returns is dressed as one loss, which the Trainer scales, divides by
the number of micro-batches and hands to its accelerator; there, instead of ``accelerator.backward``, the losses are
aligned. So accumulation, mixed precision, clipping, schedulers and checkpoints are the Trainer's.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradalign import AlignmentReport, GradientAligner
from gradalign.errors import missing_extra
from gradalign.integrations.accelerate import backward
from gradalign.integrations.scalars import scalars
from gradalign.rules import BaseRule, RowRule, Rule

try:
    from transformers import Trainer
except ImportError as error:
    raise missing_extra("transformers", "transformers") from error

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# Where a backward of accelerate's does more than loss.backward(), or parameters are cut in ways that are not tested.
_REFUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
_MOST_REPORTS = 1000  # alignments whose means are logged; where nothing is logged they would add up
_STEPPING_WITHIN = ("lomo", "adalomo")


class AlignedTrainerMixin(_Base):
    """Let ``compute_loss`` of a ``transformers.Trainer`` return named losses, and align their gradients.

    Stands before the Trainer: ``class Mine(AlignedTrainerMixin, Seq2SeqTrainer)``. A subclass writes ``compute_loss``
    as ever, but returns a mapping of each loss group's name to a scalar loss; with ``return_outputs=True`` that mapping
    and the model's outputs. Or no subclass at all: ``compute_loss_func`` may return such a mapping too.

    A ``compute_loss`` without the parameter ``num_items_in_batch`` returns means over its micro-batch, and these are
    divided by the number of micro-batches. One with that parameter is told the number of items in the whole batch, as
    the Trainer tells it, and divides its sums by it; the Trainer then does not divide again.

    In evaluation and prediction, and for the Trainer's log, one number stands for the losses: their sum with the
    rule's plain weights.

    Args:
        *args: Of the Trainer.
        rule: A rule, or the name of one, ``gradalign.rules.names()``. A copy of it is used.
        aligner_options: Keyword arguments of ``GradientAligner``: scope, granularity, collector, ...
        **kwargs: Of the Trainer.

    Raises:
        TypeError: ``rule`` is no rule, ``aligner_options`` no mapping, or the optimizer is wrapped already.
        ValueError: There is no rule of this name, or the Trainer's optimizer steps within backward.
        NotImplementedError: The Trainer is to run on DeepSpeed, FSDP, Megatron or XLA.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        rule: Rule | RowRule | str,
        aligner_options: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if not isinstance(aligner_options, Mapping | None):
            raise TypeError(
                "`aligner_options` must be a mapping of GradientAligner's keyword arguments, got"
                f' {type(aligner_options).__name__}; write aligner_options={{"scope": "shared"}}.'
            )
        # An aligner says what is wrong with a rule; that of the training is made when its optimizer is.
        self._rule = GradientAligner(torch.optim.SGD([nn.Parameter(torch.zeros(()))]), copy.deepcopy(rule)).rule
        self._aligner_options = dict(aligner_options or {})
        self._reports: deque[AlignmentReport] = deque(maxlen=_MOST_REPORTS)
        self._last_report: AlignmentReport | None = None
        super().__init__(*args, **kwargs)
        if self.aligner is not None:
            raise TypeError(
                "`optimizers` must hold a bare torch.optim.Optimizer, got a GradientAligner; pass its inner optimizer,"
                " and the rule as `rule`."
            )
        self._check_backward()
        parameters = inspect.signature(self.compute_loss).parameters
        takes_items = "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_items:
            self.model_accepts_loss_kwargs = False  # the Trainer then divides by the number of micro-batches
        self.compute_loss = _dressed(self.compute_loss, self._rule, takes_items=takes_items)  # type: ignore[method-assign]
        if self.compute_loss_func is not None:
            self.compute_loss_func = _dressed_function(self.compute_loss_func, self._rule)

    def _check_backward(self) -> None:
        """Raise where backward has to be accelerate's own."""
        kind = self.accelerator.distributed_type
        if kind in _REFUSED:
            raise NotImplementedError(
                f"`args` must ask for one device or for DistributedDataParallel, got {kind.value}; train sharded models"
                " in a loop of your own."
            )
        for name in _STEPPING_WITHIN:
            if self.args.optim == name:
                raise ValueError(
                    f"`args.optim` must name an optimizer that steps after backward, got {name!r}, which does within;"
                    " choose another, such as 'adamw_torch'."
                )

    @property
    def aligner(self) -> GradientAligner | None:
        """The aligner around the optimizer, inside what accelerate made of it; None before training begins."""
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, GradientAligner):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:  # noqa: ANN401
        """Make the Trainer's optimizer, or take the one it was given, and wrap it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._reports.clear()
        if self.aligner is not None:
            self.aligner.zero_grad()  # a training that was stopped within a step left micro-batches
            return optimizer
        self.optimizer = GradientAligner(optimizer, copy.deepcopy(self._rule), **self._aligner_options)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Take the Trainer's step on a micro-batch, with an alignment where it calls ``accelerator.backward``."""
        self.accelerator.backward = self._align
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            del self.accelerator.backward  # the class's own again
        return loss

    def _align(self, losses: object) -> None:
        """Do for named losses what ``accelerator.backward`` does for one."""
        if not isinstance(losses, NamedLosses):
            raise TypeError(
                "`compute_loss` must return a mapping of each loss group's name to a scalar loss in training, got"
                f' {type(losses).__name__}; return {{"ce": loss_ce, "kd": loss_kd}}.'
            )
        aligner, optimizer = self.aligner, self.optimizer
        if aligner is None or optimizer is None:
            raise TypeError(
                f"`create_optimizer` must return what AlignedTrainer's returns, got {type(self.optimizer).__name__};"
                " set self.optimizer and return super().create_optimizer()."
            )
        backward(self.accelerator, optimizer, losses.losses)
        if aligner.report is not None and aligner.report is not self._last_report:
            self._last_report = aligner.report
            self._reports.append(aligner.report)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Log, and beside the training loss what the alignments since the last time saw, under ``align/``.

        Args:
            logs: What the Trainer logs.
            *args: Of the Trainer.
            **kwargs: Of the Trainer.
        """
        if "loss" in logs and self._reports:
            logs = logs | _means(self._reports)
            self._reports.clear()
        super().log(logs, *args, **kwargs)


class AlignedTrainer(AlignedTrainerMixin, Trainer):
    """A ``transformers.Trainer`` whose ``compute_loss`` returns named losses; see ``AlignedTrainerMixin``."""


class NamedLosses:
    """Named losses in the place of one: what the Trainer does to a loss is done to each.

    Args:
        losses: Maps each loss group's name to a scalar loss.
        rule: The rule that aligns them.

    Raises:
        TypeError: A loss is no tensor.
        ValueError: There is none.
    """

    def __init__(self, losses: Mapping[str, Tensor], rule: BaseRule) -> None:
        if not losses:
            raise ValueError('`compute_loss` must return at least one loss group, got none; return {"main": loss}.')
        for name, loss in losses.items():
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"`compute_loss` must map the loss group {name!r} to a scalar tensor, got {type(loss).__name__}."
                )
        self.losses = dict(losses)
        self._rule = rule

    def __truediv__(self, divisor: Any) -> NamedLosses:  # noqa: ANN401
        return self._each(lambda loss: loss / divisor)

    def __mul__(self, factor: Any) -> NamedLosses:  # noqa: ANN401
        return self._each(lambda loss: loss * factor)

    def mean(self) -> NamedLosses:
        """Return the mean of each, over the devices of a DataParallel."""
        return self._each(Tensor.mean)

    def detach(self) -> Tensor:
        """Return the one number that stands for them, their sum with the rule's plain weights."""
        weights = self._rule.plain_weights(tuple(self.losses))
        parts = [weight * loss.detach().mean() for weight, loss in zip(weights, self.losses.values(), strict=True)]
        return torch.stack(parts).sum()

    def _each(self, change: Callable[[Tensor], Tensor]) -> NamedLosses:
        return NamedLosses({name: change(loss) for name, loss in self.losses.items()}, self._rule)


def _dressed(compute_loss: Callable[..., Any], rule: BaseRule, *, takes_items: bool) -> Callable[..., Any]:
    """Return a ``compute_loss`` that returns what this one does, a mapping dressed as one loss."""

    @functools.wraps(compute_loss)
    def dressed(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> object:
        if not takes_items:
            kwargs.pop("num_items_in_batch", None)
        made = compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not return_outputs:
            return _dress(made, rule, "compute_loss")
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(
                "`compute_loss` must return (losses, outputs) with return_outputs=True, got"
                f" {type(made).__name__}; write return (losses, outputs) if return_outputs else losses."
            )
        return _dress(made[0], rule, "compute_loss"), made[1]

    return dressed


def _dressed_function(function: Callable[..., Any], rule: BaseRule) -> Callable[..., Any]:
    """Return a ``compute_loss_func`` that returns what this one does, a mapping dressed as one loss."""

    @functools.wraps(function)
    def dressed(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        return _dress(function(*args, **kwargs), rule, "compute_loss_func")

    return dressed


def _dress(losses: object, rule: BaseRule, source: str) -> object:
    """Return a mapping as NamedLosses, a tensor as it is: evaluation can do with it, training refuses it."""
    if isinstance(losses, NamedLosses | Tensor):
        return losses
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"`{source}` must return a mapping of each loss group's name to a scalar loss, got"
            f' {type(losses).__name__}; return {{"ce": loss_ce, "kd": loss_kd}}.'
        )
    return NamedLosses(losses, rule)


def _means(reports: Sequence[AlignmentReport]) -> dict[str, float]:
    """Return the means of what the reports say in numbers; what none of them saw is left out."""
    seen: dict[str, list[float]] = {}
    for report in reports:
        for name, number in scalars(report).items():
            seen.setdefault(f"align/{name}", []).append(number)
    return {name: fmean(numbers) for name, numbers in seen.items()}
