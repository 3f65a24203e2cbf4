"""Kinds of rules: with an anchor, with a preference, random ones, and those that remember.

``Anchored``, ``Random`` and ``Stateful`` go with ``Rule`` and with ``RowRule``; the classes ending in Rule are the
first combination.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradalign.errors import check_seed, finite_numbers, unknown_name
from gradalign.rules.base import BaseRule, Rule, listed

Memory = dict[str, Tensor]


def fixed(weights: Sequence[float], G: Tensor) -> Tensor:
    """Return the weights (K,) once for each block of G (..., K, K), filled on the device: no copy from the host."""
    if len(set(weights)) == 1:
        return G.new_full(G.shape[:-1], weights[0])
    return torch.stack([G.new_full(G.shape[:-2], weight) for weight in weights], -1)


@dataclass(frozen=True, eq=False)
class Anchored(BaseRule):
    """A main loss group, the anchor, that the others, the auxiliaries, must not pull away.

    Args:
        anchor: The anchor's index, or its name among the loss groups.
    """

    anchor: int | str = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group("anchor", self.anchor)

    def anchor_index(self, num_groups: int, names: Sequence[str] | None) -> int:
        """Return the anchor's index in [0, K).

        Raises:
            ValueError: No such group, or the anchor is a name and ``names`` is None.
        """
        return group_index("anchor", self.anchor, num_groups, names)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless there are enough groups and the anchor is one of them."""
        super().check_groups(num_groups, names)
        self.anchor_index(num_groups, names)


@dataclass(frozen=True, eq=False)
class AnchoredRule(Anchored, Rule):
    """A rule with a main loss group, the anchor, that the others, the auxiliaries, must not pull away.

    Args:
        anchor: The anchor's index, or its name among the loss groups.
    """


