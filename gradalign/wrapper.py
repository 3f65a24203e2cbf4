"""An optimizer around an optimizer: the inner one in all it does, so that a subclass adds only what is its own."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast, overload

import torch
from torch.optim import Optimizer

from gradalign.errors import GradAlignError

_STATE_KEY = "gradalign"


class WrappedOptimizer(Optimizer):
    """Be another optimizer: its groups, state, defaults and step, and whatever schedulers and hooks ask of it.

    ``param_groups``, ``state`` and ``defaults`` are views of the inner optimizer, not copies: its
    ``load_state_dict`` replaces these objects, and an alias would then be read and written in vain. Nothing is
    written into the inner state; what a subclass has to save goes beside it, under "gradalign".

    Args:
        optimizer: The inner optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ makes the hooks, and assigns state, groups and defaults: a stand-in takes those.
        self._inner = cast(Optimizer, SimpleNamespace(add_param_group=lambda group: None))
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._inner = optimizer

    @property
    def inner(self) -> Optimizer:
        """The optimizer inside."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def state(self) -> Any:  # noqa: ANN401  # type: ignore[override]
        """The inner optimizer's state."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:  # noqa: ANN401
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the inner optimizer's step and return what it returns: the closure's loss."""
        return self._inner.step() if closure is None else self._inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``p.grad`` as the inner optimizer does.

        Args:
            set_to_none: Set ``p.grad`` to None rather than to zeros.
        """
        self._inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimizer; its parameters take part from the next ``backward``."""
        self._inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, and what is the wrapper's own under "gradalign".

        ``torch.load(..., weights_only=True)`` takes it, and the bare inner optimizer loads it too.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self._inner.state_dict(), _STATE_KEY: self._own_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state and the wrapper's own; micro-batches that wait are dropped.

        Args:
            state_dict: From ``state_dict()`` of a wrapper with the same rule and parameters, or of the bare inner
                optimizer: the wrapper's own state then stays as it is.

        Raises:
            TypeError: ``state_dict`` is no dictionary.
            ValueError: The state does not fit; nothing is loaded then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"`state_dict` must be a dictionary, got {type(state_dict).__name__}; pass what state_dict() returned."
            )
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        if not {"state", "param_groups"} <= set(state):
            raise ValueError(
                "`state_dict` must hold the optimizer's 'state' and 'param_groups', got"
                f" {sorted(map(str, state)) or 'nothing'}; pass what state_dict() returned."
            )
        own = state.pop(_STATE_KEY, None)
        self._load(own, state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def alignment_state(self) -> AlignmentState:
        """What ``state_dict()`` holds under "gradalign", alone: an entry for ``torch.distributed.checkpoint``.

        That module takes of an optimizer what torch's own have, and leaves this out.
        """
        return AlignmentState(self)

    def _load(self, own: dict[str, Any] | None, of_inner: dict[str, Any] | None) -> None:
        """Load what is not None, or nothing where one of them does not fit."""
        previous = self._own_state()
        try:
            if own is not None:
                self._load_own_state(own)
            if of_inner is not None:
                self._inner.load_state_dict(of_inner)
        except BaseException:
            self._load_own_state(previous)
            raise
        self._loaded()

    def _own_state(self) -> dict[str, Any]:
        """Return what the subclass saves: tensors, plain values, lists and dictionaries."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Take over what ``_own_state`` returned, or raise ValueError."""

    def _loaded(self) -> None:
        """Drop what belongs to the step at hand, once a state is loaded."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; hooks are dropped, as torch drops them."""
        return {"_inner": self._inner}


class AlignmentState:
    """A wrapper's own state, with the two methods of ``torch.distributed.checkpoint.stateful.Stateful``.

    That module reads a checkpoint into the tensors and keys that it finds before it reads. A rule that has seen no step
    yet has none, so that everything is in one value, the bytes that ``torch.save`` makes of it.

    Args:
        optimizer: The wrapper.
    """

    def __init__(self, optimizer: WrappedOptimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state, ``{"gradalign": bytes}``."""
        file = io.BytesIO()
        torch.save(self._optimizer._own_state(), file)
        return {_STATE_KEY: file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and leave the inner optimizer's as it is; micro-batches that wait are dropped.

        Args:
            state_dict: From ``state_dict()`` of the ``alignment_state`` of a wrapper with the same rule and parameters.

        Raises:
            ValueError: The state does not fit; nothing is loaded then.
        """
        saved = state_dict.get(_STATE_KEY) if isinstance(state_dict, Mapping) else None
        if not isinstance(saved, bytes):
            raise ValueError(
                "`state_dict` must hold bytes under 'gradalign', as alignment_state.state_dict() returns them, got"
                f" {sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__};"
                " for optimizer.state_dict() there is optimizer.load_state_dict()."
            )
        try:
            # On the host, whatever device they were saved from: each rank has another, and moves them when it steps.
            state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                "`state_dict` must hold under 'gradalign' the bytes that alignment_state.state_dict() returned, got"
                f" {len(saved)} others; read the checkpoint again."
            ) from error
        self._optimizer._load(state, None)


def step_unless(inner: Optimizer, closure: Callable[[], float], vetoed: Callable[[], bool]) -> float:
    """Take the inner optimizer's step with a closure, unless the closure's first evaluation is vetoed.

    Args:
        inner: The optimizer.
        closure: Evaluates the losses, calls backward and returns a loss.
        vetoed: Asked after each evaluation whether the step is to be left out.

    Returns:
        The closure's loss, as the inner step returns it; of a step that was left out, its first.

    Raises:
        GradAlignError: A later evaluation is vetoed: the inner step has moved parameters by then.
    """
    evaluations = 0

    def evaluate() -> float:
        nonlocal evaluations
        evaluations += 1
        loss = closure()
        if vetoed():
            if evaluations > 1:
                raise GradAlignError(
                    "A loss group's gradient must stay finite within step(closure), got NaN or infinity at"
                    f' evaluation {evaluations}; nonfinite="skip" leaves out whole steps only.'
                )
            raise _LeftOut(loss)
        return loss

    try:
        return inner.step(evaluate)
    except _LeftOut as left_out:
        return left_out.loss


class _LeftOut(Exception):  # noqa: N818 (no error: it carries the closure's loss out of the inner step)
    def __init__(self, loss: float) -> None:
        self.loss = loss
