"""Gradients most of whose rows are zero: kept, multiplied and summed by the others, as if they were dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.collectors.plans import RowSparsePlan
from gradalign.collectors.row_sparse import RowSparse, can_be_row_sparse, touched_rows, union
from gradalign.collectors.streamed import StreamedCollector
from gradalign.rules import Constant, GASoft, Sum, TrimmedMean

# Tighter than the defaults wherever the arithmetic allows it. PRODUCTS: float64 sums of the same float32 numbers in
# another order. SUMS: float32 sums in another order, and what is made of them.
PRODUCTS, SUMS = 1e-12, 1e-6

V, D = 5000, 256  # above the number of elements from which rows are looked at
EVERY = range(0, V, 2)  # too many rows to be few


def matrix(rows, dtype=torch.float32):
    gradient = torch.zeros(V, D, dtype=dtype)
    gradient[list(rows)] = torch.randn(len(rows), D).to(dtype)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_touched_rows_are_those_that_are_not_zero(dtype):
    gradient = matrix([3, 900, 4999], dtype)
    gradient[900, :-1] = 0  # one element, the last
    gradient[7, 5] = torch.finfo(dtype).tiny / 2  # subnormal
    gradient[11, 0] = torch.nan
    assert touched_rows(gradient).tolist() == [3, 7, 11, 900, 4999]
    assert touched_rows(torch.zeros(V, D, dtype=dtype)).tolist() == []


@pytest.mark.parametrize("rows", [range(V), EVERY, range(1, 1 + V // 4 + 1)], ids=["all", "half", "a few too many"])
def test_many_rows_are_not_told(rows):
    assert touched_rows(matrix(rows)) is None


def test_a_quarter_of_the_rows_is_few():
    assert touched_rows(matrix(range(1, 1 + V // 4))).tolist() == list(range(1, 1 + V // 4))


def test_rows_of_a_transposed_gradient_are_not_looked_at():
    assert touched_rows(torch.zeros(D, V).t()) is None


def test_which_parameters_are_worth_a_look():
    assert can_be_row_sparse(torch.empty(V, D))
    assert not can_be_row_sparse(torch.empty(D, V).t())
    assert not can_be_row_sparse(torch.empty(V * D))
    assert not can_be_row_sparse(torch.empty(V // 2, D))
    assert not can_be_row_sparse(torch.empty(V, D, device="meta"))


def test_arithmetic_of_row_sparse_matrices():
    a, b = matrix([1, 5, 9]), matrix([5, 6])
    one, two = (RowSparse(touched_rows(m), m[touched_rows(m)]) for m in (a, b))
    assert union([one.index, two.index]).tolist() == [1, 5, 6, 9]
    assert union([two.index, two.index.clone()]).tolist() == [5, 6]
    assert torch.equal(one.dense(torch.full((V, D), torch.nan)), a)
    assert torch.equal(one.plus(two).dense(torch.empty(V, D)), a + b)
    assert torch.equal(two.on(torch.tensor([1, 5, 6, 9])), b[[1, 5, 6, 9]])


class Embedded(nn.Module):
    """An embedding whose rows each group touches as it likes, and a head that all groups reach."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(V, D, dtype=dtype)
        self.head = nn.Linear(D, 3, dtype=dtype)

    def loss(self, rows):
        if rows is None:  # a group that does not reach the table
            return self.head.weight.square().sum()
        index = torch.tensor(list(rows))
        return (self.head(self.table(index)) * torch.linspace(-1, 2, 3 * len(rows)).view(-1, 3)).square().sum() / 9

    def losses(self, reach):
        return {f"group{k}": self.loss(rows) for k, rows in enumerate(reach)}

    def dense_rows(self, *micro_batches):
        """Each group's gradient (P,) by plain autograd, summed over micro-batches, in float64."""
        summed = 0
        for reach in micro_batches:
            rows = []
            for loss in self.losses(reach).values():
                gradients = torch.autograd.grad(
                    loss, list(self.parameters()), allow_unused=True, materialize_grads=True
                )
                rows.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
            summed = summed + torch.stack(rows)
        return summed


def align(model, rule, *micro_batches, **options):
    """Align the micro-batches, and return what came out, (P,), and the aligner."""
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=1.0), rule, **options)
    *waiting, last = micro_batches
    for reach in waiting:
        with aligner.accumulate():
            aligner.backward(model.losses(reach))
    aligner.backward(model.losses(last))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), aligner


REACHES = {
    "the same rows": ([2, 5, 5, 9], [9, 2, 5]),
    "some rows in common": ([2, 5, 9], [5, 7, 4999]),
    "no row in common": ([0, 1], [4998, 4999]),
    "the first dense": (EVERY, [3, 4]),
    "the second dense": ([3, 4], EVERY),
    "all dense": (EVERY, range(1, V, 2)),
    "the first elsewhere": (None, [3, 4]),
    "the second elsewhere": ([3, 4], None),
    "three, the last one dense": ([3, 4], [4, 5], EVERY),
    "three, the middle one elsewhere": ([3, 4], None, [8, 3, 1]),
    "one": ([3, 4, 4],),
}
reaches = pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES.keys())


