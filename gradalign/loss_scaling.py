"""Loss scaling: what a ``torch.amp.GradScaler`` multiplies every loss by, so that gradients fit into float16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_scaler(scaler: object) -> None:
    """Raise TypeError unless this is None or does what a ``torch.amp.GradScaler`` does."""
    if scaler is None:
        return
    if isinstance(scaler, type) or not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "scale")):
        got = f"the class {scaler.__name__}" if isinstance(scaler, type) else type(scaler).__name__
        raise TypeError(
            f"`scaler` must be a torch.amp.GradScaler or None, got {got};"
            " write backward(losses, scaler=scaler), then scaler.step(optimizer) and scaler.update()."
        )


def scale_of(scaler: torch.amp.GradScaler | None, groups: Mapping[str, tuple[Tensor, ...]]) -> Tensor | None:
    """Return the scale, 0-dimensional, on the device of the first loss; None where nothing is scaled."""
    if scaler is None or not scaler.is_enabled():
        return None
    (first, *_), *_ = groups.values()
    return scaler.scale(torch.ones((), device=first.device)).detach()
