import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradalign.multiexit.policies import Budget, Entropy, MaxProbability, Patience, Policy, calibrate


def softmax(z):
    exponentials = [math.exp(value - max(z)) for value in z]
    return [e / sum(exponentials) for e in exponentials]


def largest(z):
    return max(range(len(z)), key=lambda c: z[c])


# The policies as the papers tell them: one row, its exits one after the other. Each returns (exit, logits answered).


def budget(row, exit):
    return exit, row[exit - 1]


def entropy(row, threshold, normalized=False):
    for m, z in enumerate(row, 1):
        H = -sum(p * math.log(p) for p in softmax(z) if p > 0)
        if (H / math.log(len(z)) if normalized else H) < threshold:
            return m, z
    return len(row), row[-1]


def max_probability(row, threshold):
    confidences = [max(softmax(z)) for z in row]
    for m, confidence in enumerate(confidences, 1):
        if confidence >= threshold:
            return m, row[m - 1]
    return len(row), row[confidences.index(max(confidences))]


def patience(row, patience, tolerance=None):
    count = 0
    for m in range(2, len(row) + 1):
        before, now = row[m - 2], row[m - 1]
        agrees = largest(before) == largest(now) if tolerance is None else abs(now[0] - before[0]) < tolerance
        count = count + 1 if agrees else 0
        if count == patience:
            return m, now
    return len(row), row[-1]


ORACLES = {Budget: budget, Entropy: entropy, MaxProbability: max_probability, Patience: patience}


def oracle(policy, logits):
    """Decide row by row in plain Python."""
    fields = dataclasses.asdict(policy)
    rows = [ORACLES[type(policy)](row, **fields) for row in logits.double().transpose(0, 1).tolist()]
    exits = torch.tensor([exit for exit, _ in rows], dtype=torch.int64)
    answers = torch.tensor([answer for _, answer in rows], dtype=logits.dtype).reshape(logits.shape[1:])
    return exits, answers


SOME_CLASSES = st.integers(2, 4)


@st.composite
def stacked_logits(draw, min_rows=0, classes=SOME_CLASSES):
    M, N, C = draw(st.integers(1, 6)), draw(st.integers(min_rows, 8)), draw(classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    # The exits share a part, so that some agree and some do not.
    common, own = torch.randn(1, N, C, generator=generator), torch.randn(M, N, C, generator=generator)
    return draw(st.sampled_from([0.5, 3.0])) * (common + draw(st.sampled_from([0.3, 1.0])) * own)


CLASSIFYING = st.one_of(
    st.builds(Budget, exit=st.just(1)),
    st.builds(Entropy, threshold=st.floats(0, 1.5), normalized=st.booleans()),
    st.builds(MaxProbability, threshold=st.floats(0, 1.1)),
    st.builds(Patience, patience=st.integers(1, 6)),
)


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


class TestPolicyObjects:
    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (Budget(3), "Budget(exit=3)"),
            (Entropy(0.2), "Entropy(threshold=0.2, normalized=False)"),
            (MaxProbability(0.9), "MaxProbability(threshold=0.9)"),
            (Patience(4), "Patience(patience=4, tolerance=None)"),
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
