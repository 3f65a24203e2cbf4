"""A LightningModule whose ``training_step`` returns named losses, and the callback that logs their conflicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradalign import AlignmentReport, GradientAligner
from gradalign.errors import missing_extra
from gradalign.integrations.micro_batches import divided
from gradalign.integrations.scalars import scalars

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise missing_extra("lightning", "lightning") from error


class AlignedModule(LightningModule):
    """Let ``training_step`` return named losses, and ``configure_optimizers`` a ``GradientAligner``.

    Optimization stays automatic. The step's losses are kept, the Trainer gets their sum, without a graph, as its loss,
    and where it then calls the module's ``backward`` hook, the aligner takes the losses instead: divided by
    ``accumulate_grad_batches``, only added up for all micro-batches but the last, with the scaler of float16 precision.
    So gradient clipping, schedulers, accumulation, precision and checkpoints are the Trainer's own arguments, as ever.

    ``training_step`` may also return None, to skip the batch, and anything where ``automatic_optimization`` is False.
    One that calls its parent's, ``super().training_step(...)``, gets what that returned.

    Raises:
        TypeError: ``training_step`` does not return a mapping, or ``configure_optimizers`` no ``GradientAligner``.
    """

    _losses: Mapping[str, Any] | None = None  # between the training step and its backward
    _within_step = False

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        if "training_step" in cls.__dict__:
            cls.training_step = _keeping_losses(cls.__dict__["training_step"])  # type: ignore[method-assign]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Align the gradients of the losses that the training step returned; the Trainer calls it.

        Args:
            loss: The Trainer's. It is differentiated where it is no training step's: under manual optimization.
            args: For ``loss.backward``.
            kwargs: For ``loss.backward``.
        """
        losses, self._losses = self._losses, None
        if losses is None:
            super().backward(loss, *args, **kwargs)
            return
        aligner = self.optimizers(use_pl_optimizer=False)
        if not isinstance(aligner, GradientAligner):
            raise TypeError(
                f"`configure_optimizers` must return a GradientAligner, got {type(aligner).__name__}; write"
                " GradientAligner(torch.optim.AdamW(self.parameters()), rule)."
            )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with nullcontext() if _steps_now(self.trainer) else aligner.accumulate():
            aligner.backward(divided(losses, self.trainer.accumulate_grad_batches), scaler=scaler)


class AlignmentMonitor(Callback):
    """Log the last alignment to the Trainer's loggers, at every ``log_every_n_steps``-th step, and each but once.

    The names are those of ``gradalign.integrations.tensorboard``: ``align/conflicts``, ``align/cosine/ce/kd``. They are
    in ``trainer.callback_metrics``, too.

    Args:
        prefix: What the names begin with.
    """

    def __init__(self, prefix: str = "align") -> None:
        self._prefix = prefix
        self._last: AlignmentReport | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the report, unless it has been logged: ``update_every`` leaves an earlier step's."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # it is set elsewhere
        report = getattr(optimizer, "report", None)
        due = every > 0 and (trainer.global_step + 1) % every == 0  # as the Trainer itself logs
        if not due or not isinstance(report, AlignmentReport) or report is self._last:
            return
        self._last = report
        # Not by pl_module.log: the Trainer would repeat it at later steps, as if it were theirs.
        numbers = {f"{self._prefix}/{name}": number for name, number in scalars(report).items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(number) for name, number in numbers.items()})


def _keeping_losses(training_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a training step that keeps its named losses for ``backward`` and returns what the Trainer wants."""

    @wraps(training_step)
    def keeping(self: AlignedModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._within_step or not self.automatic_optimization:
            return training_step(self, *args, **kwargs)
        self._within_step = True
        try:
            losses = training_step(self, *args, **kwargs)
        finally:
            self._within_step = False
        if losses is None:
            return None
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"`training_step` must return named losses or None, got {type(losses).__name__}; write"
                ' return {"ce": ce, "kd": kd}.'
            )
        if "loss" in losses:
            raise ValueError(
                "`training_step` must return the losses that are aligned, and no total of them under 'loss', got"
                f" {list(losses)}; leave 'loss' out, or give that group another name."
            )
        self._losses = losses
        return {"loss": sum((term.detach() for term in _terms(losses)), start=torch.zeros((), device=self.device))}

    return keeping


def _terms(losses: Any) -> list[Tensor]:  # noqa: ANN401
    """Return all tensors in named losses; what else is there the aligner will refuse."""
    if isinstance(losses, Tensor):
        return [losses]
    if isinstance(losses, Mapping):
        losses = list(losses.values())
    return [term for group in losses for term in _terms(group)] if isinstance(losses, list | tuple) else []


def _steps_now(trainer: Trainer) -> bool:
    """Return whether the Trainer takes an optimizer step after this batch: the last of its micro-batches."""
    done = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return done or trainer.is_last_batch
