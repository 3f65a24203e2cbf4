"""Multi-exit networks: models, losses, training methods, exit policies and early exiting.

Everything named here needs torch alone, but for ``MultiExitConfig`` and ``MultiExitEncoder``, which are imported when
first asked for and need the extra "text". Data, training, figures and the command line need the extra "multiexit".
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gradalign.multiexit import methods, metrics, objectives, policies
from gradalign.multiexit.inference import Decision, MultiExitModel, Policy, early_exit
from gradalign.multiexit.resnet import MultiExitResNet

if TYPE_CHECKING:
    from gradalign.multiexit.text.config import MultiExitConfig
    from gradalign.multiexit.text.encoder import MultiExitEncoder

__all__ = [
    "Decision",
    "MultiExitConfig",
    "MultiExitEncoder",
    "MultiExitModel",
    "MultiExitResNet",
    "Policy",
    "early_exit",
    "methods",
    "metrics",
    "objectives",
    "policies",
]

_LATER = {"MultiExitConfig": "gradalign.multiexit.text.config", "MultiExitEncoder": "gradalign.multiexit.text.encoder"}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
