import math

import pytest
import torch
import torch.nn.functional as F

from gradalign.multiexit.resnet import BasicBlock, InternalHead, MultiExitResNet


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def with_random_weights(model, seed=0):
    """Give every parameter and running statistic a value of its own, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + (0.9 if tensor.ndim < 2 else -0.1))
    return model


def images(rows=3, channels=3, side=16, seed=0):
    return torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(seed))


def reference_forward(model, x):
    """He et al. section 4.2 and Kaya et al. on the weights of ``model``, without any of its code; evaluation mode."""
    weights = dict(model.state_dict())
    kernel = x.shape[-1] // 4

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{bn}.{name}"] for name in names))

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = F.relu(conv_bn(x, "stem.0", "stem.1"))
    logits = []
    for k in range(len(model.blocks)):
        stride = 2 if k > 0 and k % (len(model.blocks) // 3) == 0 else 1
        y = F.relu(conv_bn(x, f"blocks.{k}.conv1", f"blocks.{k}.bn1", stride))
        y = conv_bn(y, f"blocks.{k}.conv2", f"blocks.{k}.bn2")
        shortcut = torch.zeros_like(y)
        shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
        x, kernel = F.relu(y + shortcut), kernel // stride
        if k + 1 in model.exit_blocks[:-1]:
            head = f"heads.{model.exit_blocks.index(k + 1)}"
            a = weights[f"{head}.mix"]
            pooled = a * F.max_pool2d(x, kernel) + (1 - a) * F.avg_pool2d(x, kernel)
            logits.append(linear(pooled.reshape(len(x), -1), f"{head}.linear"))
    logits.append(linear(x.mean((2, 3)), f"heads.{model.num_exits - 1}.2"))
    return torch.stack(logits)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("depth", "num_classes", "expected"), [(56, 10, 853_018), (56, 100, 858_868), (20, 10, 269_722)]
    )
    def test_number_of_parameters(self, depth, num_classes, expected):
        assert parameters(MultiExitResNet(depth, num_classes, exits=[])) == expected

    def test_depth_counts_the_layers_with_weights(self):
        model = MultiExitResNet(14, exits=[])
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert len(layers) == 14

    def test_exits_add_a_linear_layer_and_a_scalar_each(self):
        plain, multi = MultiExitResNet(14, exits=[]), MultiExitResNet(14, exits=[2, 3, 5])
        heads = sum(channels * 16 * 10 + 10 + 1 for channels in (16, 32, 64))
        assert parameters(multi) - parameters(plain) == heads

    @pytest.mark.parametrize(
        ("depth", "exits"), [(8, "block"), (8, []), (14, "block"), (14, "shallow-deep"), (14, [3])]
    )
    def test_is_the_network_of_the_papers(self, depth, exits):
        model = with_random_weights(MultiExitResNet(depth, num_classes=4, exits=exits)).double().eval()
        x = images(side=32).double()
        torch.testing.assert_close(model(x), reference_forward(model, x))

    def test_in_channels(self):
        assert MultiExitResNet(8, in_channels=1)(images(channels=1)).shape == (3, 3, 10)

    @pytest.mark.parametrize("side", [1, 7, 8, 32])
    def test_any_side(self, side):
        assert MultiExitResNet(8, num_classes=5).eval()(images(2, side=side)).shape == (3, 2, 5)

    def test_internal_exits_leave_the_last_one_alone(self):
        multi = with_random_weights(MultiExitResNet(14, exits="block")).eval()
        plain = MultiExitResNet(14, exits=[]).eval()
        shared = {name: tensor for name, tensor in multi.state_dict().items() if not name.startswith("heads")}
        last = {f"heads.0.2.{name}": tensor for name, tensor in multi.heads[-1][2].state_dict().items()}
        plain.load_state_dict(shared | last)
        torch.testing.assert_close(multi(images())[-1], plain(images())[0])

    def test_every_parameter_learns(self):
        model = MultiExitResNet(8)
        model(images()).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_convolutions_start_as_he_et_al(self):
        # Standard deviation sqrt(2 / (9 channels of the output)); 9 * 32 * 64 samples tell it to 0.5 %.
        weight = MultiExitResNet(8).blocks[-1].conv1.weight
        torch.testing.assert_close(weight.std(), torch.tensor(math.sqrt(2 / (9 * 64))), rtol=0.03, atol=0)


class TestBasicBlock:
    def test_option_a_shortcut(self):
        # With the second normalisation's scale at 0 the residual is 0, and the block is ReLU of its shortcut: of every
        # second pixel of the old channels, and of zeros in the new ones.
        block = BasicBlock(2, 4, stride=2)
        torch.nn.init.zeros_(block.bn2.weight)
        x = torch.arange(-8.0, 24.0).reshape(1, 2, 4, 4)
        expected = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[8.0, 10.0], [16.0, 18.0]]])
        torch.testing.assert_close(block(x)[0, :2], expected)
        torch.testing.assert_close(block(x)[0, 2:], torch.zeros(2, 2, 2))
        assert parameters(block) == 9 * (2 * 4 + 4 * 4) + 2 * (4 + 4)

    def test_identity_shortcut(self):
        block = BasicBlock(2, 2, stride=1)
        torch.nn.init.zeros_(block.bn2.weight)
        x = images(channels=2, side=3)
        torch.testing.assert_close(block(x), x.relu())


class TestInternalHead:
    @pytest.mark.parametrize(("channels", "side"), [(16, 32), (32, 16), (64, 8)])
    @pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
    def test_is_pooling_with_a_quarter_of_the_side(self, channels, side, mix):
        head = InternalHead(channels, 10)
        torch.nn.init.constant_(head.mix, mix)
        x, s = images(2, channels, side), side // 4
        pooled = mix * F.max_pool2d(x, s) + (1 - mix) * F.avg_pool2d(x, s)
        torch.testing.assert_close(head(x), head.linear(pooled.flatten(1)))

    def test_mix_starts_in_the_middle(self):
        assert InternalHead(2, 3).mix.item() == 0.5


class TestExits:
    @pytest.mark.parametrize(
        ("depth", "exits", "expected"),
        [
            (56, "block", tuple(range(1, 28))),
            (56, "shallow-deep", (4, 8, 12, 16, 20, 24, 27)),
            (110, "shallow-deep", (8, 16, 24, 32, 40, 48, 54)),
            # 4k/27 of 9 blocks: 1.33, 2.67, 4, 5.33, 6.67, 8; of 6: 0.89, 1.78, 2.67, 3.56, 4.44, 5.33;
            # of 3: 0.44, 0.89, 1.33, 1.78, 2.22, 2.67, of which block 0 is none and block 3 the last.
            (20, "shallow-deep", (1, 3, 4, 5, 7, 8, 9)),
            (14, "shallow-deep", (1, 2, 3, 4, 5, 6)),
            (8, "shallow-deep", (1, 2, 3)),
            (14, [], (6,)),
            (14, [4, 1], (1, 4, 6)),
            (14, (5,), (5, 6)),
            (14, range(2, 4), (2, 3, 6)),
        ],
    )
    def test_blocks(self, depth, exits, expected):
        model = MultiExitResNet(depth, exits=exits)
        assert model.exit_blocks == expected
        assert model.num_exits == len(expected) == len(model.heads)

    def test_pieces_make_up_the_forward_pass(self):
        model = with_random_weights(MultiExitResNet(14, exits=[2, 5])).eval()
        x = images()
        hidden, logits = model.start(x), []
        for exit in (1, 2, 3):
            hidden, exit_logits = model.advance(hidden, exit)
            logits.append(exit_logits)
        torch.testing.assert_close(torch.stack(logits), model(x), rtol=0, atol=0)

    def test_advance_runs_only_what_lies_between(self):
        model, ran = MultiExitResNet(14, exits=[2, 5]).eval(), []
        for name, module in [*model.blocks.named_children(), *model.heads.named_children()]:
            module.register_forward_hook(lambda module, *_, name=name: ran.append((type(module), name)))
        hidden, _ = model.advance(model.start(images()), 1)
        ran.clear()
        model.advance(hidden, 2)
        assert ran == [(BasicBlock, "2"), (BasicBlock, "3"), (BasicBlock, "4"), (InternalHead, "1")]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 55}, ValueError, r"`depth` must be 6n \+ 2 .*got 55; 56 is near"),
        ({"depth": 57}, ValueError, r"got 57; 56 is near"),
        ({"depth": 2}, ValueError, r"got 2; 8 is near"),
        ({"depth": 1}, ValueError, r"got 1; 8 is near"),
        ({"depth": 0}, ValueError, r"`depth` must be at least 1, got 0"),
        ({"depth": 56.0}, TypeError, r"`depth` must be an integer, got 56\.0 \(float\)"),
        ({"num_classes": 0}, ValueError, r"`num_classes` must be at least 1, got 0"),
        ({"in_channels": True}, TypeError, r"`in_channels` must be an integer, got True"),
        ({"exits": "shallow_deep"}, ValueError, r"`exits` must be one of 'block', 'shallow-deep', got 'shallow_deep'"),
        ({"exits": 4}, TypeError, r"`exits` must be a name or a list of block numbers, got 4; write \[4, 8\]"),
        ({"exits": [4, 1.0]}, TypeError, r"`exits\[1\]` must be an integer, got 1\.0"),
        ({"exits": [0]}, ValueError, r"`exits\[0\]` must be at least 1, got 0"),
        ({"exits": [4, 2, 4]}, ValueError, r"`exits` must name each block once, got 4 twice"),
        ({"exits": [6]}, ValueError, r"`exits` must be in 1\.\.5, got 6; the last block, 6, has .*leave it out"),
        ({"exits": [2, 9]}, ValueError, r"`exits` must be in 1\.\.5, got 9"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiExitResNet(**{"depth": 14, **arguments})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (images()[0], ValueError, r"`inputs` must be \(B, 3, H, W\), got shape \(3, 16, 16\).*unsqueeze"),
        (images(channels=1), ValueError, r"`inputs` must be \(B, 3, H, W\), got shape \(3, 1, 16, 16\).*in_channels"),
        (images().byte(), TypeError, r"`inputs` must be floating, got torch\.uint8"),
    ],
)
def test_refuses_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        MultiExitResNet(8)(inputs)


@pytest.mark.parametrize("exit", [0, 4])
def test_refuses_exits_that_are_not_there(exit):
    model = MultiExitResNet(8)
    with pytest.raises(ValueError, match=rf"`exit` must be in 1\.\.3, got {exit}"):
        model.advance(model.start(images()), exit)
