"""GLUE as the hub has it: a saved copy, its parquet files, and what `datasets` loads."""

from __future__ import annotations

import pytest
import torch

from gradalign.multiexit.text import glue


def hub_copy(name, **changed):
    """What the hub would give for a task: its fields, its order of labels, more splits than are read."""
    datasets = pytest.importorskip("datasets")
    task = glue.TASKS[name]
    label = datasets.Value("float32") if task.labels is None else datasets.ClassLabel(names=list(task.labels))
    text = datasets.Value("string")
    features = datasets.Features(dict.fromkeys(task.fields, text) | {"label": label, "idx": datasets.Value("int32")})
    classes = [5.0, 1.25] if task.labels is None else [task.num_classes - 1, 0]
    rows = {field: [f"{field} {k}" for k in range(2)] for field in task.fields} | {"label": classes, "idx": [0, 1]}
    test = rows | {"label": [-1, -1]}
    validation = "validation_matched" if name == "mnli" else "validation"
    splits = {"train": rows, validation: rows | changed, "test": test}
    return datasets.DatasetDict(
        {part: datasets.Dataset.from_dict(columns, features=features) for part, columns in splits.items()}
    )


def check_hub_rows(data):
    task = data.task
    texts = [tuple(f"{field} {k}" for k in range(2)) for field in task.fields]
    assert data.dev.first == texts[0]
    assert data.dev.second == (texts[1] if len(texts) == 2 else None)
    assert data.dev.labels.tolist() == ([5.0, 1.25] if task.labels is None else [task.num_classes - 1, 0])
    assert data.dev.labels.dtype == (torch.float32 if task.labels is None else torch.int64)
    assert (len(data.train), len(data.held_out)) == (1, 1)


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_saved_copy_of_the_hub(tmp_path, name):
    hub_copy(name).save_to_disk(str(tmp_path / glue.TASKS[name].hub_config))
    check_hub_rows(glue.load(name, tmp_path))


@pytest.mark.parametrize("name", ["mnli", "sts-b", "sst-2"])
def test_parquet_files_of_the_hub(tmp_path, name):
    folder = tmp_path / glue.TASKS[name].hub_config
    folder.mkdir()
    for part, rows in hub_copy(name).items():
        for shard in range(2):
            rows.shard(2, shard).to_parquet(str(folder / f"{part}-0000{shard}-of-00002.parquet"))
    check_hub_rows(glue.load(name, tmp_path))


def test_the_hub_itself(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return hub_copy("sts-b")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_hub_rows(glue.load("sts-b"))
    assert asked == [("nyu-mll/glue", "stsb")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [1, -1]}, r"sst2 validation:1 with the label -1; mend or remove it: an integer in 0..1"),
        ({"label": [1, None]}, r"sst2 validation:1 with the label None"),
        ({"sentence": ["a", ""]}, r"sst2 validation:1 with an empty text"),
        ({"sentence": [None, "a"]}, r"sst2 validation:0 with no text"),
    ],
)
def test_malformed_rows_of_the_hub_format_are_named(tmp_path, changed, message):
    hub_copy("sst-2", **changed).save_to_disk(str(tmp_path / "sst2"))
    with pytest.raises(ValueError, match=message):
        glue.load("sst-2", tmp_path)


def test_a_copy_that_is_of_another_form(tmp_path):
    datasets = pytest.importorskip("datasets")
    copy = hub_copy("rte")
    turned = datasets.ClassLabel(names=["not_entailment", "entailment"])
    forms = {
        r"must hold the split validation, got .*rte without": datasets.DatasetDict({"train": copy["train"]}),
        r"must hold the fields sentence1, sentence2, label, got .*rte train with a": copy.rename_column(
            "sentence1", "a"
        ),
        r"must number the labels \('entailment', 'not_entailment'\), got": copy.cast_column("label", turned),
    }
    for number, (message, form) in enumerate(forms.items()):
        form.save_to_disk(str(tmp_path / str(number) / "rte"))
        with pytest.raises(ValueError, match=message):
            glue.load("rte", tmp_path / str(number))
