from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit import MultiExitEncoder, policies
from tests.multiexit.text.tiny import network, tokenizer

TEXTS = ["a b c d e f g", "good", "the very bad plot", "film film", "was the film good", "bad", "g f e d c b a"]
PAIRS = ["a", "very good film", "b", "the plot was bad", "e", "f g", "is is"]


@pytest.fixture
def saved(tmp_path):
    """A network as it is served: loaded with its tokenizer, names of classes and policy."""
    model = network(exit="mean", num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model.config.policy = policies.to_dict(policies.Budget(2))
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    return MultiExitEncoder.from_pretrained(tmp_path)


def by_hand(model, exit, *texts):
    with torch.no_grad():
        return model(**model.tokenizer(*texts, return_tensors="pt"))[exit - 1, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_are_those_of_the_saved_policy_in_the_texts_order(saved, batch_size):
    found = saved.predict(TEXTS, batch_size=batch_size)
    assert [answer.exit for answer in found] == [2] * len(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        logits = by_hand(saved, 2, text)
        assert answer.label == ("bad", "good")[int(logits.argmax())]
        assert_close(answer.probabilities, logits.softmax(-1))
    assert len({float(answer.probabilities[0]) for answer in found}) > 4


def test_another_policy_and_pairs(saved):
    every = [
        torch.stack([by_hand(saved, exit, *pair) for exit in (1, 2, 3)]) for pair in zip(TEXTS, PAIRS, strict=True)
    ]
    stored = torch.stack(every, dim=1)
    policy = policies.calibrate(policies.Entropy(0.0), stored, 1.5)
    expected = policy.decide(stored)
    found = saved.predict(TEXTS, PAIRS, policy, batch_size=3)
    assert [answer.exit for answer in found] == expected.exits.tolist()
    assert len(set(expected.exits.tolist())) > 1
    for answer, logits in zip(found, expected.logits, strict=True):
        assert_close(answer.probabilities, logits.softmax(-1))


def test_without_a_policy_all_layers_are_run(saved):
    saved.config.policy = None
    assert {answer.exit for answer in saved.predict(TEXTS)} == {3}


def test_regression_answers_with_a_number(tmp_path):
    model = network(num_labels=1)
    model.tokenizer = tokenizer(tmp_path)
    (answer,) = model.predict(["good film"])
    assert answer.label == pytest.approx(float(by_hand(model, 3, "good film")))


def test_long_texts_are_cut(saved):
    (answer,) = saved.predict(["a b c d e f g"], max_length=5)
    assert_close(answer.probabilities, by_hand(saved, 2, "a b c").softmax(-1))


def test_no_texts(saved):
    assert saved.predict([]) == []


def test_what_makes_no_sense_is_named(saved):
    with pytest.raises(TypeError, match=r"`texts` must be a list of texts, got one; write \[text\]"):
        saved.predict("good")
    with pytest.raises(ValueError, match=r"`text_pairs` must be 2, one for each text, got 1"):
        saved.predict(["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"`tokenizer` must be given, for none was saved beside the network"):
        network().predict(["a"])
