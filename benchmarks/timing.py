"""Times of several calls in turn, round after round, and their ratios within a round.

The speed of a machine drifts; what was measured one after the other in the same round drifts together. So each call's
time is divided by the reference's in the same round, and the median of these ratios is what holds.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Figures = dict[str, object]
"""A call's figures: "seconds", "rounds" and its ratios, or "failed"."""

_LONGEST_MESSAGE = 160
_FOLDERS = re.compile(r"(/[\w.+-]+)+/")
_FEWEST_ROUNDS = 3


def failure(error: Exception) -> str:
    """Return an error as one short line, files without the folders they lie in."""
    lines = str(error).strip().splitlines() or [""]
    message = _FOLDERS.sub("", f"{type(error).__name__}: {lines[0]}")
    return message if len(message) <= _LONGEST_MESSAGE else message[: _LONGEST_MESSAGE - 3] + "..."


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the time of one call; one that takes several ``steps`` counts for one of them."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) / getattr(call, "steps", 1)


def measure(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    references: Sequence[str] = (),
    clean_up: Callable[[], None] = lambda: None,
    budget: float = 60.0,
) -> dict[str, Figures]:
    """Return each call's figures, timed in turn.

    Args:
        calls: A name to what is timed. One with an attribute ``steps`` takes so many steps in a call.
        rounds: How many at most.
        device: Waited for before the clock is read.
        references: Names of calls that the others' times are divided by, round by round.
        clean_up: Called after a call that failed.
        budget: Seconds. A call that is no reference and has taken more sits out the rounds after its third.

    Returns:
        For each name "seconds", the median of "rounds", and "of NAME" for each reference, the median ratio; or "failed"
        with the error: that call is left out from then on.
    """
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str) -> float | None:
        try:
            return seconds(calls[name], device)
        except Exception as error:  # noqa: BLE001, a peer may fail with anything, and the table says so
            failed[name] = failure(error)
        clean_up()
        return None

    for name in calls:
        attempt(name)  # buffers are made, caches filled
    for number in range(rounds):
        # There and back: a speed that drifts within a round favours none.
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            slow = name not in references and sum(times[name]) > budget and number >= _FEWEST_ROUNDS
            if name not in failed and not slow and (taken := attempt(name)) is not None:
                times[name].append(taken)
    usable = {name: taken for name, taken in times.items() if name not in failed}
    measured = {name: figures(name, usable, references) for name in usable}
    return {name: {"failed": failed[name]} if name in failed else measured[name] for name in calls}


def figures(name: str, times: Mapping[str, Sequence[float]], references: Sequence[str]) -> Figures:
    """Return the medians of one call's times and of its ratios to the references.

    Args:
        name: The call.
        times: A name to its seconds, one a round.
        references: Names; one that has no times is left out.
    """
    # A slow call took part in the first rounds alone.
    ratios = {
        f"of {reference}": statistics.median(a / b for a, b in zip(times[name], times[reference], strict=False))
        for reference in references
        if reference in times
    }
    return {"seconds": statistics.median(times[name]), **ratios, "rounds": list(times[name])}
