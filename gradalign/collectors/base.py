"""What all collectors share: differentiate one group, keep or take its gradients, deposit the result in ``p.grad``.

Shapes: K groups, T parameters, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.collectors.parameters import OUTSIDE, Layout
from gradalign.distributed import Row

# Gradients that hooks leave alone, all together, in elements: their kernels are so short that a hook would cost more
# than a pass over them later, and together they are 4 MiB in float32.
_MOST_UNHOOKED = 2**20

Loss = tuple[str, tuple[Tensor, ...], "tuple[Tensor, ...] | None"]
"""A group's name, its scalar losses, and what multiplies each of their gradients (None: 1)."""


class Collector(ABC):
    """Turn K groups of losses into Gramians, and weights into ``p.grad``.

    The order of calls: ``collect`` for each micro-batch, ``gramians``, then ``write`` or ``discard``.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        shared_only: Parameters that a single group reaches count as outside the scope.
        must_reach: Every group has to reach a parameter on this rank; else whoever sums over ranks sees to it.

    Attributes:
        name: What the user calls it.
        derivative: How auxiliaries were seen that were not differentiated; None where all were.
        pending: Micro-batches whose gradients wait.
        scale: What the losses of this step are multiplied by, or None.
        last: The micro-batch at hand is the last one of its step.
        spoiled: An error lost the gradients of earlier micro-batches; ``discard`` forgets it.
    """

    name: ClassVar[str]

    def __init__(self, layout: Layout, num_groups: int, *, shared_only: bool = False, must_reach: bool = True) -> None:
        self.layout = layout
        self.num_groups = num_groups
        self.derivative: str | None = None
        self.scale: Tensor | None = None
        self.last = True
        self._must_reach = must_reach
        self.pending = 0
        self.spoiled = False
        self._shared_only = shared_only

    def collect(self, losses: Sequence[Loss], scale: Tensor | None = None, *, last: bool = True) -> None:
        """Differentiate each group's losses, and add the gradients to those of earlier micro-batches.

        Args:
            losses: K groups.
            scale: What a GradScaler multiplies every loss by, 0-dimensional; None for nothing. Gradients are kept and
                written scaled, for the scaler will divide ``p.grad``.
            last: No micro-batch of this step follows.

        Raises:
            ValueError: A group reaches no parameter, or its gradient is sparse.
            RuntimeError: The gradients of earlier micro-batches were spoiled by an error.
        """
        if self.spoiled:
            raise RuntimeError(
                "The gradients of earlier micro-batches were lost to an error inside accumulate();"
                " call zero_grad() and start the accumulation again."
            )
        self.scale, self.last = scale, last
        try:
            self._collect(losses if scale is None else [_scaled(loss, scale) for loss in losses])
        except BaseException:
            waiting = self.pending
            self.discard()
            self.spoiled = waiting > 0
            raise
        self.pending += 1

    @abstractmethod
    def _collect(self, losses: Sequence[Loss]) -> None:
        """Do what ``collect`` promises, without care for errors."""

    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of the blocks, (B, K, K), and that of the parameters outside the scope, (K, K).

        They are those of the losses as the user has them, without a scale. An entry that this collector does not see
        is 0; ``seen`` tells which those are.
        """
        blocks, outside = self._gramians()
        if self.scale is not None:
            inverse = self.scale.to(blocks).reciprocal()
            blocks, outside = blocks * inverse * inverse, outside * inverse * inverse
        return blocks, outside

    @abstractmethod
    def _gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of what is kept."""

    @abstractmethod
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the weighted sum of the gradients to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights.
            support: The groups whose weight can differ from zero.
            plain: K numbers, the weights outside the scope.
        """

    def squares(self, gramians: Tensor, outside: Tensor) -> Tensor:
        """Return numbers that are finite where a group's gradient is, (B + 1, K): its squared norms."""
        return torch.cat([gramians, outside.unsqueeze(0)]).diagonal(dim1=-2, dim2=-1)

    def seen(self, gramians: Tensor) -> Tensor:
        """Return the Gramians with NaN for the entries that this collector does not see."""
        return gramians

    def discard(self) -> None:
        """Drop the gradients."""
        self.pending = 0
        self.spoiled = False

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters whose ``p.grad`` is written."""
        return self.layout.parameters

    def check_targets(self) -> None:
        """Raise ValueError where ``p.grad`` holds something that a gradient cannot be added to in place."""
        for parameter, count in zip(self.parameters, self.counts(), strict=True):
            if count:
                check_target(parameter)

    def check_nothing_waits(self) -> None:
        """Raise RuntimeError where micro-batches wait, or have been lost: it is too early for a step."""
        if self.spoiled:
            raise RuntimeError(
                "step() must follow a backward, but an error inside accumulate() lost the gradients of the"
                " micro-batches; call zero_grad() and start the accumulation again."
            )
        if self.pending:
            raise RuntimeError(
                f"step() must follow a backward outside accumulate(), got {self.pending} micro-batches waiting;"
                " call backward of the last micro-batch outside accumulate(), or zero_grad() to drop them."
            )

    def _differentiate(
        self, loss: Loss, *, retain_graph: bool, take: Callable[[int, Tensor], bool], hooked: Iterable[int]
    ) -> Row:
        """Return the gradients of one group, (T,).

        Args:
            loss: The group.
            retain_graph: Another group follows.
            take: Called for a parameter of ``hooked`` as soon as backward has made its gradient, while it is in the
                caches. Where it returns True the gradient is dropped at once, and a tensor without memory, of the
                same shape, is returned in its stead.
            hooked: Indices of parameters.
        """
        name, terms, factors = loss
        parameters = self.layout.parameters
        handles = [parameters[i].register_hook(_taker(take, i, name)) for i in hooked]
        try:
            # autograd.grad, not backward: it leaves p.grad alone, and never starts the reducer of DDP.
            with explaining(name):
                gradients = torch.autograd.grad(
                    terms, parameters, factors, retain_graph=retain_graph, allow_unused=True
                )
        finally:
            for handle in handles:
                handle.remove()
        check_gradients(name, gradients, must_reach=self._must_reach)
        return list(gradients)

    @abstractmethod
    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it."""

    def _blocks(self) -> Sequence[int]:
        """Return each parameter's block, OUTSIDE for one that has to be shared and is not."""
        if not self._shared_only:
            return self.layout.blocks
        return [block if count > 1 else OUTSIDE for block, count in zip(self.layout.blocks, self.counts(), strict=True)]

    def _deposit(self, aligned: Row) -> None:
        """Add the aligned gradients, (T,), to ``p.grad``; where there is none, they become it."""
        pairs = zip(self.parameters, aligned, strict=True)
        targets = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
        if present := [(p.grad, gradient) for p, gradient in targets if p.grad is not None]:
            torch._foreach_add_([old for old, _ in present], [new for _, new in present])
        for parameter, gradient in targets:
            if parameter.grad is None:  # no view: such a one could not be detached in place later
                parameter.grad = gradient.detach()
        self._run_hooks([parameter for parameter, _ in targets])

    def _run_hooks(self, parameters: Sequence[Tensor]) -> None:
        """Run what register_post_accumulate_grad_hook holds: autograd.grad does not, loss.backward() would."""
        for parameter in parameters:
            for hook in post_hooks(parameter).values():
                hook(parameter)


