import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradalign.multiexit.objectives import (
    distillation,
    exit_losses,
    mutual_distillation,
    weighted_cross_entropy,
    weighted_loss,
)

LN3 = math.log(3.0)


def random_logits(num_exits, rows=4, classes=5, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_exits, rows, classes, generator=generator, dtype=torch.float64)


def eq1(logits, labels):
    """Eq. 1, written out."""
    M = len(logits)
    total = sum(m * F.cross_entropy(logits[m - 1], labels) for m in range(1, M + 1))
    return total / sum(range(1, M + 1))


def eq3(logits, T=1.0):
    """Eq. 3, written out: one term for each ordered pair, each with its own detached teacher."""
    M = len(logits)
    total = logits.new_zeros(())
    for i in range(M):
        for j in range(M):
            if i != j:
                student, teacher = F.log_softmax(logits[i] / T, -1), F.log_softmax(logits[j].detach() / T, -1)
                total = total + T**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return total


def value_and_gradient(loss, logits):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


class TestWeightedCrossEntropy:
    def test_two_exits_by_hand(self):
        # p_1 = (1/2, 1/2), p_2 = (3/4, 1/4), label 0: CE_1 = ln 2, CE_2 = ln 4/3; L = (1 ln 2 + 2 ln 4/3) / 3.
        logits = torch.tensor([[[0.0, 0.0]], [[LN3, 0.0]]])
        expected = torch.tensor((math.log(2) + 2 * math.log(4 / 3)) / 3)
        torch.testing.assert_close(weighted_cross_entropy(logits, torch.tensor([0])), expected)

    @given(num_exits=st.integers(1, 7), rows=st.integers(1, 5), classes=st.integers(2, 4), seed=st.integers(0, 99))
    def test_is_eq1(self, num_exits, rows, classes, seed):
        logits = random_logits(num_exits, rows, classes, seed)
        labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
        value, gradient = value_and_gradient(lambda z: weighted_cross_entropy(z, labels), logits)
        expected, expected_gradient = value_and_gradient(lambda z: eq1(z, labels), logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    def test_any_integer_labels(self, dtype):
        logits, labels = random_logits(3), torch.tensor([0, 1, 2, 3])
        torch.testing.assert_close(weighted_cross_entropy(logits, labels.to(dtype)), eq1(logits, labels))

    def test_half_precision_is_computed_in_float32(self):
        logits, labels = random_logits(3).bfloat16(), torch.tensor([0, 1, 2, 3])
        torch.testing.assert_close(weighted_cross_entropy(logits, labels), eq1(logits.float(), labels))

    def test_autocast_does_not_lower_the_precision(self):
        logits, labels = random_logits(3).float(), torch.tensor([0, 1, 2, 3])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(weighted_cross_entropy(logits, labels), eq1(logits, labels))


class TestMutualDistillation:
    def test_two_exits_by_hand(self):
        # p_1 = (1/2, 1/2), p_2 = (3/4, 1/4). KL(p_2, p_1) + KL(p_1, p_2) = sum_c (p_2c - p_1c) ln(p_2c / p_1c)
        # = 1/4 ln 3/2 - 1/4 ln 1/2 = ln(3) / 4.
        # Exit 1 learns from p_2: d KL(sg p_2, p_1) / d z_1 = p_1 - p_2 = (-1/4, 1/4); exit 2 the other way.
        logits = torch.tensor([[[0.0, 0.0]], [[LN3, 0.0]]])
        value, gradient = value_and_gradient(mutual_distillation, logits)
        torch.testing.assert_close(value, torch.tensor(LN3 / 4))
        torch.testing.assert_close(gradient, torch.tensor([[[-0.25, 0.25]], [[0.25, -0.25]]]))

    def test_temperature_by_hand(self):
        # At T = 2, logits 2 ln 3 give the distributions above: the value is T^2 = 4 times as large, the gradient
        # T^2 / T = 2 times.
        logits = torch.tensor([[[0.0, 0.0]], [[2 * LN3, 0.0]]])
        value, gradient = value_and_gradient(lambda z: mutual_distillation(z, temperature=2.0), logits)
        torch.testing.assert_close(value, torch.tensor(LN3))
        torch.testing.assert_close(gradient, torch.tensor([[[-0.5, 0.5]], [[0.5, -0.5]]]))

    @pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
    @pytest.mark.parametrize("num_exits", [2, 3, 7, 12])
    def test_is_eq3(self, num_exits, temperature):
        logits = random_logits(num_exits)
        value, gradient = value_and_gradient(lambda z: mutual_distillation(z, temperature), logits)
        expected, expected_gradient = value_and_gradient(lambda z: eq3(z, temperature), logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)

    @given(st.integers(2, 6), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99), st.floats(0.01, 30))
    def test_is_eq3_for_any_shape_and_spread(self, num_exits, rows, classes, seed, spread):
        logits = random_logits(num_exits, rows, classes, seed, spread)
        value, gradient = value_and_gradient(mutual_distillation, logits)
        expected, expected_gradient = value_and_gradient(eq3, logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)

    @pytest.mark.parametrize("num_exits", [2, 5])
    def test_mean_divides_by_the_ordered_pairs(self, num_exits):
        logits = random_logits(num_exits)
        pairs = num_exits * (num_exits - 1)
        torch.testing.assert_close(mutual_distillation(logits, 2.0, "mean"), eq3(logits, 2.0) / pairs)

    def test_teachers_get_no_gradient(self):
        # Exit 1 is the student in KL(sg p_2, p_1) alone, so its gradient must be that of this one term.
        first, second = random_logits(2)
        _, gradient = value_and_gradient(mutual_distillation, torch.stack([first, second]))
        _, expected = value_and_gradient(
            lambda z: F.kl_div(z.log_softmax(-1), second.softmax(-1), reduction="batchmean"), first
        )
        torch.testing.assert_close(gradient[0], expected)

    @pytest.mark.parametrize("disagreement", [1.0, 1e-2, 1e-3])
    @pytest.mark.parametrize("num_exits", [2, 12])
    def test_float32_is_exact_when_exits_nearly_agree(self, num_exits, disagreement):
        common, own = random_logits(1), random_logits(num_exits, seed=1)
        logits = (common + disagreement * own).float()
        # The value is of order disagreement^2. Rounding of log p, times a factor of order disagreement, leaves a
        # relative error of eps / disagreement; uncentred it would be eps / disagreement^2.
        torch.testing.assert_close(
            mutual_distillation(logits).double(), eq3(logits.double()), rtol=1e-6 + 2e-7 / disagreement, atol=0
        )

    @pytest.mark.parametrize("num_exits", [2, 3, 12])
    def test_zero_where_exits_agree(self, num_exits):
        logits = random_logits(1).expand(num_exits, -1, -1).float()
        value, gradient = value_and_gradient(mutual_distillation, logits)
        torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-12)
        # Each exit's p is rounded before the mean is taken: M eps is left.
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=num_exits * 1e-7)

    def test_large_gaps_are_finite(self):
        # Exit 1 is sure of class 0, exit 2 of class 1: KL = 1e4 nats each way. Its gradient is p_1 - p_2 = (1, -1).
        logits = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]])
        value, gradient = value_and_gradient(mutual_distillation, logits)
        torch.testing.assert_close(value, torch.tensor(2e4))
        torch.testing.assert_close(gradient, torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]]))

    def test_class_excluded_by_all_exits_takes_no_part(self):
        logits = random_logits(3)
        excluded = torch.cat([logits, torch.full_like(logits[..., :1], -math.inf)], dim=-1)
        value, gradient = value_and_gradient(mutual_distillation, excluded)
        expected, expected_gradient = value_and_gradient(eq3, logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, F.pad(expected_gradient, (0, 1)))

    def test_class_excluded_by_one_exit_is_infinitely_far(self):
        logits = random_logits(3)
        logits[0, :, 1] = -math.inf
        assert mutual_distillation(logits).item() == math.inf

    def test_nan_is_not_hidden(self):
        logits = random_logits(3)
        logits[0, 0, 0] = math.nan
        assert mutual_distillation(logits).isnan()

    def test_half_precision_is_computed_in_float32(self):
        logits = random_logits(3).half()
        torch.testing.assert_close(mutual_distillation(logits), eq3(logits.float()))


