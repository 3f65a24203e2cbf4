"""Multi-exit networks: models, losses, training methods, exit policies and early exiting.

What is named here needs torch alone, but for ``MultiExitEncoder``, which needs the extra "text". Data, training,
figures and the command line need the extra "multiexit", on text "text".
"""

from typing import TYPE_CHECKING, Any

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


def __dir__() -> list[str]:
    """Name what is imported only when it is asked for, too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401 (what a module holds)
    """Import what needs transformers when it is asked for."""
    if name in ("MultiExitConfig", "MultiExitEncoder"):
        from gradalign.multiexit.text import config, encoder  # noqa: PLC0415

        return {"MultiExitConfig": config.MultiExitConfig, "MultiExitEncoder": encoder.MultiExitEncoder}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