def post_hooks(parameter: Tensor) -> dict[int, Callable[[Tensor], None]]:
    """Return the hooks of ``register_post_accumulate_grad_hook``, the very dictionary where there are some."""
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def check_target(parameter: Tensor) -> None:
    """Raise ValueError where ``p.grad`` holds something that a gradient cannot be added to in place."""
    gradient = parameter.grad
    if gradient is None:
        return
    dense = gradient.layout == torch.strided
    if not dense or any(step == 0 and size > 1 for step, size in zip(gradient.stride(), gradient.shape, strict=True)):
        kind = "an expanded tensor" if dense else gradient.layout
        raise ValueError(
            f"`p.grad` must be None or a dense tensor with memory of its own, got {kind} for a parameter of"
            f" shape {tuple(parameter.shape)}; call zero_grad() before backward, or clone() it."
        )


def check_all_targets(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where a ``p.grad`` cannot be added to, whether or not a group reaches it."""
    for parameter in parameters:
        check_target(parameter)


def check_gradients(name: str, gradients: Sequence[Tensor | None], *, must_reach: bool = True) -> None:
    """Raise ValueError unless a group's gradients are dense, and it reaches a parameter where it must."""
    for gradient in gradients:
        if gradient is not None and gradient.layout != torch.strided:
            raise _not_dense(name, gradient)
    if must_reach and all(gradient is None for gradient in gradients):
        raise reaches_nothing(name)


def reaches_nothing(name: str) -> ValueError:
    """Return the error for a group that reaches no parameter."""
    return ValueError(
        f"`losses[{name!r}]` must reach a parameter of the optimizer that requires a gradient, got a loss"
        " that reaches none; check that it is computed from this model, or leave the group out."
    )


def _scaled(loss: Loss, scale: Tensor) -> Loss:
    """Return a group of which each loss counts as multiplied by the scale."""
    name, terms, factors = loss
    ones = tuple(torch.ones_like(term) for term in terms) if factors is None else factors
    return name, terms, tuple(factor * scale.to(factor) for factor in ones)


def large(sizes: Sequence[int]) -> list[int]:
    """Return the indices of all parameters but the smallest, which together have few elements."""
    unhooked = 0
    ascending = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for place, i in enumerate(ascending):
        unhooked += sizes[i]
        if unhooked > _MOST_UNHOOKED:
            return sorted(ascending[place:])
    return []


def _taker(take: Callable[[int, Tensor], bool], i: int, name: str) -> Callable[[Tensor], Tensor | None]:
    def hook(gradient: Tensor) -> Tensor | None:
        if gradient.layout != torch.strided:
            raise _not_dense(name, gradient)
        with torch.no_grad():
            return gradient.new_zeros(()).expand(gradient.shape) if take(i, gradient) else None

    return hook


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Say what to do where the backward of this group finds that another's has used up what it needs."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise _used_up(name) from error
        raise


def _used_up(name: str) -> ValueError:
    return ValueError(
        f"`losses[{name!r}]` must leave what the backwards of other groups need, got the loss of a compiled model whose"
        " backward uses it up: a plain backward(), now or in a run whose cache is read, had it compiled for one; import"
        " torch._functorch.config and set torch._functorch.config.donated_buffer = False before the model is compiled."
    )


def _not_dense(name: str, gradient: Tensor) -> ValueError:
    return ValueError(
        f"`losses[{name!r}]` must have dense gradients, got a {gradient.layout} one for a parameter of"
        f" shape {tuple(gradient.shape)}; make its embedding with sparse=False."
    )
