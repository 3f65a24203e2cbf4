import copy
import dataclasses
import math
import pickle

import pytest
import torch

from gradalign.multiexit.policies import Budget, Calibrated, Entropy, MaxProbability, Patience, PatientConfidence


class TestPolicyObjects:
    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (Budget(3), "Budget(exit=3)"),
            (Entropy(0.2), "Entropy(threshold=0.2, normalized=False)"),
            (MaxProbability(0.9), "MaxProbability(threshold=0.9)"),
            (Patience(4), "Patience(patience=4, tolerance=None)"),
            (PatientConfidence(0.2, 3), "PatientConfidence(threshold=0.2, patience=3, normalized=False)"),
            (
                Calibrated(MaxProbability(0.9), torch.tensor([1.5, 2.0])),
                "Calibrated(policy=MaxProbability(threshold=0.9), temperatures=(1.5, 2.0))",
            ),
        ],
    )
    def test_are_values(self, policy, text):
        assert repr(policy) == text
        assert policy == copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy))
        assert len({policy, copy.copy(policy)}) == 1
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
            setattr(policy, dataclasses.fields(policy)[0].name, 1)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: Budget(0), ValueError, r"`exit` must be at least 1, got 0"),
            (lambda: Budget(1.5), TypeError, r"`exit` must be an integer, got 1\.5"),
            (lambda: Budget(True), TypeError, r"`exit` must be an integer, got True"),
            (lambda: Entropy(-0.1), ValueError, r"`threshold` must be finite and at least 0, got -0\.1"),
            (lambda: Entropy(math.nan), ValueError, r"`threshold` must be finite and at least 0, got nan"),
            (lambda: MaxProbability(math.inf), ValueError, r"`threshold` must be finite and at least 0, got inf"),
            (lambda: MaxProbability("0.9"), TypeError, r"`threshold` must be a number, got '0\.9'"),
            (lambda: Patience(0), ValueError, r"`patience` must be at least 1, got 0"),
            (lambda: Patience(2.0), TypeError, r"`patience` must be an integer, got 2\.0"),
            (lambda: Patience(1, -1.0), ValueError, r"`tolerance` must be finite and at least 0, got -1\.0"),
            (lambda: PatientConfidence(0.1, 0), ValueError, r"`patience` must be at least 1, got 0"),
            (lambda: PatientConfidence(-0.1, 1), ValueError, r"`threshold` must be finite and at least 0, got -0\.1"),
            (lambda: Patience(1, "x"), TypeError, r"`tolerance` must be a number, got 'x'"),
        ],
    )
    def test_refuse(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        ("policy", "logits", "error", "message"),
        [
            (Budget(4), torch.zeros(3, 2, 2), ValueError, r"`exit` must be in 1\.\.3, the exits .*got 4"),
            (Entropy(0.5), torch.zeros(3, 2, 1), ValueError, r"`logits` must have two classes .*Patience"),
            (MaxProbability(0.5), torch.zeros(3, 2, 1), ValueError, r"two classes or more for MaxProbability"),
            (PatientConfidence(0.5, 1), torch.zeros(3, 2, 1), ValueError, r"two classes or more for PatientConfidence"),
            (Patience(1), torch.zeros(3, 2, 1), ValueError, r"`tolerance` must be given .*one output, C = 1"),
            (Patience(1, 0.5), torch.zeros(3, 2, 4), ValueError, r"`tolerance` must be given .*tolerance=0\.5.*4 cl"),
            (Budget(1), torch.zeros(3, 2), ValueError, r"`logits` must be \(exits, rows, classes\)"),
            (Budget(1), torch.zeros(0, 2, 2), ValueError, r"an exit and a class at least, got shape \(0, 2, 2\)"),
            (Budget(1), torch.zeros(3, 2, 2).long(), TypeError, r"`logits` must be floating, got torch\.int64"),
            (Budget(1), [[0.0]], TypeError, r"`logits` must be one tensor .*got list"),
        ],
    )
    def test_refuse_logits(self, policy, logits, error, message):
        with pytest.raises(error, match=message):
            policy(logits)
