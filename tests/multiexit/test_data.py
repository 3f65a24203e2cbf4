from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit import data

CIFAR10 = Path(
    os.environ.get(
        "GRADALIGN_CIFAR10",
        Path(__file__).parents[2].parent / "shared" / "data" / "cifar10" / "cifar10_lossless_8k_1k.npz",
    )
)


def arrays(**changed):
    pixels = np.random.default_rng(0)
    made = {
        "x_train": pixels.integers(0, 256, (40, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": pixels.integers(0, 256, (8, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    made.update(changed)
    return {name: array for name, array in made.items() if array is not None}


def save(folder, **changed):
    path = folder / "images.npz"
    np.savez(path, **arrays(**changed))
    return str(path)


def test_digits():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.held_out), len(digits.test)) == (1222, 216, 359)
    assert digits.train.images.shape == (1222, 1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.bincount().tolist() == pytest.approx([122] * 10, abs=20)
    assert digits.num_classes == 10
    assert (digits.in_channels, digits.image_size, digits.augmented) == (1, 8, False)


def test_splits_share_no_image_and_are_always_the_same():
    digits, again = data.load("digits"), data.load("digits")
    rows = [{row.numpy().tobytes() for row in split.images} for split in (digits.train, digits.held_out, digits.test)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    assert torch.equal(digits.held_out.images, again.held_out.images)


def test_inputs_have_mean_zero_and_deviation_one_over_the_training_pixels(tmp_path):
    images = data.load(save(tmp_path))
    inputs = images.inputs(images.train.images)
    assert inputs.dtype == torch.float32
    assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_a_constant_channel_stays_finite(tmp_path):
    images = data.load(save(tmp_path, x_train=np.full((40, 12, 12, 3), 7, dtype=np.uint8)))
    assert (images.inputs(images.train.images) == 0).all()


def test_a_file(tmp_path):
    made = arrays()
    images = data.load(save(tmp_path))
    assert len(images.train) + len(images.held_out) == 40
    assert (images.num_classes, images.in_channels, images.image_size, images.augmented) == (4, 3, 12, True)
    assert torch.equal(images.test.images, torch.from_numpy(made["x_test"]).permute(0, 3, 1, 2))
    assert torch.equal(images.test.labels, torch.from_numpy(made["y_test"]))


def test_labels_in_a_column_are_taken(tmp_path):
    images = data.load(save(tmp_path, y_train=np.arange(40).reshape(40, 1) % 4))
    assert torch.equal(images.train.labels, data.load(save(tmp_path)).train.labels)


def test_augmentation_is_a_flip_and_a_crop_of_each_padded_image(tmp_path):
    images = data.load(save(tmp_path))
    batch = images.train.images[:30]
    padded = torch.nn.functional.pad(batch, (4, 4, 4, 4))
    augmented = images.augment(batch, torch.Generator().manual_seed(0))
    assert augmented.shape == batch.shape
    assert augmented.dtype == torch.uint8
    many = images.augment(images.train.images[:1].expand(900, -1, -1, -1), torch.Generator().manual_seed(1))
    assert len({image.numpy().tobytes() for image in many}) > 155  # of 2 x 9 x 9 = 162; 8 offsets make 128 at most
    flips, places = set(), set()
    for image, source in zip(augmented, padded, strict=True):
        crops = {(top, left): source[:, top : top + 12, left : left + 12] for top in range(9) for left in range(9)}
        found = [(False, place) for place, crop in crops.items() if torch.equal(image, crop)]
        found += [(True, place) for place, crop in crops.items() if torch.equal(image, crop.flip(2))]
        assert len(found) == 1
        flips.add(found[0][0])
        places.add(found[0][1])
    assert flips == {False, True}
    assert len(places) > 15
    assert torch.equal(images.augment(batch, torch.Generator().manual_seed(0)), augmented)


def test_digits_are_not_augmented():
    digits = data.load("digits")
    batch = digits.train.images[:5]
    assert digits.augment(batch, torch.Generator()) is batch


BAD = {
    "a missing array": ({"y_test": None}, r"`data` must hold the arrays x_train, .*, got .* without y_test"),
    "float pixels": (
        {"x_test": np.zeros((8, 12, 12, 3))},
        r"`x_test` must hold pixels .* as uint8, got float64; convert",
    ),
    "flat images": (
        {"x_train": np.zeros((40, 432), np.uint8)},
        r"`x_train` must be square images .* got shape \(40, 432\)",
    ),
    "oblong images": ({"x_train": np.zeros((40, 12, 10, 3), np.uint8)}, r"`x_train` must be square images"),
    "no images": (
        {"x_test": np.zeros((0, 12, 12, 3), np.uint8)},
        r"`x_test` must be square images .* got shape \(0, 12",
    ),
    "channels first": (
        {"x_train": np.zeros((40, 12, 12, 12), np.uint8)},
        r"`x_train` must be \(N, H, W, C\) with C <= 4",
    ),
    "other sizes in test": (
        {"x_test": np.zeros((8, 16, 16, 3), np.uint8)},
        r"`x_test` must have images like those of `x_train`, \(12, 12, 3\), got \(16, 16, 3\)",
    ),
    "float labels": ({"y_train": np.zeros(40)}, r"`y_train` must hold integers, got float64"),
    "too few labels": (
        {"y_test": np.zeros(7, np.int64)},
        r"`y_test` must be \(8,\), one label an image, got shape \(7,\)",
    ),
    "one-hot labels": ({"y_test": np.zeros((8, 4), np.int64)}, r"`y_test` must be \(8,\), one label an image"),
    "an unknown label": ({"y_test": np.full(8, 9)}, r"`y_test` must hold labels from 0 to the largest of `y_train`, 3"),
    "one class": (
        {"y_train": np.zeros(40, int), "y_test": np.zeros(8, int)},
        r"`y_train` must hold two classes",
    ),
    "a negative label": ({"y_train": np.full(40, -1)}, r"`y_train` must hold labels from 0"),
    "one image": (
        {"x_train": np.zeros((1, 12, 12, 3), np.uint8), "y_train": np.array([3])},
        r"`x_train` must hold at least 2 images",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_array_is_named(case, tmp_path):
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        data.load(save(tmp_path, **changed))


def test_no_file_and_other_files(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"`data` must be 'digits' or the path of an .npz file, got .*nothing.npz': no such file",
    ):
        data.load(str(tmp_path / "nothing.npz"))
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with pytest.raises(ValueError, match=r"`data` must be an .npz file of plain arrays, got .*text.npz'"):
        data.load(str(text))
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"`data` must be an .npz file of plain arrays, got .*bare.npy'; write it"):
        data.load(str(tmp_path / "bare.npy"))


def test_pickles_are_not_opened(tmp_path):
    with pytest.raises(ValueError, match=r"`data` must be an .npz file of plain arrays.*with y_test, which is none"):
        data.load(save(tmp_path, y_test=np.array([{"a": 1}] * 8, dtype=object)))


@pytest.mark.skipif(not CIFAR10.is_file(), reason="GRADALIGN_CIFAR10 names no CIFAR-10 file")
def test_cifar10():
    images = data.load(str(CIFAR10))
    assert len(images.train) + len(images.held_out) == 8068
    assert len(images.test) == 1017
    assert (images.num_classes, images.in_channels, images.image_size) == (10, 3, 32)
    # The means and deviations known for CIFAR-10's training pixels, on a part of them.
    assert_close(images.mean.flatten() / 255, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.01)
    assert_close(images.deviation.flatten() / 255, torch.tensor([0.247, 0.243, 0.262]), rtol=0, atol=0.01)
