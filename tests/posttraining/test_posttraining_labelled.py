"""Labelled texts: found in files, refused with the record's number, split by class, and told from their duplicates."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.data import Dropped
from groundup.posttraining import BadRecord, Shared
from groundup.posttraining.labelled import (
    Columns,
    LabelledText,
    class_names,
    find_columns,
    label_ids,
    load_labelled,
    read_labelled,
    shared_texts,
    split_labelled,
)
from groundup.runtime import GroundupError, UsageError

STORY = "Once there was a fox who lived in a wood and every day it went to the river to drink and to look at the moon"


def named(*records: Any) -> list[tuple[str, Any]]:
    return [(f"x.jsonl#{number}", record) for number, record in enumerate(records, 1)]


def texts_of(*labels: str) -> list[LabelledText]:
    return [LabelledText(f"x#{number}", f"text {number}", label) for number, label in enumerate(labels, 1)]


# ---- columns


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"id": 1, "label": "a", "text": "b"}, ("text", "label")),
        ({"Sentence": "b", "Intent": "a"}, ("Sentence", "Intent")),
        ({"review": "b", "sentiment": "a", "class_id": 3}, ("review", "sentiment")),
        ({"title": "t", "text": "b", "category": "a"}, ("text", "category")),
    ],
)
def test_columns_are_known_by_their_names(record: dict[str, Any], columns: tuple[str, str]) -> None:
    assert find_columns(named(record)) == columns


def test_columns_of_other_names() -> None:
    records = named({"said": "b", "mood": "a", "label": "z"})
    assert find_columns(records, {"text": "said"}) == Columns("said", "label")
    assert find_columns(records, {"text": "said", "label": "mood"}) == Columns("said", "mood")
    with pytest.raises(
        UsageError, match=r"x\.jsonl#1: which of its columns \(said, mood, label\) holds the text cannot"
    ):
        find_columns(records)
    with pytest.raises(UsageError, match=r"(?s)\(said, mood\) holds the label cannot .* --columns"):
        find_columns(named({"said": "b", "mood": "a"}), {"text": "said"})
    with pytest.raises(UsageError, match=r"x\.jsonl#1: there is no field 'saidd' in it .*Did you mean said"):
        find_columns(records, {"text": "saidd"})
    with pytest.raises(UsageError, match=r"--columns: txt is neither text nor label\. Did you mean text"):
        find_columns(records, {"txt": "said"})
    with pytest.raises(UsageError, match="a int, and not a record"):
        find_columns(named(7))


def test_a_file_without_a_header_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(
        'ham\tOk lar... "joking" with you\t11\nspam\t"Win a prize, now, today!\t12\nham\tSee you at home\t13\n'
    )
    found = load_labelled(str(path))
    assert [text.label for text in found] == ["ham", "spam", "ham"]
    assert found[1] == LabelledText("a.tsv#2", '"Win a prize, now, today!', "spam")
    assert [text.text for text in load_labelled(str(path), {"text": "3", "label": "1"})] == ["11", "12", "13"]
    assert [text.label for text in load_labelled(str(path), {"text": "1", "label": "3"})] == ["11", "12", "13"]


@pytest.mark.parametrize("content", ["ham\thello there\nspam\tbuy this now please, sir\n", "mood\tsaid\na\tb\n"])
def test_a_first_line_that_may_be_names_is_asked_about(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"in a file without a header line, '\{text: 2, label: 1\}'"):
        load_labelled(str(path))
    found = load_labelled(str(path), {"text": "2", "label": "1"})
    assert [(text.where, text.label, text.text) for text in found] == [
        (f"a.tsv#{number}", *line.split("\t")) for number, line in enumerate(content.splitlines(), 1)
    ]


def test_names_in_the_first_line_are_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(',Text,stars\n0,"so, so",3\n1,great,5\n')
    assert load_labelled(str(path), {"label": "stars"}) == [
        LabelledText("a.csv#1", "so, so", "3"), LabelledText("a.csv#2", "great", "5"),
    ]  # fmt: skip
    path.write_text("said,mood\nfine,good\n")
    assert load_labelled(str(path), {"text": "said", "label": "mood"}) == [LabelledText("a.csv#1", "fine", "good")]


# ---- records


@pytest.mark.parametrize(
    ("label", "name"), [("  a ", "a"), (3, "3"), (3.0, "3"), (2.5, "2.5"), (True, "true"), (0, "0"), ("04", "04")]
)
def test_labels_are_names(label: Any, name: str) -> None:
    assert [text.label for text in read_labelled(named({"text": "x", "label": label}))] == [name]


BAD: list[tuple[Any, str]] = [
    ({"label": "a"}, "its text (field text) is missing"),
    ({"text": None, "label": "a"}, "its text (field text) is missing"),
    ({"text": 5, "label": "a"}, "its text (field text) is a int"),
    ({"text": " \n", "label": "a"}, "its text (field text) is empty"),
    ({"text": "x"}, "its label (field label) is missing"),
    ({"text": "x", "label": " "}, "its label (field label) is missing"),
    ({"text": "x", "label": float("nan")}, "its label (field label) is missing"),
    ({"text": "x", "label": ["a", "b"]}, "its label (field label) is a list: a text has one class"),
    ({"text": "x", "label": "a", None: ["more"]}, "more cells than the file has columns"),
    ("x", "it is a str, and not a record"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_a_bad_record_is_named_or_skipped_and_counted(record: Any, why: str) -> None:
    good = {"text": "x", "label": "a"}
    with pytest.raises(BadRecord) as caught:
        list(read_labelled(named(good, record, good)))
    assert str(caught.value).startswith("x.jsonl#2: ")
    assert why in str(caught.value)
    assert str(caught.value).endswith("--skip-bad.")
    skipped: list[Dropped] = []
    found = list(read_labelled(named(good, record, good), skip=skipped.append))
    assert [text.where for text in found] == ["x.jsonl#1", "x.jsonl#3"]
    assert [(one.name, one.reason) for one in skipped] == [("x.jsonl#2", "bad record")]
    assert why in skipped[0].detail


def test_a_file_of_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")
    with pytest.raises(GroundupError, match=r"a\.jsonl: there is no labelled text in it\.$"):
        load_labelled(str(path))
    path.write_text('{"text": "", "label": "a"}\n{"text": "x", "label": ""}\n')
    with pytest.raises(GroundupError, match=r"All 2 records are bad, the first: its text \(field text\) is empty"):
        load_labelled(str(path), skip=lambda _: None)
    path.write_text("\n".join(json.dumps({"text": f"t{n}", "label": n}) for n in range(5)))
    assert [text.label for text in load_labelled(str(path), limit=3)] == ["0", "1", "2"]


# ---- classes


def test_classes_are_sorted_and_numbered() -> None:
    texts = texts_of("b", "a", "c", "a")
    assert class_names(texts) == ["a", "b", "c"]
    ids = label_ids(texts, ["a", "b", "c"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 0, 2, 0]
    assert class_names(texts_of("10", "9", "-1")) == ["-1", "9", "10"]
    assert class_names(texts_of("10", "9", "x")) == ["10", "9", "x"]


def test_classes_that_cannot_be_learnt() -> None:
    with pytest.raises(GroundupError, match="there is no labelled text to learn from"):
        class_names([])
    with pytest.raises(GroundupError, match="all 2 texts have the label 'a': there is nothing to tell apart"):
        class_names(texts_of("a", "a"))
    with pytest.raises(
        GroundupError, match=r"x#2: the label 'spma' is none of the 2 that training has \(ham, spam\)\. Did"
    ):
        label_ids(texts_of("ham", "spma"), ["ham", "spam"])


# ---- parts


def test_each_class_is_split_alike() -> None:
    texts = texts_of(*"a" * 50, *"b" * 30, *"c" * 10, *"d" * 2, "e")
    parts = split_labelled(texts, 0.2, 0.1, seed=3)
    assert Counter(text.label for text in parts.test) == {"a": 10, "b": 6, "c": 2}
    assert Counter(text.label for text in parts.val) == {"a": 5, "b": 3, "c": 1}
    together = [*parts.train, *parts.val, *parts.test]
    assert sorted(together, key=texts.index) == texts
    for part in parts:
        assert part == sorted(part, key=texts.index)
    assert class_names(parts.train) == class_names(texts)


def test_the_split_hangs_on_the_seed_and_on_no_order() -> None:
    texts = texts_of(*"ab" * 40)
    parts = split_labelled(texts, seed=1)
    again = split_labelled(texts[::-1], seed=1)
    assert [sorted(part, key=texts.index) for part in again] == list(parts)
    assert split_labelled(texts, seed=2).test != parts.test


def test_exact_duplicates_stay_together() -> None:
    texts = [LabelledText(f"x#{n}", f"words {n // 3}" + " " * (n % 3), "a" if n % 6 < 3 else "b") for n in range(240)]
    for seed in range(5):
        parts = split_labelled(texts, 0.3, 0.2, seed)
        said = [{text.text.strip() for text in part} for part in parts]
        assert not said[0] & said[1] | said[0] & said[2] | said[1] & said[2]
        assert [len(part) for part in parts] == [120, 48, 72]
    many = [LabelledText(f"y#{n}", "the same", "a") for n in range(60)]
    assert all(text in split_labelled([*texts, *many]).train for text in many)  # more than a fifth of their class


def test_texts_with_several_labels_leave_each_class_something_to_learn() -> None:
    texts = [*texts_of(*"a" * 30), *(LabelledText(f"y#{n}", f"text {n}", "rare") for n in range(1, 4))]
    for seed in range(20):
        parts = split_labelled(texts, 0.5, seed=seed)
        assert "rare" in class_names(parts.train)
        label_ids(parts.test, class_names(parts.train))


def test_fractions_that_are_none() -> None:
    texts = texts_of(*"ab" * 5)
    for test, val in ((0.5, 0.5), (-0.1, 0.0), (0.2, float("nan"))):
        with pytest.raises(UsageError, match="each is at least 0, both are below 1 together"):
            split_labelled(texts, test, val)
    with pytest.raises(GroundupError, match=r"10 texts are too few to hold 0\.05 of each class out for test"):
        split_labelled(texts, 0.05)
    assert split_labelled(texts, 0.0).train == texts


def test_texts_that_are_measured_on_although_they_are_learnt() -> None:
    train = [LabelledText("t#1", STORY, "a"), LabelledText("t#2", "Short one", "b")]
    test = [
        LabelledText("h#1", "Short  one", "a"), LabelledText("h#2", "Other", "a"),
        LabelledText("h#3", STORY + " .", "a"), LabelledText("h#4", STORY + " again", "a"),
    ]  # fmt: skip
    found = shared_texts(train, test)
    assert found[0] == Shared("h#1", "t#2", 1.0)
    assert [(one.held_out, one.train) for one in found[1:]] == [("h#3", "t#1"), ("h#4", "t#1")]
    assert [one.held_out for one in shared_texts(train, test, near=1.0)] == ["h#1", "h#3"]


# ---- real files


@pytest.mark.parametrize(
    ("name", "count", "classes"),
    [
        ("SMSSpamCollection.tsv", {"ham": 4827, "spam": 747}, 2), ("banking77/test.csv", {"card_arrival": 40}, 77),
        ("sentence_polarity_10k.jsonl.gz", {"0": 5331, "1": 5331}, 2), ("goemotions/dev.tsv.gz", {"27": 1592}, None),
    ],
)  # fmt: skip
def test_real_files(shared_data: Path, name: str, count: dict[str, int], classes: int | None) -> None:
    texts = load_labelled(str(shared_data / "classification" / name))
    counts = Counter(text.label for text in texts)
    assert {label: counts[label] for label in count} == count
    assert classes is None or len(class_names(texts)) == classes
    parts = split_labelled(texts, 0.2, 0.1)
    train, test = ({" ".join(text.text.split()) for text in part} for part in (parts.train, parts.test))
    assert not train & test
    for label, found in Counter(text.label for text in parts.test).items():
        assert abs(found - 0.2 * counts[label]) <= max(1, 0.02 * counts[label])


def test_real_messages_have_near_duplicates(shared_data: Path) -> None:
    parts = split_labelled(load_labelled(str(shared_data / "classification" / "SMSSpamCollection.tsv")))
    found = shared_texts(parts.train, parts.test)
    said = {text.where: text.text for part in parts for text in part}
    assert 10 < len(found) < 40
    assert all(one.alike >= 0.8 and said[one.held_out].split() != said[one.train].split() for one in found)
