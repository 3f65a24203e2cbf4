"""Temperatures that calibrate each exit, and confidence policies that look through them.

Shapes: M exits, N rows, C classes; stacked logits are (M, N, C), temperatures (M,). Exits are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradalign.errors import finite_numbers
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.objectives import check_labels, check_logits
from gradalign.multiexit.policies.confidence import ConfidencePolicy

_LOWEST, _HIGHEST = 0.01, 100.0
_ITERATIONS = 200  # each halves a step or the bracket: far more than float64 can use
_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Calibrated(Policy):
    """Let a confidence policy look at each exit's logits divided by that exit's temperature.

    Args:
        policy: ``Entropy``, ``MaxProbability``, ``PatientConfidence`` or another ``ConfidencePolicy``. ``Budget`` and
            ``Patience`` are refused: a temperature changes neither a label nor what they do.
        temperatures: (M,), positive, dimensionless, those of ``calibrate_temperatures``.

    Raises:
        TypeError: ``policy`` is no ``ConfidencePolicy``, or ``temperatures`` are no numbers.
        ValueError: A temperature is not positive and finite or, when called, there are not M of them.

    Note:
        Answers are the exits' own logits, not divided: so labels are exactly what they are without temperatures.

    References:
        Schwartz et al., The Right Tool for the Job: Matching Model and Instance Complexities, ACL 2020,
        arXiv:2004.07453; Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.

    >>> from gradalign.multiexit.policies import MaxProbability
    >>> logits = torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]])  # max p = 0.95, at T = 3 0.73
    >>> MaxProbability(0.9)(logits), Calibrated(MaxProbability(0.9), [3.0, 1.0])(logits)
    (tensor([1]), tensor([2]))
    """

    policy: ConfidencePolicy
    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.policy, ConfidencePolicy):
            raise TypeError(
                "`policy` must be a policy of confidence, Entropy, MaxProbability or PatientConfidence, got"
                f" {self.policy!r}; others do not change with a temperature: use them as they are."
            )
        listed = self.temperatures.tolist() if isinstance(self.temperatures, Tensor) else self.temperatures
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise TypeError(f"`temperatures` must be one number for each exit, got {listed!r}; write [1.5, 1.0].")
        temperatures = finite_numbers("temperatures", listed, 0.0)
        if 0.0 in temperatures:
            raise ValueError(f"`temperatures` must be positive, got 0 for exit {temperatures.index(0.0) + 1}.")
        object.__setattr__(self, "temperatures", temperatures)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError unless there is a temperature for each exit and the policy makes sense."""
        if len(self.temperatures) != num_exits:
            raise ValueError(
                f"`temperatures` must be {num_exits}, one for each exit of this network, got"
                f" {len(self.temperatures)}; calibrate_temperatures(logits, labels) makes them."
            )
        self.policy.check(num_exits, num_classes)

    def looks(self, exit: int) -> bool:
        """Look where the policy looks."""
        return self.policy.looks(exit)

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let the policy judge by the scores of the scaled logits."""
        scores = self.policy.score(logits.double() / self.temperatures[exit - 1])
        return self.policy.judge(scores, logits, state)

    def settings(self, logits: Tensor) -> tuple[str, Sequence[ConfidencePolicy]]:
        """Try every setting of the policy that makes a difference on the scaled logits."""
        self.check(logits.shape[0], logits.shape[-1])
        temperatures = torch.tensor(self.temperatures, dtype=torch.float64, device=logits.device)
        field, values = self.policy.settings(logits.double() / temperatures[:, None, None])
        return "policy", [replace(self.policy, **{field: value}) for value in values]


def calibrate_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each exit the temperature that makes its probabilities fit held-out labels best.

    T_m minimises the mean over the rows of -ln softmax(z_m / T)_y. That is convex in b = 1/T, with the derivative
    mean(sum_c p_c z_c - z_y) and the second derivative mean(var_p(z)); the root of the first is found by Newton steps
    within a bracket, in float64.

    Args:
        logits: (M, N, C), floating, finite, N >= 1, C >= 2: every exit's logits of rows not trained on.
        labels: (N,), integer, in [0, C).

    Returns:
        (M,), float64, dimensionless, in [0.01, 100]. Where the best lies beyond, a bound is returned, 0.01
        for an exit that is right by a margin on every row, 100 for one that is no better than chance, or whose logits
        do not differ.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` no integer one.
        ValueError: ``logits`` is not (M, N, C), is empty, has one class or is not finite, or ``labels`` does not fit.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599, section 4.2.

    >>> logits = torch.tensor([[[2.0, 0.0]] * 4])  # right three times in four: 2 / T = ln 3
    >>> calibrate_temperatures(logits, torch.tensor([0, 0, 0, 1]))
    tensor([1.8205], dtype=torch.float64)
    """
    M, N, C = check_logits(logits)
    check_labels(labels, N, C)
    if N == 0 or C == 1 or not logits.isfinite().all():
        raise ValueError(
            "`logits` must hold a row, two classes and finite numbers to calibrate temperatures, got shape"
            f" {tuple(logits.shape)}."
        )
    z = logits.detach().double()
    z = z - z.gather(-1, labels.long().expand(M, N)[..., None])  # z_c - z_y: the same p, and no large numbers cancel

    def derivatives(b: Tensor) -> tuple[Tensor, Tensor]:
        p = (b[:, None, None] * z).softmax(-1)
        mean = (p * z).sum(-1, keepdim=True)
        return mean.mean((1, 2)), (p * (z - mean).square()).sum(-1).mean(-1)

    low, high = z.new_full((M,), 1 / _HIGHEST), z.new_full((M,), 1 / _LOWEST)
    # Where p underflows, all slopes are 0 though the logits differ: that exit is right, by a wide margin.
    flat = (derivatives(low)[0] > 0) | (z == 0).all(-1).all(-1)
    sharp = (derivatives(high)[0] <= 0) & ~flat
    b, step = torch.ones_like(low), torch.full_like(low, torch.inf)
    for _ in range(_ITERATIONS):
        slope, curvature = derivatives(b)
        low, high = b.where(slope < 0, low), b.where(slope > 0, high)
        newton = b - slope / curvature
        # A step that leaves the bracket, or is not half of the last, makes no good progress: halve the bracket of ln b.
        good = (newton >= low) & (newton <= high) & ((newton - b).abs() <= step / 2)
        after = newton.where(good, (low * high).sqrt()).where(slope != 0, b)
        step, b = (after - b).abs(), after
        if (flat | sharp | (step <= _TOLERANCE * b)).all():
            break
    return (1 / b).masked_fill(sharp, _LOWEST).masked_fill(flat, _HIGHEST)
