import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gradalign.multiexit.metrics import exit_accuracies, exit_macs, speed_up
from gradalign.multiexit.resnet import MultiExitResNet


class TestSpeedUp:
    @pytest.mark.parametrize(
        ("exits", "num_exits", "expected"),
        [([4, 4], 4, 1.0), ([1, 1, 1], 4, 4.0), ([1, 3], 4, 2.0), ([2, 3, 4, 3], 6, 2.0), ([1], 1, 1.0)],
    )
    def test_by_hand(self, exits, num_exits, expected):
        # M N / sum of the exits: 4*2/8, 4*3/3, 4*2/4, 6*4/12, 1*1/1.
        assert speed_up(torch.tensor(exits), num_exits) == expected

    @given(st.integers(1, 12).flatmap(lambda M: st.tuples(st.just(M), st.lists(st.integers(1, M), min_size=1))))
    def test_is_the_formula_by_counts(self, drawn):
        M, exits = drawn
        counts = [exits.count(m) for m in range(1, M + 1)]
        expected = M * sum(counts) / sum(m * count for m, count in enumerate(counts, 1))
        assert speed_up(torch.tensor(exits), M) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("exits", "error", "message"),
        [
            (torch.tensor([], dtype=torch.int64), ValueError, r"`exits` must hold at least one row, got none"),
            (torch.tensor([0, 2]), ValueError, r"`exits` must be in 1\.\.3, counted from 1, got 0 to 2"),
            (torch.tensor([1, 4]), ValueError, r"`exits` must be in 1\.\.3, counted from 1, got 1 to 4"),
            (torch.tensor([1.0]), TypeError, r"`exits` must be an integer tensor, got torch\.float32"),
            ([1, 2], TypeError, r"`exits` must be an integer tensor, got list"),
        ],
    )
    def test_refuses(self, exits, error, message):
        with pytest.raises(error, match=message):
            speed_up(exits, 3)


class TestExitAccuracies:
    def test_by_hand(self):
        answers = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0]])
        logits = torch.nn.functional.one_hot(answers, 3).float()
        accuracies = exit_accuracies(logits, torch.tensor([0, 1, 2, 2]))
        torch.testing.assert_close(accuracies, torch.tensor([0.25, 0.5, 0.75]))

    @pytest.mark.parametrize(
        ("logits", "labels", "error", "message"),
        [
            (torch.zeros(3, 2), torch.tensor([0, 1]), ValueError, r"`logits` must be \(exits, rows, classes\)"),
            (torch.zeros(3, 2, 2), torch.tensor([0]), ValueError, r"`labels` must be \(2,\).*got shape \(1,\)"),
            (torch.zeros(3, 2, 2), torch.tensor([0, 2]), ValueError, r"`labels` must be in 0\.\.1, got 0 to 2"),
            (torch.zeros(3, 2, 2), torch.tensor([0.0, 1.0]), TypeError, r"`labels` must be integer class numbers"),
            (torch.zeros(3, 0, 2), torch.zeros(0).long(), ValueError, r"`logits` must hold at least one row"),
        ],
    )
    def test_refuses(self, logits, labels, error, message):
        with pytest.raises(error, match=message):
            exit_accuracies(logits, labels)


class TestExitMacs:
    def test_resnet_56_by_hand(self):
        # Stem 9*3*16 weights on 32^2 pixels; 18 convolutions of 9*16*16 on 32^2; one of 9*16*32 and 17 of 9*32*32 on
        # 16^2; one of 9*32*64 and 17 of 9*64*64 on 8^2; 64*10 in the end: 125.49 million.
        stem, stage_1 = 9 * 3 * 16 * 32**2, 18 * 9 * 16 * 16 * 32**2
        stage_2 = (9 * 16 * 32 + 17 * 9 * 32 * 32) * 16**2
        stage_3 = (9 * 32 * 64 + 17 * 9 * 64 * 64) * 8**2
        (last,) = exit_macs(MultiExitResNet(56, exits=[]), 32)
        assert last == stem + stage_1 + stage_2 + stage_3 + 640
        assert round(last / 1e6, 2) == 125.49

    def test_shares_of_the_shallow_deep_exits(self):
        *internal, last = exit_macs(MultiExitResNet(56, exits="shallow-deep"), 32, heads=False)
        assert [round(macs / last, 3) for macs in internal] == [0.154, 0.304, 0.445, 0.596, 0.737, 0.887]

    @pytest.mark.parametrize("side", [7, 32])
    @pytest.mark.parametrize("exits", ["block", [], [1, 4]])
    def test_is_what_torch_counts(self, exits, side):
        model = MultiExitResNet(14, num_classes=7, in_channels=2, exits=exits).eval()
        counts = []
        with FlopCounterMode(display=False) as counter:
            hidden = model.start(torch.zeros(1, 2, side, side))
            for exit in range(1, model.num_exits + 1):
                hidden, _ = model.advance(hidden, exit)
                counts.append(counter.get_total_flops() // 2)  # a multiplication and an addition each
        assert exit_macs(model, side) == tuple(counts)

    def test_heads_are_those_on_the_way(self):
        model = MultiExitResNet(8, num_classes=10)
        with_heads, without = exit_macs(model, 32), exit_macs(model, 32, heads=False)
        first, second = 16 * 16 * 10, 32 * 16 * 10
        assert [a - b for a, b in zip(with_heads, without, strict=True)] == [first, first + second, first + second]

    @pytest.mark.parametrize(
        ("model", "image_size", "error", "message"),
        [
            (torch.nn.Linear(2, 2), 32, TypeError, r"`model` must be a MultiExitResNet, got Linear"),
            (MultiExitResNet(8), 0, ValueError, r"`image_size` must be at least 1, got 0"),
            (MultiExitResNet(8), (32, 32), TypeError, r"`image_size` must be an integer, got \(32, 32\)"),
        ],
    )
    def test_refuses(self, model, image_size, error, message):
        with pytest.raises(error, match=message):
            exit_macs(model, image_size)
