"""What early exiting gives and costs: accuracy at each exit, speed-up in layers, multiply-accumulates."""

from __future__ import annotations

from torch import Tensor, nn

from gradalign.multiexit.objectives import check_count, check_labels, check_logits
from gradalign.multiexit.resnet import MultiExitResNet


def speed_up(exits: Tensor, num_exits: int) -> float:
    """Return how many times fewer layers were run than without early exiting.

    M N / sum_m m N_m, where N_m of the N rows left at exit m; each exit counts as one layer's cost.

    Args:
        exits: (N,), integer, in 1..M, N >= 1: where each row left.
        num_exits: M.

    Returns:
        Dimensionless, from 1 (all at the last exit) to M (all at the first).

    Raises:
        TypeError: ``exits`` is no integer tensor.
        ValueError: ``exits`` is empty or outside 1..M.

    >>> import torch
    >>> speed_up(torch.tensor([1, 3]), num_exits=4)  # 4 * 2 / (1 + 3)
    2.0
    """
    if not isinstance(exits, Tensor) or exits.is_floating_point() or exits.is_complex():
        got = exits.dtype if isinstance(exits, Tensor) else type(exits).__name__
        raise TypeError(f"`exits` must be an integer tensor, got {got}; give the `exits` of a decision.")
    if exits.numel() == 0:
        raise ValueError("`exits` must hold at least one row, got none.")
    low, high = (int(bound) for bound in exits.aminmax())
    if low < 1 or high > num_exits:
        raise ValueError(f"`exits` must be in 1..{num_exits}, counted from 1, got {low} to {high}.")
    return num_exits * exits.numel() / int(exits.sum())


def exit_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows that each exit classifies right.

    Args:
        logits: (M, N, C), floating, N >= 1.
        labels: (N,), integer, in [0, C).

    Returns:
        (M,), in [0, 1].

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` no integer one.
        ValueError: A shape is not as above, there is no row, or a label is outside [0, C).
    """
    _, N, C = check_logits(logits)
    check_labels(labels, N, C)
    if N == 0:
        raise ValueError("`logits` must hold at least one row, got none.")
    return (logits.argmax(-1) == labels).sum(1) / N


def exit_macs(model: MultiExitResNet, image_size: int, *, heads: bool = True) -> tuple[int, ...]:
    """Return the multiply-accumulates for one image from the input up to and including each exit.

    Convolutions and linear layers are counted; normalisation, activation, pooling and additions are not.

    Args:
        model: The network; nothing is run.
        image_size: Side of the square image, pixels.
        heads: Count the internal heads, all of those on the way, as when every exit is asked in turn; False
            leaves them out. The last exit's linear layer always counts.

    Returns:
        (M,), ascending.

    Raises:
        TypeError: ``model`` is no ``MultiExitResNet``, or ``image_size`` no integer.
        ValueError: ``image_size`` is below 1.

    >>> exit_macs(MultiExitResNet(depth=56, exits=[]), 32)
    (125485696,)
    """
    if not isinstance(model, MultiExitResNet):
        raise TypeError(f"`model` must be a MultiExitResNet, got {type(model).__name__}.")
    check_count("image_size", image_size)
    total, side = _convolutions(model.stem, image_size)
    done, counts = 0, []
    for exit, (end, head) in enumerate(zip(model.exit_blocks, model.heads, strict=True), 1):
        for block in range(done, end):
            macs, side = _convolutions(model.blocks[block], side)
            total += macs
        if heads or exit == model.num_exits:
            # A linear layer sees one vector an image: as many multiply-accumulates as weights.
            total += sum(layer.weight.numel() for layer in head.modules() if isinstance(layer, nn.Linear))
        counts.append(total)
        done = end
    return tuple(counts)


def _convolutions(module: nn.Module, side: int) -> tuple[int, int]:
    """Return the multiply-accumulates of the convolutions, one after the other, and the side after them."""
    macs = 0
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            side = -(-side // layer.stride[0])  # padding 1 on a 3x3 kernel: ceil(side / stride)
            macs += layer.weight.numel() * side**2
    return macs, side
