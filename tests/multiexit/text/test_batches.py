from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit.text import batches
from gradalign.multiexit.text.glue import TextSplit

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "##s"]
PAD, UNK, CLS, SEP, A, B, C, S = 0, 1, 2, 3, 5, 6, 7, 11


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return transformers.BertTokenizerFast.from_pretrained(str(folder))


def single(*texts):
    return TextSplit(texts, None, torch.arange(len(texts)))


def tensor(rows):
    return torch.tensor(rows, dtype=torch.int64)


def same(found, expected):
    assert set(found) == set(expected)
    for name, column in found.items():
        assert_close(column, tensor(expected[name]), rtol=0, atol=0)


def test_single_texts_by_hand(tokenizer):
    encoded = batches.encode(single("a", "A bs c", "what a"), tokenizer, max_length=16)
    assert len(encoded) == 3
    assert encoded.lengths.tolist() == [3, 6, 4]
    assert encoded.labels.tolist() == [0, 1, 2]
    same(
        batches.collate(encoded, torch.tensor([2, 0])),  # row 1, the longest, is not there
        {
            "input_ids": [[CLS, UNK, A, SEP], [CLS, A, SEP, PAD]],
            "token_type_ids": [[0, 0, 0, 0], [0, 0, 0, 0]],
            "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        },
    )
    same(
        batches.collate(encoded, torch.tensor([1])),
        {
            "input_ids": [[CLS, A, B, S, C, SEP]],
            "token_type_ids": [[0, 0, 0, 0, 0, 0]],
            "attention_mask": [[1, 1, 1, 1, 1, 1]],
        },
    )


def test_pairs_by_hand(tokenizer):
    pairs = TextSplit(("a", "a b c a b c"), ("b c", "c"), torch.tensor([0.5, 1.5]))
    encoded = batches.encode(pairs, tokenizer, max_length=7)
    assert encoded.labels.tolist() == [0.5, 1.5]
    same(
        batches.collate(encoded, torch.tensor([0, 1])),
        {
            # [CLS] a [SEP] b c [SEP], and of the other pair the longer text is cut
            "input_ids": [[CLS, A, SEP, B, C, SEP, PAD], [CLS, A, B, C, SEP, C, SEP]],
            "token_type_ids": [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]],
            "attention_mask": [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
        },
    )


@pytest.mark.parametrize("multiple", [1, 8])
def test_any_batch_is_what_the_tokenizer_itself_pads(tokenizer, multiple):
    choice = random.Random(0)
    first, second = (
        tuple(" ".join(choice.choices(WORDS[5:11], k=choice.randint(1, 9))) for _ in range(2050)) for _ in range(2)
    )  # more rows than two calls of the tokenizer take
    encoded = batches.encode(TextSplit(first, second, torch.zeros(2050)), tokenizer, max_length=16)
    for rows in torch.randperm(2050, generator=torch.Generator().manual_seed(0)).split(205):
        direct = tokenizer(
            [first[k] for k in rows],
            [second[k] for k in rows],
            truncation=True,
            max_length=16,
            padding=True,
            pad_to_multiple_of=multiple,
        )
        same(batches.collate(encoded, rows, multiple), dict(direct))


def test_only_what_the_tokenizer_gives_and_its_own_padding(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    other = transformers.BertTokenizerFast.from_pretrained(
        str(tmp_path), pad_token="f", model_input_names=["input_ids", "attention_mask"]
    )
    encoded = batches.encode(single("a", "a b"), other, max_length=8)
    same(
        batches.collate(encoded, torch.tensor([0, 1])),
        {
            "input_ids": [[CLS, A, SEP, WORDS.index("f")], [CLS, A, B, SEP]],
            "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        },
    )


def test_a_tokenizer_that_cannot_pad_on_the_right(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    left = transformers.BertTokenizerFast.from_pretrained(str(tmp_path), padding_side="left")
    with pytest.raises(ValueError, match=r"`tokenizer` must pad on the right .*, got padding on the left"):
        batches.encode(single("a"), left, max_length=8)
    none = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    none.pad_token = None
    with pytest.raises(ValueError, match="got no padding token"):
        batches.encode(single("a"), none, max_length=8)


def test_bad_arguments(tokenizer):
    encoded = batches.encode(single("a"), tokenizer, max_length=8)
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        batches.encode(single("a"), tokenizer, max_length=0)
    with pytest.raises(ValueError, match="`max_length` must exceed the 2 special tokens of a row, got 2"):
        batches.encode(single("a"), tokenizer, max_length=2)
    with pytest.raises(ValueError, match="`max_length` must exceed the 3 special tokens of a row, got 3"):
        batches.encode(TextSplit(("a",), ("b",), torch.zeros(1)), tokenizer, max_length=3)
    with pytest.raises(ValueError, match="`rows` must hold at least one row"):
        batches.collate(encoded, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="`multiple` must be at least 1, got 0"):
        batches.collate(encoded, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        batches.epoch_order(torch.ones(3), 0, torch.Generator())
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        batches.in_order(torch.ones(3), 0)


def lengths_of(count):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(count))


def order(count, buckets, seed=0, batch_size=8):
    return batches.epoch_order(lengths_of(count), batch_size, torch.Generator().manual_seed(seed), buckets)


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 400, 401, 1003])  # 50 batches of 8 are 400 rows
def test_each_row_once_in_as_few_batches_as_can_be(count, buckets):
    found = order(count, buckets)
    assert sorted(torch.cat(found).tolist()) == list(range(count))
    assert len(found) == -(-count // 8)
    sizes = sorted(len(batch) for batch in found)
    assert sizes == sorted([8] * (count // 8) + [count % 8] * (count % 8 > 0))


@pytest.mark.parametrize("buckets", [False, True])
def test_an_order_is_a_function_of_its_generator(buckets):
    once, again, other = (torch.cat(order(1003, buckets, seed)) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert not torch.equal(once.sort().values, once)


def padded(found, lengths):
    """Tokens of all batches, each padded to its longest row."""
    return sum(int(lengths[batch].max()) * len(batch) for batch in found)


def test_buckets_pad_little_and_stay_shuffled():
    lengths = lengths_of(4000)
    plain, buckets = order(4000, False), order(4000, True)
    assert padded(plain, lengths) > 1.6 * int(lengths.sum())
    assert padded(buckets, lengths) < 1.05 * int(lengths.sum())
    one_run = order(400, True)
    means = torch.stack([lengths_of(400)[batch].double().mean() for batch in one_run])
    # 50 batches in random order: the correlation with their place has deviation 1/7; sorted it would be near 1
    place = torch.arange(50, dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([means, place]))[0, 1]) < 4 / 7
    met = [{frozenset(batch.tolist()) for batch in order(4000, True, seed)} for seed in (0, 1)]
    assert not met[0] & met[1]  # other rows meet in the next epoch


def test_without_buckets_a_permutation_is_cut():
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(3)).split(8)
    for found, batch in zip(order(20, False, seed=3), expected, strict=True):
        assert_close(found, batch, rtol=0, atol=0)


def test_in_order_sorts_and_puts_answers_back():
    lengths = lengths_of(101)
    found, places = batches.in_order(lengths, 8)
    assert [len(batch) for batch in found] == [8] * 12 + [5]
    ordered = lengths[torch.cat(found)]
    assert torch.equal(ordered, lengths.sort().values)
    answers = torch.cat([batch.double() ** 2 for batch in found])
    assert_close(answers[places], torch.arange(101).double() ** 2, rtol=0, atol=0)


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.int64)
    assert batches.epoch_order(empty, 4, torch.Generator(), buckets=True) == []
    found, places = batches.in_order(empty, 4)
    assert (found, places.tolist()) == ([], [])
