from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")

from gradalign.multiexit import MultiExitConfig, MultiExitEncoder, early_exit  # noqa: E402
from gradalign.multiexit.policies import Budget  # noqa: E402
from gradalign.multiexit.text.heads import KINDS  # noqa: E402

FAMILIES = ("bert", "albert", "roberta", "distilbert", "electra")


def config_of(family, layers=3):
    if family == "distilbert":
        return transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=layers, n_heads=2, hidden_dim=32)
    more = {"embedding_size": 8} if family in ("albert", "electra") else {}
    return transformers.AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **more,
    )


def model_of(family="bert", **kwargs):
    torch.manual_seed(0)
    return MultiExitEncoder.from_config(config_of(family), **kwargs).double().eval()


def batch_of(lengths=(7, 4, 2), extra=0):
    ids = torch.ones(len(lengths), max(lengths) + extra, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(5, 5 + length) + 9 * row
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours_or_padding(family, kind):
    model, lengths = model_of(family, exit=kind), (7, 4, 2)
    batch = batch_of(lengths)
    with torch.no_grad():
        whole, padded = model(**batch), model(**batch_of(lengths, extra=3))
        alone = [model(batch["input_ids"][k : k + 1, :length]) for k, length in enumerate(lengths)]
    assert whole.shape == (3, 3, 2)
    assert_close(padded, whole, rtol=0, atol=1e-12)
    assert_close(torch.cat(alone, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_early_exit_answers_as_the_whole_network(kind):
    model, batch = model_of(exit=kind, exits=[1]), batch_of()
    assert model.exit_layers == (1, 3)
    for exit in (1, 2):
        with torch.no_grad():
            assert_close(early_exit(model, batch, Budget(exit)).logits, model(**batch)[exit - 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_to_the_bit(family, kind, tmp_path):
    torch.manual_seed(0)
    model = MultiExitEncoder.from_config(config_of(family), num_labels=3, exit=kind, exits=[2]).eval()
    model.config.policy = {"name": "Entropy", "threshold": 0.3}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (MultiExitEncoder.from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, MultiExitEncoder)
        assert (loaded.exit_layers, loaded.config.policy) == ((2, 3), model.config.policy)
        with torch.no_grad():
            assert torch.equal(loaded(**batch_of()), model(**batch_of()))


@pytest.mark.parametrize("family", ["bert", "albert", "roberta"])
def test_pooler_is_the_checkpoints(family, tmp_path):
    source = transformers.AutoModel.from_config(config_of(family)).eval()
    source.save_pretrained(tmp_path)
    model = MultiExitEncoder.from_pretrained(tmp_path)
    batch = batch_of()
    with torch.no_grad():
        expected = source(**batch).pooler_output
        state = model.start(batch)
        for exit in (1, 2, 3):
            state = model.layers(state, exit)
        assert_close(model.pooler(state["hidden"]), expected)


def test_keeps_the_first_layers(tmp_path):
    source = transformers.AutoModel.from_config(config_of("bert")).eval()
    source.save_pretrained(tmp_path)
    short, whole = (MultiExitEncoder.from_pretrained(tmp_path, exit="mean", num_layers=n) for n in (2, None))
    whole.heads[:2].load_state_dict(short.heads.state_dict())
    with torch.no_grad():
        assert_close(short(**batch_of()), whole(**batch_of())[:2])


def test_loss_is_weighted_by_the_exits_number():
    labels = torch.tensor([1, 0, 1])
    out = model_of()(**batch_of(), labels=labels)
    each = [torch.nn.functional.cross_entropy(logits, labels) for logits in out.logits]
    assert_close(out.loss, (each[0] + 2 * each[1] + 3 * each[2]) / 6)


def test_regression_loss_is_the_weighted_squared_error():
    labels = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)
    out = model_of(num_labels=1)(**batch_of(), labels=labels)
    each = [((logits[:, 0] - labels) ** 2).mean() for logits in out.logits]
    assert_close(out.loss, (each[0] + 2 * each[1] + 3 * each[2]) / 6)
    with pytest.raises(ValueError, match="`labels` must be"):
        model_of(num_labels=1)(**batch_of(), labels=labels[:, None])


def test_left_padding_is_refused():
    batch = {name: tensor.flip(1) for name, tensor in batch_of().items()}
    with pytest.raises(ValueError, match="padding_side"):
        model_of()(**batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_half_the_counted_flops(family, kind):
    # Exits from layer 2 on: torch multiplies a mixture of one layer without a matrix product, which is not counted.
    model = MultiExitEncoder.from_config(config_of(family), exit=kind, exits=[2], attn_implementation="eager").eval()
    ids = torch.arange(5, 12)[None]
    # Attention by plain matrix products: the counter does not know the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert 2 * model.exit_macs(7)[-1] == counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_every_parameter_once(family):
    model = model_of(family)
    found = [id(p) for block in model.layer_blocks() for p in block]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_parameters_of_the_papers_base_models():
    with torch.device("meta"):
        bert = MultiExitEncoder.from_config(transformers.BertConfig())
        deebert = MultiExitEncoder.from_config(transformers.BertConfig(), exit="deebert")
    # Embeddings (30522 + 512 + 2 + 2) 768; a layer 4 (768^2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768; a pooler
    # 768^2 + 768; an exit 2 * 768 + 2.
    layer = 4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    backbone, pooler = (30522 + 512 + 2 + 2) * 768 + 12 * layer, 768**2 + 768
    assert bert.num_parameters() == backbone + pooler + 12 * (2 * 768 + 2) == 109_500_696
    assert deebert.num_parameters() == bert.num_parameters() + 11 * pooler


def test_torch_alone_imports_the_package():
    code = (
        "import sys, gradalign.multiexit as m; assert 'transformers' not in sys.modules;"
        "assert 'MultiExitEncoder' in dir(m)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert MultiExitConfig is MultiExitEncoder.config_class


def tokenizer_of_words():
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: k for k, word in enumerate(["[UNK]", "[PAD]", "[CLS]", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def test_predictions_in_the_texts_order_by_the_saved_policy(tmp_path):
    model, texts = model_of(id2label={0: "bad", 1: "good"}), ["a b c d e", "f", "g h a", "b b"]
    model.config.policy = {"name": "Budget", "exit": 2}
    model.save_pretrained(tmp_path)
    tokenizer_of_words().save_pretrained(tmp_path)
    loaded = MultiExitEncoder.from_pretrained(tmp_path)
    found = loaded.predict(texts, batch_size=2)
    for text, answer in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = loaded(**loaded.tokenizer([text], return_tensors="pt"))[1, 0]
        assert answer.exit == 2
        assert answer.label == ("bad", "good")[int(logits.argmax())]
        assert_close(answer.probabilities, logits.float().softmax(-1))
    assert [answer.exit for answer in loaded.predict(texts, policy=Budget(3))] == [3] * 4
    with pytest.raises(ValueError, match="tokenizer"):
        model.predict(texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_resized(family):
    model = model_of(family)
    with torch.no_grad():
        before = model(**batch_of())
        model.resize_token_embeddings(60, mean_resizing=False)
        assert model.get_input_embeddings().weight.shape[0] == 60
        assert torch.equal(model(**batch_of()), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_layers_run_again_and_give_the_same_gradients():
    grads, runs = [], []
    for checkpointed in (False, True):
        model = model_of()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        calls = []
        model.backbone.encoder.layer[1].attention.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        model.train()
        model(**batch_of(), labels=torch.tensor([1, 0, 1])).loss.backward()
        runs.append(len(calls))
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert runs == [1, 2]
    assert_close(grads[1], grads[0])
