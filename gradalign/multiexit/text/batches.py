"""Rows of text as token numbers: tokenised once, put into batches by length, padded batch by batch.

Shapes: N rows of a split, n of a batch, L tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradalign.errors import positive_integer
from gradalign.multiexit.text.readers import TextSplit

_CHUNK = 1000  # rows a call of the tokenizer: its lists of Python integers are short-lived
_MEGA = 50  # batches that are sorted by length together


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenised split: ragged rows, end to end.

    Attributes:
        columns: What the tokenizer gave, by name, "input_ids" among them; each (T,), int32, all rows' tokens in turn.
        starts: (N,), int64: where each row starts.
        lengths: (N,), int64: how many tokens each row has.
        labels: (N,), as the split has them.
        padding: What fills a short row, by name.
    """

    columns: Mapping[str, Tensor]
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    padding: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.lengths)


def encode(split: TextSplit, tokenizer: Any, max_length: int) -> Encoded:  # noqa: ANN401 (of transformers, if anyone's)
    """Return the rows of a split as tokens.

    Args:
        split: N rows.
        tokenizer: A Hugging Face tokenizer that pads on the right.
        max_length: Rows are cut to so many tokens, special ones counted; of a pair the longer text is cut first.

    Raises:
        ValueError: ``max_length`` leaves room for special tokens alone, or the tokenizer has no padding token, or
            pads on the left.
    """
    special = tokenizer.num_special_tokens_to_add(pair=split.second is not None)
    if positive_integer("max_length", max_length) <= special:  # the tokenizer would cut nothing then, and not say so
        raise ValueError(f"`max_length` must exceed the {special} special tokens of a row, got {max_length}; take 128.")
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        got = "no padding token" if tokenizer.pad_token_id is None else "padding on the left"
        raise ValueError(
            f"`tokenizer` must pad on the right with a token of its own, got {got}; set `pad_token` and"
            ' `padding_side="right"`.'
        )
    parts: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    for start in range(0, len(split), _CHUNK):
        texts = [list(side[start : start + _CHUNK]) for side in (split.first, split.second) if side is not None]
        rows = tokenizer(*texts, truncation=True, max_length=max_length)
        lengths += map(len, rows["input_ids"])
        for name, column in rows.items():
            parts.setdefault(name, []).append(torch.tensor(list(chain(*column)), dtype=torch.int32))
    counts = torch.tensor(lengths, dtype=torch.int64)
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return Encoded(
        {name: torch.cat(pieces) for name, pieces in parts.items()},
        counts.cumsum(0) - counts,
        counts,
        split.labels,
        {name: padding.get(name, 0) for name in parts},
    )


def collate(encoded: Encoded, rows: Tensor, multiple: int = 1) -> dict[str, Tensor]:
    """Return a batch, padded on the right to its longest row.

    Args:
        encoded: The tokenised split.
        rows: (n,), int64, n >= 1: which rows.
        multiple: L is rounded up to a multiple of it, beyond ``max_length`` where that is none.

    Returns:
        What the tokenizer gave, by name, each (n, L), int64.

    Raises:
        ValueError: ``rows`` is empty, or ``multiple`` below 1.
    """
    positive_integer("multiple", multiple)
    if len(rows) == 0:
        raise ValueError("`rows` must hold at least one row, got none.")
    lengths = encoded.lengths[rows].unsqueeze(1)
    L = -(-int(lengths.max()) // multiple) * multiple
    position = torch.arange(L)
    inside = position < lengths
    place = torch.where(inside, encoded.starts[rows].unsqueeze(1) + position, 0)
    return {
        name: torch.where(inside, column[place].long(), encoded.padding[name])
        for name, column in encoded.columns.items()
    }


def epoch_order(lengths: Tensor, batch_size: int, generator: torch.Generator, buckets: bool = False) -> list[Tensor]:
    """Return the batches of an epoch: each row once, ceil(N / batch_size) batches, all but one of them full.

    With buckets the shuffled rows are cut into runs of 50 batches and sorted by length within each run, so that the
    rows of a batch are about as long and little is padded; then the batches are shuffled.

    Args:
        lengths: (N,), integer: tokens of each row.
        batch_size: Rows a batch.
        generator: Makes all choices, on the CPU; its state decides the result.
        buckets: Sort by length as above.

    Returns:
        Row numbers, each (n,), int64.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    positive_integer("batch_size", batch_size)
    order = torch.randperm(len(lengths), generator=generator)
    if not buckets:
        return list(_cut(order, batch_size))
    runs = [run[lengths[run].argsort(stable=True)] for run in _cut(order, _MEGA * batch_size)]
    batches = [batch for run in runs for batch in _cut(run, batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def in_order(lengths: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Return batches of rows sorted by length, for evaluation, and how to put what was computed back.

    Args:
        lengths: (N,), integer: tokens of each row.
        batch_size: Rows a batch.

    Returns:
        Row numbers, each (n,), int64; and the places (N,), int64: ``torch.cat(answers)[places]`` has the answers in
        the order of the rows.

    Raises:
        ValueError: ``batch_size`` is below 1.

    >>> batches, places = in_order(torch.tensor([9, 2, 5]), batch_size=2)
    >>> batches
    [tensor([1, 2]), tensor([0])]
    >>> torch.cat(batches)[places]
    tensor([0, 1, 2])
    """
    positive_integer("batch_size", batch_size)
    order = lengths.argsort(stable=True)
    return list(_cut(order, batch_size)), order.argsort()


def _cut(rows: Tensor, size: int) -> Iterator[Tensor]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
