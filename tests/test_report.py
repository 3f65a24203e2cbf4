from __future__ import annotations

import torch
from torch.testing import assert_close

from gradalign import AlignmentReport


def report(G, w, names=("ce", "kd"), **more):
    return AlignmentReport(names, torch.tensor(G, dtype=torch.float64), torch.tensor(w, dtype=torch.float64), **more)


def test_by_hand():
    # g_1 = (1, 0), g_2 = (-1, sqrt 3): norms 1 and 2, cosine -1/2, angle 120 degrees.
    seen = report([[1.0, -1.0], [-1.0, 4.0]], [1.0, -0.5])
    assert_close(seen.norms, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert_close(seen.cosines, torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
    assert_close(seen.angles, torch.tensor([[0.0, 120.0], [120.0, 0.0]], dtype=torch.float64))
    assert seen.conflicts == (("ce", "kd"),)
    assert seen.reversals == 1
    assert not seen.skipped


def test_blocks():
    seen = report([[[1.0, 0.5], [0.5, 1.0]], [[1.0, -0.5], [-0.5, 1.0]]], [[1.0, 1.0], [-1.0, -2.0]])
    assert seen.cosines.shape == (2, 2, 2)
    assert seen.norms.shape == (2, 2)
    assert seen.conflicts == (("ce", "kd"),)
    assert seen.reversals == 2
    assert "2 blocks" in repr(seen)


def test_no_conflict():
    seen = report([[1.0, 0.0], [0.0, 4.0]], [1.0, 1.0])
    assert seen.conflicts == ()
    assert repr(seen) == "AlignmentReport(ce, kd: weights [1.0, 1.0], conflicts none)"


def test_a_zero_gradient_has_no_angle():
    seen = report([[1.0, 0.0], [0.0, 0.0]], [1.0, 1.0])
    assert seen.cosines[0, 1].isnan()
    assert seen.angles[1, 1].isnan()
    assert seen.angles[0, 0] == 0


def test_rounding_does_not_push_a_cosine_past_one():
    seen = report([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], [1.0, 1.0])
    assert seen.angles.isfinite().all()
