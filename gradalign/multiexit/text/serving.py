"""Answers for texts, with early exiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradalign.multiexit import policies
from gradalign.multiexit.inference import early_exit
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.policies import Budget, Policy

if TYPE_CHECKING:
    from gradalign.multiexit.text.encoder import MultiExitEncoder


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a text is answered.

    Attributes:
        label: The name of the class, as the configuration's ``id2label`` has it; in regression the number.
        exit: Where it left, from 1.
        probabilities: (C,), float32, softmax of the answer's logits; in regression (1,), the number.
    """

    label: str | float
    exit: int
    probabilities: Tensor


def predict(
    model: MultiExitEncoder,
    texts: Sequence[str],
    text_pairs: Sequence[str] | None = None,
    policy: Policy | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    tokenizer: Any = None,  # noqa: ANN401 (of transformers)
) -> list[Prediction]:
    """Return what each text is answered, in the texts' order.

    Texts are sorted by length into batches; the answers are those of one text at a time, up to rounding.

    Args:
        model: The network.
        texts: N texts.
        text_pairs: N second texts, for tasks on pairs.
        policy: Who leaves where; the one saved with the network if left out, all layers where it has none.
        batch_size: Texts that are run together.
        max_length: Longest sequence, tokens; what is longer is cut. The tokenizer's own if left out.
        tokenizer: The network's own if left out.

    Raises:
        TypeError: ``texts`` is one text.
        ValueError: There is no tokenizer, or another number of pairs than of texts.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts, got one; write [text].")
    if text_pairs is not None and len(text_pairs) != len(texts):
        raise ValueError(f"`text_pairs` must be {len(texts)}, one for each text, got {len(text_pairs)}.")
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("`tokenizer` must be given, for none was saved beside the network; AutoTokenizer loads one.")
    if not texts:
        return []
    chosen = policy or _saved(model.config.policy) or Budget(model.num_exits)
    sides = (list(texts),) if text_pairs is None else (list(texts), list(text_pairs))
    rows = tokenizer(*sides, truncation=True, max_length=max_length)
    lengths = torch.tensor([len(row) for row in rows["input_ids"]])
    names = {int(number): name for number, name in (model.config.id2label or {}).items()}
    answers: dict[int, Prediction] = {}
    for part in lengths.argsort(stable=True).split(check_count("batch_size", batch_size)):
        numbers = part.tolist()
        batch = tokenizer.pad(
            {name: [column[k] for k in numbers] for name, column in rows.items()}, return_tensors="pt"
        )
        decision = early_exit(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, chosen)
        logits, exits = decision.logits.float().cpu(), decision.exits.tolist()
        for number, row, exit in zip(numbers, logits, exits, strict=True):
            answers[number] = _prediction(row, exit, names)
    return [answers[k] for k in range(len(texts))]


def _prediction(logits: Tensor, exit: int, names: Mapping[int, str]) -> Prediction:
    if len(logits) == 1:
        return Prediction(float(logits), exit, logits)
    return Prediction(names[int(logits.argmax())], exit, logits.softmax(-1))


def _saved(values: Mapping[str, Any] | None) -> Policy | None:
    return None if values is None else policies.from_dict(values)