def weights_of(reach):
    return [2.0, -0.5, 0.25][: len(reach)]


@reaches
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_gramian_and_sum_are_those_of_dense_gradients(reach, granularity):
    model = Embedded()
    J = model.dense_rows(reach)
    aligned, aligner = align(model, Constant(weights_of(reach)), reach, granularity=granularity, collector="stacked")
    blocks = [J] if granularity == "global" else J.split([V * D, 3 * D, 3], dim=1)
    G = torch.stack([block @ block.T for block in blocks]).squeeze(0)
    assert_close(aligner.report.gramian, G, rtol=PRODUCTS, atol=PRODUCTS * G.abs().max().item())
    assert_close(aligned, (torch.tensor(weights_of(reach)).double() @ J).float(), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = Embedded(dtype)
    reach = REACHES["some rows in common"]
    J = model.dense_rows(reach)
    aligned, aligner = align(model, Constant([2.0, -0.5]), reach, collector="stacked")
    assert_close(aligner.report.gramian, J @ J.T, rtol=PRODUCTS, atol=0)
    assert_close(aligned, (torch.tensor([2.0, -0.5]).double() @ J).to(dtype))


@reaches
def test_sum_is_plain_backward(reach):
    model, plain = Embedded(), Embedded()
    sum(plain.losses(reach).values()).backward()
    aligned, _ = align(model, Sum(), reach, collector="stacked")
    assert_close(aligned, torch.cat([p.grad.flatten() for p in plain.parameters()]), rtol=SUMS, atol=SUMS)


MICRO_BATCHES = {
    "few rows each": (([1, 2], [2, 3]), ([7, 2], [9, 1]), ([1], [4999])),
    "first few, then many": (([1, 2], [2, 3]), (EVERY, EVERY)),
    "first many, then few": ((EVERY, EVERY), ([1, 2], [2, 3])),
    "a second group becomes dense": (([1, 2], [2, 3]), ([4, 2], EVERY)),
    "the first group becomes dense": (([1, 2], [2, 3]), (EVERY, [4, 2])),
    "many in the end": ((range(1, V, 9), [1]), (range(2, V, 9), [1]), (range(3, V, 9), [1])),
    "a group comes later": (([1, 2], None), ([7, 2], [9, 1])),
    "the lead is another": ((None, [2, 3]), ([7, 2], [9, 1])),
    "one group": (([1, 2],), ([7, 2],)),
}


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES.values(), ids=MICRO_BATCHES.keys())
def test_micro_batches_add_up(micro_batches):
    model = Embedded()
    J = model.dense_rows(*micro_batches)
    weights = [2.0, -0.5][: len(J)]
    aligned, aligner = align(model, Constant(weights), *micro_batches, collector="stacked")
    G = J @ J.T
    assert_close(aligner.report.gramian, G, rtol=SUMS, atol=SUMS * G.abs().max().item())
    assert_close(aligned, (torch.tensor(weights).double() @ J).float(), rtol=SUMS, atol=SUMS)


