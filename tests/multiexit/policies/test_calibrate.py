import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradalign.multiexit.policies import Budget, Entropy, MaxProbability, Patience, PatientConfidence, Policy, calibrate
from tests.multiexit.policies.oracles import oracle, stacked_logits


def brute_force(make, values, logits, wanted):
    """The nearest speed-up of all, the slower of two as near, in plain Python."""
    M, N, _ = logits.shape
    speeds = {M * N / int(oracle(make(value), logits)[0].sum()) for value in values}
    return min(sorted(speeds), key=lambda speed: abs(speed - wanted))


def midpoints(values):
    ordered = sorted(set(values))
    return [0.0, *((a + b) / 2 for a, b in itertools.pairwise(ordered)), ordered[-1] + 1]


class TestCalibrate:
    @given(logits=stacked_logits(min_rows=1), share=st.floats(0, 1), normalized=st.booleans())
    def test_thresholds_are_the_best_there_are(self, logits, share, normalized):
        M, N, C = logits.shape
        wanted = 1 + share * (M - 1)
        p = logits.double().softmax(-1)
        entropies = (torch.special.entr(p).sum(-1) / (math.log(C) if normalized else 1)).flatten().tolist()
        for policy, make, scores in [
            (Entropy(9.0, normalized), lambda tau: Entropy(tau, normalized), entropies),
            (MaxProbability(9.0), MaxProbability, p.amax(-1).flatten().tolist()),
        ]:
            found = calibrate(policy, logits, wanted)
            assert type(found) is type(policy)
            expected = brute_force(make, midpoints(scores), logits, wanted)
            assert M * N / found(logits).sum().item() == expected
            # The safest of those with this speed-up: the next stricter cut is slower.
            slow_first = midpoints(scores) if isinstance(policy, Entropy) else midpoints(scores)[::-1]
            stricter = slow_first[: slow_first.index(pytest.approx(found.threshold, abs=1e-15))]
            assert not stricter or M * N / make(stricter[-1])(logits).sum().item() < expected
        assert calibrate(Entropy(9.0, normalized), logits, wanted).normalized == normalized

    @given(logits=stacked_logits(min_rows=1), share=st.floats(0, 1))
    def test_budget_and_patience_try_every_value(self, logits, share):
        M, N, _ = logits.shape
        wanted = 1 + share * (M - 1)
        for make in (Budget, Patience):
            found = calibrate(make(1), logits, wanted)
            assert M * N / found(logits).sum().item() == brute_force(make, range(1, M + 1), logits, wanted)

    @given(logits=stacked_logits(min_rows=1, classes=st.just(1)), share=st.floats(0, 1))
    def test_regression_keeps_the_tolerance(self, logits, share):
        M, N, _ = logits.shape
        wanted = 1 + share * (M - 1)
        found = calibrate(Patience(1, tolerance=0.5), logits, wanted)
        assert found.tolerance == 0.5
        expected = brute_force(lambda value: Patience(value, 0.5), range(1, M + 1), logits, wanted)
        assert M * N / found(logits).sum().item() == expected

    @given(logits=stacked_logits(min_rows=1), share=st.floats(0, 1), patience=st.integers(1, 3))
    def test_patient_confidence_keeps_the_patience(self, logits, share, patience):
        M, N, _ = logits.shape
        wanted = 1 + share * (M - 1)
        found = calibrate(PatientConfidence(9.0, patience), logits, wanted)
        assert found.patience == patience
        cuts = midpoints(torch.special.entr(logits.double().softmax(-1)).sum(-1).flatten().tolist())
        expected = brute_force(lambda tau: PatientConfidence(tau, patience), cuts, logits, wanted)
        assert M * N / found(logits).sum().item() == expected

    def test_the_slower_of_two_as_near(self):
        # Budgets of 2 exits: speed-ups 1 and 2, and 1.5 is as near to both.
        assert calibrate(Budget(1), torch.zeros(2, 3, 2), 1.5) == Budget(2)
        assert calibrate(Budget(1), torch.zeros(2, 3, 2), 1.51) == Budget(1)

    def test_the_safest_of_equal_speed(self):
        # All exits agree always: patience 3 or more runs to exit 4.
        assert calibrate(Patience(1), torch.ones(4, 2, 2), 1.0) == Patience(3)

    def test_threshold_halves_the_gap(self):
        # Entropies of the first exit: ln 2 and 0; leaving with the sure row alone is 2 * 2 / 3.
        logits = torch.tensor([[[0.0, 0.0], [1e4, 0.0]]]).expand(2, -1, -1)
        found = calibrate(Entropy(0.0), logits, 1.4)
        assert found.threshold == pytest.approx(math.log(2) / 2)
        assert found(logits).tolist() == [2, 1]

    def test_neighbouring_floats_are_parted(self):
        # The two entropies are neighbouring numbers: whatever lies between them in real numbers rounds to one of them.
        class Listed(Entropy):
            def score(self, logits):
                return logits[..., 0]

        low = 1.0 + 2**-52
        high = low + 2**-52
        logits = torch.tensor([[[low, 0.0], [high, 0.0]]], dtype=torch.float64).expand(2, -1, -1)
        assert calibrate(Listed(0.0), logits, 4 / 3)(logits).tolist() == [1, 2]

    @pytest.mark.parametrize("policy", [Entropy(0.1), MaxProbability(0.1), Budget(1), Patience(1)])
    def test_ends(self, policy):
        logits = torch.randn(5, 40, 3)
        assert calibrate(policy, logits, 1.0)(logits).tolist() == [5] * 40
        first = 2 if isinstance(policy, Patience) else 1
        assert calibrate(policy, logits, 5.0)(logits).min() == first

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"speed_up": 0.9}, ValueError, r"`speed_up` must be in \[1, 3\], got 0\.9"),
            ({"speed_up": 3.1}, ValueError, r"`speed_up` must be in \[1, 3\], got 3\.1"),
            ({"speed_up": math.nan}, ValueError, r"`speed_up` must be in \[1, 3\], got nan"),
            ({"speed_up": "2"}, TypeError, r"`speed_up` must be a number, got '2'"),
            ({"policy": Entropy}, TypeError, r"`policy` must be a policy, got <class.*write Entropy\(0\.0\)"),
            ({"logits": torch.zeros(3, 0, 2)}, ValueError, r"`logits` must hold at least one row and no NaN"),
            ({"logits": torch.full((3, 1, 2), math.nan)}, ValueError, r"`logits` must hold .* no NaN"),
            ({"logits": torch.zeros(3, 2)}, ValueError, r"`logits` must be \(exits, rows, classes\)"),
            ({"logits": torch.zeros(3, 2, 1)}, ValueError, r"`logits` must have two classes or more for Entropy"),
            (
                {"logits": torch.zeros(3, 2, 1), "policy": Entropy(0.1, normalized=True)},
                ValueError,
                r"`logits` must have two classes or more for Entropy",
            ),
        ],
    )
    def test_refuses(self, arguments, error, message):
        with pytest.raises(error, match=message):
            calibrate(**{"policy": Entropy(0.5), "logits": torch.zeros(3, 2, 2), "speed_up": 2.0, **arguments})

    def test_a_policy_without_settings_says_so(self):
        @dataclasses.dataclass(frozen=True)
        class Own(Policy):
            def step(self, logits, exit, state):
                return logits[:, 0] > 0, logits

        with pytest.raises(NotImplementedError, match=r"`settings` must be written to calibrate Own"):
            calibrate(Own(), torch.zeros(3, 2, 2), 2.0)
