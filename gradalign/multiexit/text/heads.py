"""The kinds of exits that an encoder can have.

Shapes: n rows, L tokens, H hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Hidden = Mapping[str, Tensor]
"""The state after a layer: "hidden" (n, L, H); "mask" (n, L), bool, True for tokens; for kind "mix" also "cls"
(n, layers, H), the first token after each layer so far; for kind "pooler" also "pooled" (n, H)."""

_FASTBERT_WIDTH = 128
_FASTBERT_HEADS = 2


class Pooler(nn.Module):
    """Map the first token's state to tanh(W h + b), as BERT does: (n, L, H) -> (n, H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n, H)."""
        return torch.tanh(self.dense(hidden[:, 0]))


class LinearHead(nn.Module):
    """Classify the first token's state by dropout and a linear layer."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_labels)

    def features(self, state: Hidden) -> Tensor:
        """Return what the linear layer sees, before dropout, (n, H)."""
        return state["hidden"][:, 0]

    def forward(self, state: Hidden) -> Tensor:
        """Return logits (n, C)."""
        logits: Tensor = self.linear(self.dropout(self.features(state)))
        return logits

    def macs(self, length: int) -> int:
        """Return the multiply-accumulates of a row of so many tokens."""
        return self.linear.weight.numel()


class SharedPoolerHead(LinearHead):
    """Classify by the network's one shared pooler, dropout and a linear layer of its own, as PABEE does.

    The pooler is the network's; the head is given what it returned.

    References:
        Zhou et al., BERT Loses Patience, NeurIPS 2020, arXiv:2006.04152.
    """

    def features(self, state: Hidden) -> Tensor:
        """Return the pooled first token, (n, H)."""
        return state["pooled"]


class OwnPoolerHead(LinearHead):
    """Classify by a pooler of its own, dropout and a linear layer, as DeeBERT does.

    References:
        Xin et al., DeeBERT, ACL 2020, arXiv:2004.12993.
    """

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__(width, num_labels, dropout)
        self.pooler = Pooler(width)

    def features(self, state: Hidden) -> Tensor:
        """Return the pooled first token, (n, H)."""
        pooled: Tensor = self.pooler(state["hidden"])
        return pooled

    def macs(self, length: int) -> int:
        """Return the multiply-accumulates of a row of so many tokens."""
        return super().macs(length) + self.pooler.dense.weight.numel()


class MeanHead(LinearHead):
    """Classify the mean of the tokens' states, padding left out, by dropout and a linear layer."""

    def features(self, state: Hidden) -> Tensor:
        """Return the mean over the tokens, (n, H)."""
        weights = state["mask"].unsqueeze(-1).to(state["hidden"].dtype)
        return (state["hidden"] * weights).sum(1) / weights.sum(1)


class MixHead(LinearHead):
    """Classify a mixture of the first token's states after this layer and those before, as RightTool does.

    The mixture's weights are a softmax of free scalars, one a layer, which start equal.

    References:
        Schwartz et al., The Right Tool for the Job, ACL 2020, arXiv:2004.07453.
    """

    def __init__(self, width: int, num_labels: int, dropout: float, layers: int) -> None:
        super().__init__(width, num_labels, dropout)
        self.mix = nn.Parameter(torch.zeros(layers))

    def features(self, state: Hidden) -> Tensor:
        """Return the mixture, (n, H)."""
        return torch.einsum("nlh,l->nh", state["cls"], self.mix.softmax(0))

    def macs(self, length: int) -> int:
        """Return the multiply-accumulates of a row of so many tokens."""
        return super().macs(length) + self.mix.numel() * self.linear.in_features


class FastBertHead(nn.Module):
    """Classify by a narrow layer of self-attention, as FastBERT does.

    Linear H -> 128, tanh, self-attention of 2 heads over the tokens, the first token, Linear 128 -> 128, tanh,
    Linear -> C.

    References:
        Liu et al., FastBERT, ACL 2020, arXiv:2004.02178.
    """

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        del dropout  # FastBERT's student has none
        self.narrow = nn.Linear(width, _FASTBERT_WIDTH)
        self.query = nn.Linear(_FASTBERT_WIDTH, _FASTBERT_WIDTH)
        self.key = nn.Linear(_FASTBERT_WIDTH, _FASTBERT_WIDTH)
        self.value = nn.Linear(_FASTBERT_WIDTH, _FASTBERT_WIDTH)
        self.out = nn.Linear(_FASTBERT_WIDTH, _FASTBERT_WIDTH)
        self.dense = nn.Linear(_FASTBERT_WIDTH, _FASTBERT_WIDTH)
        self.linear = nn.Linear(_FASTBERT_WIDTH, num_labels)

    def forward(self, state: Hidden) -> Tensor:
        """Return logits (n, C)."""
        narrow = torch.tanh(self.narrow(state["hidden"]))
        # Of the self-attention only the first token is looked at: one query a row.
        query, key, value = self._split(self.query(narrow[:, :1])), self._split(self.key(narrow)), self.value(narrow)
        mask = state["mask"][:, None, None, :]
        seen = F.scaled_dot_product_attention(query, key, self._split(value), attn_mask=mask)
        first = self.out(seen.transpose(1, 2).flatten(2).squeeze(1))
        logits: Tensor = self.linear(torch.tanh(self.dense(first)))
        return logits

    def macs(self, length: int) -> int:
        """Return the multiply-accumulates of a row of so many tokens."""
        every = self.narrow.weight.numel() + self.key.weight.numel() + self.value.weight.numel()
        once = self.query.weight.numel() + self.out.weight.numel() + self.dense.weight.numel()
        return length * (every + 2 * _FASTBERT_WIDTH) + once + self.linear.weight.numel()

    def _split(self, tokens: Tensor) -> Tensor:
        """Return (n, L, 128) as (n, heads, L, 64)."""
        split: Tensor = tokens.unflatten(2, (_FASTBERT_HEADS, -1)).transpose(1, 2)
        return split


Head = LinearHead | FastBertHead

KINDS: Mapping[str, type[Head]] = {
    "pooler": SharedPoolerHead,
    "linear": LinearHead,
    "mean": MeanHead,
    "fastbert": FastBertHead,
    "deebert": OwnPoolerHead,
    "mix": MixHead,
}


def make(kind: str, width: int, num_labels: int, dropout: float, layer: int) -> Head:
    """Return a new exit after a layer, counted from 1."""
    if kind == "mix":
        return MixHead(width, num_labels, dropout, layer)
    return KINDS[kind](width, num_labels, dropout)
