import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradalign.multiexit.policies import Budget, Entropy, MaxProbability, Patience, PatientConfidence
from tests.multiexit.policies.oracles import CLASSIFYING, oracle, stacked_logits


class TestDecide:
    @given(policy=CLASSIFYING, logits=stacked_logits())
    def test_is_what_the_papers_say(self, policy, logits):
        exits, answers = oracle(policy, logits)
        decision = policy.decide(logits)
        assert torch.equal(decision.exits, exits)
        assert torch.equal(policy(logits), exits)
        assert torch.equal(decision.logits, answers)
        assert torch.equal(decision.labels, answers.argmax(-1))
        assert (decision.exits.dtype, decision.labels.dtype) == (torch.int64, torch.int64)

    @given(logits=stacked_logits(classes=st.just(1)), patience=st.integers(1, 5), tolerance=st.floats(0, 2))
    def test_regression(self, logits, patience, tolerance):
        policy = Patience(patience, tolerance)
        exits, answers = oracle(policy, logits)
        decision = policy.decide(logits)
        assert torch.equal(decision.exits, exits)
        assert torch.equal(decision.logits, answers)
        assert torch.equal(decision.labels, answers[:, 0])

    @given(logits=stacked_logits())
    def test_budget_answers_with_its_exit(self, logits):
        for exit in range(1, len(logits) + 1):
            decision = Budget(exit).decide(logits)
            assert torch.equal(decision.exits, torch.full(logits.shape[1:2], exit))
            assert torch.equal(decision.logits, logits[exit - 1])

    @given(policy=CLASSIFYING, logits=stacked_logits(min_rows=1), data=st.data())
    def test_a_row_does_not_depend_on_the_rows_beside_it(self, policy, logits, data):
        rows = data.draw(st.lists(st.integers(0, logits.shape[1] - 1)))
        together, alone = policy.decide(logits), policy.decide(logits[:, rows])
        assert torch.equal(alone.exits, together.exits[rows])
        assert torch.equal(alone.logits, together.logits[rows])

    @pytest.mark.parametrize("policy", [Budget(2), Entropy(0.5), MaxProbability(0.7), Patience(1)])
    def test_no_rows(self, policy):
        decision = policy.decide(torch.zeros(3, 0, 4))
        assert (decision.exits.shape, decision.labels.shape, decision.logits.shape) == ((0,), (0,), (0, 4))

    def test_leaves_the_logits_alone(self):
        logits = torch.randn(4, 5, 3, requires_grad=True)
        before = logits.detach().clone()
        decision = MaxProbability(0.6).decide(logits)
        decision.logits.fill_(7.0)
        assert torch.equal(logits, before)
        assert not decision.logits.requires_grad

    def test_half_precision(self):
        logits = torch.randn(4, 50, 3).bfloat16()
        decision = Entropy(0.7).decide(logits)
        exits, answers = oracle(Entropy(0.7), logits)
        assert torch.equal(decision.exits, exits)
        assert torch.equal(decision.logits, answers)


class TestEntropy:
    def test_by_hand(self):
        # Two classes at odds e^x : 1. At x = 0, H = ln 2 = 0.6931; at x = ln 3, p = (3/4, 1/4) and
        # H = 2 ln 2 - 3/4 ln 3 = 0.5623. Normalised by ln 2: 1 and 0.8113.
        logits = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
        for policy, exit in [
            (Entropy(0.70), 1),
            (Entropy(0.69), 2),
            (Entropy(0.56), 3),
            (Entropy(0.82, normalized=True), 2),
            (Entropy(0.81, normalized=True), 3),
            (Entropy(1.01, normalized=True), 1),
        ]:
            assert policy(logits).tolist() == [exit]

    def test_the_surest_rows_leave(self):
        # p = 0 exactly, where p ln p is NaN.
        logits = torch.tensor([[[1e4, 0.0], [0.0, -math.inf]]]).expand(3, -1, -1)
        assert Entropy(1e-9)(logits).tolist() == [1, 1]

    def test_the_threshold_itself_does_not_leave(self):
        assert Entropy(0.0)(torch.tensor([[[1e4, 0.0]]]).expand(2, -1, -1)).tolist() == [2]

    def test_nan_never_leaves_early(self):
        assert Entropy(1.0)(torch.full((3, 1, 2), math.nan)).tolist() == [3]


