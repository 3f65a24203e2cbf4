"""Images to train on: scikit-learn's digits, or arrays from a file.

Shapes: N images of H x W pixels in NCHW, uint8; labels (N,), int64.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gradalign.errors import missing_extra

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError as error:
    raise missing_extra("numpy", "multiexit") from error

_HELD_OUT = 0.15  # of the training images
_TEST_DIGITS = 0.2
_CROP_PADDING = 4
_MOST_CHANNELS = 4
_NAMES = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class Split:
    """Some of the images.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images in three splits, and how they become inputs.

    Attributes:
        train: What the network learns from.
        held_out: A fixed random part of the training images, for choosing: thresholds are calibrated on it.
        test: For the figures that are reported.
        num_classes: C.
        mean: (channels, 1, 1), of the training pixels, in units of a pixel.
        deviation: (channels, 1, 1), of the training pixels, in units of a pixel.
        augmented: Training images are flipped and cropped at random.
    """

    train: Split
    held_out: Split
    test: Split
    num_classes: int
    mean: Tensor
    deviation: Tensor
    augmented: bool

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self.train.images.shape[2]

    def inputs(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W), uint8, as float32 of mean 0 and deviation 1 over the training pixels."""
        return (images.float() - self.mean.to(images.device)) / self.deviation.to(images.device)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the training images flipped with probability 1/2 and cropped after padding by 4 pixels.

        Args:
            images: (N, C, H, W), uint8; returned as they are where the data is not ``augmented``.
            generator: Makes all random choices, on the CPU.
        """
        if not self.augmented:
            return images
        N, _, H, W = images.shape
        flip = torch.rand(N, generator=generator) < 0.5  # noqa: PLR2004 (a fair coin)
        top, left = torch.randint(0, 2 * _CROP_PADDING + 1, (2, N, 1), generator=generator)
        rows = top + torch.arange(H)
        columns = left + torch.where(flip.unsqueeze(1), torch.arange(W - 1, -1, -1), torch.arange(W))
        padded = F.pad(images, (_CROP_PADDING,) * 4)
        # (N, 1, 1) x (N, H, 1) x (N, 1, W), with the channels sliced whole: the result is (N, H, W, C).
        picked = padded[torch.arange(N).view(N, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return picked.permute(0, 3, 1, 2).contiguous()


def load(source: str) -> ImageData:
    """Return the images of ``source``.

    Args:
        source: "digits", the 1,797 images of 8 x 8 pixels that come with scikit-learn, or the path of an .npz file
            with the arrays x_train, y_train, x_test, y_test, as CIFAR-10 has them: images (N, H, W, C) uint8 with
            H = W, labels (N,) of integers from 0. Such images are flipped and cropped in training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no .npz, lacks an array, or an array is not as above; it is named.
        MissingExtraError: scikit-learn is not installed.
    """
    return _digits() if source == "digits" else _from_file(Path(source))


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (a second to import, and only here)
    except ImportError as error:
        raise missing_extra("scikit-learn", "multiexit") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)  # intensities from 0 to 16
    whole = Split(images, torch.from_numpy(bunch.target).long())
    rest, test = _divide(whole, _TEST_DIGITS, seed=0)
    return _with_held_out(rest, test, augmented=False)


def _from_file(path: Path) -> ImageData:
    if not path.is_file():
        raise FileNotFoundError(
            f"`data` must be 'digits' or the path of an .npz file, got {str(path)!r}: no such file."
        )
    arrays = _read(path)
    missing = [name for name in _NAMES if name not in arrays]
    if missing:
        raise ValueError(
            f"`data` must hold the arrays {', '.join(_NAMES)}, got {str(path)!r} without {', '.join(missing)}."
        )
    return _with_held_out(_split(arrays, "train"), _split(arrays, "test"), augmented=True)


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return those arrays of the file that are wanted; objects in it are not unpickled."""
    name = None
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one bare array")
        with loaded as file:
            arrays = {}
            for name in set(_NAMES) & set(file.files):
                arrays[name] = file[name]
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        where = f" with {name}, which is none" if name else ""
        raise ValueError(
            f"`data` must be an .npz file of plain arrays, got {str(path)!r}{where}; write it by numpy.savez."
        ) from error


def _split(arrays: dict[str, NDArray[np.generic]], part: str) -> Split:
    """Return the split made of x_part and y_part, or say which of the arrays is wrong."""
    name, label_name = f"x_{part}", f"y_{part}"
    images, labels = arrays[name], arrays[label_name]
    if images.dtype != np.uint8:
        raise ValueError(
            f"`{name}` must hold pixels from 0 to 255 as uint8, got {images.dtype}; convert by"
            " x.round().astype('uint8'), after x = 255 * x where they go from 0 to 1."
        )
    if images.ndim != 4 or images.shape[1] != images.shape[2] or 0 in images.shape:
        raise ValueError(
            f"`{name}` must be square images (N, H, W, C), at least one, got shape {images.shape};"
            " channels that come second go last by x.transpose(0, 2, 3, 1)."
        )
    if images.shape[3] > _MOST_CHANNELS:
        raise ValueError(f"`{name}` must be (N, H, W, C) with C <= {_MOST_CHANNELS}, got shape {images.shape}.")
    if images.shape[1:] != arrays["x_train"].shape[1:]:
        raise ValueError(
            f"`{name}` must have images like those of `x_train`, {arrays['x_train'].shape[1:]}, got {images.shape[1:]}."
        )
    labels = _labels(label_name, labels, len(images), int(arrays["y_train"].max()))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def _labels(name: str, labels: NDArray[np.generic], num_images: int, largest: int) -> NDArray[np.generic]:
    """Return the labels (N,), or say what is wrong with them."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{name}` must hold integers, got {labels.dtype}; convert by y.astype('int64').")
    if labels.shape == (num_images, 1):  # as some packages deliver CIFAR-10
        labels = labels[:, 0]
    if labels.shape != (num_images,):
        raise ValueError(
            f"`{name}` must be ({num_images},), one label an image, got shape {labels.shape}; one-hot rows become"
            " labels by y.argmax(1)."
        )
    if labels.min() < 0 or labels.max() > largest:
        raise ValueError(
            f"`{name}` must hold labels from 0 to the largest of `y_train`, {largest}, got {labels.min()} to"
            f" {labels.max()}; number the classes from 0."
        )
    return labels


def _divide(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Return all but ``share`` of the rows, and those, by a fixed random choice; at least one row each."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    cut = len(split) - max(1, round(share * len(split)))
    first, second = order[:cut].sort().values, order[cut:].sort().values
    return Split(split.images[first], split.labels[first]), Split(split.images[second], split.labels[second])


def _with_held_out(rest: Split, test: Split, *, augmented: bool) -> ImageData:
    if len(rest) < 2:
        raise ValueError(f"`x_train` must hold at least 2 images, one of them to be held out, got {len(rest)}.")
    num_classes = int(rest.labels.max()) + 1
    if num_classes == 1:
        raise ValueError("`y_train` must hold two classes or more, got 0 alone.")
    train, held_out = _divide(rest, _HELD_OUT, seed=1)
    # Counted, not summed over pixels: exact in float64 whatever the number of images.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in train.images.transpose(0, 1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean.unsqueeze(1)).square()).sum(1)
    deviation = variance.sqrt().clamp(min=1.0)  # a constant channel stays as it is
    return ImageData(
        train, held_out, test, num_classes, mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1), augmented
    )
