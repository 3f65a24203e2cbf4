"""An encoder with an exit after each layer, of any BERT, ALBERT, RoBERTa, DistilBERT or ELECTRA.

Shapes: B rows of a batch, L tokens, H hidden width, M exits, C classes; layers and exits are counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradalign.errors import missing_extra
from gradalign.multiexit.inference import every_exit
from gradalign.multiexit.objectives import weighted_loss
from gradalign.multiexit.text import backbones, heads
from gradalign.multiexit.text.config import MultiExitConfig
from gradalign.multiexit.text.costs import encoder_macs
from gradalign.multiexit.text.loading import around, of_hub, take_weights, tokenizer_of
from gradalign.multiexit.text.serving import predict

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput
except ImportError as error:
    raise missing_extra("transformers", "text") from error


class MultiExitEncoder(PreTrainedModel):
    """Classify text at every layer of an encoder.

    A Hugging Face model: ``save_pretrained``, ``from_pretrained``, ``push_to_hub`` and ``AutoModel`` take it. Made by
    ``from_pretrained(name_or_path)`` of an encoder's checkpoint, whose weights it takes and whose exits are new, or of
    one that it saved itself; or by ``from_config`` of an encoder's configuration, with all weights new.

    Early exiting runs it piece by piece: ``hidden = start(batch)``, then ``hidden, logits = advance(hidden, exit)``.
    Trailing columns that are padding in all rows still there are dropped on the way; a row's answer does not depend on
    the rows beside it, up to rounding.

    Args:
        config: What it is made of.

    Attributes:
        num_exits: M.
        exit_layers: (M,), the layer before each exit; the last is the backbone's last.
        backbone: The encoder, without pooler.
        pooler: The pooler that all exits share, with exits of the kind "pooler", else None.
        heads: The exits.
        tokenizer: What ``from_pretrained`` found beside the weights, else None; ``predict`` uses it.

    References:
        Zhu et al., GAML-BERT, EMNLP 2021; the kinds of exits name theirs in ``heads``.
    """

    config_class = MultiExitConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MultiExitConfig) -> None:
        super().__init__(config)
        own = config.backbone_config
        self.backbone = backbones.make(own, getattr(config, "_attn_implementation", None))
        self.exit_layers = config.exit_layers
        self.num_exits = len(self.exit_layers)
        width = int(own.hidden_size)
        dropout = config.classifier_dropout
        if dropout is None:
            dropout = getattr(own, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(own, "hidden_dropout_prob", getattr(own, "dropout", 0.1))
        self.pooler = heads.Pooler(width) if config.exit == "pooler" else None
        self.heads = nn.ModuleList(
            heads.make(config.exit, width, int(config.num_labels or 2), dropout, layer) for layer in self.exit_layers
        )
        self.tokenizer: Any = None
        self.post_init()

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        num_labels: int = 2,
        exit: str = "pooler",
        exits: Sequence[int] | None = None,
        num_layers: int | None = None,
        **kwargs: Any,  # noqa: ANN401 (transformers' own)
    ) -> MultiExitEncoder:
        """Return a network with new weights.

        Args:
            config: An encoder's configuration, or a ``MultiExitConfig``, with which nothing else may be given.
            num_labels: C; 1 is regression.
            exit: The kind of the exits.
            exits: The layers that an exit follows; the last one always has one. None is every layer.
            num_layers: Keep the first so many layers of the encoder; None keeps all.
            **kwargs: Of ``MultiExitConfig``; ``attn_implementation``, "eager" or "sdpa".

        Raises:
            ValueError: An architecture, kind or layer that there is not.
        """
        backbones.check_attention(kwargs.get("attn_implementation"))
        if not isinstance(config, MultiExitConfig):
            config = around(config, num_labels, exit, exits, num_layers, kwargs)
        made: MultiExitEncoder = cls._from_config(config, **kwargs)
        return made

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        num_labels: int | None = None,
        exit: str | None = None,
        exits: Sequence[int] | None = None,
        num_layers: int | None = None,
        **kwargs: Any,  # noqa: ANN401 (transformers' own)
    ) -> MultiExitEncoder:
        """Return a network with an encoder's pretrained weights and new exits, or one that was saved.

        A shared pooler starts as the pretrained one where the checkpoint has one, and so does each exit's own pooler of
        kind "deebert".

        Args:
            pretrained_model_name_or_path: Name on the hub or folder, of an encoder or of what ``save_pretrained``
                wrote; of the latter the configuration is its own.
            num_labels: C, 2 if left out; 1 is regression.
            exit: The kind of the exits, "pooler" if left out.
            exits: The layers that an exit follows; the last one always has one. None is every layer.
            num_layers: Keep the first so many layers of the encoder; None keeps all.
            **kwargs: Of ``PreTrainedModel.from_pretrained``.

        Raises:
            ValueError: An architecture, kind or layer that there is not, or a setting for a saved network.
            OSError: There is no such checkpoint.
        """
        backbones.check_attention(kwargs.get("attn_implementation"))
        name = pretrained_model_name_or_path
        model: MultiExitEncoder
        if isinstance(kwargs.get("config"), MultiExitConfig):  # transformers' own way in, by AutoModel say
            model = super().from_pretrained(name, **kwargs)
        else:
            own = AutoConfig.from_pretrained(name, **of_hub(kwargs))
            given = {"num_labels": num_labels, "exit": exit, "exits": exits, "num_layers": num_layers}
            if isinstance(own, MultiExitConfig):
                odd = [f"{key}={value!r}" for key, value in given.items() if value is not None]
                if odd:
                    raise ValueError(
                        f"`{name}` has a configuration of its own, got {', '.join(odd)} beside it; leave it out."
                    )
                model = super().from_pretrained(name, **kwargs)
            else:
                labels = 2 if num_labels is None else num_labels
                config = around(own, labels, exit or "pooler", exits, num_layers, kwargs)
                attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
                model = cls._from_config(config, **attention)
                take_weights(model, name, kwargs.pop("dtype", None), kwargs)
        model.tokenizer = tokenizer_of(name, kwargs)
        return model

    def start(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first layer.

        Args:
            batch: What a tokenizer gives: input_ids (B, L), int64; attention_mask (B, L), 1 for tokens, all of them
                where it is left out; token_type_ids (B, L); or inputs_embeds (B, L, width) for input_ids.

        Raises:
            TypeError: ``batch`` is no mapping of names to tensors.
            ValueError: There are neither ids nor embeddings, a row begins with padding or is too long, or a name is
                unknown.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"`batch` must be what a tokenizer returns, tensors by name, got {type(batch).__name__}; write"
                ' tokenizer(texts, padding=True, return_tensors="pt").'
            )
        known = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        odd = sorted(set(batch) - set(known))
        if odd:
            raise ValueError(f"`batch` must hold what a tokenizer gives, {', '.join(known)}, got {', '.join(odd)}.")
        inputs = {name: tensor for name, tensor in batch.items() if tensor is not None}
        listed = [name for name, tensor in inputs.items() if not isinstance(tensor, Tensor)]
        if listed:
            raise TypeError(
                f"`batch` must hold tensors, got {type(inputs[listed[0]]).__name__} for {listed[0]}; give the tokenizer"
                ' return_tensors="pt".'
            )
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise ValueError(
                "`batch` must hold input_ids or inputs_embeds, got neither; give what the tokenizer returns."
            )
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones(tokens.shape[:2], device=tokens.device, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(mask[:, :1].all()):
            raise ValueError(
                "`attention_mask` must be 1 for the first token of each row, got 0; set the tokenizer's"
                ' padding_side="right".'
            )
        length = _longest(mask)
        limit = backbones.longest(self.backbone.config)
        if length > limit and "position_ids" not in inputs:
            raise ValueError(
                f"`batch` must have rows of at most {limit} tokens, got {length}; give the tokenizer truncation=True"
                f" and max_length={limit}."
            )
        inputs = {name: tensor[:, :length] for name, tensor in inputs.items()}
        hidden = backbones.embed(self.backbone, inputs)
        state = {"hidden": hidden, "mask": mask[:, :length]}
        if self.config.exit == "mix":
            state["cls"] = hidden.new_empty(hidden.shape[0], 0, hidden.shape[2])
        return state

    def layers(self, hidden: Mapping[str, Tensor], exit: int) -> dict[str, Tensor]:
        """Run the layers after the exit before, up to ``exit``.

        Args:
            hidden: From ``start`` for exit 1, from the exit before for the others; rows may have been dropped.
            exit: 1 to M.

        Raises:
            ValueError: There is no such exit.
        """
        if not 1 <= exit <= self.num_exits:
            raise ValueError(f"`exit` must be in 1..{self.num_exits}, got {exit}.")
        length = _longest(hidden["mask"])
        mask, tokens = hidden["mask"][:, :length], hidden["hidden"][:, :length]
        done = self.exit_layers[exit - 2] if exit > 1 else 0
        refused = backbones.penalty(mask, tokens.dtype)
        firsts = [hidden["cls"]] if "cls" in hidden else []
        for layer in self._modules_run()[done : self.exit_layers[exit - 1]]:
            tokens = backbones.run(layer, tokens, refused)
            if firsts:
                firsts.append(tokens[:, :1])
        state = {"hidden": tokens, "mask": mask}
        if firsts:
            state["cls"] = torch.cat(firsts, dim=1)
        return state

    def classify(self, hidden: Mapping[str, Tensor], exit: int) -> Tensor:
        """Return the logits that an exit gives for the state after its layer, (n, C)."""
        state = hidden if self.pooler is None else {**hidden, "pooled": self.pooler(hidden["hidden"])}
        logits: Tensor = self.heads[exit - 1](state)
        return logits

    def advance(self, hidden: Mapping[str, Tensor], exit: int) -> tuple[dict[str, Tensor], Tensor]:
        """Run ``layers`` and ``classify``; return the state and the logits (n, C)."""
        state = self.layers(hidden, exit)
        return state, self.classify(state, exit)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | SequenceClassifierOutput:
        """Return the logits of every exit, (M, B, C), exit 1 first.

        With ``labels``, (B,), an output with ``logits`` and with ``loss``, the weighted loss of all exits (GAML-BERT,
        Eq. 1): cross-entropy, or with one class, which is regression, the squared error.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        logits = every_exit(self, {name: tensor for name, tensor in batch.items() if tensor is not None})
        if labels is None:
            return logits
        return SequenceClassifierOutput(loss=weighted_loss(logits, labels), logits=logits)

    predict = predict

    def exit_macs(self, length: int, *, heads: bool = True) -> tuple[int, ...]:
        """Return the multiply-accumulates of a row of so many tokens, up to and including each exit, (M,).

        Matrix products are counted; normalisation, activation, embedding look-ups and additions are not.

        Args:
            length: Tokens of the row.
            heads: Count all exits on the way, as when every exit is asked in turn; False counts the last alone.
        """
        return encoder_macs(self, length, heads=heads)

    def layer_blocks(self) -> list[list[nn.Parameter]]:
        """Return the parameters layer by layer, each once: a layer with its exit; the first with the embeddings."""
        seen: set[int] = set()
        blocks: list[list[nn.Parameter]] = []
        run = self._modules_run()
        before = [p for name, p in self.backbone.named_parameters() if id(p) not in _ids(run)]
        for number, layer in enumerate(run, 1):
            exits = [self.heads[k] for k, at in enumerate(self.exit_layers) if at == number]
            several = [*(before if number == 1 else []), *layer.parameters()]
            several += [p for head in exits for p in head.parameters()]
            if number == len(run) and self.pooler is not None:
                several += list(self.pooler.parameters())
            block = [p for p in several if id(p) not in seen]
            seen.update(map(id, block))
            if block:
                blocks.append(block)
        return blocks

    def _modules_run(self) -> list[nn.Module]:
        return backbones.family_of(self.backbone.config).layers(self.backbone)


def _ids(modules: Sequence[nn.Module]) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def _longest(mask: Tensor) -> int:
    """Return how many columns hold a token in some row, at least one."""
    used = mask.any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


AutoConfig.register(MultiExitConfig.model_type, MultiExitConfig)
AutoModel.register(MultiExitConfig, MultiExitEncoder)