class TestMaxProbability:
    LOGITS = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3)]], [[math.log(2), 0.0]]], dtype=torch.float64)

    def test_by_hand(self):
        # max p is 1/2, 3/4, 2/3.
        for threshold, exit, label in [(0.5, 1, 0), (0.51, 2, 1), (0.74, 2, 1)]:
            decision = MaxProbability(threshold).decide(self.LOGITS)
            assert (decision.exits.tolist(), decision.labels.tolist()) == ([exit], [label])

    def test_unsure_rows_get_the_most_confident_answer_at_full_cost(self):
        decision = MaxProbability(0.8).decide(self.LOGITS)
        assert decision.exits.tolist() == [3]
        assert torch.equal(decision.logits, self.LOGITS[1])

    def test_the_threshold_itself_leaves(self):
        # exp(0) / (exp(0) + exp(-inf)) = 1 exactly.
        logits = torch.tensor([[[0.0, -math.inf]], [[0.0, 0.0]]])
        assert MaxProbability(1.0)(logits).tolist() == [1]

    def test_first_of_ties(self):
        logits = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        assert MaxProbability(0.9).decide(logits).labels.tolist() == [0]

    def test_nan_is_never_the_most_confident(self):
        logits = torch.tensor([[[math.nan, 0.0]], [[0.0, 1.0]], [[math.nan, 0.0]]])
        decision = MaxProbability(0.9).decide(logits)
        assert (decision.exits.tolist(), decision.labels.tolist()) == ([3], [1])


class TestPatience:
    @pytest.mark.parametrize(
        ("labels", "patience", "exit"),
        [
            ([0, 0, 0, 0, 0], 1, 2),
            ([0, 0, 0, 0, 0], 3, 4),
            ([0, 1, 1, 0, 0], 1, 3),
            ([0, 0, 1, 1, 1], 2, 5),
            ([0, 0, 1, 1, 1], 4, 5),
            ([0, 1, 0, 1, 0], 1, 5),
            ([0], 1, 1),
        ],
    )
    def test_by_hand(self, labels, patience, exit):
        logits = torch.nn.functional.one_hot(torch.tensor(labels), 2).float().unsqueeze(1)
        assert Patience(patience)(logits).tolist() == [exit]

    def test_regression_by_hand(self):
        # Steps of 1, 0.5, 0.25: below 0.5 is the last one alone.
        logits = torch.tensor([0.0, 1.0, 0.5, 0.75, 9.0]).reshape(5, 1, 1)
        decision = Patience(1, tolerance=0.5).decide(logits)
        assert (decision.exits.tolist(), decision.labels.tolist()) == ([4], [0.75])


class TestPatientConfidence:
    # Sure (S) is p = e^9 : 1, unsure p = 1/2.
    @pytest.mark.parametrize(
        ("sure", "patience", "exit"),
        [
            ("SSSSS", 1, 1),
            ("SSSSS", 3, 3),
            ("SUSSU", 2, 4),
            ("USUSU", 2, 5),
            ("SUSUS", 1, 1),
            ("UUSSS", 3, 5),
            ("S", 4, 1),
        ],
    )
    def test_by_hand(self, sure, patience, exit):
        logits = torch.tensor([[[9.0 * (said == "S"), 0.0]] for said in sure])
        assert PatientConfidence(0.5, patience)(logits).tolist() == [exit]

    def test_labels_need_not_agree(self):
        logits = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]], [[9.0, 0.0]]])
        decision = PatientConfidence(0.5, 2).decide(logits)
        assert (decision.exits.tolist(), decision.labels.tolist()) == ([2], [1])

    @given(logits=stacked_logits(), threshold=st.floats(0, 1.5), normalized=st.booleans())
    def test_patience_of_one_is_entropy(self, logits, threshold, normalized):
        patient = PatientConfidence(threshold, 1, normalized)
        assert torch.equal(patient(logits), Entropy(threshold, normalized)(logits))

    def test_the_threshold_itself_is_not_sure(self):
        logits = torch.tensor([[[1e4, 0.0]]]).expand(3, -1, -1)
        assert PatientConfidence(0.0, 1)(logits).tolist() == [3]
        assert PatientConfidence(1e-9, 2)(logits).tolist() == [2]
