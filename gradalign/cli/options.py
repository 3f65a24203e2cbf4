"""The options that set up a run, and the configuration they make."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from gradalign.multiexit import methods

if TYPE_CHECKING:
    from gradalign.multiexit.configs import Config


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in a line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"gradalign: {message.rstrip('.')}; see {self.prog} --help\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a command is added."""


def _exits(text: str) -> str | tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",")) if text[:1].isdigit() else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a name or block numbers as 4,8,12, got {text!r}") from error


@dataclass(frozen=True)
class Setting:
    """An option that sets a field of a configuration.

    Attributes:
        help: What it is; its default is the configuration's own.
        type: Makes the value of the text.
        choices: The texts that are allowed, all where there are none.
        metavar: What stands for the value in the help.
    """

    help: str
    type: Any = str
    choices: Sequence[str] | None = None
    metavar: str | None = None


_TRAINING: Mapping[str, Setting] = {
    "epochs": Setting("passes over the training rows, at most", int),
    "batch_size": Setting("rows a step", int),
    "learning_rate": Setting("the largest of the schedule", float),
    "warm_up": Setting("while the learning rate grows: a share of the steps for images, epochs for text", float),
    "weight_decay": Setting("of the optimizer", float),
    "clip": Setting("largest norm of the aligned gradient", float),
    "patience": Setting("stop after so many epochs without a better held-out score, and keep the best network", int),
    "precision": Setting("of the network's arithmetic", choices=("float32", "bfloat16")),
}
_METHOD: Mapping[str, Setting] = {
    "alpha": Setting("weight of the distillation loss; the method's own if left out", float),
    "temperature": Setting("of the distillation; the method's own if left out", float),
    "reduction": Setting("of the distillation over pairs of exits; sum is the paper's Eq. 3", choices=("sum", "mean")),
    "pair_exit": Setting("the early exit of pml-..., which train it and the last; 1 if left out", int),
    "beta": Setting("weight of the hidden states' distance in bert-pkd; the method's own if left out", float),
    "granularity": Setting("what shares one Gramian", choices=("global", "layer", "tensor")),
    "scope": Setting("which parameters are aligned: all, or the trunk, those of no exit", choices=("all", "trunk")),
}
_IMAGES: Mapping[str, Setting] = {
    "data": Setting(
        "images; a file holds x_train, x_test, uint8 (N, H, W, C), and y_train, y_test, integers from 0",
        metavar="digits|PATH.npz",
    ),
    "depth": Setting("layers of the ResNet, 6n + 2", int),
    "exits": Setting("block, shallow-deep, or block numbers as 4,8,12", _exits),
}
_TEXT: Mapping[str, Setting] = {
    "data_dir": Setting("folder of the GLUE tasks' folders; from the hub if left out", metavar="DIR"),
    "backbone": Setting("name or path of a BERT, ALBERT, RoBERTa, DistilBERT or ELECTRA", metavar="NAME|PATH"),
    "exit": Setting("kind of the exits: pooler, linear, mean, fastbert, deebert, mix"),
    "max_length": Setting("longest sequence, tokens", int),
    "max_train": Setting("take so many training rows, a fixed random part", int),
}
_SECTIONS = {
    "training": _TRAINING,
    "method": _METHOD,
    "images": _IMAGES,
    "text, with --task": _TEXT,
}
_FLAGS = {
    "clamp": ("method", "let GA-soft stop at weight 0 instead of reversing the step", True),
    "full_step": ("method", "let GA-hard take 1 - alpha of the cross-entropy where it drops the distillation", False),
    "pretrained": ("text, with --task", "take the backbone's configuration alone and draw new weights", False),
    "buckets": ("text, with --task", "do not put rows of like length in a batch", False),
}


def type_of(name: str) -> Any:  # noqa: ANN401 (int, float, str or a function of a text)
    """Return what makes a setting's value of its text, or raise KeyError."""
    return {**_TRAINING, **_METHOD, **_TEXT}[name].type