class TestExitLosses:
    @pytest.mark.parametrize("num_exits", [1, 3])
    def test_classes(self, num_exits):
        logits, labels = random_logits(num_exits), torch.tensor([0, 1, 2, 3])
        expected = torch.stack([F.cross_entropy(exit, labels) for exit in logits])
        torch.testing.assert_close(exit_losses(logits, labels), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_regression(self, dtype):
        logits, labels = random_logits(3, classes=1).to(dtype), torch.tensor([0.5, -1.0, 2.0, 0.0])
        expected = torch.stack([F.mse_loss(exit[:, 0], labels.to(dtype)) for exit in logits])
        torch.testing.assert_close(exit_losses(logits, labels), expected)

    def test_half_precision_is_computed_in_float32(self):
        logits, labels = random_logits(3, classes=1).bfloat16(), torch.tensor([0.5, -1.0, 2.0, 0.0])
        assert exit_losses(logits, labels).dtype == torch.float32
        torch.testing.assert_close(exit_losses(logits, labels), exit_losses(logits.float(), labels))

    @given(num_exits=st.integers(1, 7), seed=st.integers(0, 99))
    def test_weighted_loss_of_regression_is_eq1(self, num_exits, seed):
        logits, labels = random_logits(num_exits, classes=1, seed=seed), random_logits(1, classes=1)[0, :, 0]
        total = sum(m * (logits[m - 1, :, 0] - labels).square().mean() for m in range(1, num_exits + 1))
        torch.testing.assert_close(weighted_loss(logits, labels), total / sum(range(1, num_exits + 1)))

    def test_weighted_loss_of_classes_is_the_cross_entropy(self):
        logits, labels = random_logits(3), torch.tensor([0, 1, 2, 3])
        assert torch.equal(weighted_loss(logits, labels), weighted_cross_entropy(logits, labels))

    @pytest.mark.parametrize(
        ("logits", "labels", "message"),
        [
            (random_logits(2), torch.zeros(4), r"`logits` must be \(exits, rows, 1\) for floating .* \(2, 4, 5\)"),
            (random_logits(2, classes=1), torch.zeros(3), r"`labels` must be \(4,\), one for each row, .* \(3,\)"),
            (random_logits(2, classes=1), torch.zeros(4, 1), r"`labels` must be \(4,\), .* shape \(4, 1\)"),
        ],
    )
    def test_refuses(self, logits, labels, message):
        for loss in (exit_losses, weighted_loss):
            with pytest.raises(ValueError, match=message):
                loss(logits, labels)


class TestDistillation:
    @pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
    def test_is_the_divergence_from_a_detached_teacher(self, temperature):
        logits, T = random_logits(4), temperature

        def naive(z):
            teacher = F.log_softmax(z[-1].detach() / T, -1)
            students = [F.log_softmax(student / T, -1) for student in z[:-1]]
            return torch.stack([T**2 * F.kl_div(s, teacher, log_target=True, reduction="batchmean") for s in students])

        scale = torch.tensor([1.0, 2.0, 3.0])
        value, gradient = value_and_gradient(lambda z: distillation(z[:-1], z[-1], T) @ scale.double(), logits)
        expected, expected_gradient = value_and_gradient(lambda z: naive(z) @ scale.double(), logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert not gradient[-1].any()

    def test_regression_is_the_squared_difference(self):
        logits = random_logits(3, classes=1)
        value, gradient = value_and_gradient(lambda z: distillation(z[:-1], z[-1], 7.0).sum(), logits)
        expected = sum((logits[m] - logits[2]).square().mean() for m in (0, 1))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient[:2], 2 * (logits[:2] - logits[2]) / 4)
        assert not gradient[2].any()

    def test_a_class_that_the_teacher_excludes_takes_no_part(self):
        students, (teacher,) = random_logits(2), random_logits(1, seed=1)
        wider, excluded = F.pad(students, (0, 1), value=-math.inf), F.pad(teacher, (0, 1), value=-math.inf)
        value, gradient = value_and_gradient(lambda z: distillation(z, excluded).sum(), wider)
        expected, expected_gradient = value_and_gradient(lambda z: distillation(z, teacher).sum(), students)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, F.pad(expected_gradient, (0, 1)))

    def test_half_precision_is_computed_in_float32(self):
        logits = random_logits(3).half()
        single = logits.float()
        torch.testing.assert_close(distillation(logits[:2], logits[2]), distillation(single[:2], single[2]))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"`teacher` must be \(4, 5\), as one student, got shape \(3, 5\)"):
            distillation(random_logits(2), random_logits(1)[0, :3])
        with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
            distillation(random_logits(2), random_logits(1)[0], 0)


