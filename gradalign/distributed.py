"""Averages over ranks that hold the same parameters, each with its own part of the batch.

Shapes: N ranks, T parameters. A row is one group's gradients, (T,), None where it reaches none. A *share* is what one
rank keeps of a row that is split among them: of each gradient, as it lies in memory, cut into N pieces of equal length
and filled up with zeros, one piece.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from gradalign.errors import GradAlignError

# The names of later versions of torch, which warns of the earlier ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Gradients of fewer elements travel together, copied into one message; larger ones go from where they are.
_FEWEST_ALONE = 2**16


Row = list[Any]
"""A group's gradients, (T,): a tensor, or None for a parameter that it does not reach."""


class Layout(Protocol):
    """What has to be known of the parameters."""

    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def flat(self, i: int, gradient: Tensor) -> Tensor:
        """Return a gradient of parameter i as it lies in memory, (numel,)."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, seen from one of them.

    All methods are collective: every rank calls them in the same order, with the same parameters and groups.

    Attributes:
        group: The process group; None for the default one.
        size: N.
    """

    group: dist.ProcessGroup | None
    size: int

    def check_same(self, names: Sequence[str], manner: str, checksum: int, device: torch.device) -> None:
        """Raise on every rank unless all have the same loss groups and parameters, in order, and go on alike.

        Args:
            names: This rank's groups.
            manner: How this rank goes on, in words; different ways exchange different things.
            checksum: Of the parameters, the same number for the same ones, frozen ones among them.
            device: Where they are.

        Raises:
            ValueError: They differ.
            GradAlignError: Another rank has met an error.
        """
        numbers = [zlib.crc32(repr(list(names)).encode()), zlib.crc32(manner.encode()), checksum]
        mine = torch.tensor(numbers, device=device)
        everybody = mine.new_empty(self.size * len(numbers))
        _all_gather(everybody, mine, group=self.group)
        of_groups, of_manners, of_layouts = (len(set(seen)) > 1 for seen in everybody.view(self.size, -1).T.tolist())
        if not (of_groups or of_manners or of_layouts):
            return
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, (manner, list(names), checksum), group=self.group)
        if failed := [rank for rank, (how, _, _) in enumerate(said) if how == _GIVEN_UP]:
            raise _elsewhere(failed)
        if of_layouts:
            alike = [rank for rank, (_, _, seen) in enumerate(said) if seen == said[0][2]]
            raise ValueError(
                "`optimizer` must hold the same parameters on all ranks, the same ones of them frozen and in the same"
                f" blocks, got others on ranks {sorted(set(range(self.size)) - set(alike))} than on {alike}; build and"
                " freeze the model alike everywhere."
            )
        if of_groups:
            listed = "; ".join(f"{groups} on rank {rank}" for rank, (_, groups, _) in enumerate(said))
            raise ValueError(
                f"`losses` must hold the same loss groups on all ranks, got {listed}; pass a zero, such as"
                " 0 * output.sum(), for what a rank has no data of."
            )
        listed = "; ".join(f"{how} on rank {rank}" for rank, (how, _, _) in enumerate(said))
        raise ValueError(
            f"backward() must go on alike on all ranks, got {listed}; make the aligners with the same arguments, and"
            " call backward as often, with a probe or scaler on all or none."
        )

    def give_up(self, device: torch.device) -> None:
        """Take part in the others' ``check_same`` after an error on this rank, so that they do not wait."""
        with suppress(ValueError, GradAlignError):
            self.check_same((), _GIVEN_UP, 0, device)

    def agree(self, layout: Layout, reached: Sequence[bool] | None) -> list[bool]:
        """Return for each parameter whether any rank reaches it.

        Args:
            layout: The parameters.
            reached: Which of them this rank reaches; None where it has met an error, so that the others do not wait.

        Raises:
            GradAlignError: Another rank has met an error.
        """
        T = len(layout.parameters)
        mine = [*([False] * T if reached is None else reached), *([False] * self.size)]
        mine[T + dist.get_rank(self.group)] = reached is None
        mask = torch.tensor(mine, dtype=torch.uint8, device=layout.parameters[0].device)
        dist.all_reduce(mask, dist.ReduceOp.MAX, group=self.group)
        agreed = [bool(one) for one in mask.tolist()]
        if reached is not None and any(agreed[T:]):
            raise _elsewhere([rank for rank, failed in enumerate(agreed[T:]) if failed])
        return agreed[:T]

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over the ranks, the same bits on all."""
        return self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, the same bits on all."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def average(self, layout: Layout, row: Row, members: Sequence[int]) -> Arriving:
        """Begin to average these parameters' gradients over the ranks, in place, and return what waits for them.

        Args:
            layout: The parameters.
            row: Gradients in the layout's strides, memory of this row alone; none may be read before it has arrived.
                Where this rank has none it gets zeros.
            members: Which of them, the same on all ranks.
        """
        for i in members:
            if row[i] is None:
                row[i] = torch.zeros_like(layout.parameters[i], requires_grad=False)
        arriving = Arriving()
        joined: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i in reversed(members):  # backward made the last ones first, and needs them first again
            parameter = layout.parameters[i]
            if layout.sizes[i] < _FEWEST_ALONE:
                joined.setdefault((parameter.dtype, parameter.device), []).append(i)
            else:
                flat = layout.flat(i, row[i])
                work = dist.all_reduce(flat, group=self.group, async_op=True)
                arriving.add([i], work, partial(flat.div_, self.size))
        for chosen in joined.values():
            parts = [layout.flat(i, row[i]) for i in chosen]
            message = torch.cat(parts)
            work = dist.all_reduce(message, group=self.group, async_op=True)
            arriving.add(chosen, work, partial(self._put_back, message, parts))
        return arriving

    def _put_back(self, message: Tensor, parts: Sequence[Tensor]) -> None:
        message.div_(self.size)
        torch._foreach_copy_(list(parts), message.split([part.numel() for part in parts]))

    def split(self, layout: Layout, row: Row, reached: Sequence[bool]) -> Callable[[], Row]:
        """Begin to average a row over the ranks, and return what waits for this rank's share of it.

        Args:
            layout: The parameters.
            row: Gradients in the layout's strides, None where this rank's losses do not reach.
            reached: Whether any rank's do.
        """
        share: Row = [None] * len(row)
        works = []
        for members in self._messages(layout, [i for i, any_rank in enumerate(reached) if any_rank]):
            lengths = [self.length(layout, i) for i in members]
            like = layout.parameters[members[0]]
            message = torch.empty(self.size, sum(lengths), dtype=like.dtype, device=like.device)
            for i, place in zip(members, message.split(lengths, dim=1), strict=True):
                _fill(place, None if row[i] is None else layout.flat(i, row[i]))
            mine = torch.empty(sum(lengths), dtype=like.dtype, device=like.device)
            work = _reduce_scatter(mine, message.view(-1), group=self.group, async_op=True)
            works.append((work, mine, message))  # which has to live until it has been sent
            for i, piece in zip(members, mine.split(lengths), strict=True):
                share[i] = piece

        def wait() -> Row:
            for work, mine, _ in works:
                work.wait()
                mine.div_(self.size)
            works.clear()
            return share

        return wait

    def join(self, layout: Layout, share: Row) -> Row:
        """Return the row of which this is one rank's share, whole, with memory of its own."""
        row: Row = [None] * len(share)
        for members in self._messages(layout, [i for i, piece in enumerate(share) if piece is not None]):
            lengths = [self.length(layout, i) for i in members]
            mine = torch.cat([share[i] for i in members])
            message = mine.new_empty(self.size, sum(lengths))
            _all_gather(message.view(-1), mine, group=self.group)
            for i, place in zip(members, message.split(lengths, dim=1), strict=True):
                row[i] = torch.empty_like(layout.parameters[i], requires_grad=False)
                _take(place, layout.flat(i, row[i]))
        return row

    def length(self, layout: Layout, i: int) -> int:
        """Return how many elements of parameter i make a share."""
        return -(-layout.sizes[i] // self.size)

    def _messages(self, layout: Layout, members: Sequence[int]) -> list[list[int]]:
        """Return the parameters in lists that travel together."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i in members:
            kinds.setdefault((layout.parameters[i].dtype, layout.parameters[i].device), []).append(i)
        return list(kinds.values())


class Arriving:
    """Gradients on their way."""

    def __init__(self) -> None:
        self._messages: list[tuple[list[int], dist.Work, Callable[[], object]]] = []
        self._of: dict[int, int] = {}  # a parameter to the number of its message

    def add(self, members: Sequence[int], work: dist.Work, finish: Callable[[], object]) -> None:
        """Take up a message.

        Args:
            members: The parameters whose gradients it carries.
            work: What waits for it.
            finish: What makes gradients of it.
        """
        self._of.update(dict.fromkeys(members, len(self._messages)))
        self._messages.append((list(members), work, finish))

    def wait(self, members: Sequence[int] | None = None) -> list[int]:
        """Wait for the gradients of some parameters, of all by default; return those that arrived now."""
        arrived = []
        for number in sorted({self._of[i] for i in (self._of if members is None else members) if i in self._of}):
            carried, work, finish = self._messages[number]
            work.wait()
            finish()
            arrived += carried
        for i in arrived:
            del self._of[i]
        return arrived


_GIVEN_UP = "an error"


def _elsewhere(ranks: Sequence[int]) -> GradAlignError:
    return GradAlignError(
        f"backward() must succeed on all ranks, got an error on {list(ranks)}, which says there what it is; nothing was"
        " written here."
    )


def _fill(place: Tensor, flat: Tensor | None) -> None:
    """Write a gradient (P,) into N pieces (N, n), zeros behind it."""
    if flat is None:
        place.zero_()
        return
    length = place.shape[1]
    full, rest = divmod(flat.numel(), length) if length else (0, 0)
    place[:full].copy_(flat[: full * length].view(full, length))
    if full < len(place):
        place[full, :rest].copy_(flat[full * length :])
        place[full, rest:].zero_()
        place[full + 1 :].zero_()


def _take(place: Tensor, flat: Tensor) -> None:
    """Read a gradient (P,) from N pieces (N, n)."""
    length = place.shape[1]
    full, rest = divmod(flat.numel(), length) if length else (0, 0)
    flat[: full * length].view(full, length).copy_(place[:full])
    if rest:
        flat[full * length :].copy_(place[full, :rest])


@dataclass(frozen=True)
class RanksOf:
    """The ranks of what an aligner was given as its process group, known only once ``torch.distributed`` runs.

    A copy shares the process group, which lives in this process; so it is not pickled.

    Attributes:
        process_group: "auto" for the default group, a group, or None for this rank alone.
    """

    process_group: Any

    def __call__(self) -> Ranks | None:
        """Return the ranks to average over; None for this one alone.

        Raises:
            TypeError: It is something else than a process group.
            ValueError: ``torch.distributed`` does not run, or the group is one that this rank is no member of.
        """
        running = dist.is_available() and dist.is_initialized()
        if self.process_group not in (None, "auto"):
            self._check(running=running)
        if self.process_group is None or not running:
            return None
        group = None if self.process_group == "auto" else self.process_group
        size = dist.get_world_size(group)
        return Ranks(group, size) if size > 1 else None

    def _check(self, *, running: bool) -> None:
        group = self.process_group
        if not running:
            raise ValueError(
                "`process_group` must be 'auto' or None while torch.distributed does not run, got"
                f" {type(group).__name__}; call torch.distributed.init_process_group first."
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "`process_group` must be one that this rank is a member of, got another's; pass each rank its own, or"
                " None."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "`process_group` must be 'auto', a torch.distributed.ProcessGroup or None, got"
                f" {type(group).__name__}; leave it out to average over all ranks."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> RanksOf:
        """Return this, which does not change."""
        return self

    def __reduce__(self) -> tuple[type[RanksOf], tuple[str | None]]:
        """Return what pickle takes, or raise TypeError."""
        if self.process_group not in ("auto", None):
            raise TypeError(
                "`process_group` must be 'auto' or None for an aligner to be pickled, got a process group; save"
                " state_dict() and make the aligner anew."
            )
        return type(self), (self.process_group,)
