"""A file of prompts: every line is answered once, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from groundup.inference import LanguageModel, SamplingParams
from groundup.inference.batch import generate_file
from groundup.runtime import GroundupError, UsageError

PARAMS = SamplingParams(max_tokens=7, temperature=1.0, seed=3)
ROWS: list[Any] = ["the cat", {"prompt": "the dog", "id": "a7", "max_tokens": 3}, {"prompt": "naïve 中文", "seed": 9}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answers(path: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["line"] for row in rows}) == len(rows)
    return {row["line"]: row for row in rows}


def test_each_line_is_what_the_prompt_alone_would_give(lm: LanguageModel, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert generate_file(lm, source, target, PARAMS) == {"done": 3, "kept": 0, "failed": 0}
    found = answers(target)
    assert found[1]["text"] == lm.generate("the cat", max_tokens=7, temperature=1.0, seed=3)
    assert found[2]["text"] == lm.generate("the dog", max_tokens=3, temperature=1.0, seed=4)
    assert found[3]["text"] == lm.generate("naïve 中文", max_tokens=7, temperature=1.0, seed=9)
    assert found[2]["id"] == "a7"
    assert found[2]["tokens"] <= 3
    assert found[1]["finish"] in ("length", "end_of_text")


def test_what_is_there_is_not_done_again(lm: LanguageModel, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    generate_file(lm, source, target, PARAMS)
    whole = answers(target)
    lines = target.read_text().splitlines()
    target.write_text(lines[0] + "\n" + lines[1][:20])  # killed in the middle of a line
    assert generate_file(lm, source, target, PARAMS) == {"done": 2, "kept": 1, "failed": 0}
    assert answers(target) == whole
    assert generate_file(lm, source, target, PARAMS) == {"done": 0, "kept": 3, "failed": 0}
    with open(source, "a") as file:
        file.write('\n"one more"\n')
    assert generate_file(lm, source, target, PARAMS) == {"done": 1, "kept": 3, "failed": 0}
    assert set(answers(target)) == {1, 2, 3, 5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is not JSON"), ("3", "a line is a text, or an object"), ('{"text": "a"}', "a line is a text"),
        ('{"prompt": "a", "top_k": 0}', "top_k = 0 must be at least 1"), ('{"prompt": [999999]}', "outside the model"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no chat template"),
        ('{"prompt": 3}', "a line is a text"),
        ('{"prompt": "a", "n": "many"}', "n = "),
    ],
)  # fmt: skip
def test_a_wrong_line_is_an_answer_of_its_own_and_tried_again(
    lm: LanguageModel, source: Path, tmp_path: Path, line: str, message: str
) -> None:
    target = tmp_path / "out.jsonl"
    source.write_text(f'"the cat"\n{line}\n"the dog"\n')
    assert generate_file(lm, source, target, PARAMS) == {"done": 2, "kept": 0, "failed": 1}
    found = answers(target)
    assert message in found[2]["error"]
    assert "text" in found[1]
    assert "text" in found[3]
    assert generate_file(lm, source, target, PARAMS) == {"done": 0, "kept": 2, "failed": 1}
    assert not lm.engine.busy


def test_several_completions_and_logprobs(lm: LanguageModel, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "the cat", "n": 2, "logprobs": 0}\n')
    generate_file(lm, source, target, PARAMS)
    texts = answers(target)[1]["texts"]
    assert len(texts) == 2
    assert all(len(one["logprobs"]) == one["tokens"] for one in texts)


def test_files_that_cannot_be_used(lm: LanguageModel, source: Path, tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match="nowhere"):
        generate_file(lm, tmp_path / "nowhere", tmp_path / "out.jsonl", PARAMS)
    other = tmp_path / "other.jsonl"
    other.write_text('{"mine": 1}\n{"mine": 2}\n')
    with pytest.raises(UsageError, match="holds no answers"):
        generate_file(lm, source, other, PARAMS)
    assert other.read_text() == '{"mine": 1}\n{"mine": 2}\n'
    target = tmp_path / "out.jsonl"
    generate_file(lm, source, target, PARAMS)
    source.write_text('"another"\n')
    with pytest.raises(UsageError, match="answers another prompt"):
        generate_file(lm, source, target, PARAMS)
    source.write_bytes(b'"caf\xe9"\n')
    with pytest.raises(UsageError, match="not UTF-8"):
        generate_file(lm, source, tmp_path / "new.jsonl", PARAMS)
