"""The configuration of an encoder with exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradalign.errors import missing_extra, unknown_name
from gradalign.multiexit.text import backbones, heads

try:
    from transformers import AutoConfig, PretrainedConfig
except ImportError as error:
    raise missing_extra("transformers", "text") from error


class MultiExitConfig(PretrainedConfig):
    """What ``MultiExitEncoder`` is made of; saved with it as config.json.

    Args:
        backbone: The encoder's own configuration, as ``to_dict`` gives it.
        exit: The kind of the exits, a key of ``heads.KINDS``.
        exits: The layers that an exit follows, counted from 1; the last one always has one. None is every layer.
        classifier_dropout: Of the exits; None takes the backbone's.
        policy: How ``predict`` lets rows leave, as ``policies.to_dict`` gives it.
        **kwargs: Of ``PretrainedConfig``: num_labels (1 is regression), id2label and so on.

    Raises:
        ValueError: An unknown kind or architecture, or a layer that there is not.
    """

    model_type = "multi_exit_encoder"

    def __init__(
        self,
        backbone: Mapping[str, Any] | None = None,
        exit: str = "pooler",
        exits: Sequence[int] | None = None,
        classifier_dropout: float | None = None,
        policy: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 (transformers' own)
    ) -> None:
        super().__init__(**kwargs)
        self.backbone = dict(backbone or {"model_type": "bert"})
        self.exit = exit
        self.exits = None if exits is None else list(exits)
        self.classifier_dropout = classifier_dropout
        self.policy = None if policy is None else dict(policy)
        if exit not in heads.KINDS:
            raise unknown_name("exit", exit, heads.KINDS)
        backbones.family_of(self.backbone_config)
        self.initializer_range = getattr(self.backbone_config, "initializer_range", 0.02)

    @property
    def backbone_config(self) -> PretrainedConfig:
        """The encoder's own configuration."""
        values = {name: value for name, value in self.backbone.items() if name != "model_type"}
        return AutoConfig.for_model(self.backbone["model_type"], **values)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layers that an exit follows, counted from 1, ascending.

        Raises:
            ValueError: ``exits`` names a layer that there is not, or one twice.
        """
        depth = int(self.backbone_config.num_hidden_layers)
        if self.exits is None:
            return tuple(range(1, depth + 1))
        odd = [layer for layer in self.exits if isinstance(layer, bool) or not 1 <= layer <= depth]
        if odd or len(set(self.exits)) < len(self.exits):
            raise ValueError(
                f"`exits` must be different layers in 1..{depth}, those of the backbone, got {list(self.exits)}."
            )
        return tuple(sorted({*self.exits, depth}))
