from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from gradalign.multiexit.text import heads


@pytest.fixture
def state():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    tokens = torch.randn(2, 4, 16, dtype=torch.float64)
    return {
        "hidden": tokens,
        "mask": mask,
        "cls": torch.randn(2, 3, 16, dtype=torch.float64),
        "pooled": torch.randn(2, 16, dtype=torch.float64),
    }


def head_of(kind):
    torch.manual_seed(1)
    return heads.make(kind, 16, 3, 0.5, 3).double().eval()


def test_what_each_kind_looks_at(state):
    mix, own = head_of("mix"), head_of("deebert")
    mix.mix.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    shares = mix.mix.exp() / mix.mix.exp().sum()
    tokens, dense = state["hidden"], own.pooler.dense
    looked = {
        "linear": tokens[:, 0],
        "pooler": state["pooled"],
        "mean": torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)]),
        "mix": sum(shares[k] * state["cls"][:, k] for k in range(3)),
        "deebert": torch.tanh(tokens[:, 0] @ dense.weight.T + dense.bias),
    }
    for kind, features in looked.items():
        head = {"mix": mix, "deebert": own}.get(kind) or head_of(kind)
        assert_close(head(state), features @ head.linear.weight.T + head.linear.bias, msg=kind)


def test_fastbert_is_attention_of_two_heads_at_the_first_token(state):
    head = head_of("fastbert")
    for row, length in enumerate((4, 2)):
        narrow = torch.tanh(head.narrow(state["hidden"][row, :length]))
        query, key, value = head.query(narrow), head.key(narrow), head.value(narrow)
        parts = []
        for part in (slice(0, 64), slice(64, 128)):
            scores = (query[:, part] @ key[:, part].T / 8).softmax(-1)
            parts.append((scores @ value[:, part])[0])
        expected = head.linear(torch.tanh(head.dense(head.out(torch.cat(parts)))))
        assert_close(head(state)[row], expected)
