from __future__ import annotations

import numpy as np
import pytest

from gradalign.multiexit.reproduce import Order, reproduce
from tests.multiexit.reproduce.pieces import PIECES, order_of
from tests.multiexit.text.folders import backbone, glue


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """What the pieces on text share; four layers, two seeds, one short epoch."""
    folder = tmp_path_factory.mktemp("reproduce")
    return Order(
        folder / "out",
        ("sst-2",),
        seeds=(0, 1),
        settings={
            "backbone": str(backbone(folder / "encoder", layers=4)),
            "data_dir": str(glue(folder / "glue", train=24, dev=24)),
            "epochs": 1,
            "batch_size": 10,
            "learning_rate": 3e-3,
        },
    )


@pytest.fixture(scope="session")
def made(text):
    """The files of each piece on text, all in one folder."""
    return {name: reproduce(name, order_of(text, name)) for name in PIECES}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce-images")
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    pixels = random.integers(0, 100, (60, 8, 8, 3)) + 120 * labels[:, None, None, None]
    np.savez(
        folder / "shades.npz",
        x_train=pixels[:40].astype(np.uint8),
        y_train=labels[:40],
        x_test=pixels[40:].astype(np.uint8),
        y_test=labels[40:],
    )
    return Order(
        folder / "out",
        seeds=(0, 1),
        settings={"data": str(folder / "shades.npz"), "depth": 8, "epochs": 2, "batch_size": 10, "learning_rate": 0.05},
    )
