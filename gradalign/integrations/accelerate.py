"""A loop of Hugging Face Accelerate whose ``backward`` takes named losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.optim import Optimizer

from gradalign import GradientAligner
from gradalign.errors import missing_extra
from gradalign.integrations.micro_batches import divided, divided_probe

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as error:
    raise missing_extra("accelerate", "accelerate") from error

_Losses = Mapping[str, Tensor | Sequence[Tensor]]


def backward(
    accelerator: Accelerator, optimizer: Optimizer, losses: _Losses, *, probe: Callable[[], _Losses] | None = None
) -> None:
    """Align the losses' gradients: ``accelerator.backward``, for a ``GradientAligner`` that the accelerator prepared.

    As there, the losses are divided by ``gradient_accumulation_steps`` and multiplied by the scale of float16 training.
    Within ``accelerator.accumulate(model)`` all micro-batches but the last only add up. Everything else stays the
    accelerator's: ``clip_grad_norm_``, the prepared scheduler, ``save_state`` and ``load_state``, with which the rule's
    state goes too.

    Args:
        accelerator: The accelerator that prepared the optimizer.
        optimizer: What ``accelerator.prepare`` made of a ``GradientAligner``.
        losses: As ``GradientAligner.backward`` takes them, of this process's part of the batch.
        probe: As ``GradientAligner.backward`` takes it.

    Raises:
        TypeError: ``accelerator`` or ``optimizer`` is something else.
        ValueError: The accelerator trains with DeepSpeed, Megatron-LM or FSDP of version 1, or with FSDP of version 2
            and micro-batches whose gradients it does not reduce.
        Exception: What ``GradientAligner.backward`` raises.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"`accelerator` must be an accelerate.Accelerator, got {type(accelerator).__name__}; write"
            " backward(accelerator, optimizer, losses)."
        )
    aligner = _prepared_aligner(optimizer)
    _check_gradients_can_be_had(accelerator)
    number = accelerator.gradient_accumulation_steps
    with nullcontext() if accelerator.sync_gradients else aligner.accumulate():
        aligner.backward(
            divided(losses, number), probe=divided_probe(probe, number), scaler=getattr(accelerator, "scaler", None)
        )


def _check_gradients_can_be_had(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (sharded and not accelerator.is_fsdp2):
        version = ", version 1" if sharded else ""
        raise ValueError(
            f"`accelerator` must leave every parameter its own gradient, got one with {kind.value}{version}; take"
            " DistributedDataParallel, or FSDP of version 2."
        )
    each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if sharded and not accelerator.sync_gradients and not each:
        raise ValueError(
            "`accelerator` must reduce every micro-batch's gradients with FSDP, got one that leaves them to the last;"
            " pass gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=..., sync_each_batch=True)."
        )


def _prepared_aligner(optimizer: object) -> GradientAligner:
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
    if isinstance(inner, GradientAligner):
        return inner
    got = (
        ("an unprepared " if isinstance(optimizer, GradientAligner) else "")
        + type(optimizer).__name__
        + (f" around {type(inner).__name__}" if inner is not None else "")
    )
    raise TypeError(
        f"`optimizer` must be a GradientAligner that the accelerator prepared, got {got}; write"
        " accelerator.prepare(model, GradientAligner(torch.optim.AdamW(model.parameters()), rule))."
    )
