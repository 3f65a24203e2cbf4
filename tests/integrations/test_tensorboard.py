"""What TensorBoard reads back is what the report says."""

from __future__ import annotations

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close
from torch.utils.tensorboard import SummaryWriter

from gradalign import AlignmentReport, GradientAligner, MissingExtraError
from gradalign.integrations.tensorboard import log_report
from tests.integrations import small

PAIRS = [("first", "second"), ("first", "third"), ("second", "third")]


def aligned(rule="pcgrad", **options):
    model = small.Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)
    optimizer.backward(model(*small.batches()[0]))
    return optimizer.report


def written(folder, *reports, **options):
    """Write reports, one a step from 5 on, and read them back."""
    with SummaryWriter(folder) as writer:
        for step, report in enumerate(reports, start=5):
            log_report(writer, report, step, **options)
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars_at(events, step):
    return {
        tag: event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
        if event.step == step and event.value is not None
    }


def counted(events, tag):
    """Return (limit, count) of a histogram's buckets that are not empty, and its number of values."""
    (event,) = events.Histograms(tag)
    buckets = zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True)
    return [(limit, count) for limit, count in buckets if count], event.histogram_value.num


def test_scalars(tmp_path):
    reports = [aligned(), aligned("sum")]
    events = written(tmp_path, *reports)
    for step, report in enumerate(reports, start=5):
        expected = {
            "align/conflicts": len(report.conflicts),
            "align/reversals": report.reversals,
            "align/skipped": 0,
            **{f"align/norm/{name}": float(report.norms[k]) for k, name in enumerate(report.names)},
            **{f"align/weight/{name}": float(report.weights[k]) for k, name in enumerate(report.names)},
            **{
                f"align/cosine/{a}/{b}": float(report.cosines[report.names.index(a), report.names.index(b)])
                for a, b in PAIRS
            },
        }
        # TensorBoard keeps float32.
        assert_close(
            scalars_at(events, step), {tag: float(value) for tag, value in expected.items()}, rtol=1e-6, atol=0
        )
    assert reports[0].conflicts


def test_reversals(tmp_path):
    report = AlignmentReport(("a", "b"), torch.eye(2), torch.tensor([-0.5, 1.0]))
    assert scalars_at(written(tmp_path, report), 5)["align/reversals"] == 1.0


def test_a_histogram_of_angles(tmp_path):
    # cos 60 = 1/2, cos 120 = -1/2, and the third pair is orthogonal.
    gramian = torch.tensor([[1.0, 0.5, -0.5], [0.5, 1.0, 0.0], [-0.5, 0.0, 1.0]], dtype=torch.float64)
    gramian[0, 1] = gramian[1, 0] = math.cos(math.radians(62))
    events = written(tmp_path, AlignmentReport(("a", "b", "c"), gramian, None), prefix="surgery")
    assert events.Tags()["histograms"] == ["surgery/angles"]
    buckets, number = counted(events, "surgery/angles")
    assert number == 3
    # 62 degrees are in the bucket that ends at 65. 90 and 120 lie on an edge, up to rounding: on either side of it.
    assert buckets[0] == (65.0, 1.0)
    assert [count for _, count in buckets] == [1.0, 1.0, 1.0]
    assert buckets[1][0] in (90.0, 95.0)
    assert buckets[2][0] in (120.0, 125.0)


def test_blocks(tmp_path):
    report = aligned(granularity="tensor")
    whole = aligned("sum")
    events = written(tmp_path, report)
    B = len(report.gramian)
    assert B == 6
    found = scalars_at(events, 5)
    for k, name in enumerate(report.names):
        assert found[f"align/norm/{name}"] == pytest.approx(float(whole.norms[k]), rel=1e-5)  # float32 sums
        assert found[f"align/weight/{name}"] == pytest.approx(float(report.weights[:, k].mean()), rel=1e-6)
        assert counted(events, f"align/blocks/norm/{name}")[1] == B
        assert counted(events, f"align/blocks/weight/{name}")[1] == B
    angles = {pair: report.angles[:, report.names.index(pair[0]), report.names.index(pair[1])] for pair in PAIRS}
    for (a, b), values in angles.items():
        finite = values[values.isfinite()]  # where a head has no gradient from one of the two there is no angle
        tag = f"align/blocks/angle/{a}/{b}"
        buckets, number = counted(events, tag)
        assert number == len(finite)
        assert sum(count for _, count in buckets) == len(finite)
    assert found["align/conflicts"] == len(report.conflicts)
    assert counted(events, "align/angles")[1] == sum(int(values.isfinite().sum()) for values in angles.values())


def test_what_the_collector_does_not_see_is_left_out(tmp_path):
    report = aligned("ga-soft")
    assert report.collector == "streamed"
    events = written(tmp_path, report)
    found = scalars_at(events, 5)
    assert "align/cosine/first/second" in found
    assert "align/cosine/second/third" not in found
    assert counted(events, "align/angles")[1] == 2
    assert all(math.isfinite(value) for value in found.values())


def test_a_skipped_step(tmp_path):
    model = small.Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", nonfinite="skip")
    losses = model(*small.batches()[0])
    optimizer.backward({**losses, "second": losses["second"] * torch.nan})
    found = scalars_at(written(tmp_path, optimizer.report), 5)
    assert found["align/skipped"] == 1.0
    assert not any(tag.startswith("align/weight") for tag in found)


def test_a_rule_without_weights_and_a_single_group(tmp_path):
    events = written(tmp_path / "rows", aligned("graddrop"))
    assert not any("weight" in tag for tag in events.Tags()["scalars"])
    events = written(tmp_path / "one", AlignmentReport(("a",), torch.ones(1, 1), torch.ones(1)))
    assert events.Tags()["histograms"] == []


def test_other_things_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`writer` must be a torch\.utils\.tensorboard\.SummaryWriter, got PosixPath;"):
        log_report(tmp_path, aligned(), 0)
    said = "`report` must be an AlignmentReport, got NoneType; write it after a backward"
    with SummaryWriter(tmp_path) as writer, pytest.raises(TypeError, match=said):
        log_report(writer, None, 0)


def test_the_page(tmp_path, monkeypatch):
    small.run_page("tensorboard", tmp_path, monkeypatch)
    events = EventAccumulator(str(tmp_path / "runs" / "observed"))
    events.Reload()
    assert len(events.Scalars("align/conflicts")) == 20


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(
        MissingExtraError, match=r"needs the package `tensorboard`, which is not .*gradalign\[tensorboard\]"
    ):
        small.import_without(
            ["tensorboard", "torch.utils.tensorboard"], "gradalign.integrations.tensorboard", monkeypatch
        )
