"""How auxiliary losses change as the parameters move along a direction, seen without their backward.

For parameters theta, a direction g and a loss L_k, D_k = d/dt L_k(theta + t g) at t = 0 is <grad L_k, g>. A gradient
does not pass through ``detach()`` and ``torch.no_grad()``, and neither does D_k here: what a distillation loss takes
from its teacher stays as it is at theta, or D_k would be another number than <grad L_k, g>.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradalign.collectors.losses import Terms
from gradalign.collectors.undisturbed import RandomState, spared_buffers
from gradalign.gramian import accumulation_dtype

Evaluate = Callable[[], dict[str, Terms]]
"""Evaluates losses: a group's name to its scalar losses."""

# Error of a central difference, relative: step^2 of the curvature, precision / step of the rounding. They meet at the
# cube root of the precision. This share of the reach was the best on transformers, convolutions and perceptrons, fresh
# and trained, in float32 and bfloat16: a median error of 3e-5 and 8e-3 of the norms, at most 7e-4 and 4e-2.
_ROOT = 1 / 3
_SHARE = 0.15

_STOPS = (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, vars(torch._C.TensorBase)["data"].__get__)

# What a user's code asks of a parameter itself, not of its value.
_OF_THE_PARAMETER = (
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    vars(torch._C.TensorBase)["grad"].__get__,
)