def searchable() -> list[str]:
    """Return the names of the settings that a search can vary."""
    return [*_TRAINING, *_METHOD, *_TEXT]


def add_settings(parser: argparse.ArgumentParser, *, task: bool = True) -> None:
    """Give a parser the options that set up a run, ``--task`` among them."""
    defaults = _defaults()
    if task:
        parser.add_argument("--task", help="a GLUE task, as rte or sst-2; images if left out")
    for title, settings in _SECTIONS.items():
        section = parser.add_argument_group(title)
        for name, setting in settings.items():
            section.add_argument(
                _option(name),
                dest=name,
                type=setting.type,
                choices=setting.choices,
                metavar=setting.metavar,
                help=setting.help + defaults.get(name, ""),
                default=None,
            )
        for name, (where, text, value) in _FLAGS.items():
            if where == title:
                option = _option(name if value else f"no_{name}")
                section.add_argument(option, dest=name, action="store_const", const=value, default=None, help=text)
    add_device(parser)


def _defaults() -> dict[str, str]:
    """Return what to say of each setting's default."""
    from gradalign.multiexit.configs import ImageConfig, TextConfig

    said: dict[str, list[str]] = {}
    for kind in (ImageConfig, TextConfig):
        for field in fields(kind):
            if field.default is not MISSING and field.default is not None:
                said.setdefault(field.name, []).append(str(field.default))
    return {
        name: f" (default: {' for images, '.join(dict.fromkeys(values))}"
        + (" for text)" if len(set(values)) > 1 else ")")
        for name, values in said.items()
    }


def method(name: str) -> str:
    """Return the name of a method, for argparse, which says what is wrong with another."""
    try:
        return methods.get(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option for the device."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by field."""
    names = ["task", *(name for settings in _SECTIONS.values() for name in settings), *_FLAGS]
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def checked(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the settings that were given for a kind of runs, by field; paths are absolute.

    Raises:
        ValueError: A setting belongs to the other kind of run, or text comes without a backbone.
    """
    from gradalign.multiexit.configs import ImageConfig, TextConfig

    values = given(options)
    known = {f.name for f in fields(TextConfig if kind == TextConfig.kind else ImageConfig)}
    odd = [_option(name) for name in values if name not in known]
    if odd:
        other = "images" if kind == TextConfig.kind else "text, with --task"
        raise ValueError(f"`{odd[0]}` must come with a run on {other}, got one on {kind}; leave it out.")
    if kind == TextConfig.kind and "backbone" not in values:
        raise ValueError("`--backbone` must name an encoder for a run on text, as bert-base-uncased or a folder.")
    for name in {"data", "data_dir", "backbone"} & set(values):
        if Path(values[name]).exists():  # a run goes on from any folder
            values[name] = str(Path(values[name]).resolve())
    return values


def config_of(options: argparse.Namespace, method: str, seed: int) -> Config:
    """Return the configuration that the options make.

    Raises:
        ValueError: A setting makes no sense, or belongs to the other kind of run.
    """
    from gradalign.multiexit.configs import ImageConfig, TextConfig

    kind = ImageConfig if options.task is None else TextConfig
    return kind(method=method, seed=seed, **checked(options, kind.kind))


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device, or raise ValueError where this machine or this torch has none such."""
    name = options.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` must be auto, cpu or one that torch has, got {name!r}: {reason}") from error


def check_alone(command: str) -> None:
    """Raise ValueError where torchrun started several processes for a command that is for one."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"`torchrun` must start one process for {command}, got {ranks}; several can `train` together.")


def method_help() -> str:
    """Return the methods with a line each, as argparse takes it."""
    lines = [f"{name}: {methods.get(name).summary}" for name in methods.names()]
    text = "; ".join(
        [*lines, "kd:RULE: cross-entropy and distillation, joined by a rule; exits:RULE: one loss an exit"]
    )
    return text.replace("%", "%%")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