def check_group(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a group's index or name."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"`{argument}` must be a group's index or name, got {value!r}.")


def group_index(argument: str, value: int | str, num_groups: int, names: Sequence[str] | None) -> int:
    """Return the index in [0, K) of a group given by index or name, or raise ValueError where there is none."""
    if isinstance(value, str):
        if names is None:
            raise ValueError(
                f"`names` must name the groups when the {argument} is a name, got None for {argument}={value!r};"
                f" pass names=(...) beside the Gramian, or the {argument}'s index."
            )
        if value not in names:
            raise unknown_name(argument, value, names)
        return list(names).index(value)
    if not -num_groups <= value < num_groups:
        raise ValueError(f"`{argument}` must be an index below the number of loss groups, {num_groups}, got {value}.")
    return value % num_groups


def check_preference(value: object) -> tuple[float, ...]:
    """Return the numbers, or raise unless they are finite, >= 0, and one of them is above 0."""
    numbers = finite_numbers("preference", value, 0.0)
    if not any(numbers):
        raise ValueError(f"`preference` must hold a number above 0, got {numbers}; the step would be zero.")
    return numbers


@dataclass(frozen=True, eq=False)
class PreferenceRule(Rule):
    """A rule that corrects a weighted sum of the gradients, the preference.

    Args:
        preference: (K,) finite numbers >= 0, dimensionless, in the order of the loss groups; 1/K each where None.
    """

    preference: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preference is not None:
            object.__setattr__(self, "preference", check_preference(self.preference))

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the preference."""
        return super().plain_weights(names) if self.preference is None else tuple(self.preference)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless there is one number of the preference for each group."""
        super().check_groups(num_groups, names)
        if self.preference is not None and len(self.preference) != num_groups:
            raise ValueError(
                f"`preference` must hold one number for each of the {num_groups} loss groups{listed(names)},"
                f" got {len(self.preference)}."
            )

    def _preferred(self, G: Tensor) -> Tensor:
        """Return the preference once for each block, (..., K)."""
        K = G.shape[-1]
        return fixed((1 / K,) * K if self.preference is None else self.preference, G)


@dataclass(frozen=True, eq=False)
class Random(BaseRule):
    """Random numbers from a generator of the rule's own, so that ranks with one seed draw alike.

    Args:
        seed: Seed of the generator.
    """

    seed: int = field(default=0, kw_only=True)
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(check_seed(self.seed)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the generator's: ``{"generator": uint8 tensor}``."""
        return super().state_dict() | {"generator": self._generator.get_state()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        try:
            torch.Generator().set_state(state["generator"].cpu())  # wherever map_location has put it
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"`state` must hold a generator's state as torch saves it: {error}") from error

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self._generator.set_state(state["generator"].cpu())

    def _orders(self, G: Tensor) -> Tensor:
        """Return (..., K, K - 1): for each block and group i, the other groups in random order."""
        keys = torch.rand(G.shape, generator=self._generator, dtype=torch.float64)
        keys.diagonal(dim1=-2, dim2=-1).fill_(2.0)  # above every draw: i itself sorts last, and is cut off
        return keys.argsort(-1)[..., :-1].to(G.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class RandomRule(Random, Rule):
    """A rule that draws random numbers, from a generator of its own, so that ranks with one seed draw alike.

    Args:
        seed: Seed of the generator.
    """


@dataclass(frozen=True, eq=False)
class Stateful(BaseRule):
    """A memory of earlier calls, group by group.

    It is made at the first call, for that call's K, names and shapes, and keeps to them. It holds tensors by name
    (``remembers``), in slots of their own where a rule is called block by block.
    """

    _slots: dict[int, Memory] = field(init=False, repr=False, default_factory=dict)
    _groups: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    stateful: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]]

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the groups are those that the rule remembers."""
        super().check_groups(num_groups, names)
        if self._groups:
            self._keep_groups("The loss groups", num_groups, names, "pass the same groups, or make a new rule.")

    def _keep_groups(self, what: str, num_groups: int, names: Sequence[str] | None, mend: str) -> None:
        known, known_names = self._groups["num_groups"], self._groups["names"]
        named = names is not None and known_names is not None
        if num_groups != known or (named and list(names or ()) != known_names):
            old = f"{known} groups{listed(known_names)}"
            new = f"{num_groups}{listed(names)}"
            raise ValueError(f"{what} must be those that {type(self).__name__} remembers, {old}, got {new}; {mend}")

    def _recall(self, slot: int, like: Tensor, begin: Callable[[], Memory]) -> Memory:
        """Return the memory of a slot, floating tensors in the dtype of ``like``, all on its device."""
        if slot not in self._slots:
            return begin()
        return {
            key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
            for key, value in self._slots[slot].items()
        }

    def _remember(self, slot: int, memory: Memory, num_groups: int, names: Sequence[str] | None) -> None:
        known = self._groups.get("names")
        self._slots[slot] = {key: value.detach() for key, value in memory.items()}
        self._groups.update(num_groups=num_groups, names=known if names is None else list(names))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the memory by slots and its groups' number and names, None before the first call."""
        return super().state_dict() | {
            "memory": {slot: dict(memory) for slot, memory in self._slots.items()},
            "num_groups": self._groups.get("num_groups"),
            "names": self._groups.get("names"),
        }

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        slots, num_groups, names = state["memory"], state["num_groups"], state["names"]
        fits = isinstance(slots, Mapping) and all(
            isinstance(memory, Mapping)
            and sorted(memory) == sorted(self.remembers)
            and all(isinstance(value, Tensor) for value in memory.values())
            for memory in slots.values()
        )
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        counted = isinstance(num_groups, int) and (names is None or (named and len(names) == num_groups))
        if not fits or not (counted if slots else num_groups is None):
            raise ValueError(
                f"`state` must hold the memory of {type(self).__name__}, tensors {sorted(self.remembers)} for each"
                " block, and the groups they belong to; load the state into the rule that saved it."
            )
        if self._groups and num_groups is not None:
            self._keep_groups("The groups of `state`", num_groups, names, "load it into a new rule.")

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self._slots.clear()
        self._slots.update({slot: dict(memory) for slot, memory in state["memory"].items()})
        self._groups.clear()
        if state["num_groups"] is not None:
            self._groups.update(num_groups=state["num_groups"], names=state["names"])


@dataclass(frozen=True, eq=False)
class StatefulRule(Stateful, Rule):
    """A rule that remembers: it writes ``_begin``, the first memory, and ``_step``, from memory to memory.

    Both are pure. A block of G that is not finite leaves its memory as it was.
    """

    @abstractmethod
    def _begin(self, G: Tensor) -> Memory:
        """Return the memory before the first call, tensors with the leading dimensions of G."""

    @abstractmethod
    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        """Return the weights (..., K) and the next memory."""

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        blocks, first = G.shape[:-2], self._begin(G)
        memory = self._recall(0, G, lambda: first)
        for key, value in memory.items():
            if value.shape != first[key].shape:
                raise ValueError(
                    f"`gramian` must keep the blocks that {type(self).__name__} remembers, got {tuple(blocks)}, for"
                    f" which {key!r} has the shape {tuple(first[key].shape)}, not {tuple(value.shape)} as remembered;"
                    " make a new rule for other blocks or batches."
                )
        weights, following = self._step(G, memory, names)
        healthy = G.isfinite().all(-1).all(-1)
        kept = {
            key: torch.where(healthy.reshape(blocks + (1,) * (value.ndim - len(blocks))), value, memory[key])
            for key, value in following.items()
        }
        self._remember(0, kept, G.shape[-1], names)
        return weights
