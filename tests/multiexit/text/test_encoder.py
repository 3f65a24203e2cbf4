from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AlbertConfig, AutoConfig, AutoModel, BertConfig, BertModel

from gradalign.multiexit import MultiExitEncoder, early_exit, objectives, policies
from gradalign.multiexit.text.backbones import FAMILIES
from tests.multiexit.text.tiny import CONFIGS, KINDS, batch, network


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_does_not_depend_on_the_rows_beside_it(family, kind):
    model, rows = network(family, exit=kind, num_labels=3).double(), batch(family)
    with torch.no_grad():
        together = model(**rows)
        longer = model(**{name: torch.nn.functional.pad(tensor, (0, 4), value=CONFIGS[family].pad_token_id or 0)
                          if name == "input_ids" else torch.nn.functional.pad(tensor, (0, 4))
                          for name, tensor in rows.items()})  # fmt: skip
        assert together.shape == (3, 4, 3)
        assert_close(longer, together, rtol=0, atol=0)
        for row, length in enumerate(rows["attention_mask"].sum(1).tolist()):
            alone = model(input_ids=rows["input_ids"][row : row + 1, :length])  # no mask: all are tokens
            assert_close(alone[:, 0], together[:, row], rtol=0, atol=1e-12)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3  # rows and exits do differ
    assert (together[0] - together[2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_early_exiting_is_what_stored_logits_say(kind):
    model, rows = network(exit=kind, num_labels=3), batch(lengths=(9, 5, 3, 7, 8, 8, 2, 6), seed=1)
    with torch.no_grad():
        stored = model(**rows)
    for policy in (policies.Entropy(0.0), policies.Patience(1), policies.Budget(2)):
        chosen = policy if isinstance(policy, policies.Budget) else policies.calibrate(policy, stored, 1.4)
        expected, found = chosen.decide(stored), early_exit(model, rows, chosen)
        assert torch.equal(found.exits, expected.exits)
        assert torch.equal(found.labels, expected.labels)
        assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_padding_is_dropped_when_the_long_rows_have_left():
    model = network(exit="linear")
    widths = []
    for layer in model.backbone.encoder.layer:
        layer.register_forward_pre_hook(lambda module, inputs: widths.append(tuple(inputs[0].shape[:2])))
    with torch.no_grad():
        state = model.layers(model.start(batch()), 1)
        model.layers({name: tensor[1:3] for name, tensor in state.items()}, 2)
    assert widths == [(4, 9), (2, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_network_comes_back(family, kind, tmp_path):
    model = network(family, exit=kind, num_labels=3, exits=[1])
    model.config.policy = policies.to_dict(policies.Entropy(0.25))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = MultiExitEncoder.from_pretrained(tmp_path)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.exit_layers == model.exit_layers == (1, 3)
    assert again.config.exit == kind
    assert again.config.num_labels == 3
    assert policies.from_dict(again.config.policy) == policies.Entropy(0.25)
    assert again.tokenizer is None
    with torch.no_grad():
        assert torch.equal(again(**batch(family)), model(**batch(family)))
    assert type(AutoModel.from_pretrained(tmp_path)) is MultiExitEncoder
    assert AutoConfig.from_pretrained(tmp_path).exits == [1]


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_an_encoders_weights_are_taken(family, tmp_path):
    source = AutoModel.from_config(CONFIGS[family])
    source.save_pretrained(tmp_path)
    model = MultiExitEncoder.from_pretrained(tmp_path, num_labels=3)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    pooler = {"bert": "pooler.dense.weight", "albert": "pooler.weight"}.get(family)
    if pooler:
        assert torch.equal(model.pooler.dense.weight, source.state_dict()[pooler])
    assert model(**batch(family)).shape == (3, 4, 3)


def test_own_poolers_start_as_the_pretrained_one(tmp_path):
    source = BertModel(CONFIGS["bert"])
    source.save_pretrained(tmp_path)
    model = MultiExitEncoder.from_pretrained(tmp_path, exit="deebert")
    assert all(torch.equal(head.pooler.dense.weight, source.pooler.dense.weight) for head in model.heads)
    assert len({head.pooler.dense.weight.data_ptr() for head in model.heads}) == 3


def test_the_first_layers_alone(tmp_path):
    source = BertModel(CONFIGS["bert"])
    source.save_pretrained(tmp_path)
    model = MultiExitEncoder.from_pretrained(tmp_path, num_layers=2)
    assert model.exit_layers == (1, 2)
    assert len(model.backbone.encoder.layer) == 2
    assert torch.equal(model.backbone.encoder.layer[1].output.dense.weight, source.encoder.layer[1].output.dense.weight)


def test_new_exits_depend_on_the_generator_alone(tmp_path):
    BertModel(CONFIGS["bert"]).save_pretrained(tmp_path)
    torch.manual_seed(3)
    one = MultiExitEncoder.from_pretrained(tmp_path)
    torch.manual_seed(3)
    assert torch.equal(one.heads[0].linear.weight, MultiExitEncoder.from_pretrained(tmp_path).heads[0].linear.weight)


def test_parameters_of_bert_base_are_the_papers():
    """109M of Table 2, with PABEE's heads.

    BERT-base without pooler: embeddings (30522 + 512 + 2) 768 + 2 * 768 = 23,837,184; a layer 4 (768^2 + 768) + 2 * 768
    attention, 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768 feed-forward = 7,087,872, twelve of them 85,054,464.
    Pooler 768^2 + 768 = 590,592; twelve exits 12 (768 * 2 + 2) = 18,456. Together 109,500,696.
    """
    with torch.device("meta"):
        shared = MultiExitEncoder.from_config(BertConfig())
        own = MultiExitEncoder.from_config(BertConfig(), exit="deebert")
        linear = MultiExitEncoder.from_config(BertConfig(), exit="linear")
    assert sum(p.numel() for p in shared.parameters()) == 109_500_696
    assert sum(p.numel() for p in own.parameters()) == 109_500_696 + 11 * 590_592
    assert sum(p.numel() for p in linear.parameters()) == 109_500_696 - 590_592


def test_parameters_of_albert_base():
    """12M: embeddings (30000 + 512 + 2) 128 + 256 = 3,906,048; 128 * 768 + 768 = 99,072; one layer 7,087,872; pooler
    590,592; twelve exits 18,456."""
    config = AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    with torch.device("meta"):
        model = MultiExitEncoder.from_config(config)
    assert model.num_exits == 12
    assert sum(p.numel() for p in model.parameters()) == 3_906_048 + 99_072 + 7_087_872 + 590_592 + 18_456


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_of_layers_hold_every_parameter_once(family):
    model = network(family)
    blocks = model.layer_blocks()
    assert sorted(id(p) for block in blocks for p in block) == sorted(id(p) for p in model.parameters())
    assert len(blocks) == 3
    head = model.heads[1].linear.weight
    assert any(p is head for p in blocks[1])


def test_the_loss_is_eq_1_and_regression_has_its_own():
    model, rows, labels = network(num_labels=3), batch(), torch.tensor([0, 2, 1, 1])
    output = model(**rows, labels=labels)
    assert_close(output.loss, objectives.weighted_cross_entropy(output.logits, labels))
    regression = network(num_labels=1)
    scores = torch.tensor([0.5, 1.0, 4.0, 2.0])
    output = regression(**rows, labels=scores)
    errors = ((output.logits.squeeze(-1) - scores) ** 2).mean(1)
    assert_close(output.loss, (errors * torch.tensor([1.0, 2.0, 3.0])).sum() / 6)


def test_checkpointed_layers_run_again_and_give_the_same_gradients():
    gradients, runs = [], []
    for checkpointed in (False, True):
        model, calls = network().train(), []
        if checkpointed:  # transformers 5 renames it, and warns at the old name
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        model.backbone.encoder.layer[1].attention.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(0)  # the same dropout
        model(**batch()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        runs.append(len(calls))
    assert runs == [1, 2]
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two)


def test_more_words():
    model = network()
    model.resize_token_embeddings(60)
    assert model(input_ids=torch.tensor([[2, 59, 3]])).shape == (3, 1, 2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"exit": "poolar"}, r"`exit` must be one of .*, got 'poolar'; did you mean 'pooler'"),
            ({"exits": [4]}, r"`exits` must be different layers in 1\.\.3, those of the backbone, got \[4\]"),
            ({"exits": [1, 1]}, r"`exits` must be different layers in 1\.\.3"),
            ({"num_layers": 4}, r"`num_layers` must be in 1\.\.3, the layers of the backbone, got 4"),
            ({"num_labels": 0}, r"`num_labels` must be at least 1, got 0"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            MultiExitEncoder.from_config(copy.deepcopy(CONFIGS["bert"]), **options)

    def test_settings_of_a_saved_network(self, tmp_path):
        network().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"has a configuration of its own, got exit='linear' beside it"):
            MultiExitEncoder.from_pretrained(tmp_path, exit="linear")

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"input_id": torch.ones(1, 2)}, r"`batch` must hold what a tokenizer gives, .*, got input_id"),
            ({"attention_mask": torch.ones(1, 2)}, r"`batch` must hold input_ids or inputs_embeds, got neither"),
            (
                {"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])},
                r'`attention_mask` must be 1 for the first token of each row, got 0; set .*padding_side="right"',
            ),
        ],
    )
    def test_batches(self, rows, message):
        with pytest.raises(ValueError, match=message):
            network().start(rows)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (torch.ones(1, 2, dtype=torch.long), r"`batch` must be what a tokenizer returns, .*, got Tensor; write"),
            ({"input_ids": [[2, 5]]}, r'`batch` must hold tensors, got list for input_ids; .*return_tensors="pt"'),
        ],
    )
    def test_what_is_no_batch(self, rows, message):
        with pytest.raises(TypeError, match=message):
            early_exit(network(), rows, policies.Budget(1))

    @pytest.mark.parametrize(("family", "limit"), [("bert", 40), ("roberta", 38)])
    def test_rows_that_are_too_long(self, family, limit):
        model = network(family)
        assert model(input_ids=torch.full((1, limit), 5)).shape == (3, 1, 2)
        with pytest.raises(
            ValueError, match=rf"`batch` must have rows of at most {limit} tokens, got {limit + 1}; give"
        ):
            model(input_ids=torch.full((1, limit + 1), 5))

    @pytest.mark.parametrize("exit", [0, 4])
    def test_an_exit_that_there_is_not(self, exit):
        model = network()
        with pytest.raises(ValueError, match=rf"`exit` must be in 1\.\.3, got {exit}"):
            model.layers(model.start(batch()), exit)
