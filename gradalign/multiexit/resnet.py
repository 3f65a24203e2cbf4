"""The CIFAR ResNet with exits along its depth.

Shapes: B images, C classes, M exits; blocks and exits are counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradalign.errors import unknown_name
from gradalign.multiexit.inference import every_exit
from gradalign.multiexit.objectives import check_count

_WIDTHS = (16, 32, 64)
_POOLED_SIDE = 4


class MultiExitResNet(nn.Module):
    """Classify images by a ResNet of depth 6n + 2 at M exits.

    A 3x3 stem of 16 channels, then 3n basic blocks in three stages of 16, 32 and 64 channels, the last two of
    which start with stride 2; identity shortcuts without parameters (option A). The last exit is the
    network's own global average pool and linear layer. Each other exit is an ``InternalHead`` after a block.

    Early exiting runs it piece by piece: ``hidden = start(inputs)``, then
    ``hidden, logits = advance(hidden, exit)`` for exit = 1, ..., M; ``forward`` does the same for all rows.

    Args:
        depth: 6n + 2 for n >= 1, layers with weights; 56 has 27 blocks and, with 10 classes and no internal
            exit, 853,018 parameters.
        num_classes: C >= 1.
        in_channels: Channels of the images.
        exits: Where the internal exits are: ``"block"``, after every block but the last; ``"shallow-deep"``,
            six at the fractions 4/27, 8/27, ..., 24/27 of the blocks, rounded, or fewer where a small depth
            makes them coincide; or the numbers of the blocks, in any order. The last exit is always there and
            is not listed.

    Attributes:
        num_exits: M.
        num_classes: C.
        exit_blocks: (M,), the number of the block before each exit, ascending; the last is 3n.

    Raises:
        TypeError: An argument is no integer, or ``exits`` neither a name nor integers.
        ValueError: ``depth`` is not 6n + 2, a count is below 1, ``exits`` is an unknown name, or a number in
            it is outside 1, ..., 3n - 1 or comes twice.

    Note:
        The authors of Shallow-Deep Networks put a 1x1 convolution on the shortcuts that change shape (option
        B); option A is the CIFAR network of He et al.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, section 4.2.
        Kaya et al., Shallow-Deep Networks: Understanding and Mitigating Network Overthinking, ICML 2019,
        arXiv:1810.07052.

    >>> model = MultiExitResNet(depth=14, exits=[2, 4])
    >>> model.exit_blocks
    (2, 4, 6)
    >>> model(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([3, 5, 10])
    """

    def __init__(
        self,
        depth: int = 56,
        num_classes: int = 10,
        in_channels: int = 3,
        exits: str | Sequence[int] = "block",
    ) -> None:
        super().__init__()
        blocks_in_a_stage = _check_depth(depth)
        self.num_classes = check_count("num_classes", num_classes)
        self.in_channels = check_count("in_channels", in_channels)
        self.exit_blocks = _exit_blocks(exits, blocks_in_a_stage * len(_WIDTHS))
        self.num_exits = len(self.exit_blocks)

        first = _WIDTHS[0]
        self.stem = nn.Sequential(_conv3x3(in_channels, first, 1), nn.BatchNorm2d(first), nn.ReLU())
        # widths[k] is block k's, widths[0] the stem's. A block that doubles the width halves the side.
        widths = [first, *(width for width in _WIDTHS for _ in range(blocks_in_a_stage))]
        self.blocks = nn.ModuleList(
            BasicBlock(before, width, stride=width // before) for before, width in pairwise(widths)
        )
        internal = [InternalHead(widths[block], num_classes) for block in self.exit_blocks[:-1]]
        last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], num_classes))
        self.heads = nn.ModuleList([*internal, last])

    def start(self, inputs: Tensor) -> Tensor:
        """Return the hidden state before the first block.

        Args:
            inputs: (B, in_channels, H, W), floating.

        Returns:
            (B, 16, H, W).

        Raises:
            TypeError: ``inputs`` is not floating.
            ValueError: ``inputs`` has another number of dimensions or channels.
        """
        if not inputs.is_floating_point():
            raise TypeError(f"`inputs` must be floating, got {inputs.dtype}; scale images by .float() / 255.")
        if inputs.ndim != 4 or inputs.shape[1] != self.in_channels:
            raise ValueError(
                f"`inputs` must be (B, {self.in_channels}, H, W), got shape {tuple(inputs.shape)}; for one"
                " image add .unsqueeze(0), for other channels set `in_channels`."
            )
        hidden: Tensor = self.stem(inputs)
        return hidden

    def layers(self, hidden: Tensor, exit: int) -> Tensor:
        """Run the blocks after the exit before, up to ``exit``.

        Args:
            hidden: (n, channels, height, width), from ``start`` for exit 1, from the exit before for the
                others; rows may have been dropped.
            exit: 1 to M.

        Returns:
            The hidden state after the exit's block, (n, channels', height', width').

        Raises:
            ValueError: There is no such exit.
        """
        if not 1 <= exit <= self.num_exits:
            raise ValueError(f"`exit` must be in 1..{self.num_exits}, got {exit}.")
        done = self.exit_blocks[exit - 2] if exit > 1 else 0
        for block in islice(self.blocks, done, self.exit_blocks[exit - 1]):
            hidden = block(hidden)
        return hidden

    def classify(self, hidden: Tensor, exit: int) -> Tensor:
        """Return the logits that an exit's head gives for the hidden state after its block, (n, C)."""
        logits: Tensor = self.heads[exit - 1](hidden)
        return logits

    def advance(self, hidden: Tensor, exit: int) -> tuple[Tensor, Tensor]:
        """Run ``layers`` and ``classify``; return the hidden state and the logits (n, C)."""
        hidden = self.layers(hidden, exit)
        return hidden, self.classify(hidden, exit)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every exit.

        Args:
            x: (B, in_channels, H, W), floating.

        Returns:
            (M, B, C), exit 1 first.
        """
        return every_exit(self, x)


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to the input, which passes by without parameters (option A).

    Where the shape changes, the shortcut takes every second pixel and fills the new channels, the last ones,
    with zeros.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, at least ``in_channels``.
        stride: Of the first convolution and the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, H, W) to (n, channels, ceil(H / stride), ceil(W / stride))."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(residual + x)


class InternalHead(nn.Module):
    """Classify a feature map by mixed pooling to 4x4 and a linear layer, as Shallow-Deep Networks do.

    pooled = a maxpool + (1 - a) avgpool, a one free scalar, ``mix``, that starts at 0.5.

    Args:
        channels: Channels of the feature map.
        num_classes: C.

    Note:
        Kaya et al. pool with kernel s = side / 4; adaptive pooling is the same where 4 divides the side, and
        needs no input size. They draw the first a uniformly from [0, 1); 0.5 is its mean.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(channels * _POOLED_SIDE**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, H, W) to logits (n, C)."""
        largest = F.adaptive_max_pool2d(x, _POOLED_SIDE)
        average = F.adaptive_avg_pool2d(x, _POOLED_SIDE)
        logits: Tensor = self.linear((self.mix * largest + (1 - self.mix) * average).flatten(1))
        return logits


def _conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _check_depth(depth: int) -> int:
    """Return n, the number of blocks in a stage."""
    n, rest = divmod(check_count("depth", depth) - 2, 6)
    if n < 1 or rest:
        near = 6 * max(1, n + (rest > 3)) + 2
        raise ValueError(f"`depth` must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}; {near} is near.")
    return n


def _every_block(num_blocks: int) -> list[int]:
    return list(range(1, num_blocks))


def _shallow_deep(num_blocks: int) -> list[int]:
    # No ties to round: 4 k num_blocks / 27 is an integer or has 3, 9 or 27 for its denominator.
    nearest = {round(4 * k * num_blocks / 27) for k in range(1, 7)}
    return sorted(nearest & set(_every_block(num_blocks)))


_PLACINGS: dict[str, Callable[[int], list[int]]] = {"block": _every_block, "shallow-deep": _shallow_deep}


def _exit_blocks(exits: str | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Return the numbers of the blocks before an exit, ascending, the last block included."""
    if isinstance(exits, str):
        if exits not in _PLACINGS:
            raise unknown_name("exits", exits, _PLACINGS)
        return (*_PLACINGS[exits](num_blocks), num_blocks)
    if not isinstance(exits, Sequence):
        raise TypeError(f"`exits` must be a name or a list of block numbers, got {exits!r}; write [4, 8].")
    numbers = sorted(check_count(f"exits[{k}]", number) for k, number in enumerate(exits))
    for before, number in pairwise([0, *numbers]):
        if number == before:
            raise ValueError(f"`exits` must name each block once, got {number} twice.")
        if number >= num_blocks:
            raise ValueError(
                f"`exits` must be in 1..{num_blocks - 1}, got {number}; the last block, {num_blocks}, has the"
                " network's own exit already: leave it out."
            )
    return (*numbers, num_blocks)
