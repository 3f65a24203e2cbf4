"""What goes wrong, said once: exceptions for numerics at run time and the wording of misuse."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

_SEEDS = 2**63


class GradAlignError(RuntimeError):
    """Base of the errors that numerics, or another rank, cause at run time; misuse is a ValueError or TypeError."""


class NonFiniteError(GradAlignError):
    """Raised when a loss group's gradient, or the weights made from it, hold NaN or infinity.

    Attributes:
        groups: Names of the loss groups concerned, in the order of the losses.
    """

    def __init__(self, message: str, groups: tuple[str, ...]) -> None:
        super().__init__(message)
        self.groups = groups


def not_finite(groups: Sequence[str]) -> NonFiniteError:
    """Return the error for loss groups with a gradient that is not finite."""
    return NonFiniteError(
        f"The gradient of loss group {' and '.join(map(repr, groups))} must be finite, got NaN or infinity; look at"
        ' that loss, pass the `scaler` of float16 training, or nonfinite="skip" to leave such steps out.',
        tuple(groups),
    )


class MissingExtraError(ImportError):
    """Raised when a feature needs a package that an extra of gradalign brings."""


def unknown_name(argument: str, value: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name outside ``known``, with the nearest names offered.

    >>> unknown_name("rule", "pc-grad", ["ga-soft", "pcgrad"])
    ValueError("`rule` must be one of 'ga-soft', 'pcgrad', got 'pc-grad'; did you mean 'pcgrad'?")
    """
    names = list(known)
    near = difflib.get_close_matches(str(value).lower(), names, n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ValueError(f"`{argument}` must be one of {', '.join(map(repr, names))}, got {value!r}{hint}")


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Return the error for a package that is not installed and the extra that brings it."""
    return MissingExtraError(
        f'This needs the package `{package}`, which is not installed; pip install "gradalign[{extra}]" brings it.'
    )


def check_seed(value: object) -> int:
    """Return ``value``, or raise unless it is a seed that every generator takes: an integer in [0, 2**63)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`seed` must be an integer, got {value!r}.")
    if not 0 <= value < _SEEDS:
        raise ValueError(f"`seed` must be in [0, 2**63), got {value}; take a small one, say 0.")
    return value


def flag(argument: str, value: object) -> bool:
    """Return ``value``, or raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False, got {value!r}.")
    return value


def finite_number(argument: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a float, or raise unless it is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{argument}` must be a number, got {value!r} ({type(value).__name__}).")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"in [{low:g}, {high:g}]"
        if math.isinf(high):
            bounds = "finite" if math.isinf(low) else f"finite and at least {low:g}"
        raise ValueError(f"`{argument}` must be {bounds}, got {value!r}.")
    return float(value)


def finite_numbers(argument: str, value: object, low: float = -math.inf) -> tuple[float, ...]:
    """Return ``value``, which may be a tensor, as a tuple of floats, or raise unless it holds finite numbers >= low."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise TypeError(f"`{argument}` must be a sequence of numbers, got {value!r}; write [0.7, 0.3].")
    numbers = tuple(finite_number(f"{argument}[{k}]", number, low) for k, number in enumerate(listed))
    if not numbers:
        raise ValueError(f"`{argument}` must hold one number for each loss group, got none.")
    return numbers


def positive_integer(argument: str, value: object, low: int = 1) -> int:
    """Return ``value``, or raise unless it is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{argument}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{argument}` must be at least {low}, got {value}.")
    return value