@pytest.mark.parametrize("num_exits", [2, 3, 7])
def test_mutual_distillation_of_regression_is_the_squared_difference_of_each_pair(num_exits):
    def naive(z):
        pairs = [(i, j) for i in range(num_exits) for j in range(num_exits) if i != j]
        return sum((z[j].detach() - z[i]).square().mean() for i, j in pairs)

    logits = random_logits(num_exits, classes=1)
    value, gradient = value_and_gradient(lambda z: mutual_distillation(z, 3.0), logits)
    expected, expected_gradient = value_and_gradient(naive, logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    pairs = num_exits * (num_exits - 1)
    torch.testing.assert_close(mutual_distillation(logits, reduction="mean"), expected / pairs)


@settings(max_examples=20)
@given(num_exits=st.integers(2, 5), seed=st.integers(0, 99))
def test_order_of_rows_does_not_matter(num_exits, seed):
    logits, labels = random_logits(num_exits, seed=seed), torch.tensor([0, 1, 2, 3])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for loss in (mutual_distillation, lambda z, y=labels[order]: weighted_cross_entropy(z, y)):
        shuffled = loss(logits[:, order])
        expected = eq3(logits) if loss is mutual_distillation else eq1(logits, labels)
        torch.testing.assert_close(shuffled, expected)


LOGITS = torch.zeros(2, 3, 4)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS[0], LABELS, ValueError, r"`logits` must be \(exits, rows, classes\).*got shape \(3, 4\)"),
        (LOGITS[None], LABELS, ValueError, r"`logits` must be .*got shape \(1, 2, 3, 4\); stack"),
        (LOGITS[:0], LABELS, ValueError, r"with an exit and a class at least, got shape \(0, 3, 4\)"),
        (LOGITS[..., :0], LABELS, ValueError, r"with an exit and a class at least, got shape \(2, 3, 0\)"),
        (LOGITS[:, :0], LABELS[:0], ValueError, r"`logits` must hold a row at least, got \(2, 0, 4\)"),
        (list(LOGITS), LABELS, TypeError, r"`logits` must be one tensor .*got list; write torch\.stack"),
        (LOGITS.long(), LABELS, TypeError, r"`logits` must be floating, got torch\.int64"),
        (LOGITS, LABELS[:2], ValueError, r"`labels` must be \(3,\).*got shape \(2,\)"),
        (LOGITS, LABELS[:, None], ValueError, r"`labels` must be \(3,\).*got shape \(3, 1\)"),
        (LOGITS, LABELS.float(), TypeError, r"`labels` must be integer class numbers, got torch\.float32"),
        (LOGITS, LABELS.bool(), TypeError, r"`labels` must be integer class numbers, got torch\.bool"),
        (LOGITS, [0, 1, 2], TypeError, r"`labels` must be a tensor, got \[0, 1, 2\]"),
        (LOGITS, LABELS + 2, ValueError, r"`labels` must be in 0\.\.3, got 2 to 4"),
        (LOGITS, LABELS - 100, ValueError, r"`labels` must be in 0\.\.3, got -100 to -98"),
    ],
)
def test_weighted_cross_entropy_refuses(logits, labels, error, message):
    with pytest.raises(error, match=message):
        weighted_cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": LOGITS[:1]}, ValueError, r"`logits` must hold two exits or more for distillation, got 1"),
        ({"logits": LOGITS[0]}, ValueError, r"`logits` must be \(exits, rows, classes\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"`logits` must hold a row at least"),
        ({"logits": tuple(LOGITS)}, TypeError, r"`logits` must be one tensor .*got tuple"),
        ({"logits": LOGITS, "temperature": 0.0}, ValueError, r"`temperature` must be positive, got 0\.0"),
        ({"logits": LOGITS, "temperature": -1}, ValueError, r"`temperature` must be positive, got -1"),
        ({"logits": LOGITS, "temperature": math.nan}, ValueError, r"`temperature` must be finite, got nan"),
        ({"logits": LOGITS, "temperature": "1"}, TypeError, r"`temperature` must be a number, got '1'"),
        ({"logits": LOGITS, "reduction": "avg"}, ValueError, r"`reduction` must be one of 'sum', 'mean', got 'avg'"),
    ],
)
def test_mutual_distillation_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        mutual_distillation(**arguments)
