import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradalign.multiexit.inference import MultiExitModel, Walk, early_exit, every_exit
from gradalign.multiexit.policies import (
    Budget,
    Calibrated,
    Entropy,
    MaxProbability,
    Patience,
    PatientConfidence,
    Policy,
    calibrate,
)
from gradalign.multiexit.resnet import MultiExitResNet

POLICIES = [
    Budget(3),
    Entropy(0.0),
    MaxProbability(0.0),
    Patience(1),
    PatientConfidence(0.0, patience=2),
    Calibrated(MaxProbability(0.0), [0.5, 2.0, 1.0, 0.7, 1.5, 3.0]),
]
ROWS = 12


def images(rows=ROWS, side=8, seed=0):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """A network of 6 exits whose answers differ from row to row and exit to exit, the deeper the surer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MultiExitResNet(14, num_classes=4, exits="block").train()
    with torch.no_grad():
        for seed in range(1, 6):  # so that the normalisation has statistics of its own
            network(images(seed=seed))
        for exit, head in enumerate(network.heads, 1):
            linear = next(layer for layer in head.modules() if isinstance(layer, nn.Linear))
            linear.weight.mul_(exit)
            head.get_parameter("mix" if exit < network.num_exits else "2.bias").add_(0.1)
    return network.eval()


@pytest.fixture(scope="module")
def stored(model):
    with torch.no_grad():
        return model(images())


def at_work(policy, stored):
    """Set the policy so that rows leave at several exits: else a test of it would show nothing."""
    found = policy if isinstance(policy, Budget) else calibrate(policy, stored, 2.0)
    if not isinstance(policy, Budget):
        assert len(found(stored).unique()) >= 3
    return found


def assert_same(decision, expected):
    assert torch.equal(decision.exits, expected.exits)
    assert torch.equal(decision.labels, expected.labels)
    torch.testing.assert_close(decision.logits, expected.logits)


@dataclasses.dataclass
class Table:
    """A model that looks its logits up, (M, N, C), and remembers which rows it was asked for; no nn.Module."""

    logits: torch.Tensor

    def __post_init__(self):
        self.num_exits = len(self.logits)
        self.asked = []

    def start(self, inputs):
        return inputs

    def advance(self, hidden, exit):
        self.asked.append(hidden.tolist())
        return hidden, self.logits[exit - 1, hidden]


class Text(nn.Module):
    """An encoder of sentences whose hidden state is two tensors, one of which is a mask."""

    def __init__(self, num_exits=4, width=16, num_classes=3):
        super().__init__()
        self.num_exits = num_exits
        self.words = nn.Embedding(20, width)
        self.encoders = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(num_exits)
        )
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(num_exits))

    def start(self, inputs):
        return {"hidden": self.words(inputs["words"]), "mask": inputs["mask"]}

    def layers(self, hidden, exit):
        after = self.encoders[exit - 1](hidden["hidden"], src_key_padding_mask=~hidden["mask"])
        return {**hidden, "hidden": after}

    def advance(self, hidden, exit):
        hidden = self.layers(hidden, exit)
        return hidden, exit * self.heads[exit - 1](hidden["hidden"][:, 0])


def sentences():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(ROWS) % 5 + 2
    mask = torch.arange(7) < lengths[:, None]
    return {"words": torch.randint(20, (ROWS, 7), generator=generator), "mask": mask}


@pytest.fixture(scope="module")
def text():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Text().eval()


class TestAnswers:
    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
    @pytest.mark.parametrize("rows", [range(ROWS), range(ROWS - 1, -1, -1), [5], [0, 0, 7, 3, 7], range(0, ROWS, 3)])
    def test_those_of_the_stored_logits(self, model, stored, policy, rows):
        policy = at_work(policy, stored)
        assert_same(early_exit(model, images()[list(rows)], policy), policy.decide(stored[:, list(rows)]))

    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
    def test_a_batch_is_its_rows_one_by_one(self, model, stored, policy):
        policy = at_work(policy, stored)
        together = early_exit(model, images(), policy)
        for row, image in enumerate(images()):
            alone = early_exit(model, image[None], policy)
            assert alone.exits == together.exits[row]
            assert alone.labels == together.labels[row]
            torch.testing.assert_close(alone.logits[0], together.logits[row])

    @settings(max_examples=30)
    @given(
        st.integers(1, 6),
        st.integers(0, 9),
        st.integers(0, 999),
        st.sampled_from([Budget(1), Entropy(0.5), Entropy(0.9, normalized=True), MaxProbability(0.7), Patience(1)]),
    )
    def test_any_model_that_keeps_the_protocol(self, num_exits, rows, seed, policy):
        logits = 2 * torch.randn(num_exits, rows, 3, generator=torch.Generator().manual_seed(seed))
        table: MultiExitModel = Table(logits)
        decision, expected = early_exit(table, torch.arange(rows), policy), policy.decide(logits)
        assert torch.equal(decision.exits, expected.exits)
        assert torch.equal(decision.logits, expected.logits)
        asked = [[row for row in range(rows) if expected.exits[row] >= exit] for exit in range(1, num_exits + 1)]
        # Exit 1 is asked even for no rows, to learn C.
        assert table.asked == [asked[0], *(rows for rows in asked[1:] if rows)]

    def test_a_hidden_state_of_several_tensors(self, model, stored):
        class Named:
            num_exits = model.num_exits

            def start(self, inputs):
                return {"hidden": model.start(inputs["pixels"]), "row": inputs["row"]}

            def advance(self, hidden, exit):
                after, logits = model.advance(hidden["hidden"], exit)
                assert torch.equal(policy(stored)[hidden["row"]] >= exit, torch.ones(len(logits), dtype=torch.bool))
                return {**hidden, "hidden": after}, logits

        policy = at_work(Entropy(0.0), stored)
        batch = {"pixels": images(), "row": torch.arange(ROWS)}
        assert_same(early_exit(Named(), batch, policy), policy.decide(stored))

    def test_regression(self):
        # Outputs 0, 1, 1.2, 1.3 and 0, 0, 5, 5: within 0.5 from exit 3 on, and at exit 2.
        table = Table(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.2, 5.0], [1.3, 5.0]]).unsqueeze(-1))
        decision = early_exit(table, torch.arange(2), Patience(1, tolerance=0.5))
        assert decision.exits.tolist() == [3, 2]
        torch.testing.assert_close(decision.labels, torch.tensor([1.2, 0.0]))

    def test_heads_of_different_precision(self):
        class Mixed(Table):
            def advance(self, hidden, exit):
                hidden, logits = super().advance(hidden, exit)
                return hidden, logits.double() if exit == 2 else logits

        logits = torch.randn(3, 4, 2)
        for policy in (Budget(2), MaxProbability(0.8)):
            decision = early_exit(Mixed(logits), torch.arange(4), policy)
            # In the precision of the first exit looked at.
            assert decision.logits.dtype == (torch.float64 if policy == Budget(2) else torch.float32)
            torch.testing.assert_close(decision.logits, policy.decide(logits).logits, check_dtype=False)

    def test_text_like_hidden_states(self, text):
        batch = sentences()
        with torch.no_grad():
            stored = every_exit(text, batch)
        policy = at_work(Entropy(0.0), stored)
        decision = early_exit(text, batch, policy)
        assert_same(decision, policy.decide(stored))
        for row in range(ROWS):
            alone = early_exit(text, {name: tensor[row : row + 1] for name, tensor in batch.items()}, policy)
            assert (alone.exits, alone.labels) == (decision.exits[row], decision.labels[row])
            torch.testing.assert_close(alone.logits[0], decision.logits[row])

    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
    def test_empty_batch(self, model, policy):
        decision = early_exit(model, images(0), policy)
        assert (decision.exits.shape, decision.labels.shape, decision.logits.shape) == ((0,), (0,), (0, 4))


class TestComputation:
    @pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
    def test_rows_that_left_are_not_computed(self, model, stored, policy):
        policy = at_work(policy, stored)
        seen: dict[str, int] = {}
        hooks = [
            module.register_forward_hook(
                lambda module, inputs, output, name=f"{part} {number}": seen.__setitem__(name, len(inputs[0]))
            )
            for part in ("blocks", "heads")
            for number, module in enumerate(getattr(model, part), 1)
        ]
        try:
            exits = early_exit(model, images(), policy).exits
        finally:
            for hook in hooks:
                hook.remove()
        there = {exit: int((exits >= exit).sum()) for exit in range(1, model.num_exits + 1)}
        expected = {f"{part} {exit}": n for part in ("blocks", "heads") for exit, n in there.items() if n}
        if isinstance(policy, Budget):
            del expected["heads 1"], expected["heads 2"]
        assert seen == expected  # with exits after every block, block and head m belong to exit m
        assert len(set(expected.values())) > 1 or isinstance(policy, Budget)

    def test_budget_stops_the_network(self, model):
        def stop(*_):
            raise ZeroDivisionError("reached")

        hook = model.blocks[3].register_forward_hook(stop)
        try:
            assert early_exit(model, images(), Budget(3)).exits.tolist() == [3] * ROWS
            with pytest.raises(ZeroDivisionError, match="reached"):
                early_exit(model, images(), Budget(4))
        finally:
            hook.remove()

    def test_a_model_without_layers_runs_the_heads_and_gives_the_same(self):
        logits = torch.randn(4, 3, 2)
        table = Table(logits)
        decision = early_exit(table, torch.arange(3), Budget(3))
        assert table.asked == [[0, 1, 2]] * 3
        assert torch.equal(decision.logits, logits[2])

    def test_a_list_of_modules_called_layers_is_not_called(self):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.num_exits = 3
                self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

            def start(self, inputs):
                return inputs

            def advance(self, hidden, exit):
                hidden = self.layers[exit - 1](hidden)
                return hidden, hidden

        network = Listed()
        expected = network.layers[1](network.layers[0](torch.ones(2, 2)))
        torch.testing.assert_close(early_exit(network, torch.ones(2, 2), Budget(2)).logits, expected.detach())

    def test_looks_at_some_exits_alone(self):
        @dataclasses.dataclass(frozen=True)
        class Even(Policy):
            def looks(self, exit):
                return exit % 2 == 0

            def step(self, logits, exit, state):
                assert exit in (2, 4, 5)  # the last is looked at always
                return logits[:, 0] > 0, logits

        logits = torch.tensor([[1, 1, 1], [1, -1, -1], [1, 1, 1], [1, 1, -1], [-1, -1, -1]]).float()
        logits = torch.stack([logits, -logits], -1)
        decision = Even().decide(logits)
        assert decision.exits.tolist() == [2, 4, 5]
        assert decision.labels.tolist() == [0, 0, 1]
        table = Table(logits)
        assert_same(early_exit(table, torch.arange(3), Even()), decision)
        assert table.asked == [[0, 1, 2], [0, 1, 2], [1, 2], [1, 2], [2]]

    def test_no_gradients(self, model):
        decision = early_exit(model, images().requires_grad_(), MaxProbability(0.9))
        assert not decision.logits.requires_grad
        # An answer can still teach another network, which an inference tensor cannot.
        student = torch.zeros(ROWS, 4, requires_grad=True)
        (student * decision.logits).sum().backward()
        torch.testing.assert_close(student.grad, decision.logits)


class TestMode:
    def modes(self, network):
        return [module.training for module in network.modules()]

    def test_evaluates_and_returns_each_module_to_its_mode(self):
        network = MultiExitResNet(8, num_classes=4).train()
        network.blocks[1].eval()
        network.heads[0].eval()
        modes, statistics = self.modes(network), network.stem[1].running_mean.clone()
        decision = early_exit(network, images(), Budget(3))
        assert self.modes(network) == modes
        assert len(set(modes)) == 2
        torch.testing.assert_close(network.stem[1].running_mean, statistics, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(decision.logits, network.eval()(images())[-1])

    def test_also_after_an_error(self):
        @dataclasses.dataclass(frozen=True)
        class Broken(Policy):
            def step(self, logits, exit, state):
                raise ZeroDivisionError("broken")

        network = MultiExitResNet(8).train()
        network.blocks[0].eval()
        modes = self.modes(network)
        with pytest.raises(ZeroDivisionError, match="broken"):
            early_exit(network, images(), Broken())
        assert self.modes(network) == modes


class TestRefusals:
    @pytest.mark.parametrize("policy", [Budget, None, 3])
    def test_no_policy(self, model, policy):
        with pytest.raises(TypeError, match=r"`policy` must be a policy, got .*write Entropy\(0\.3\)"):
            early_exit(model, images(), policy)

    def test_exit_beyond_the_last(self, model):
        with pytest.raises(ValueError, match=r"`exit` must be in 1\.\.6, the exits of this network, got 7"):
            early_exit(model, images(), Budget(7))

    @pytest.mark.parametrize("shape", [(3, 2), (4, 2, 2), (4,)])
    def test_a_model_that_loses_rows(self, shape):
        class Wrong(Table):
            def advance(self, hidden, exit):
                return hidden, torch.zeros(shape)

        with pytest.raises(ValueError, match=r"`logits` must be \(4, C\), one row for each still there, got shape"):
            early_exit(Wrong(torch.zeros(2, 4, 2)), torch.arange(4), Budget(1))

    def test_a_walk_that_has_not_begun(self):
        with pytest.raises(RuntimeError, match="`visit` must be called once at least"):
            Walk(Budget(1), 3, 4, torch.device("cpu")).decision()
