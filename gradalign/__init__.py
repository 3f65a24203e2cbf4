"""gradalign: gradient surgery in two lines around any torch optimizer."""

from importlib.metadata import version

from gradalign import rules
from gradalign.aligner import GradientAligner
from gradalign.errors import GradAlignError, MissingExtraError, NonFiniteError
from gradalign.report import AlignmentReport

__all__ = [
    "AlignmentReport",
    "GradAlignError",
    "GradientAligner",
    "MissingExtraError",
    "NonFiniteError",
    "__version__",
    "rules",
]

__version__ = version("gradalign")
