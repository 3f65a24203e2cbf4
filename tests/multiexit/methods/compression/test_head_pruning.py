from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("transformers")

from gradalign.multiexit.methods.compression import head_pruning, layers
from tests.multiexit.methods.compression import tiny

FAMILIES = ("bert", "albert", "roberta", "distilbert", "electra")
BATCH, LABELS = tiny.rows(3)


def network(family="bert", layers=4):
    return tiny.encoder(family, layers=layers, exits=[]).double().eval()


def row_losses(model, masks):
    """The loss of each row with these masks, (projections, heads), the same for all rows."""
    with torch.no_grad(), head_pruning.masked(head_pruning.projections(model), masks[:, None].expand(-1, 3, -1)):
        return F.cross_entropy(model(**BATCH)[-1], LABELS, reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_derivative_by_the_masks(family):
    model = network(family, layers=2)
    found = head_pruning.sensitivity(model, BATCH, LABELS)
    count = 1 if family == "albert" else 2  # ALBERT's layers share their heads
    assert found.shape == (count, 2)
    for k in range(count):
        for head in range(2):
            up, down = torch.ones(2, count, 2, dtype=torch.float64)
            up[k, head] += 1e-5
            down[k, head] -= 1e-5
            slopes = (row_losses(model, up) - row_losses(model, down)) / 2e-5
            assert_close(found[k, head], slopes.abs().sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_for_good_is_a_mask_of_zero(family):
    model = network(family)
    gone = torch.zeros(len(head_pruning.projections(model)), 2, dtype=torch.bool)
    gone[0, 1] = gone[-1, 0] = True
    with (
        head_pruning.masked(head_pruning.projections(model), (~gone).double()[:, None].expand(-1, 3, -1)),
        torch.no_grad(),
    ):
        expected = model(**BATCH)
    before = model(**BATCH)
    head_pruning.mask_heads(model, gone)
    assert_close(model(**BATCH), expected)
    assert not torch.allclose(before, expected)


def test_normalisation_by_hand():
    # lengths 5 and 13: (.6, .8), (5/13, 12/13); least 5/13, range 7/13: (.6 - 5/13) 13/7 = 2.8/7, (.8 - 5/13) 13/7
    found = head_pruning.normalised(torch.tensor([[3.0, 4.0], [5.0, 12.0]]))
    assert_close(found, torch.tensor([[0.4, 5.4 / 7], [0.0, 1.0]]))
    assert_close(head_pruning.normalised(torch.tensor([[0.0, 0.0], [3.0, 4.0]])), torch.tensor([[0, 0], [0.75, 1.0]]))


class Scripted(tiny.Tokens):
    """A workload whose scores are what a test says."""

    def __init__(self, script):
        super().__init__(tiny.config("head-pruning"))
        self.script = list(script)

    def scores(self, logits, labels):
        return {"accuracy": torch.tensor([self.script.pop(0)], dtype=torch.float64)}


def masked_heads(model):
    return [
        [bool((block == 0).all()) for block in module.weight.unflatten(1, (2, -1)).unbind(1)]
        for module in head_pruning.projections(model)
    ]


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ([1.0, 0.89], 0),  # the first round is undone
        ([1.0, 0.95, 0.9, 0.91, 0.5, 1.0], 3),  # 90 % is enough; the fourth is undone and the last
        ([0.0] * 8, 0),  # Matthews' of one answer for all rows: nothing can fall
        ([1.0] * 8, 7),  # eight heads, one a round: one is left
    ],
)
def test_rounds_until_the_score_falls(script, count):
    work = Scripted(script)
    model = layers.with_layers(tiny.encoder(), range(4)).eval()
    first = head_pruning.importance(model, work)
    kept = head_pruning.pruned(model, work)
    order = masked_heads(kept)
    assert sum(map(sum, order)) == count
    if count:
        assert order[int(first.argmin()) // 2][int(first.argmin()) % 2]  # the least important is among them


def test_each_round_masks_the_least_important_that_is_left():
    work = Scripted([1.0, 1.0, 1.0, 0.0])
    model = layers.with_layers(tiny.encoder(), range(4)).eval()
    twin = layers.with_layers(model, range(4)).eval()
    gone = torch.zeros(4, 2, dtype=torch.bool)
    for _ in range(2):
        values = head_pruning.importance(twin, work)
        values[gone] = 2.0
        gone.view(-1)[values.argmin()] = True
        head_pruning.mask_heads(twin, gone)
    head_pruning.pruned(model, work)
    assert torch.tensor(masked_heads(model)).equal(gone)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_importance_sums_over_the_batches_and_has_no_dropout():
    work = tiny.Tokens(tiny.config("head-pruning"))
    model = tiny.encoder(exits=[]).train()
    found = head_pruning.importance(model, work)
    assert model.training
    inputs, labels = work.splits["train"]
    at_once = head_pruning.sensitivity(model.eval(), inputs, labels)
    assert_close(found, head_pruning.normalised(at_once))
    assert all(p.grad is None for p in model.parameters())
