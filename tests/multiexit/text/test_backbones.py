from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from gradalign.multiexit.text.encoder import MultiExitEncoder  # noqa: E402

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL, num_hidden_layers=3),
    "albert": transformers.AlbertConfig(**SMALL, num_hidden_layers=4, num_hidden_groups=2, embedding_size=8),
    "roberta": transformers.RobertaConfig(**SMALL, num_hidden_layers=3, max_position_embeddings=40),
    "distilbert": transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    "electra": transformers.ElectraConfig(**SMALL, num_hidden_layers=3, embedding_size=8),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_those_of_transformers(family, attention, tmp_path):
    torch.manual_seed(0)
    source = transformers.AutoModel.from_config(CONFIGS[family], attn_implementation=attention).eval()
    source.save_pretrained(tmp_path)
    model = MultiExitEncoder.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.backbone.config._attn_implementation == attention
    ids = torch.randint(5, 50, (3, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()
    ids = ids.where(mask.bool(), 1)
    with torch.no_grad():
        expected = source(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        state = model.start({"input_ids": ids, "attention_mask": mask})
        assert_close(state["hidden"][mask.bool()], expected[0][mask.bool()])
        for exit in range(1, model.num_exits + 1):
            state = model.layers(state, exit)
            assert_close(state["hidden"][mask.bool()], expected[exit][mask.bool()], msg=f"{family} layer {exit}")


def test_unknown_architecture_names_the_known():
    with pytest.raises(ValueError, match="distilbert"):
        MultiExitEncoder.from_config(transformers.GPT2Config())


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="eager"):
        MultiExitEncoder.from_config(CONFIGS["bert"], attn_implementation="flash_attention_2")
