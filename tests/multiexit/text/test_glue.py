from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close

from gradalign.errors import MissingExtraError
from gradalign.multiexit.text import glue

ENTAILED = ("entailment", "not_entailment")

# MNLI's training file has 12 columns, its development file 16.
MNLI_TRAIN = [
    "index",
    "promptID",
    "pairID",
    "genre",
    "sentence1_binary_parse",
    "sentence2_binary_parse",
    "sentence1_parse",
    "sentence2_parse",
    "sentence1",
    "sentence2",
    "label1",
    "gold_label",
]
MNLI_DEV = [*MNLI_TRAIN[:-1], "label2", "label3", "label4", "label5", "gold_label"]
STS_B = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
PAIRED = [["0", "a", "b", "entailment"], ["1", "c", "d", "not_entailment"]]
# The folder of each task, a file's lines, and the labels of its two rows, whose texts are a and c, or the pairs a, b
# and c, d.
LAYOUTS = {
    "cola": ("CoLA", [["gj04", "1", "", "a"], ["gj04", "0", "*", "c"]], [1, 0]),
    "sst-2": ("SST-2", [["sentence", "label"], ["a", "1"], ["c", "0"]], [1, 0]),
    "mrpc": (
        "MRPC",
        [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "a", "b"], ["0", "9", "6", "c", "d"]],
        [1, 0],
    ),
    "qqp": (
        "QQP",
        [
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            ["1", "2", "3", "a", "b", "1"],
            ["4", "5", "6", "c", "d", "0"],
        ],
        [1, 0],
    ),
    "mnli": (
        "MNLI",
        [
            MNLI_TRAIN,
            ["0", "1", "1n", "fiction", "(", ")", "(", ")", "a", "b", "entailment", "neutral"],
            ["1", "1", "1n", "fiction", "(", ")", "(", ")", "c", "d", "neutral", "contradiction"],
        ],
        [1, 2],
    ),
    "qnli": ("QNLI", [["index", "question", "sentence", "label"], *PAIRED], [0, 1]),
    "rte": ("RTE", [["index", "sentence1", "sentence2", "label"], *PAIRED], [0, 1]),
    "sts-b": (
        "STS-B",
        [
            STS_B,
            ["0", "main", "f", "2012", "1", "none", "none", "a", "b", "5.000"],
            ["1", "main", "f", "2012", "1", "none", "none", "c", "d", "1.25"],
        ],
        [5.0, 1.25],
    ),
    "wnli": (
        "WNLI",
        [["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "1"], ["1", "c", "d", "0"]],
        [1, 0],
    ),
}


def write(path, lines, end="\n", last=True, bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = end.join("\t".join(line) for line in lines) + (end if last else "")
    path.write_bytes(("\ufeff" if bom else "").encode() + text.encode())
    return path


def write_sst2(folder, train=(("good", "1"), ("bad", "0")), dev=(("fine", "1"),), **options):
    header = ("sentence", "label")
    write(folder / "SST-2" / "train.tsv", [header, *train], **options)
    write(folder / "SST-2" / "dev.tsv", [header, *dev], **options)
    return folder


def both(data):
    """The training and held-out rows as (text, text, label)."""
    rows = []
    for split in (data.train, data.held_out):
        second = split.second or [None] * len(split)
        rows += list(zip(split.first, second, split.labels.tolist(), strict=True))
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_classic_layout_of_each_task(tmp_path, name):
    folder, lines, labels = LAYOUTS[name]
    write(tmp_path / folder / "train.tsv", lines)
    dev = lines
    if name == "mnli":
        dev = [MNLI_DEV, *([*line[:-1], "neutral", "neutral", "neutral", "neutral", line[-1]] for line in lines[1:])]
    write(tmp_path / folder / ("dev_matched.tsv" if name == "mnli" else "dev.tsv"), dev)
    data = glue.load(name, tmp_path)
    assert data.task is glue.TASKS[name]
    assert data.dev.first == ("a", "c")
    pairs = name not in ("cola", "sst-2")
    assert data.dev.second == (("b", "d") if pairs else None)
    dtype = torch.float32 if name == "sts-b" else torch.int64
    assert_close(data.dev.labels, torch.tensor(labels, dtype=dtype), rtol=0, atol=0)
    assert (len(data.train), len(data.held_out), data.skipped) == (1, 1, 0)
    seconds = ("b", "d") if pairs else (None, None)
    assert sorted(both(data)) == sorted(zip(("a", "c"), seconds, labels, strict=True))


def test_mnli_with_four_columns_in_files_of_parts(tmp_path):
    lines = [["sentence1", "sentence2", "label", "genre"], ["a", "b", "contradiction", "x"], ["c", "d", "neutral", "x"]]
    write(tmp_path / "MNLI" / "train_subset.tsv", lines)
    write(tmp_path / "MNLI" / "dev_subset.tsv", lines)
    dev = glue.load("mnli", tmp_path).dev
    assert (dev.first, dev.second, dev.labels.tolist()) == (("a", "c"), ("b", "d"), [2, 1])


def test_a_whole_file_is_preferred_to_a_part(tmp_path):
    write_sst2(tmp_path)
    write(tmp_path / "SST-2" / "dev_subset.tsv", [("sentence", "label"), ("other", "0")])
    assert glue.load("sst2", tmp_path).dev.first == ("fine",)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [True, False])
def test_line_ends_marks_and_quotes(tmp_path, end, last, bom):
    # U+2028 and the form feed end no line here, though str.splitlines would say so.
    texts = ['he said "no', 'yes" he said', "\u2028 caf\u00e9 \x0c 'tis ", '"quoted"']
    write_sst2(tmp_path, dev=[(text, "1") for text in texts], end=end, last=last, bom=bom)
    assert glue.load("sst-2", tmp_path).dev.first == tuple(texts)


def test_cola_starts_at_its_first_line_even_after_a_byte_order_mark(tmp_path):
    lines = LAYOUTS["cola"][1]
    write(tmp_path / "CoLA" / "train.tsv", lines)
    write(tmp_path / "CoLA" / "dev.tsv", lines, bom=True, last=False)
    assert glue.load("CoLA", tmp_path).dev.first == ("a", "c")


def test_qqp_skips_rows_cut_in_two_and_keeps_empty_questions(tmp_path):
    header, first, second = LAYOUTS["qqp"][1]
    cut = [["7", "8", "9", "half a question"], ["", "its rest", "0"], [""]]
    write(tmp_path / "QQP" / "train.tsv", [header, first, *cut, second])
    write(tmp_path / "QQP" / "dev.tsv", [header, ["1", "2", "3", "how?", "", "0"], ["4", "5", "6"]])
    data = glue.load("qqp", tmp_path)
    assert data.skipped == 4
    assert (data.dev.first, data.dev.second) == (("how?",), ("",))
    assert sorted(both(data)) == [("a", "b", 1), ("c", "d", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("too", "many", "1"), "train.tsv:3 with 3 columns; mend or remove it: 2 columns"),
        (("too few",), "train.tsv:3 with 1 columns"),
        (("",), "train.tsv:3 with 1 columns"),
        (("word", "positive"), "train.tsv:3 with the label 'positive'; mend or remove it: one of 0, 1"),
        (("number", "2"), "train.tsv:3 with the label '2'"),
        (("", "1"), "train.tsv:3 with an empty text"),
        ((" ", "1"), "train.tsv:3 with an empty text"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, message):
    write_sst2(tmp_path, train=[("good", "1"), row, ("bad", "0")])
    with pytest.raises(ValueError, match=message):
        glue.load("sst-2", tmp_path)


@pytest.mark.parametrize("score", ["nan", "inf", "five", ""])
def test_bad_scores_are_named(tmp_path, score):
    header, first, second = LAYOUTS["sts-b"][1]
    write(tmp_path / "STS-B" / "train.tsv", [header, first, second])
    write(tmp_path / "STS-B" / "dev.tsv", [header, first, [*second[:-1], score]])
    with pytest.raises(ValueError, match=f"dev.tsv:3 with the score '{score}'; mend or remove it: a finite number"):
        glue.load("stsb", tmp_path)


def test_a_row_of_qqp_that_is_too_long_is_named(tmp_path):
    lines = LAYOUTS["qqp"][1]
    write(tmp_path / "QQP" / "train.tsv", [*lines, ["1", "2", "3", "a", "b", "1", "x"]])
    write(tmp_path / "QQP" / "dev.tsv", lines)
    with pytest.raises(ValueError, match=r"train.tsv:4 with 7 columns"):
        glue.load("qqp", tmp_path)


def test_cola_rows_are_counted_from_its_first_line(tmp_path):
    lines = LAYOUTS["cola"][1]
    write(tmp_path / "CoLA" / "train.tsv", [["gj04", "2", "", "a"], *lines])
    write(tmp_path / "CoLA" / "dev.tsv", lines)
    with pytest.raises(ValueError, match=r"train.tsv:1 with the label '2'"):
        glue.load("cola", tmp_path)


def test_files_without_the_columns_rows_or_encoding(tmp_path):
    write_sst2(tmp_path)
    path = tmp_path / "SST-2" / "train.tsv"
    write(path, [("text", "label"), ("a", "1")])
    with pytest.raises(ValueError, match=r"train.tsv with the columns sentence, label, got .* \['text', 'label'\]"):
        glue.load("sst-2", tmp_path)
    write(path, [("sentence", "label")])
    with pytest.raises(ValueError, match=r"at least one row, got .*train.tsv with none"):
        glue.load("sst-2", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.tsv with the columns sentence, label, got"):
        glue.load("sst-2", tmp_path)
    path.write_bytes("sentence\tlabel\ncaf\u00e9\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"must hold UTF-8 text, got .*train.tsv"):
        glue.load("sst-2", tmp_path)
    write(path, [("sentence", "label"), ("a", "1")])
    with pytest.raises(ValueError, match=r"at least 2 training rows, one of them to be held out, got 1"):
        glue.load("sst-2", tmp_path)


def test_the_hub_needs_datasets_and_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'`datasets`, which is not installed; pip install "gradalign\[text\]"'):
        glue.load("sst-2")
    assert glue.load("sst-2", write_sst2(tmp_path)).dev.first == ("fine",)


def test_missing_files_are_listed(tmp_path):
    looked = (
        r"`data_dir` must hold the rows of mnli, got .* with neither MNLI/train.tsv or train_subset.tsv and"
        r" dev_matched.tsv or dev.tsv or dev_subset.tsv, nor mnli/dataset_dict.json, nor mnli/train-\*.parquet and"
        r" validation_matched-\*.parquet; leave it out"
    )
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=looked):
            glue.load("mnli", folder)
    write(tmp_path / "MNLI" / "train.tsv", LAYOUTS["mnli"][1])
    with pytest.raises(FileNotFoundError, match=looked):
        glue.load("mnli", tmp_path)


def many(folder, count):
    return write_sst2(folder, train=[(f"row {k}", str(k % 2)) for k in range(count)])


def test_splits_are_fixed_and_share_no_row(tmp_path):
    many(tmp_path, 40)
    data, again, other = (glue.load("sst-2", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert (len(data.train), len(data.held_out)) == (34, 6)  # 0.15 * 40 = 6
    assert sorted(both(data)) == sorted((f"row {k}", None, k % 2) for k in range(40))
    assert data.held_out.first == again.held_out.first
    assert data.held_out.first != other.held_out.first
    numbers = [int(text.split()[1]) for text in data.train.first]
    assert numbers == sorted(numbers)  # in the file's order


def test_max_train_counts_the_held_out_rows(tmp_path):
    many(tmp_path, 40)
    data, again = (glue.load("sst-2", tmp_path, max_train=10, held_out=0.3) for _ in range(2))
    assert (len(data.train), len(data.held_out), len(data.dev)) == (7, 3, 1)
    assert len(set(both(data))) == 10
    assert set(both(data)) <= {(f"row {k}", None, k % 2) for k in range(40)}
    assert {text for text, *_ in both(data)} != {f"row {k}" for k in range(10)}  # not merely the first
    assert both(data) == both(again)
    whole = glue.load("sst-2", tmp_path, max_train=1000)
    assert len(both(whole)) == 40
    assert len(glue.load("sst-2", tmp_path, max_train=2, held_out=0.9).train) == 1
    assert len(glue.load("sst-2", tmp_path, max_train=2, held_out=0.01).held_out) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"held_out": 0.0}, ValueError, r"`held_out` must be in \(0, 1\), got 0.0"),
        ({"held_out": 1.0}, ValueError, r"`held_out` must be in \(0, 1\), got 1.0"),
        ({"held_out": "0.1"}, TypeError, r"`held_out` must be a number"),
        ({"max_train": 1}, ValueError, r"`max_train` must be at least 2, got 1"),
        ({"max_train": 2.5}, TypeError, r"`max_train` must be an integer"),
        ({"seed": -1}, ValueError, r"`seed` must be in"),
    ],
)
def test_bad_arguments(tmp_path, options, error, message):
    write_sst2(tmp_path)
    with pytest.raises(error, match=message):
        glue.load("sst-2", tmp_path, **options)


@pytest.mark.parametrize("name", ["sst-2", "SST-2", "sst2", "SST2", "sst_2", "Sst-2"])
def test_spellings(name):
    assert glue.task(name) is glue.TASKS["sst-2"]
    assert glue.task(glue.TASKS["sst-2"]) is glue.TASKS["sst-2"]


def test_an_unknown_task_is_offered_the_near_ones():
    with pytest.raises(ValueError, match=r"`task` must be one of 'cola', .*, got 'mnl'; did you mean 'mnli'"):
        glue.task("mnl")
    with pytest.raises(ValueError, match=r"`task` must be one of"):
        glue.load("imdb")


def test_the_table():
    assert {name: task.num_classes for name, task in glue.TASKS.items()} == dict.fromkeys(LAYOUTS, 2) | {
        "mnli": 3,
        "sts-b": 1,
    }
    assert all(name == task.name for name, task in glue.TASKS.items())
    assert {name: task.main for name, task in glue.TASKS.items()} == dict.fromkeys(LAYOUTS, "accuracy") | {
        "cola": "matthews",
        "mrpc": "accuracy_and_f1",
        "qqp": "accuracy_and_f1",
        "sts-b": "pearson_and_spearman",
    }