@reaches
def test_scope_shared(reach):
    model = Embedded()
    J = model.dense_rows(reach)
    aligned, aligner = align(model, Constant(weights_of(reach)), reach, scope="shared", collector="stacked")
    embedded = sum(rows is not None for rows in reach) > 1  # else one group alone reaches the table and the bias
    table, head, bias = J.split([V * D, 3 * D, 3], dim=1)
    kept = torch.cat([table, head, bias] if embedded else [head if len(reach) > 1 else head[:, :0]], dim=1)
    assert_close(aligner.report.gramian, kept @ kept.T, rtol=PRODUCTS, atol=1e-9)  # where products cancel
    assert_close(aligned, (torch.tensor(weights_of(reach)).double() @ J).float(), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("reach", [reach for reach in REACHES.values() if len(reach) > 1])
@pytest.mark.parametrize("scope", ["all", "shared"])
def test_streamed_sees_and_writes_what_stacked_does(reach, scope):
    outcomes = [align(Embedded(), GASoft(0.3), reach, scope=scope, collector=c) for c in ("streamed", "stacked")]
    (streamed, one), (stacked, two) = outcomes
    assert one.report.collector == "streamed"
    assert_close(streamed, stacked, rtol=SUMS, atol=1e-7)
    seen = one.report.gramian.isfinite()
    assert_close(one.report.gramian[seen], two.report.gramian[seen], rtol=PRODUCTS, atol=PRODUCTS)


def test_rules_of_rows_get_dense_rows(monkeypatch):
    model = Embedded()
    reach = REACHES["three, the middle one elsewhere"]
    J = model.dense_rows(reach)
    seen = []
    aligned = TrimmedMean._aligned
    monkeypatch.setattr(
        TrimmedMean, "_aligned", lambda self, rows, *rest: (seen.append(list(rows)), aligned(self, rows, *rest))[1]
    )
    came, _ = align(model, TrimmedMean(), reach)
    assert_close(torch.stack(seen[0]).double(), J, rtol=SUMS, atol=SUMS)
    assert_close(came.double(), J.median(0).values, rtol=SUMS, atol=SUMS)


def test_rules_of_rows_take_a_narrow_table_beside_wide_parameters():
    torch.manual_seed(3)
    table, head = nn.Embedding(V, D, dtype=torch.bfloat16), nn.Linear(D, 3)
    optimizer = GradientAligner(torch.optim.SGD([*table.parameters(), *head.parameters()], lr=1.0), TrimmedMean(trim=0))
    losses = {
        name: head(table(torch.tensor(rows)).float()).square().mean() for name, rows in (("a", [1, 2]), ("b", [2]))
    }
    expected = [torch.autograd.grad(loss, table.weight, retain_graph=True)[0].float() for loss in losses.values()]
    optimizer.backward(losses)
    assert_close(table.weight.grad.float(), sum(expected) / 2, rtol=1e-2, atol=1e-6)


def test_gradients_that_are_there_are_added_to():
    model = Embedded()
    reach = REACHES["some rows in common"]
    J = model.dense_rows(reach)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    aligned, _ = align(model, Constant([2.0, -0.5]), reach, collector="stacked")
    assert_close(aligned, 1 + (torch.tensor([2.0, -0.5]).double() @ J).float(), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("collector", ["stacked", "streamed"])
def test_every_step_has_its_own_rows(collector):
    model = Embedded()
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.0), GASoft(0.3), collector=collector)
    steps = (
        ([1, 2], [2, 3]),
        (EVERY, range(1, V, 2)),
        ([7], [9, 1]),
        (None, None),
        ([3], [3, 4]),
        (EVERY, [5]),
        ([5], EVERY),
    )
    for reach in steps:
        aligner.zero_grad()
        aligner.backward(model.losses(reach))
        a, b = model.dense_rows(reach)
        assert_close(aligner.report.gramian[0], torch.stack([a @ a, a @ b]), rtol=1e-10, atol=1e-12)
        gradient = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
        )
        assert_close(gradient, ((0.7 + 0.3 * (a @ b) / (a @ a)) * a).float(), rtol=1e-5, atol=1e-6)


def test_gradients_of_earlier_steps_never_change():
    model = Embedded()
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), Constant([2.0, -0.5]), collector="stacked")
    kept = []
    for reach in (([1, 2], [2, 3]), ([7, 2], [9, 1]), (EVERY, [4]), ([1], [2])):
        aligner.zero_grad()
        aligner.backward(model.losses(reach))
        kept.append((model.table.weight.grad, model.table.weight.grad.clone()))
        aligner.step()
    assert all(torch.equal(gradient, as_it_was) for gradient, as_it_was in kept)


def test_nan_in_a_row_is_seen():
    model = Embedded()
    losses = model.losses(([1, 2], [2, 3]))
    losses["group1"] = losses["group1"] + torch.nan * model.table(torch.tensor([17])).sum()  # alone in this row
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), Sum(), nonfinite="propagate")
    aligner.backward(losses)
    assert aligner.report.norms.isfinite().tolist() == [True, False]
    assert model.table.weight.grad[17].isnan().all()


def row_sparse_plans(monkeypatch):
    """Record the rows of what is multiplied as row-sparse."""
    sizes = []
    made = RowSparsePlan.__init__

    def init(self, *args):
        made(self, *args)
        sizes.append(len(self._index))

    monkeypatch.setattr(RowSparsePlan, "__init__", init)
    return sizes


def test_only_touched_rows_are_multiplied_and_kept(monkeypatch):
    sizes = row_sparse_plans(monkeypatch)
    model = Embedded()
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), Sum(), collector="stacked")
    held = []
    monkeypatch.setattr(RowSparse, "dense", lambda self, into: held.append(into))
    for reach in (([1, 2, 3], [3, 4]), ([8], [8])):
        aligner.zero_grad()
        aligner.backward(model.losses(reach))
    assert sizes == [4, 1]
    assert held == []  # no group was made dense


def test_streamed_multiplies_touched_rows_alone(monkeypatch):
    sizes = []
    gramian = StreamedCollector._row_sparse_gramian
    monkeypatch.setattr(
        StreamedCollector,
        "_row_sparse_gramian",
        lambda self, rows: (sizes.append([len(row.index) for row in rows]), gramian(self, rows))[1],
    )
    align(Embedded(), GASoft(0.3), ([1, 2, 3], [3, 4]))
    assert sizes == [[2, 3]]
