"""What --tensorboard writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gradalign import AlignmentReport
    from gradalign.multiexit.training import Watch


def require_tensorboard() -> None:
    """Raise MissingExtraError where tensorboard is not installed."""
    import gradalign.integrations.tensorboard  # noqa: F401


@contextmanager
def tensorboard(folder: Path) -> Iterator[Watch]:
    """Yield what writes a run's losses, learning rate, scores and alignment into a folder for TensorBoard.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    from gradalign.integrations.tensorboard import SummaryWriter, log_report

    with SummaryWriter(str(folder)) as writer:

        def watch(record: dict[str, Any], report: AlignmentReport | None) -> None:
            step = record["step"]
            if report is None:
                for name, values in record.items():
                    if isinstance(values, Tensor):
                        writer.add_scalar(f"{name}/mean", fmean(values.tolist()), step)
                        writer.add_scalar(f"{name}/last", float(values[-1]), step)
                return
            for name, loss in record["losses"].items():
                writer.add_scalar(f"loss/{name}", loss, step)
            writer.add_scalar("learning_rate", record["learning_rate"], step)
            log_report(writer, report, step)

        yield watch
