"""The rows of the first table in docs/compatibility.md."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch._functorch import config as functorch_config

from tests.compatibility import nets
from tests.compatibility.cells import COLLECTORS, Row
from tests.compatibility.flows import (
    auxiliary_comes_and_goes,
    changed_by_hooks,
    generator_and_discriminator,
    read_by_hooks,
    run_after_accumulation,
)

# A plain backward adds the losses' gradients up in a dtype's arithmetic, where parts of up to 0.3 cancel; the aligner
# adds up float32 gradients. A probe's derivative, by which all is multiplied, is made in that arithmetic too.
BFLOAT16 = {"rtol": 2 * torch.finfo(torch.bfloat16).eps, "atol": 0.3 * torch.finfo(torch.bfloat16).eps}
# What is rounded to bfloat16 once, from sums in another order, may be rounded to a neighbour.
ROUNDED = {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 1e-5}
# A probe's derivative in float16.
FLOAT16 = {"rtol": 2 * torch.finfo(torch.float16).eps, "atol": 1e-6}
# Central differences in float32, where a layer has no forward mode: the weight, by which all is multiplied, is so near.
DIFFERENCES = {"rtol": 1e-3, "atol": 1e-7}

CHECKPOINT = (ValueError, r"`losses\['main'\]` must not pass through reentrant .* pass use_reentrant=False")
DENSE = (ValueError, r"`losses\['main'\]` must have dense gradients, got a torch.sparse_coo one")
DONATED = (ValueError, r"`losses\['main'\]` must leave .* set torch._functorch.config.donated_buffer = False before")
COMPILED = (ValueError, r"`losses\['main'\]` must not pass through a compiled .* take collector='stacked'")
UNBATCHED = (RuntimeError, r"collector='batched' every operator .* take collector='stacked'")


def everywhere(refusal):
    return dict.fromkeys(COLLECTORS, refusal)


def compiled(net):
    """Compile a network by all that goes before code generation, which decides what a backward may use up."""
    torch._dynamo.reset()
    net.compile(backend="aot_eager")


def compiled_for_one_backward(net):
    """Compile a network's backward for a loss that is differentiated once."""
    compiled(net)
    sum(net.losses().values()).backward()
    net.zero_grad()


ROWS = {
    "activation checkpointing, `use_reentrant=False`": Row(nets.Checkpointed),
    "the same, with dropout in it": Row(partial(nets.Checkpointed, dropout=0.3), refused={"batched": UNBATCHED}),
    "activation checkpointing, `use_reentrant=True`": Row(
        partial(nets.Checkpointed, reentrant=True), refused=everywhere(CHECKPOINT)
    ),
    "tied weights": Row(partial(nets.Words, tied=True)),
    "`nn.Embedding(sparse=True)`": Row(
        partial(nets.Words, sparse=True), refused=everywhere(DENSE) | {"batched": UNBATCHED}
    ),
    "frozen parameters": Row(nets.frozen),
    "parameters that one group, or none, reaches": Row(nets.Reaching),
    "BatchNorm": Row(nets.normalised),
    "dropout": Row(nets.dropped),
    "GRU": Row(partial(nets.Sequence, nn.GRU)),
    "LSTM": Row(partial(nets.Sequence, nn.LSTM), tolerances={"probed": DIFFERENCES}),
    "LSTM and dropout": Row(partial(nets.Sequence, nn.LSTM, dropout=0.3), tolerances={"probed": DIFFERENCES}),
    "channels_last": Row(nets.Pictures),
    "`torch.compile`": Row(nets.Net, prepare=compiled, refused={"batched": COMPILED}),
    "`torch.compile`, after a plain `backward()`": Row(
        nets.Net,
        prepare=compiled_for_one_backward,
        refused={"stacked": DONATED, "streamed": DONATED, "batched": COMPILED},
    ),
    "the same, with `donated_buffer = False`": Row(
        nets.Net,
        prepare=compiled_for_one_backward,
        around=partial(functorch_config.patch, donated_buffer=False),
        refused={"batched": COMPILED},
    ),
    "a module that two groups share": Row(nets.Siamese),
    "an auxiliary loss that comes and goes": Row(nets.Net, check=auxiliary_comes_and_goes),
    "several aligners on one model": Row(nets.Net, check=generator_and_discriminator),
    "`register_hook` that reads the gradient": Row(
        nets.Net, check=read_by_hooks, refused={"batched": UNBATCHED}, in_part=("probed",)
    ),
    "`register_hook` that changes the gradient": Row(nets.Net, check=changed_by_hooks, in_part=("probed",)),
    "`register_post_accumulate_grad_hook`": Row(nets.Net, check=run_after_accumulation),
    "bfloat16 autocast": Row(partial(nets.Autocast, torch.bfloat16), tolerances={"sum": BFLOAT16, "probed": BFLOAT16}),
    "bfloat16 parameters": Row(
        nets.Narrow,
        tolerances={"sum": BFLOAT16, "probed": BFLOAT16, "pcgrad": ROUNDED, "ga-soft": ROUNDED},
    ),
    "float16 autocast with a `GradScaler`": Row(
        partial(nets.Autocast, torch.float16), tolerances={"probed": FLOAT16}, scale=2.0**10
    ),
}
