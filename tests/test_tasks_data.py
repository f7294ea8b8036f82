"""One's own data: columns and kinds found out, and every bad input refused with its column, row, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, List, Value

from smbert.tasks import GLUE, Task, custom_task_from, load_files, load_task, prepare

TASK = Task("t", ("text",), label_names=("negative", "neutral", "positive"))
TRAIN_ONLY = ("train",)


def texts(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})


def encoded(task: Task, labels: list[Any], split: str = "train") -> list[Any]:
    return list(prepare(task, {split: texts(labels)}, required=(split,))[split]["label"])


# ------------------------------------------------------------------------------------------------- what task it poses


@pytest.mark.parametrize(
    ("labels", "kind", "names", "encoded_as"),
    [
        ([0, 1, 2, 1], "single_label", ("0", "1", "2"), [0, 1, 2, 1]),
        ([1, 5, 3, 1], "single_label", ("1", "3", "5"), [0, 2, 1, 0]),
        ([2, 10, 2], "single_label", ("2", "10"), [0, 1, 0]),  # by value, not as text
        (["2", "10", "2"], "single_label", ("2", "10"), [0, 1, 0]),
        (["spam", "ham", " spam "], "single_label", ("ham", "spam"), [1, 0, 1]),
        ([True, False], "single_label", ("False", "True"), [1, 0]),
        ([0.5, 3.0], "regression", (), [0.5, 3.0]),
        ([1.0, 3.0], "regression", (), [1.0, 3.0]),
        (["0.5", "3"], "regression", (), [0.5, 3.0]),
        ([[0, 1, 1], [1, 0, 0]], "multi_label", ("0", "1", "2"), [[0, 1, 1], [1, 0, 0]]),
        ([[0, 2], [1], []], "multi_label", ("0", "1", "2"), [[1, 0, 1], [0, 1, 0], [0, 0, 0]]),
        ([["b", "a"], ["c"]], "multi_label", ("a", "b", "c"), [[1, 1, 0], [0, 0, 1]]),
        ([[0.0, 1.0], [1.0, 1.0]], "multi_label", ("0", "1"), [[0, 1], [1, 1]]),
    ],
)
def test_kind_and_names_are_found(labels: list, kind: str, names: tuple, encoded_as: list) -> None:
    data = texts(labels)
    task = custom_task_from(data)
    assert (task.kind, task.label_names, task.text_columns) == (kind, names, ("text",))
    ready = prepare(task, data, TRAIN_ONLY)
    assert list(ready["train"]["label"]) == encoded_as
    again = prepare(task, ready, TRAIN_ONLY)
    assert again["train"].to_dict() == ready["train"].to_dict()  # 1..5 became 0..2: must not be mapped twice


def test_class_label_names_are_kept_and_matched_by_name() -> None:
    data = texts([1, 0, 1]).cast_column("label", ClassLabel(names=["yes", "no"]))
    task = custom_task_from(data)
    assert task.label_names == ("yes", "no")
    other = texts([1, 0, 1]).cast_column("label", ClassLabel(names=["no", "yes"]))
    assert list(prepare(task, other, TRAIN_ONLY)["train"]["label"]) == [0, 1, 0]
    feature = prepare(task, data, TRAIN_ONLY)["train"].features["label"]
    assert feature == ClassLabel(names=["yes", "no"])


def test_multi_label_class_label() -> None:
    data = texts([[1], [0, 1]]).cast_column("label", List(ClassLabel(names=["y", "x"])))
    task = custom_task_from(data)
    assert task.label_names == ("y", "x")
    assert list(prepare(task, data, TRAIN_ONLY)["train"]["label"]) == [[0, 1], [1, 1]]


def test_class_label_of_other_classes_is_refused() -> None:
    data = texts([1, 0, 1]).cast_column("label", ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match=r"classes \['cat', 'dog'\], but task 'rte' has .*To resolve"):
        prepare(GLUE["rte"], data.rename_column("text", "sentence1").add_column("sentence2", ["a"] * 3), TRAIN_ONLY)


def test_wnli_numbering_is_not_taken_for_rtes() -> None:
    data = texts([0, 1]).cast_column("label", ClassLabel(names=["not_entailment", "entailment"]))
    data = data.rename_column("text", "sentence1").add_column("sentence2", ["a", "b"])
    assert list(prepare(GLUE["rte"], data, TRAIN_ONLY)["train"]["label"]) == [1, 0]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("sentence2", "sentence1", "id"), ("sentence1", "sentence2")),
        (("hypothesis", "premise"), ("premise", "hypothesis")),
        (("title", "body"), ("title", "body")),
        (("text", "author", "city"), ("text",)),
        (("review",), ("review",)),
    ],
)
def test_text_columns_are_found(columns: tuple[str, ...], found: tuple[str, ...]) -> None:
    data = Dataset.from_dict({**{c: [f"{c} a", f"{c} b"] for c in columns}, "n": ["1", "2"], "label": [0, 1]})
    assert custom_task_from(data).text_columns == found


def test_columns_that_cannot_be_told() -> None:
    three = Dataset.from_dict({**{c: ["x", "y"] for c in "abc"}, "label": [0, 1]})
    with pytest.raises(ValueError, match=r"3 columns of texts \(a, b, c\); its columns are 'a', 'b', 'c', 'label'"):
        custom_task_from(three)
    assert custom_task_from(three, text_columns=["c", "a"]).text_columns == ("c", "a")
    assert custom_task_from(three, text_columns="b").text_columns == ("b",)
    with pytest.raises(ValueError, match=r"no column of texts; its columns are 'n', 'label'.*`text_columns`"):
        custom_task_from(Dataset.from_dict({"n": [1, 2], "label": [0, 1]}))
    with pytest.raises(
        ValueError, match=r"neither 'label' nor 'labels'; its columns are 'text', 'stars'.*`label_column`"
    ):
        custom_task_from(texts([0, 1]).rename_column("label", "stars"))
    with pytest.raises(ValueError, match=r"both 'label' and 'labels'"):
        custom_task_from(texts([0, 1]).add_column("labels", [0, 1]))


@pytest.mark.parametrize("option", [{"text_columns": ["txt"]}, {"label_column": "txt"}])
def test_named_columns_that_are_absent(option: dict) -> None:
    with pytest.raises(ValueError, match=r"no column 'txt'; its columns are 'text', 'label'.*To resolve"):
        custom_task_from(texts([0, 1]), **option)


def test_one_class_only() -> None:
    with pytest.raises(ValueError, match=r"'label' must hold at least 2 classes, got only \['7'\].*To resolve"):
        custom_task_from(texts([7, 7, 7]))
    with pytest.raises(ValueError, match=r"train split holds one label only: 'positive' in all 3 rows.*To resolve"):
        prepare(TASK, texts(["positive"] * 3), TRAIN_ONLY)
    with pytest.raises(ValueError, match=r"one label only: 2.5"):
        prepare(Task("r", ("text",), "regression"), texts([2.5, 2.5]), TRAIN_ONLY)


def test_numbers_and_words_in_one_column() -> None:
    with pytest.raises(ValueError, match=r"numbers only or texts only; text among numbers, got 'n/a' in row 2"):
        custom_task_from(texts(["1", "2", "n/a"]))
    with pytest.raises(ValueError, match=r"a number among texts, got '3' in row 0"):
        custom_task_from(texts(["3", "good", "bad"]))
    assert custom_task_from(texts(["1", "2", "n/a"]), kind="single_label").label_names == ("1", "2", "n/a")


def test_integers_as_scores_need_to_be_asked_for() -> None:
    task = custom_task_from(texts([1, 5, 3]), kind="regression")
    assert encoded(task, [1, 5, 3]) == [1.0, 5.0, 3.0]


def test_empty_data_sets() -> None:
    with pytest.raises(ValueError, match=r"the data set has no rows"):
        custom_task_from(texts([]))
    with pytest.raises(ValueError, match=r"the data set has no split"):
        custom_task_from(DatasetDict())
    with pytest.raises(ValueError, match=r"validation split of task 't' has no rows.*To resolve"):
        prepare(TASK, {"train": texts([0, 1]), "validation": texts([0]).select([])})
    with pytest.raises(ValueError, match=r"'label' holds no label at all"):
        custom_task_from(texts([None, None]))


# --------------------------------------------------------------------------------------------------- labels out of line


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 7, 3], r"hold one of the labels 0 \(negative\), .*, got 7 in row 2 \(2 such rows\)"),
        ([0, 1, -2], "got -2 in row 2"),
        (["positive", "great"], "got 'great' in row 1"),
        ([0.0, 1.5], "got 1.5 in row 1"),
        ([0, None, 1], "have a label in every row, got None in row 1"),
        ([0, -1, 1], r"have a label in every row, got -1 in row 1.*-1 means no label"),
        (["positive", "", "negative"], "have a label in every row, got '' in row 1"),
        ([1.0, float("nan")], "have a label in every row, got nan in row 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_class_labels(labels: list, message: str, split: str) -> None:
    with pytest.raises(ValueError, match=f"label column 'label' of the {split} split must .*{message}") as error:
        encoded(TASK, labels, split)
    assert "To resolve" in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1.5", "high"], "must hold numbers, got 'high' in row 1"),
        ([True, False], "must hold numbers, got True in row 0"),
        ([1.0, float("inf")], "must hold numbers, got inf in row 1"),
        ([1.0, None], "must have a label in every row, got None in row 1"),
    ],
)
def test_bad_scores(labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(Task("r", ("text",), "regression"), labels)


def test_scores_outside_the_range() -> None:
    pairs = texts([1.0, 5.5]).rename_column("text", "sentence1").add_column("sentence2", ["a", "b"])
    with pytest.raises(ValueError, match=r"numbers from 0 to 5, got 5.5 in row 1"):
        prepare(GLUE["stsb"], pairs, TRAIN_ONLY)
    assert encoded(Task("r", ("text",), "regression"), [-1.0, 1.0]) == [-1.0, 1.0]  # a score like any other here


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0], [3]], r"multi-hot rows of 3 or lists .*got \[3\] in row 1"),
        ([["negative"], ["bad"]], r"got \['bad'\] in row 1"),
        ([[0, 1], [1, 1]], r"multi-hot rows of 3.*got \[0, 1\] in row 0"),
        ([0, 1], "must hold lists of labels, got 0 in row 0"),
        ([[0], None], "must have a label in every row, got None in row 1"),
    ],
)
def test_bad_label_lists(labels: list, message: str) -> None:
    task = Task("m", ("text",), "multi_label", ("negative", "neutral", "positive"))
    with pytest.raises(ValueError, match=message):
        encoded(task, labels)


def test_label_that_training_never_saw() -> None:
    data = {"train": texts(["a", "b"]), "validation": texts(["a", "c"])}
    with pytest.raises(
        ValueError, match=r"of the validation split must hold one of the labels 0 .a., 1 .b., got 'c' in row 1"
    ):
        prepare(custom_task_from(data), data)


def test_minus_one_can_be_a_class() -> None:
    task = custom_task_from(texts([-1, 0, 1]), label_names=["-1", "0", "1"])
    assert encoded(task, [-1, 1, 0]) == [0, 2, 1]


def test_unlabelled_rows_are_for_test_only() -> None:
    data = {"train": texts([0, 1]), "validation": texts([0, 1]), "test": texts([-1, -1])}
    assert prepare(TASK, data)["test"].column_names == ["text"]
    assert prepare(TASK, {**data, "test": data["test"].remove_columns("label")})["test"].column_names == ["text"]
    with pytest.raises(ValueError, match=r"of the test split must have a label in every row, got -1 in row 1"):
        prepare(TASK, {**data, "test": texts([0, -1])})
    with pytest.raises(ValueError, match=r"validation split has no column 'label'"):
        prepare(TASK, {**data, "validation": data["test"].remove_columns("label")})
    with pytest.raises(ValueError, match=r"of the validation split must have a label"):
        prepare(TASK, {**data, "validation": texts([-1, -1])})


def test_unlabelled_text_needs_no_labels() -> None:
    ready = prepare(TASK, {"unlabelled": texts([99, -1])}, required=("unlabelled",))
    assert ready["unlabelled"].column_names == ["text"]


# ------------------------------------------------------------------------------------------------------- texts, splits


@pytest.mark.parametrize(("values", "shown"), [(["a", None, "c"], "None"), ([1, 2, 3], "1")])
def test_texts_must_be_strings(values: list, shown: str) -> None:
    data = Dataset.from_dict({"text": values, "label": [0, 1, 0]})
    with pytest.raises(
        ValueError, match=f"text column 'text' of the train split must hold strings, got {shown} in row"
    ):
        prepare(TASK, data, TRAIN_ONLY)


def test_empty_strings_are_texts() -> None:
    data = Dataset.from_dict({"text": ["", "b"], "label": [0, 1]})
    assert list(prepare(TASK, data, TRAIN_ONLY)["train"]["text"]) == ["", "b"]


def test_absent_columns_list_those_there() -> None:
    with pytest.raises(ValueError, match=r"train split has no column 'sentence1', 'sentence2'; its columns are 'text'"):
        prepare(GLUE["rte"], texts([0, 1]), TRAIN_ONLY)


def test_split_names() -> None:
    data = {"train": texts([0, 1]), "dev": texts([1, 0, 2]), "unsupervised": texts([-1])}
    ready = prepare(TASK, data)
    assert {s: len(d) for s, d in ready.items()} == {"train": 2, "validation": 3}
    renamed = Task("t", ("text",), label_names=TASK.label_names, splits={"validation": "test"})
    assert set(prepare(renamed, {"train": texts([0, 1]), "test": texts([0, 1])})) == {"train", "validation"}
    with pytest.raises(ValueError, match=r"two splits of the data are the validation split"):
        prepare(TASK, {**data, "validation": texts([0])})
    with pytest.raises(ValueError, match=r"needs the split validation; the data has train"):
        prepare(TASK, texts([0, 1]))


def test_other_types_are_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a", "label": 0}]))
    for wrong in (stream, [{"text": "a"}], {"train": [1]}):
        with pytest.raises(TypeError, match=r"`dataset` must be a datasets.Dataset or a mapping.*To resolve"):
            prepare(TASK, wrong)  # type: ignore[arg-type]


def test_views_and_formats_do_not_matter() -> None:
    data = texts(["positive", "negative", "neutral", "positive"]).select([3, 1, 0])
    plain = prepare(TASK, data, TRAIN_ONLY)["train"]
    formatted = prepare(TASK, data.with_format("numpy"), TRAIN_ONLY)["train"]
    assert plain.to_dict() == formatted.to_dict() == {"text": ["text 3", "text 1", "text 0"], "label": [2, 0, 2]}


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ValueError) as error:
        encoded(TASK, ["positive", "x" * 5000])
    assert len(str(error.value)) < 600 and "..." in str(error.value)


# --------------------------------------------------------------------------------------------------------------- files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_keeps_texts_as_they_are(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.csv",
        '\ufefftext,label,id\nnull,pos,007\n"NA, ""quoted""\nsecond line",neg,008\nnan,pos,009\n,neg,010\n',
    )
    task, data = load_files(train, required=TRAIN_ONLY)
    assert task.label_names == ("neg", "pos")
    assert list(data["train"]["text"]) == ["null", 'NA, "quoted"\nsecond line', "nan", ""]
    assert list(data["train"]["label"]) == [1, 0, 1, 0]


def test_files_of_every_kind(tmp_path: Path) -> None:
    lines = [{"q": "is it", "a": "yes", "stars": 2.5}, {"q": "was it", "a": "no", "stars": 4.0}]
    train = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    validation = write(tmp_path / "b.json", json.dumps(lines))
    test = tmp_path / "c.parquet"
    Dataset.from_list(lines).remove_columns("stars").to_parquet(str(test))
    task, data = load_files(train, validation, test, text_columns=["q", "a"], label_column="stars", name="qa")
    assert (task.name, task.kind, task.headline) == ("qa", "regression", "pearson")
    assert list(data["validation"]["stars"]) == [2.5, 4.0] and data["test"].column_names == ["q", "a"]


def test_csv_labels_as_numbers_and_lists(tmp_path: Path) -> None:
    stars = write(tmp_path / "stars.csv", "text,label\ngood, 5\nbad,1\nfair,3\n")
    task, data = load_files(stars, stars)
    assert task.label_names == ("1", "3", "5") and list(data["train"]["label"]) == [2, 0, 1]
    task, data = load_files(stars, stars, kind="regression")
    assert list(data["train"]["label"]) == [5.0, 1.0, 3.0]
    task, data = load_files(None, stars, label_names=["1", "2", "3", "4", "5"], required=("validation",))
    assert list(data["validation"]["label"]) == [4, 0, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a.csv' is empty"),
        ("a.csv", "text,label\n", "a.csv holds no rows"),
        ("a.csv", "text,text\na,b\n", "must name every column once, got"),
        ("a.csv", "text,\na,b\n", "must name every column once, got"),
        ("a.csv", "text,label\nfine,1\ntoo,many,cells,here\n", "could not read .*a.csv as csv"),
        ("a.csv", b"text,label\ncaf\xe9,1\nb,0\n", "could not read .*a.csv|is not UTF-8"),
        ("a.csv", b"t\xe9xt,label\na,1\nb,0\n", "a.csv' is not UTF-8"),
        ("a.csv", "text;label\na;1\nb;0\n", "neither 'label' nor 'labels'; its columns are 'text;label'"),
        ("a.json", '{"text": "a", "label"', "could not read .*a.json as json"),
        ("a.parquet", "no parquet", "could not read .*a.parquet as parquet"),
        ("a.txt", "text", r"a.txt' must be one of .parquet, .csv, .json, .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_files(write(tmp_path / name, content), required=TRAIN_ONLY)
    assert "To resolve" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data file .*gone.csv' does not exist"):
        load_files(tmp_path / "gone.csv", required=TRAIN_ONLY)
    with pytest.raises(ValueError, match=r"`validation_file` must be given. To resolve, pass --validation-file"):
        load_files(tmp_path / "gone.csv")


def test_edited_file_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", "text,label\na,0\nb,1\n")
    load_files(file, required=TRAIN_ONLY)
    write(file, "text,label\na,1\nb,0\n")
    assert list(load_files(file, required=TRAIN_ONLY)[1]["train"]["label"]) == [1, 0]


def test_splits_of_different_types_do_not_clash(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    texts([0, 1]).to_parquet(str(folder / "train.parquet"))
    texts(["positive", "neutral"]).to_parquet(str(folder / "validation.parquet"))
    _, data = load_task(TASK, tmp_path)
    assert list(data["validation"]["label"]) == [2, 1] and data["validation"].features == data["train"].features
    assert data["train"].features["text"] == Value("string")
