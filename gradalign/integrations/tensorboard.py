"""Reports in TensorBoard: curves of their numbers, and histograms of the angles."""

from __future__ import annotations

from torch import Tensor

from gradalign import AlignmentReport
from gradalign.errors import missing_extra
from gradalign.integrations.scalars import on_cpu, scalars

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise missing_extra("tensorboard", "tensorboard") from error

__all__ = ["SummaryWriter", "log_report"]

_FIVE_DEGREES = list(range(0, 181, 5))


def log_report(writer: SummaryWriter, report: AlignmentReport, step: int, prefix: str = "align") -> None:
    """Write a report's numbers as scalars and its angles as a histogram.

    Scalars are ``conflicts``, the number of pairs that conflict; ``reversals``, of weights below zero; ``skipped``;
    ``norm/a``, ``cosine/a/b`` and ``weight/a`` by the groups' names. ``angles`` is the histogram, in steps of five
    degrees, of all pairs' angles. With blocks, norms and cosines are of the whole gradients, weights are means over the
    blocks, ``angles`` has every block's, and under ``blocks/`` each of norms, weights and angles has a histogram over
    the blocks. What the collector did not see, or is not finite, is left out.

    Reading a report waits for its device, so write it as often as you need it.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar`` and ``add_histogram``.
        report: ``optimizer.report``, after ``backward``.
        step: The number of the step.
        prefix: What the tags begin with.

    Raises:
        TypeError: ``writer`` or ``report`` is something else.
    """
    _check(writer, report)
    seen = on_cpu(report)
    for name, number in scalars(seen).items():
        writer.add_scalar(f"{prefix}/{name}", number, step)
    K = len(seen.names)
    angles = seen.angles.reshape(-1, K, K)
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    if pairs:
        rows, columns = zip(*pairs, strict=True)
        _add_angles(writer, f"{prefix}/angles", angles[:, rows, columns], step)
    if seen.gramian.ndim == 2:
        return
    for i, j in pairs:
        _add_angles(writer, f"{prefix}/blocks/angle/{seen.names[i]}/{seen.names[j]}", angles[:, i, j], step)
    for k, name in enumerate(seen.names):
        _add(writer, f"{prefix}/blocks/norm/{name}", seen.norms[:, k], step)
        if seen.weights is not None:
            _add(writer, f"{prefix}/blocks/weight/{name}", seen.weights[:, k], step)


_METHODS = ("add_scalar", "add_histogram")


def _check(writer: object, report: object) -> None:
    if isinstance(writer, type) or not all(callable(getattr(writer, name, None)) for name in _METHODS):
        raise TypeError(
            f"`writer` must be a torch.utils.tensorboard.SummaryWriter, got {type(writer).__name__};"
            " write log_report(SummaryWriter(), optimizer.report, step), or logger.experiment for Lightning's logger."
        )
    if not isinstance(report, AlignmentReport):
        raise TypeError(
            f"`report` must be an AlignmentReport, got {type(report).__name__}; write it after a backward, from which"
            " the aligner has its first one."
        )


def _add_angles(writer: SummaryWriter, tag: str, values: Tensor, step: int) -> None:
    finite = values[values.isfinite()]
    if finite.numel():
        writer.add_histogram(tag, finite, step, bins=_FIVE_DEGREES)


def _add(writer: SummaryWriter, tag: str, values: Tensor, step: int) -> None:
    finite = values[values.isfinite()]
    if finite.numel():
        writer.add_histogram(tag, finite, step)
