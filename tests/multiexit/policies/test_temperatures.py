import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradalign.multiexit.policies import (
    Budget,
    Calibrated,
    Entropy,
    MaxProbability,
    Patience,
    PatientConfidence,
    calibrate,
    calibrate_temperatures,
)
from tests.multiexit.policies.oracles import stacked_logits

CONFIDENT = st.one_of(
    st.builds(Entropy, threshold=st.floats(0, 1.5), normalized=st.booleans()),
    st.builds(MaxProbability, threshold=st.floats(0, 1.1)),
    st.builds(PatientConfidence, threshold=st.floats(0, 1.5), patience=st.integers(1, 3)),
)


def slope(logits, labels, b):
    """The derivative of the mean negative log-likelihood to b = 1/T, in plain Python."""
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [math.exp(b * (value - max(z))) for value in z]
        total += sum(w * value for w, value in zip(weights, z, strict=True)) / sum(weights) - z[y]
    return total / len(labels)


def bisected(logits, labels):
    """The temperature in [0.01, 100] by 200 halvings of b's range: no Newton, no tensors."""
    low, high = 0.01, 100.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(logits, labels, middle) > 0 else (middle, high)
    return 1 / low


class TestCalibrateTemperatures:
    @given(logits=stacked_logits(min_rows=2), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
    def test_is_the_minimum(self, logits, scale, seed):
        _, N, C = logits.shape
        labels = torch.randint(C, (N,), generator=torch.Generator().manual_seed(seed))
        logits = scale * logits.double()
        found = calibrate_temperatures(logits, labels)
        assert found.dtype == torch.float64
        expected = torch.tensor([bisected(exit, labels) for exit in logits], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)

    def test_by_hand(self):
        # Odds 3 : 1 at a margin of 2 and 6: margin / T = ln 3.
        labels = torch.tensor([0, 0, 0, 1])
        logits = torch.tensor([[[2.0, 0.0]] * 4, [[6.0, 0.0]] * 4])
        expected = torch.tensor([2.0, 6.0], dtype=torch.float64) / math.log(3)
        torch.testing.assert_close(calibrate_temperatures(logits, labels), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("margin", [1e-3, 1.0, 1e3, 1e9])
    def test_separable_rows_get_the_lowest(self, margin):
        logits = torch.tensor([[[margin, 0.0], [0.0, margin]]])
        assert calibrate_temperatures(logits, torch.tensor([0, 1])).tolist() == [0.01]

    @pytest.mark.parametrize("logits", [[[0.0, 0.0], [0.0, 0.0]], [[5.0, 5.0], [1.0, 1.0]], [[3.0, 0.0], [3.0, 0.0]]])
    def test_uninformative_logits_get_the_highest(self, logits):
        assert calibrate_temperatures(torch.tensor([logits]), torch.tensor([0, 1])).tolist() == [100.0]

    @pytest.mark.parametrize(
        ("logits", "labels", "error", "message"),
        [
            (torch.zeros(2, 0, 2), torch.zeros(0).long(), ValueError, r"must hold a row, two classes and finite"),
            (torch.zeros(2, 3, 1), torch.zeros(3).long(), ValueError, r"must hold a row, two classes and finite"),
            (torch.full((2, 3, 2), math.inf), torch.zeros(3).long(), ValueError, r"must hold a row, two classes"),
            (torch.zeros(3, 2), torch.zeros(3).long(), ValueError, r"`logits` must be \(exits, rows, classes\)"),
            (torch.zeros(2, 3, 2), torch.zeros(4).long(), ValueError, r"`labels` must be \(3,\)"),
            (torch.zeros(2, 3, 2), torch.zeros(3), TypeError, r"`labels` must be integer"),
        ],
    )
    def test_refuses(self, logits, labels, error, message):
        with pytest.raises(error, match=message):
            calibrate_temperatures(logits, labels)


class TestCalibrated:
    @given(policy=CONFIDENT, logits=stacked_logits(), seed=st.integers(0, 99))
    def test_is_the_policy_on_divided_logits(self, policy, logits, seed):
        T = 0.3 + 3 * torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        divided = logits.double() / T[:, None, None]
        decision, expected = Calibrated(policy, T).decide(logits), policy.decide(divided)
        assert torch.equal(decision.exits, expected.exits)
        assert torch.equal(decision.labels, expected.labels)
        # An answer is what an exit said.
        assert (decision.logits == logits).all(-1).any(0).all()

    @given(policy=CONFIDENT, logits=stacked_logits())
    def test_temperatures_of_one_change_nothing(self, policy, logits):
        decision, expected = Calibrated(policy, [1.0] * len(logits)).decide(logits), policy.decide(logits)
        assert torch.equal(decision.exits, expected.exits)
        assert torch.equal(decision.logits, expected.logits)

    def test_the_most_confident_once_divided_answers(self):
        logits = torch.tensor([[[4.0, 0.0]], [[0.0, 3.0]]])
        assert MaxProbability(1.0).decide(logits).labels.tolist() == [0]
        decision = Calibrated(MaxProbability(1.0), [4.0, 1.0]).decide(logits)
        assert (decision.labels.tolist(), decision.logits.tolist()) == ([1], [[0.0, 3.0]])

    def test_close_logits_keep_their_order(self):
        # Divided by 3 in float32 both would round to one number, and the first class would answer.
        logits = torch.tensor([[[1.0, 1.0 + 2**-23]]])
        assert Calibrated(Entropy(0.1), [3.0]).decide(logits).labels.tolist() == [1]

    @pytest.mark.parametrize("policy", [Entropy(0.0), MaxProbability(0.0), PatientConfidence(0.0, 2)])
    def test_is_calibrated_on_divided_logits(self, policy):
        logits = 3 * torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0))
        T = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
        found = calibrate(Calibrated(policy, T), logits, 1.6)
        assert found == Calibrated(calibrate(policy, logits.double() / T[:, None, None], 1.6), T)
        assert found.policy != calibrate(policy, logits, 1.6)
        assert 5 * 40 / found(logits).sum() == pytest.approx(1.6, abs=0.05)

    @pytest.mark.parametrize("policy", [Budget(1), Patience(1), None, Calibrated(Entropy(0.1), [1.0])])
    def test_refuses_what_a_temperature_does_not_change(self, policy):
        with pytest.raises(TypeError, match=r"`policy` must be a policy of confidence.*use them as they are"):
            Calibrated(policy, [1.0])

    @pytest.mark.parametrize(
        ("temperatures", "error", "message"),
        [
            ([1.0, 0.0], ValueError, r"`temperatures` must be positive, got 0 for exit 2"),
            ([1.0, -1.0], ValueError, r"`temperatures\[1\]` must be finite and at least 0, got -1\.0"),
            ([math.nan], ValueError, r"`temperatures\[0\]` must be finite"),
            (["1"], TypeError, r"`temperatures\[0\]` must be a number"),
            ([], TypeError, r"`temperatures` must be one number for each exit"),
            (1.0, TypeError, r"`temperatures` must be one number for each exit, got 1\.0"),
        ],
    )
    def test_refuses_temperatures(self, temperatures, error, message):
        with pytest.raises(error, match=message):
            Calibrated(Entropy(0.1), temperatures)

    def test_refuses_another_number_of_exits(self):
        policy = Calibrated(Entropy(0.1), [1.0, 2.0])
        for use in (policy, lambda logits: calibrate(policy, logits, 1.0)):
            with pytest.raises(ValueError, match=r"`temperatures` must be 3, one for each exit .*got 2"):
                use(torch.zeros(3, 2, 2))