class DirectionalDerivatives:
    """Compute D_k by forward-mode differentiation where every operator supports it, else by central differences.

    Forward mode is exact and evaluates the losses once. Central differences, (L(theta + e g) - L(theta - e g)) / 2e,
    evaluate them twice, and once more at theta where a loss stops gradients: what passes through ``detach()`` is
    then replayed from there, and what runs under ``no_grad()`` sees the parameters as they are. What a loss reads as a
    Python number, by ``item()``, is not replayed.

    Each evaluation begins with the same state of torch's random generators, so that dropout draws the same masks; when
    all is done they stand as after one evaluation. Modules' buffers and the parameters are as before, bit for bit.

    Attributes:
        way: "forward-mode" or "central-differences", what the next call tries and the last one took.
    """

    def __init__(self) -> None:
        self.way = "forward-mode"
        self._home: list[Tensor] = []  # memory for the parameters while they are shifted
        self._precision = 0.0  # the coarsest of the losses' arithmetic, 0 as long as it is not known
        self._stops = True

    def __call__(
        self, evaluate: Evaluate, parameters: Sequence[Tensor], direction: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return each group's D_k, 0-dimensional, float64 (float32 where the device has no float64).

        Args:
            evaluate: Evaluates the losses; called once or more.
            parameters: N parameters.
            direction: N tensors of their shapes, g.
        """
        random = RandomState({parameter.device for parameter in parameters})
        try:
            if self.way == "forward-mode":
                try:
                    return self._forward_mode(evaluate, parameters, direction)
                except RuntimeError:  # an operator without forward mode; losses that fail anyway fail again below
                    derivatives = self._differences(evaluate, parameters, direction, random)
                    self.way = "central-differences"
                    return derivatives
            return self._differences(evaluate, parameters, direction, random)
        except BaseException:
            random.restore()
            raise

    def _forward_mode(
        self, evaluate: Evaluate, parameters: Sequence[Tensor], direction: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        device = parameters[0].device
        _load_forward_mode()
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            duals = [forward_ad.make_dual(p.detach(), g) for p, g in zip(parameters, direction, strict=True)]
            with _evaluating(device), _Substitution(parameters, duals, duals), spared_buffers(scripts=_no_forward_mode):
                losses = evaluate()
            if _reaches([term for terms in losses.values() for term in terms], parameters):
                raise NotImplementedError("A custom function or compiled code has seen parameters without a tangent.")
            return {
                name: _total([forward_ad.unpack_dual(term).tangent for term in terms], device)
                for name, terms in losses.items()
            }

    def _differences(
        self, evaluate: Evaluate, parameters: Sequence[Tensor], direction: Sequence[Tensor], random: RandomState
    ) -> dict[str, Tensor]:
        device = parameters[0].device
        shifted = [p.detach() for p in parameters]
        if [p.shape for p in self._home] != [p.shape for p in shifted]:
            self._home = [torch.empty_like(p) for p in shifted]
        torch._foreach_copy_(self._home, shifted)
        mode = _Substitution(parameters, shifted, self._home)

        def losses_here() -> dict[str, Tensor]:
            random.restore()
            with _evaluating(device), mode, spared_buffers():
                losses = evaluate()
            return {name: _total([term.detach() for term in terms], device) for name, terms in losses.items()}

        if self._stops:
            mode.record()
            losses_here()
            self._stops, self._precision = bool(mode.stopped), mode.precision
        step = _SHARE * self._precision**_ROOT * _reach(parameters, direction)
        sides = []
        try:
            for sign in (1.0, -1.0):
                _shift(shifted, self._home, direction, sign * step)
                mode.replay()
                sides.append(losses_here())
                if (mode.stops and not self._stops) or mode.precision > self._precision:  # for the first time
                    self._stops = True
                    torch._foreach_copy_(shifted, self._home)
                    return self._differences(evaluate, parameters, direction, random)
        finally:
            torch._foreach_copy_(shifted, self._home)
        above, below = sides
        zero = torch.zeros_like(step)
        return {name: torch.where(step == 0, zero, (above[name] - below[name]) / (2 * step)) for name in above}


class _Substitution(TorchFunctionMode):
    """Let the code within see other tensors in place of the parameters, and stop derivatives where it stops gradients.

    Args:
        parameters: What the code names.
        seen: What it sees.
        frozen: What it sees under ``no_grad()``.
    """

    def __init__(self, parameters: Sequence[Tensor], seen: Sequence[Tensor], frozen: Sequence[Tensor]) -> None:
        self._seen = {id(p): other for p, other in zip(parameters, seen, strict=True)}
        self._frozen = {id(p): other for p, other in zip(parameters, frozen, strict=True)}
        self._in_use = self._seen
        self._device = parameters[0].device.type
        self.stopped: list[Tensor] | None = None
        """What passed through detach() while it was recorded, in order."""
        self.stops = False
        """Something has passed through detach()."""
        self._replayed: Iterator[Tensor] | None = None
        self.precision = max(torch.finfo(p.dtype).eps for p in parameters)
        """The coarsest of the parameters and of autocast, where it was on."""

    def record(self) -> None:
        """Let the evaluation that follows be the one that others replay."""
        self.stopped, self._replayed = [], None

    def replay(self) -> None:
        """Let the evaluation that follows see the recorded tensors."""
        self._replayed = None if self.stopped is None else iter(self.stopped)

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
        elif func not in _OF_THE_PARAMETER:
            args = tuple(self._substituted(argument) for argument in args)
            kwargs = {name: self._substituted(argument) for name, argument in (kwargs or {}).items()}
        if torch.is_autocast_enabled(self._device):
            self.precision = max(self.precision, torch.finfo(torch.get_autocast_dtype(self._device)).eps)
        result = func(*args, **(kwargs or {}))
        return self._stop(result) if func in _STOPS else result

    def _enable_gradients(self, enabled: bool) -> None:
        if enabled:
            self._in_use = self._seen
        elif torch.is_grad_enabled():  # else within a Function's own forward, whose backward knows of derivatives
            self._in_use = self._frozen
        forward_ad._set_fwd_grad_enabled(self._in_use is self._seen)

    def _substituted(self, argument: Any) -> Any:  # noqa: ANN401
        in_use = self._frozen if torch.is_inference_mode_enabled() else self._in_use
        if isinstance(argument, Tensor):
            return in_use.get(id(argument), argument)
        if isinstance(argument, list | tuple) and any(isinstance(part, Tensor) for part in argument):
            return type(argument)(in_use.get(id(part), part) for part in argument)
        return argument

    def _stop(self, result: Tensor) -> Tensor:
        self.stops = True
        if self._replayed is not None:
            replayed = next(self._replayed, None)
            if replayed is None or replayed.shape != result.shape:
                raise RuntimeError("`probe` must compute the same at every call, but it called detach() otherwise.")
            return replayed
        if self.stopped is not None:
            self.stopped.append(result.clone())
        return result


@cache
def _load_forward_mode() -> None:
    """Let torch load the formulas of forward mode, once, and keep to itself that it uses a deprecated module there."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _evaluating(device: torch.device) -> Iterator[None]:
    """Differentiable as for a user's own forward, but no weight that autocast has cached is the one to be seen."""
    torch.clear_autocast_cache()
    eager = getattr(torch.compiler, "set_stance", None)
    try:
        with torch.enable_grad(), eager("force_eager") if eager else nullcontext():
            yield
    finally:
        torch.clear_autocast_cache()


def _reaches(terms: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Return whether a term has a graph that leads to one of the parameters themselves, not to what stands for it."""
    sought = {id(parameter) for parameter in parameters}
    nodes = [term.grad_fn for term in terms if term.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if id(getattr(node, "variable", None)) in sought:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False


def _no_forward_mode() -> None:
    raise NotImplementedError("A TorchScript module does not let its parameters be seen as others.")


def _total(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the sum of 0-dimensional tensors, None for 0, in the dtype of a Gramian."""
    total = torch.zeros((), dtype=accumulation_dtype(device), device=device)
    for part in parts:
        if part is not None:
            total = total + part.detach().reshape(()).to(total)
    return total


def _reach(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """Return how far the direction leads until a parameter, by its largest element, is another one; 0 if nowhere.

    The largest elements, for they do not underflow. Vectors, such as biases that begin at zero, count as no
    smaller than the smallest matrix.
    """
    device = parameters[0].device
    of_theta, of_g = (
        torch.stack([n.to(device, accumulation_dtype(device)) for n in torch._foreach_norm(part, torch.inf)])
        for part in ([p.detach() for p in parameters], list(direction))
    )
    matrices = torch.stack([of_theta.new_full((), float(p.ndim > 1)) for p in parameters]) > 0
    floor = torch.where(matrices & (of_theta > 0), of_theta, torch.inf).min()
    floor = torch.where(floor.isinf(), 0.0, floor)
    sizes = torch.where(matrices, of_theta, of_theta.maximum(floor))
    shortest = torch.where((sizes > 0) & (of_g > 0), sizes / of_g, torch.inf).min()
    alone = torch.where(of_g.max() > 0, 1 / of_g.max(), 0.0)  # all weights are zero: a step of length 1
    return torch.where(shortest.isinf(), alone, shortest)


def _shift(shifted: Sequence[Tensor], home: Sequence[Tensor], direction: Sequence[Tensor], step: Tensor) -> None:
    """Write home + step * direction into ``shifted``."""
    for to, start, g in zip(shifted, home, direction, strict=True):
        wide = torch.promote_types(start.dtype, torch.float32)
        scale = step.to(start.device, wide)
        if wide == start.dtype:
            torch.addcmul(start, g, scale, out=to)
        else:
            to.copy_(torch.addcmul(start.to(wide), g.to(wide), scale))
