"""N ranks give what one process gives on the whole batch; each rank has its part of it."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import processes, training

WRAPPED = {
    "bare": None,
    "ddp": {},
    "unused found": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}
CASES = {
    **{
        f"stacked {rule}": {"rule": rule, "options": {"collector": "stacked"}}
        for rule in ("sum", "constant", "ga-soft")
    },
    **{rule: {"rule": rule} for rule in ("pcgrad", "upgrad", "nash-mtl", "momentum-weights", "random-weights", "mgda")},
    **{f"{rule}, of rows": {"rule": rule} for rule in ("graddrop", "moco", "trimmed-mean")},
    **{f"streamed {rule}": {"rule": rule} for rule in ("ga-soft", "ga-hard of the second")},
    **{
        f"{rule}, {name}={value}": {"rule": rule, "options": {name: value}}
        for rule in ("pcgrad", "ga-soft", "ga-hard of the second")
        for name, value in (
            ("scope", "shared"),
            ("scope", "list"),
            ("granularity", "tensor"),
            ("update_every", 2),
            ("nonfinite", "propagate"),
        )
    },
    "pcgrad, blocks and shared, every other": {
        "rule": "pcgrad",
        "options": {"scope": "shared", "granularity": "tensor", "update_every": 2},
    },
    "ga-soft, blocks and shared": {"rule": "ga-soft", "options": {"scope": "shared", "granularity": "tensor"}},
    "graddrop, shared": {"rule": "graddrop", "options": {"scope": "shared"}},
    **{f"{rule}, micro-batches": {"rule": rule, "parts": 3} for rule in ("pcgrad", "ga-soft", "graddrop")},
    "batched": {"rule": "pcgrad", "options": {"collector": "batched"}},  # over ranks it is stacked
    "batched, ddp": {"rule": "pcgrad", "options": {"collector": "batched"}, "wrap": {}},
    "probed": {"rule": "ga-soft", "probe": True},
    "probed, ddp": {"rule": "ga-soft", "probe": True, "wrap": {}},
    "probed, micro-batches": {"rule": "ga-soft", "probe": True, "parts": 2},
    **{f"{rule}, scaled": {"rule": rule, "scale": 2.0**10} for rule in ("nash-mtl", "ga-soft", "moco")},
    "probed, scaled": {"rule": "ga-soft", "probe": True, "scale": 2.0**10},
    **{f"{rule}, float32": {"rule": rule, "dtype": torch.float32} for rule in ("pcgrad", "ga-soft", "upgrad")},
    **{
        f"{rule}, {name}": {"rule": rule, "wrap": wrap}
        for rule in ("pcgrad", "ga-soft", "graddrop")
        for name, wrap in WRAPPED.items()
        if wrap is not None
    },
    "pcgrad, wrapped, micro-batches": {"rule": "pcgrad", "wrap": {}, "parts": 2},
    "pcgrad, wrapped, every other": {"rule": "pcgrad", "wrap": {}, "options": {"update_every": 2}},
}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size} ranks")
def outcomes(request, tmp_path_factory):
    """What every case gave on each rank, and in one process."""
    size = request.param
    on_ranks = processes.run(training.train_all, size, CASES, folder=tmp_path_factory.mktemp("ranks"))
    return on_ranks, {name: training.train(case, None, range(size)) for name, case in CASES.items()}


def error(ours, reference):
    """The distance over the length, of gradients or parameters all together; infinite where one is missing."""
    if any((a is None) != (b is None) for a, b in zip(ours, reference, strict=True)):
        return torch.inf
    pairs = [(a, b) for a, b in zip(ours, reference, strict=True) if a is not None]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(outcomes, name):
    on_ranks, references = outcomes
    reference = references[name]
    tolerance = 1e-6 if CASES[name].get("dtype") == torch.float32 else 1e-9
    for outcome in on_ranks:
        assert "raised" not in outcome, outcome
        ours = outcome[name]
        for here, there in zip(ours["steps"], reference["steps"], strict=True):
            found = error(here["gradients"], there["gradients"])
            print(f"{len(on_ranks)} ranks, {name}: error {found:.1e}")  # noqa: T201 - pytest -s shows it
            assert found < tolerance
            seen = here["gramian"].isfinite()
            unseen = torch.zeros_like(seen)
            if here["collector"] != "stacked":  # of an auxiliary's average gradient only the product with the anchor's
                a = 1 if "of the second" in CASES[name]["rule"] and here["collector"] == "streamed" else 0
                auxiliaries = torch.arange(seen.shape[-1]) != a
                unseen |= auxiliaries.unsqueeze(0) & auxiliaries.unsqueeze(1)
            assert torch.equal(~seen, unseen)
            assert torch.allclose(here["gramian"][seen], there["gramian"][seen], rtol=1e-5, atol=1e-12)
            if there["weights"] is not None:
                assert torch.allclose(here["weights"], there["weights"], rtol=1e-5, atol=1e-12)
        assert error(ours["parameters"], reference["parameters"]) < 1e3 * tolerance


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_bits(outcomes, name):
    first, *others = [outcome[name] for outcome in outcomes[0]]
    for other in others:
        for one, two in zip(first["parameters"], other["parameters"], strict=True):
            assert torch.equal(one, two)


def test_the_streamed_collector_does_not_claim_norms_that_it_has_not_seen(outcomes):
    gramian = outcomes[0][0]["streamed ga-soft"]["steps"][0]["gramian"]
    assert gramian.isnan().tolist() == [[False, False, False], [False, True, True], [False, True, True]]
