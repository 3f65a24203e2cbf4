"""Which parameters take part in an alignment, in which block, and how their gradients lie in memory.

A *block* is what shares one Gramian.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gradalign.errors import unknown_name
from gradalign.sharding import Shards, is_sharded, local

MOST_WHOLE = 2**13
"""Gradients of more elements are taken as they lie in memory, so that they can be cut; the others keep their shape."""

OUTSIDE = -1
"""The block of parameters outside the scope: they enter no Gramian."""

Scope = Literal["all", "shared"] | Iterable[Tensor]
Granularity = Literal["global", "param_group", "tensor"] | Sequence[Sequence[Tensor]]


class Layout:
    """The parameters that take part, their blocks, and how their gradients lie in memory.

    Args:
        parameters: The parameters.
        blocks: A block's number for each parameter, or OUTSIDE.
        num_blocks: How many blocks there are.
        copies: For each parameter, how many ranks hold each of its elements, of those whose Gramians are added up.
        places: Where each parameter stands among all of the optimizer's, frozen ones too.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        blocks: Sequence[int],
        num_blocks: int,
        copies: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.parameters = tuple(parameters)
        self.places = tuple(range(len(self.parameters)) if places is None else places)
        self.copies = (1,) * len(self.parameters) if copies is None else tuple(copies)
        self.blocks = tuple(blocks)
        self.num_blocks = num_blocks
        # A parameter's own strides where it is dense: what loss.backward() makes, and what fused steps want.
        self.shards = Shards(self.parameters) if any(is_sharded(p) for p in self.parameters) else None
        parts = [local(p) for p in self.parameters]
        self.strides = tuple(torch.empty_like(part, device="meta").stride() for part in parts)
        self.sizes = tuple(part.numel() for part in parts)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self.parameters[0].device

    @cached_property
    def checksum(self) -> int:
        """The same number for the same parameters, the same of them frozen, in the same blocks."""
        said = zip(self.places, self.blocks, (f"{tuple(p.shape)} {p.dtype}" for p in self.parameters), strict=True)
        return zlib.crc32(repr(list(said)).encode())

    def is_laid_out(self, i: int, gradient: Tensor) -> bool:
        """Return whether a dense gradient of parameter i has the layout's strides."""
        return gradient.stride() == self.strides[i] or self.sizes[i] <= 1

    def laid_out(self, i: int, gradient: Tensor) -> Tensor:
        """Return a dense gradient of parameter i with the layout's strides: itself, or a copy."""
        if self.is_laid_out(i, gradient):
            return gradient
        return torch.empty_like(self.parameters[i], requires_grad=False).copy_(gradient)

    def flat(self, i: int, gradient: Tensor) -> Tensor:
        """Return a laid-out gradient of parameter i as it lies in memory, (numel,)."""
        return gradient.as_strided((self.sizes[i],), (1,))


def check_scope(scope: object, param_groups: Sequence[Mapping[str, Any]]) -> str | tuple[Tensor, ...]:
    """Return the scope as a name or a tuple of the optimizer's parameters, or say what is wrong with it."""
    if isinstance(scope, str):
        if scope not in ("all", "shared"):
            raise unknown_name("scope", scope, ["all", "shared"])
        return scope
    parameters = _known_parameters("scope", scope, param_groups)
    if not parameters:
        raise ValueError(
            "`scope` must hold at least one parameter, got none; an iterator may have been used up before."
        )
    return parameters


def check_granularity(
    granularity: object, param_groups: Sequence[Mapping[str, Any]]
) -> str | tuple[tuple[Tensor, ...], ...]:
    """Return the granularity as a name or tuples of the optimizer's parameters, or say what is wrong with it."""
    if isinstance(granularity, str):
        if granularity not in ("global", "param_group", "tensor"):
            raise unknown_name("granularity", granularity, ["global", "param_group", "tensor"])
        return granularity
    if not isinstance(granularity, Sequence):
        raise TypeError(
            "`granularity` must be 'global', 'param_group', 'tensor' or a list of lists of parameters,"
            f" got {type(granularity).__name__}."
        )
    blocks = tuple(_known_parameters("granularity", block, param_groups) for block in granularity)
    seen: set[int] = set()
    for number, block in enumerate(blocks):
        for parameter in block:
            if id(parameter) in seen:
                raise ValueError(
                    f"`granularity` must name each parameter once, got one of shape {tuple(parameter.shape)}"
                    f" again in block {number}."
                )
            seen.add(id(parameter))
    return blocks


def make_layout(
    param_groups: Sequence[Mapping[str, Any]],
    scope: str | tuple[Tensor, ...],
    granularity: str | tuple[tuple[Tensor, ...], ...],
) -> Layout:
    """Return the layout of the parameters that require a gradient now."""
    members = [(p, g) for g, group in enumerate(param_groups) for p in group["params"] if p.requires_grad]
    inside = None if isinstance(scope, str) else {id(p) for p in scope}
    blocks, num_blocks = _blocks(members, len(param_groups), granularity)
    return Layout(
        [p for p, _ in members],
        [
            block if inside is None or id(p) in inside else OUTSIDE
            for (p, _), block in zip(members, blocks, strict=True)
        ],
        num_blocks,
        places=[
            place for place, p in enumerate(p for group in param_groups for p in group["params"]) if p.requires_grad
        ],
    )


def quick_key(param_groups: Sequence[Mapping[str, Any]]) -> list[list[tuple[object, ...]]]:
    """Return what changes whenever ``layout_key`` does, and is cheap enough for every step."""
    return [
        [(id(p), p.data_ptr(), p.shape, p.stride(), p.dtype) for p in group["params"] if p.requires_grad]
        for group in param_groups
    ]


def layout_key(param_groups: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
    """Return what a layout depends on: it changes when a layout has to be made anew."""
    return tuple(
        (id(p), g, p.dtype, p.device, p.shape, p.stride())
        for g, group in enumerate(param_groups)
        for p in group["params"]
        if p.requires_grad
    )


def _blocks(
    members: Sequence[tuple[Tensor, int]], num_groups: int, granularity: str | tuple[tuple[Tensor, ...], ...]
) -> tuple[list[int], int]:
    """Return each parameter's block and the number of blocks."""
    if granularity == "global":
        return [0] * len(members), 1
    if granularity == "param_group":
        return [g for _, g in members], num_groups
    if granularity == "tensor":
        return list(range(len(members))), len(members)
    number = {id(p): b for b, block in enumerate(granularity) if not isinstance(block, str) for p in block}
    # Parameters that no list names share one more block, the last.
    rest = len(granularity)
    blocks = [number.get(id(p), rest) for p, _ in members]
    return blocks, rest + (rest in blocks)


def _known_parameters(
    argument: str, parameters: object, param_groups: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, ...]:
    """Return the parameters as a tuple; raise unless each is one of the optimizer's."""
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"`{argument}` must hold parameters in a list, got {type(parameters).__name__};"
            " pass list(module.parameters())."
        )
    known = {id(p) for group in param_groups for p in group["params"]}
    checked = tuple(parameters)
    for position, parameter in enumerate(checked):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"`{argument}` must hold parameters, got {type(parameter).__name__} at position {position};"
                " pass parameters themselves, such as list(module.parameters())."
            )
        if id(parameter) not in known:
            raise ValueError(
                f"`{argument}` must hold parameters of the optimizer, got one of shape {tuple(parameter.shape)} at"
                f" position {position} that is in none of its parameter groups; give it to the optimizer too,"
                f" or leave it out of `{argument}`."
            )
    return checked
