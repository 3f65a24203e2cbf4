"""The encoders of transformers that can carry exits, and where each keeps its parts.

Shapes: n rows, L tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradalign.errors import missing_extra, unknown_name

try:
    from transformers import AutoModel, PretrainedConfig, PreTrainedModel
except ImportError as error:
    raise missing_extra("transformers", "text") from error

ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class Family:
    """Where the encoders of one architecture keep their parts.

    Attributes:
        layers: Names the module that is run as each layer, in order; ALBERT runs one several times.
        project: Maps embeddings to the hidden width, None where they have it.
        pooler: Names the linear layer of the pretrained pooler in the checkpoints, None where there is none.
        arguments: Of the model's class, beside its configuration.
        takes_types: The embeddings take token types.
        unused: Counts the positions of a configuration that no token has.
    """

    layers: Callable[[Any], list[nn.Module]]
    project: Callable[[Any], nn.Module | None] = lambda backbone: None
    pooler: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    takes_types: bool = True
    unused: Callable[[PretrainedConfig], int] = lambda config: 0


def _stack(backbone: Any) -> Any:  # noqa: ANN401 (a module of transformers)
    return backbone.transformer if hasattr(backbone, "transformer") else backbone.encoder


def _listed(backbone: Any) -> list[nn.Module]:  # noqa: ANN401
    return list(_stack(backbone).layer)


def _albert_layers(backbone: Any) -> list[nn.Module]:  # noqa: ANN401
    config, groups = backbone.config, backbone.encoder.albert_layer_groups
    per_group = config.num_hidden_layers / config.num_hidden_groups
    return [groups[int(layer / per_group)] for layer in range(config.num_hidden_layers)]


_BERT = Family(_listed, pooler="pooler.dense", arguments={"add_pooling_layer": False})
FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    # RoBERTa counts positions from after that of its padding.
    "roberta": replace(_BERT, unused=lambda config: int(config.pad_token_id) + 1),
    "albert": Family(
        _albert_layers,
        project=lambda backbone: backbone.encoder.embedding_hidden_mapping_in,
        pooler="pooler",
        arguments={"add_pooling_layer": False},
    ),
    "distilbert": Family(_listed, takes_types=False),
    "electra": Family(_listed, project=lambda backbone: getattr(backbone, "embeddings_project", None)),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of an encoder's configuration, or raise ValueError where it is not known."""
    if config.model_type not in FAMILIES:
        raise unknown_name("model_type", config.model_type, FAMILIES)
    return FAMILIES[config.model_type]


def longest(config: PretrainedConfig) -> int:
    """Return how many tokens a row may have."""
    return int(config.max_position_embeddings) - family_of(config).unused(config)


def make(config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """Return a new encoder without pooler."""
    check_attention(attention)
    chosen = {} if attention is None else {"attn_implementation": attention}
    backbone: PreTrainedModel = AutoModel.from_config(config, **family_of(config).arguments, **chosen)
    return backbone


def check_attention(attention: str | None) -> None:
    """Raise ValueError where the layers could not be run with this attention and a mask of floats."""
    if attention is not None and attention not in ATTENTIONS:
        raise ValueError(
            f"`attn_implementation` must be {' or '.join(map(repr, ATTENTIONS))}, got {attention!r}; leave it out for"
            " the fastest of them."
        )


def embed(backbone: Any, inputs: Mapping[str, Tensor | None]) -> Tensor:  # noqa: ANN401 (a model of transformers)
    """Return the state before the first layer, (n, L, H)."""
    family = family_of(backbone.config)
    known = {name: value for name, value in inputs.items() if value is not None}
    if not family.takes_types:
        known.pop("token_type_ids", None)
    hidden: Tensor = backbone.embeddings(**known)
    project = family.project(backbone)
    return hidden if project is None else project(hidden)


def penalty(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores before the softmax, (n, 1, 1, L) for all heads and all queries.

    Args:
        mask: (n, L), bool, True for tokens.
        dtype: Of the hidden state.
    """
    nothing = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return nothing.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def run(layer: nn.Module, hidden: Tensor, refused: Tensor) -> Tensor:
    """Return the state after a layer, (n, L, H).

    Args:
        layer: Of the backbone.
        hidden: (n, L, H).
        refused: (n, 1, 1, L), of ``penalty``.
    """
    after = layer(hidden, refused)
    state: Tensor = after[0] if isinstance(after, tuple) else after  # before transformers 5 a tuple
    return state
