import pytest
import torch

from benchmarks import early_exit as benchmark
from gradalign.multiexit import early_exit, metrics, policies

TINY = {
    "resnet": lambda: benchmark.resnet(24, depth=14, side=8),
    "encoder": lambda: benchmark.encoder(24, width=32, length=5),
}


@pytest.fixture(params=TINY)
def workload(request):
    with torch.random.fork_rng(devices=[]):
        return TINY[request.param]()


@pytest.mark.parametrize("share", [0, 0.25, 0.6, 1])
def test_rows_that_left_change_nothing_however_late_they_are_dropped(workload, share):
    logits = benchmark.stored_logits(workload)
    policy = benchmark.calibrated(logits, 2.0)
    assert len(policy(logits).unique()) >= 3
    late = benchmark.late_exit(workload.model, workload.inputs, policy, share)
    for expected in (early_exit(workload.model, workload.inputs, policy), policy.decide(logits)):
        assert torch.equal(late.exits, expected.exits)
        assert torch.equal(late.labels, expected.labels)
        torch.testing.assert_close(late.logits, expected.logits)


def test_rows_are_dropped_when_the_share_has_left(workload):
    logits = benchmark.stored_logits(workload)
    policy = benchmark.calibrated(logits, 2.0)
    exits = policy(logits)
    heads = [next(m for m in head.modules() if isinstance(m, torch.nn.Linear)) for head in workload.model.heads]
    seen = {}
    for share in (0, 1):
        hooks = [
            head.register_forward_hook(
                lambda _, inputs, __, share=share: seen.setdefault(share, []).append(len(inputs[0]))
            )
            for head in heads
        ]
        benchmark.late_exit(workload.model, workload.inputs, policy, share)
        for hook in hooks:
            hook.remove()
    assert seen[0] == [int((exits >= exit).sum()) for exit in range(1, int(exits.max()) + 1)]
    assert seen[1] == [24] * int(exits.max())


def test_tables_and_curves(workload):
    measured = benchmark.throughput(workload, (1, 8), (2.0,), 1, "cpu")
    assert list(measured) == [
        "full depth, batch 1",
        "early exit at 2x, batch 1",
        "full depth, batch 8",
        "early exit at 2x, batch 8",
    ]
    logits = benchmark.stored_logits(workload)
    reached = metrics.speed_up(benchmark.calibrated(logits, 2.0)(logits), len(logits))
    assert measured["early exit at 2x, batch 8"]["speed-up in layers"] == reached
    assert measured["full depth, batch 8"]["speed-up in time"] == 1
    assert measured["early exit at 2x, batch 1"]["speed-up over batches of one"] == 1
    assert benchmark.throughput_table(measured).count("\n| early exit at 2x | ") == 2
    assert [size for size, _ in benchmark.curves(measured)["early exit at 2x"]] == [1, 8]


def test_one_thread_is_restored():
    before = torch.get_num_threads()
    with benchmark.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_every_policy_of_the_benchmark_is_calibrated_by_temperatures(workload):
    found = benchmark.calibrated(benchmark.stored_logits(workload), 2.0)
    assert type(found) is policies.Calibrated
    assert len(set(found.temperatures)) > 1
