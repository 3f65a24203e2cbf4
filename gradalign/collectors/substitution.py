"""Letting code see other tensors than the parameters it names, and values that stand still where gradients stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# What makes of a tensor something that gradients do not pass through.
_STOPS = (
    Tensor.detach,
    Tensor.detach_,
    torch.detach,
    torch.detach_,
    vars(torch._C.TensorBase)["data"].__get__,
    Tensor.item,
    Tensor.tolist,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
)

# What code asks of a parameter itself, not of its value.
_OF_THE_PARAMETER = (
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    vars(torch._C.TensorBase)["grad"].__get__,
)


class Substitution(TorchFunctionMode):
    """Let the code within see other tensors in place of the parameters, and stop derivatives where it stops gradients.

    Gradients stop at ``detach()`` and the like, and at what runs under ``no_grad()``. Forward mode stops at the first
    by itself, and is switched off here for the second. Differences of two evaluations stop at neither: so one
    evaluation is recorded, and in others what leaves such a place, or enters it, has the recorded value.

    A function of torch's that is written in Python is one call here: what it detaches inside, as ``gumbel_softmax``
    with ``hard`` does, goes unseen.

    Args:
        parameters: What the code names.
        seen: What it sees.
        frozen: What it sees where gradients stop.

    Attributes:
        stops: Gradients have stopped somewhere.
        precision: The coarsest of the parameters' and, where it was on, of autocast's, as a relative rounding.
    """

    def __init__(self, parameters: Sequence[Tensor], seen: Sequence[Tensor], frozen: Sequence[Tensor]) -> None:
        self._seen = {id(p): other for p, other in zip(parameters, seen, strict=True)}
        self._frozen = {id(p): other for p, other in zip(parameters, frozen, strict=True)}
        self._still = {id(other) for other in frozen}
        self._device = parameters[0].device.type
        self._recorded: list[Any] | None = None
        self._replayed: Iterator[Any] | None = None
        self.stops = False
        self.precision = max(torch.finfo(p.dtype).eps for p in parameters)
        self._begin()

    def _begin(self) -> None:
        self._in_use = self._seen
        self._inside: dict[int, Tensor] = {}  # made under no_grad(), held so that no other takes the place and id

    def record(self) -> None:
        """Let the evaluation that follows be the one that others replay."""
        self._begin()
        self._recorded, self._replayed = [], None

    def replay(self) -> None:
        """Let the evaluation that follows see what was recorded, if anything was."""
        self._begin()
        self._replayed = None if self._recorded is None else iter(self._recorded)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call ``func`` with the parameters' substitutes."""
        if func is torch._C._set_grad_enabled:
            self._enable_gradients(args[0])
            return func(*args)
        if torch.is_autocast_enabled(self._device):
            self.precision = max(self.precision, torch.finfo(torch.get_autocast_dtype(self._device)).eps)
        frozen = self._in_use is self._frozen or torch.is_inference_mode_enabled()
        if func not in _OF_THE_PARAMETER:
            in_use = self._frozen if frozen else self._seen
            args = tuple(_substituted(argument, in_use) for argument in args)
            kwargs = {name: _substituted(argument, in_use) for name, argument in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        if func in _STOPS or (frozen and self._moves(args)):
            result = self._stop(result, args)
        if frozen:
            self._inside.update((id(part), part) for part in _tensors(result))
        return result

    def _enable_gradients(self, enabled: bool) -> None:
        if enabled:
            self._begin()
        elif torch.is_grad_enabled():  # else within a Function's own forward, whose backward knows of derivatives
            self._in_use = self._frozen
        forward_ad._set_fwd_grad_enabled(self._in_use is self._seen)

    def _moves(self, args: tuple[Any, ...]) -> bool:
        """Return whether a tensor comes from where derivatives do not stop."""
        return any(
            id(part) not in self._inside and id(part) not in self._still
            for argument in args
            for part in _tensors(argument)
        )

    def _stop(self, result: Any, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        self.stops = True
        if self._replayed is not None:
            return _replaced(result, next(self._replayed, None), args)
        if self._recorded is not None:
            self._recorded.append(_copied(result))
        return result


def _tensors(value: Any) -> Sequence[Tensor]:  # noqa: ANN401
    if isinstance(value, Tensor):
        return (value,)
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, list | tuple) else ()


def _substituted(argument: Any, by: Mapping[int, Tensor]) -> Any:  # noqa: ANN401
    if isinstance(argument, Tensor):
        return by.get(id(argument), argument)
    if isinstance(argument, list | tuple) and any(isinstance(part, Tensor) for part in argument):
        return type(argument)(by.get(id(part), part) for part in argument)
    return argument


def _copied(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value


def _replaced(value: Any, recorded: Any, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """Return the recorded value in place of ``value``; a tensor that the call has changed in place is changed again."""
    if isinstance(value, Tensor):
        if not isinstance(recorded, Tensor) or recorded.shape != value.shape:
            raise ValueError(
                "`probe` must compute the same at every call, but it stopped gradients at other values than before;"
                " draw what is random, such as the rows that it sees, before backward."
            )
        if any(value is argument for argument in args):
            with torch.no_grad():
                return value.copy_(recorded)
        return recorded.clone()
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size) and _tensors(value):
        parts = [_replaced(part, old, args) for part, old in zip(value, recorded, strict=True)]
        return parts if isinstance(value, list) else tuple(parts)
    return value if recorded is None else recorded
