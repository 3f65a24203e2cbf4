"""The real files, where they are at hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from gradalign.multiexit.text import glue

GLUE = Path(os.environ.get("GRADALIGN_GLUE", Path(__file__).parents[3].parent / "shared" / "data" / "glue"))

# rows of the two files, labels counted in the order of the classes
REAL = {
    "cola": (8551, [2528, 6023], 1043, [322, 721]),
    "sst-2": (67349, [29780, 37569], 872, [428, 444]),
    "mrpc": (3668, [1194, 2474], 408, [129, 279]),
    "rte": (2490, [1249, 1241], 277, [146, 131]),
    "qnli": (10475, [5227, 5248], 5463, [2702, 2761]),
    "qqp": (20000, [12553, 7447], 3496, [2196, 1300]),
    "mnli": (20000, [6709, 6646, 6645], 5000, [1784, 1552, 1664]),
    "wnli": (635, [323, 312], 71, [40, 31]),
    "sts-b": (5749, 2.701, 1500, 2.364),
}


@pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE files at {GLUE}; GRADALIGN_GLUE names another folder")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    train, train_labels, dev, dev_labels = REAL[name]
    data = glue.load(name, GLUE)
    assert (len(data.train) + len(data.held_out), len(data.dev), data.skipped) == (train, dev, 0)
    assert len(data.held_out) == round(0.15 * train)
    labels = torch.cat([data.train.labels, data.held_out.labels])
    if name == "sts-b":
        assert labels.double().mean().item() == pytest.approx(train_labels, abs=5e-4)
        assert data.dev.labels.double().mean().item() == pytest.approx(dev_labels, abs=5e-4)
        return
    assert labels.bincount().tolist() == train_labels
    assert data.dev.labels.bincount().tolist() == dev_labels


@pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE files at {GLUE}; GRADALIGN_GLUE names another folder")
def test_real_texts_are_the_columns_that_they_should_be():
    for name in REAL:
        dev = glue.load(name, GLUE, max_train=2).dev
        for texts in (dev.first, dev.second or ()):
            assert not any(re.search(r"[\t\r\n]|^\ufeff", text) for text in texts)
            assert sum(" " in text for text in texts) >= 0.99 * len(texts)  # sentences, not numbers or labels
