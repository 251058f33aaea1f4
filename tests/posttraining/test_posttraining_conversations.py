"""Examples in the forms that people have them: found out, read, and refused with the record's number."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from groundup.data import Dropped, open_records
from groundup.posttraining import BadRecord, Conversation, form_of, read_conversations
from groundup.runtime import GroundupError, UsageError

USER = {"role": "user", "content": "What is 2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}

FORMS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("alpaca", ALPACA, [{"role": "user", "content": "Add.\n\n2 and 2"}, ASSISTANT]),
    ("alpaca", {"instruction": "Hi", "input": "", "response": "4"}, [{"role": "user", "content": "Hi"}, ASSISTANT]),
    ("alpaca", {"instruction": "Hi", "output": "4", "system": "Be short.", "history": [["What is 2 + 2?", "4"]]},
     [{"role": "system", "content": "Be short."}, USER, ASSISTANT, {"role": "user", "content": "Hi"}, ASSISTANT]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
     [USER, ASSISTANT]),
    ("sharegpt", {"system": "Be short.", "conversations": [
        {"from": "user", "value": "What is 2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 2}"}'},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]},
     [{"role": "system", "content": "Be short."}, USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": "4"}, ASSISTANT]),
    ("messages", {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    ("messages", {"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    ("messages", {"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]}]},
     [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **CALL}]}]),
    ("prompt-completion", {"prompt": "What is 2 + 2?", "completion": "4"}, [USER, ASSISTANT]),
    ("prompt-completion", {"prompt": "What is 2 + 2?", "response": "4"}, [USER, ASSISTANT]),
    ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
    ("text", {"text": "Once upon a time"}, [{"role": "text", "content": "Once upon a time"}]),
]  # fmt: skip


def named(*records: Any) -> list[tuple[str, Any]]:
    return [(f"x.jsonl#{number}", record) for number, record in enumerate(records, 1)]


@pytest.mark.parametrize(("form", "record", "messages"), FORMS)
def test_each_form_is_known_by_its_fields(form: str, record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert form_of(record) == form
    (found,) = read_conversations(named(record))
    assert found == Conversation("x.jsonl#1", messages, None, record)


def test_tools_are_wrapped_as_openai_does() -> None:
    add = {"name": "add", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": add}
    for tools in ([add], json.dumps([add]), [wrapped]):
        (found,) = read_conversations(named({"messages": [USER, ASSISTANT], "tools": tools}))
        assert found.tools == [wrapped]


def test_fields_of_other_names() -> None:
    record = {"question": "What is 2 + 2?", "solution": "4", "text": "not this"}
    (found,) = read_conversations(named(record), columns={"prompt": "question", "completion": "solution"})
    assert found.messages == [USER, ASSISTANT]
    with pytest.raises(UsageError, match=r"x\.jsonl#1: there is no field 'solutoin' in it\. Did you mean solution"):
        list(read_conversations(named(record), columns={"prompt": "question", "completion": "solutoin"}))
    with pytest.raises(UsageError, match=r"its fields \(question, solution\) are those of no form .* --columns"):
        list(read_conversations(named({"question": "a", "solution": "b"})))
    with pytest.raises(UsageError, match="a int, and not a record with named fields"):
        list(read_conversations(named(7)))


BAD: list[tuple[Any, str]] = [
    ({"prompt": "a", "completion": "b"}, "it has the form prompt-completion, those before it have messages"),
    ({"foo": 1}, "it has the form of nothing that is known"),
    ([1], "it is a list, and not a record"),
    ({"messages": [USER]}, "no message is the assistant's"),
    ({"messages": [ASSISTANT, USER]}, "the assistant speaks first"),
    ({"messages": [{"role": "system", "content": "x"}, ASSISTANT]}, "the assistant speaks first"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "message 2, of the assistant, is empty"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2, of the assistant, has no content"),
    ({"messages": [{"content": "hi"}, ASSISTANT]}, "message 1 has no role"),
    ({"messages": ["hi", ASSISTANT]}, "message 1 is a str"),
    ({"messages": "not JSON"}, "its field messages is a str, and not a list of messages"),
    (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": ["x"]}]},
        "message 2 calls a tool, but not",
    ),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": 5}]}, "message 2 calls a tool, but not"),
    ({"messages": [USER, ASSISTANT], "tools": "nonsense"}, "its field tools is not a list"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_a_bad_record_is_named_or_skipped_and_counted(record: Any, why: str) -> None:
    good = {"messages": [USER, ASSISTANT]}
    with pytest.raises(BadRecord) as caught:
        list(read_conversations(named(good, record, good)))
    assert str(caught.value).startswith("x.jsonl#2: ")
    assert why in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    skipped: list[Dropped] = []
    found = list(read_conversations(named(good, record, good), skip=skipped.append))
    assert [one.where for one in found] == ["x.jsonl#1", "x.jsonl#3"]
    assert [(one.name, one.reason) for one in skipped] == [("x.jsonl#2", "bad record")]
    assert why in skipped[0].detail


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"conversations": [{"from": "humann", "value": "a"}]}, r"from 'humann', who is not known\. Did you mean"),
        ({"conversations": [{"from": "human"}]}, "message 1 has no text in a field value"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "message 1 does not say who speaks"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(2, 2)"}]},
         "message 2 calls a tool"),
        ({"instruction": 5, "output": "a"}, "its field instruction is a int, and not a text"),
        ({"instruction": "a", "output": None}, "its field output is missing, and not a text"),
        ({"instruction": "a", "output": ""}, "message 2, of the assistant, is empty"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list of pairs"),
        ({"text": None}, "its field text is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_other_forms(record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=rf"x\.jsonl#1: .*{why}"):
        list(read_conversations(named(record)))


# ---- files


def written(folder: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    records = [ALPACA, {"instruction": 'Say,\n\n"hi"\t!', "input": "", "output": "hi"}]
    path = written(tmp_path, kind, records)
    found = list(read_conversations(open_records(str(path))))
    assert [one.where for one in found] == [f"{path.name}#1", f"{path.name}#2"]
    assert [one.messages[0]["content"] for one in found] == ["Add.\n\n2 and 2", 'Say,\n\n"hi"\t!']
    assert [one.record["input"] for one in found] == ["2 and 2", ""]
    assert len(list(open_records(str(path), limit=1))) == 1


def test_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    written(tmp_path, "jsonl", [ALPACA])
    written(tmp_path / "b", "json", [ALPACA, ALPACA])
    (tmp_path / "readme.md").write_text("not records")
    assert [name for name, _ in open_records(str(tmp_path))] == ["data.jsonl#1", "b/data.json#1", "b/data.json#2"]


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(UsageError, match=r"trian\.jsonl: no such file or folder\. Did you mean train\.jsonl"):
        list(open_records(str(tmp_path / "trian.jsonl")))
    with pytest.raises(GroundupError, match="line 2 is not JSON"):
        list(open_records(str(tmp_path / "train.jsonl")))
    with pytest.raises(UsageError, match="--data is empty"):
        list(open_records(" "))
    with pytest.raises(UsageError, match="--limit 0"):
        list(open_records("x", limit=0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GroundupError, match="there is no file of records in this folder"):
        list(open_records(str(tmp_path / "empty")))
    (tmp_path / "x.txt").write_text("words")
    with pytest.raises(GroundupError, match=r"records are read from \.jsonl"):
        list(open_records(str(tmp_path / "x.txt")))


REAL = [
    ("code_alpaca_2k.json", "alpaca", 2017), ("dolly_hhrlhf_1k.jsonl", "prompt-completion", 1000),
    ("gpteacher_roleplay.json.gz", "alpaca", 1923), ("instruction-data.json", "alpaca", 1100),
    ("toolcall_en_demo.json", "sharegpt", 300),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "count"), REAL)
def test_real_files(shared_data: Path, name: str, form: str, count: int) -> None:
    path = shared_data / "sft" / name
    records = list(open_records(str(path)))
    assert len(records) == count
    assert form_of(records[0][1]) == form
    skipped: list[Dropped] = []
    found = list(read_conversations(records, skip=skipped.append))
    assert len(found) + len(skipped) == count
    assert len(skipped) <= count // 100
