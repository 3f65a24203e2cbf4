"""What a network with exits takes from an encoder's checkpoint: configuration, weights, tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradalign.errors import missing_extra
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.text import backbones, heads
from gradalign.multiexit.text.config import MultiExitConfig

try:
    from transformers import AutoModel, AutoTokenizer, PretrainedConfig
except ImportError as error:
    raise missing_extra("transformers", "text") from error

if TYPE_CHECKING:
    from gradalign.multiexit.text.encoder import MultiExitEncoder


def of_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments that say where a checkpoint is found."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


def around(
    own: PretrainedConfig,
    num_labels: int,
    exit: str,
    exits: Sequence[int] | None,
    num_layers: int | None,
    kwargs: dict[str, Any],
) -> MultiExitConfig:
    """Return the configuration of exits around an encoder; takes from ``kwargs`` what is the configuration's."""
    own = copy.deepcopy(own)
    backbones.family_of(own)
    check_count("num_labels", num_labels)
    if num_layers is not None:
        depth = int(own.num_hidden_layers)
        if isinstance(num_layers, bool) or not 1 <= num_layers <= depth:
            raise ValueError(f"`num_layers` must be in 1..{depth}, the layers of the backbone, got {num_layers!r}.")
        own.num_hidden_layers = num_layers
    names = ("classifier_dropout", "policy", "id2label", "label2id", "problem_type")
    taken = {name: kwargs.pop(name) for name in names if name in kwargs}
    config = MultiExitConfig(own.to_dict(), exit, exits, num_labels=num_labels, **taken)
    _ = config.exit_layers
    return config


def take_weights(model: MultiExitEncoder, name: str | Path, dtype: torch.dtype | str | None, kwargs: Any) -> None:  # noqa: ANN401
    """Give a new network the weights of an encoder's checkpoint, and its poolers the pretrained one's."""
    source = AutoModel.from_pretrained(name, **kwargs)
    weights = source.state_dict()
    model.backbone.load_state_dict({key: weights[key] for key in model.backbone.state_dict()})
    pooler = backbones.family_of(source.config).pooler
    if pooler is not None and f"{pooler}.weight" in weights:
        dense = {"weight": weights[f"{pooler}.weight"], "bias": weights[f"{pooler}.bias"]}
        for module in model.modules():
            if isinstance(module, heads.Pooler):
                module.dense.load_state_dict(dense)
    torch.nn.Module.to(model, source.dtype if dtype in (None, "auto") else dtype)
    model.eval()  # as every from_pretrained returns it


def tokenizer_of(name: str | Path, kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 (of transformers)
    """Return the tokenizer beside a checkpoint, None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, **of_hub(kwargs))
    except (OSError, ValueError, KeyError):
        return None
