"""How auxiliary losses change as the parameters move along a direction, seen without their backward.

For parameters theta, a direction g and a loss L_k, D_k = d/dt L_k(theta + t g) at t = 0 is <grad L_k, g>. A gradient
does not pass through ``detach()`` and ``torch.no_grad()``, and neither does D_k here: what a distillation loss takes
from its teacher stays as it is at theta, or D_k would be another number than <grad L_k, g>.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradalign.collectors.graphs import edges
from gradalign.collectors.losses import Terms
from gradalign.collectors.substitution import Substitution
from gradalign.collectors.undisturbed import RandomState, spared_buffers
from gradalign.gramian import accumulation_dtype

Evaluate = Callable[[], dict[str, Terms]]
"""Evaluates losses: a group's name to its scalar losses."""

# Error of a central difference, relative: step^2 of the curvature, precision / step of the rounding. They meet at the
# cube root of the precision. This share of the reach was the best on transformers, convolutions and perceptrons, fresh
# and trained, in float32 and bfloat16: a median error of 3e-5 and 8e-3 of the norms, at most 7e-4 and 4e-2.
_ROOT = 1 / 3
_SHARE = 0.15

# A parameter counts as no smaller than this share of the upper quartile (3 of 4) of the matrices.
_MOST, _LEAST = 3, 0.3


class DirectionalDerivatives:
    """Compute D_k by forward-mode differentiation where every operator supports it, else by central differences.

    Forward mode is exact and evaluates the losses once. Central differences, (L(theta + e g) - L(theta - e g)) / 2e,
    evaluate them twice, and once more at theta where a loss stops gradients: what passes through ``detach()`` is
    then replayed from there, and what runs under ``no_grad()`` sees the parameters as they are.

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
                except torch.cuda.OutOfMemoryError:
                    raise
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
        newest = _sequence_number()
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            duals = [forward_ad.make_dual(p.detach(), g) for p, g in zip(parameters, direction, strict=True)]
            with _evaluating(device), Substitution(parameters, duals, duals), spared_buffers(scripts=_no_forward_mode):
                losses = evaluate()
            if _reaches([term for terms in losses.values() for term in terms], parameters, newest):
                raise NotImplementedError("A custom function or compiled code has seen parameters without a tangent.")
            tangents = {
                name: [forward_ad.unpack_dual(term).tangent for term in terms] for name, terms in losses.items()
            }
        for name, terms in losses.items():
            if not any(term.requires_grad for term in terms) and all(tangent is None for tangent in tangents[name]):
                raise ValueError(
                    f"`probe()[{name!r}]` must change with the parameters, got a loss that does not; compute it from"
                    " the model within the probe, without detach() or no_grad() around all of it."
                )
        return {name: _total(parts, device) for name, parts in tangents.items()}

    def _differences(
        self, evaluate: Evaluate, parameters: Sequence[Tensor], direction: Sequence[Tensor], random: RandomState
    ) -> dict[str, Tensor]:
        device = parameters[0].device
        shifted = [p.detach() for p in parameters]
        if [p.shape for p in self._home] != [p.shape for p in shifted]:
            self._home = [torch.empty_like(p) for p in shifted]
        torch._foreach_copy_(self._home, shifted)
        mode = Substitution(parameters, shifted, self._home)

        def losses_here() -> dict[str, Tensor]:
            random.restore()
            with _evaluating(device), mode, spared_buffers():
                losses = evaluate()
            return {name: _total([term.detach() for term in terms], device) for name, terms in losses.items()}

        if self._stops:
            mode.record()
            losses_here()
            self._stops, self._precision = mode.stops, mode.precision
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
        stance = eager("force_eager") if eager else nullcontext()
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), stance:
            yield
    finally:
        torch.clear_autocast_cache()


@torch.enable_grad()
def _sequence_number() -> int:
    """Return a number that is above those of all nodes in graphs made so far, and not above those that follow."""
    return int(torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr())  # type: ignore[union-attr]


def _reaches(terms: Sequence[Tensor], parameters: Sequence[Tensor], newest: int) -> bool:
    """Return whether a term has a graph that leads to one of the parameters themselves, not to what stands for it.

    Raises:
        ValueError: It leads there through what was computed before, by nodes older than ``newest``.
    """
    sought = {id(parameter) for parameter in parameters}
    leading = [node for node, following in edges(terms) if id(getattr(following, "variable", None)) in sought]
    if any(node._sequence_nr() < newest for node in leading):
        raise ValueError(
            "`probe` must compute its losses within its call, from the parameters, got one that uses what was computed"
            " before; let the model's forward run in the probe too."
        )
    return bool(leading)


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

    The largest elements, for they do not underflow. What begins at zero, as biases, new heads and half of a low-rank
    pair do, is no measure: parameters count as no smaller than a share of what most matrices have.
    """
    device, dtype = parameters[0].device, accumulation_dtype(parameters[0].device)
    of_theta, of_g = (
        [n.to(device, dtype) for n in torch._foreach_norm(part, torch.inf)]
        for part in ([p.detach() for p in parameters], list(direction))
    )
    matrices = [n for n, p in zip(of_theta, parameters, strict=True) if p.ndim > 1] or of_theta
    typical = torch.stack(matrices).sort().values[_MOST * (len(matrices) - 1) // 4]
    sizes, lengths = torch.stack(of_theta).maximum(_LEAST * typical), torch.stack(of_g)
    shortest = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, torch.inf).min()
    alone = torch.where(lengths.max() > 0, 1 / lengths.max(), 0.0)  # all weights are zero: a step of length 1
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
