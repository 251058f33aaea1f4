"""What is left out of examples: duplicates, lengths, what a template loses; and what is measured on although learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from groundup.data import Dropped, open_records
from groundup.posttraining import (
    BadRecord,
    Conversation,
    Example,
    Shared,
    check_template,
    of_length,
    read_conversations,
    shared_with_training,
    without_duplicates,
)
from groundup.tokenizer import ChatTemplate

STORY = "Once there was a fox who lived in a wood and every day it went to the river to drink and to look at the moon"


def talk(where: str, *texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(where, [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)])


def test_duplicates_are_left_out_and_named() -> None:
    all_of_them = [
        talk("a#1", "Tell me a story.", STORY), talk("a#2", "Tell me  a\nstory.", STORY),
        talk("a#3", "Tell me a story.", STORY + " and sing"), talk("a#4", "Hello", "Hi"),
        Conversation("a#5", [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]),
    ]  # fmt: skip
    dropped: list[Dropped] = []
    kept = list(without_duplicates(all_of_them, None, dropped.append))
    assert [one.where for one in kept] == ["a#1", "a#3", "a#4", "a#5"]
    assert dropped == [Dropped("a#2", "duplicate", "of a#1")]
    dropped.clear()
    kept = list(without_duplicates(all_of_them, 0.7, dropped.append))
    assert [one.where for one in kept] == ["a#1", "a#4", "a#5"]
    assert [(one.name, one.reason) for one in dropped] == [("a#2", "duplicate"), ("a#3", "near duplicate")]
    assert dropped[1].detail.startswith("of a#1, ")


def test_calls_of_other_tools_are_no_duplicates() -> None:
    def calling(where: str, city: str) -> Conversation:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        return Conversation(where, [{"role": "user", "content": "How is it?"}, said])

    kept = list(
        without_duplicates([calling("a", "Rome"), calling("b", "Oslo"), calling("c", "Rome")], None, lambda _: None)
    )
    assert [one.where for one in kept] == ["a", "b"]


def test_what_is_measured_on_although_it_is_learnt() -> None:
    train = [talk("t#1", "x", STORY), talk("t#2", "y", "z"), talk("t#3", "x", STORY + " again")]
    held_out = [talk("h#1", "y", "z"), talk("h#2", "x", STORY + " ."), talk("h#3", "other", "words")]
    found = shared_with_training(train, held_out)
    assert found[0] == Shared("h#1", "t#2", 1.0)
    assert (found[1].held_out, found[1].train) == ("h#2", "t#1")
    assert len(found) == 2


def test_lengths() -> None:
    def example(learnt: int) -> Example:
        return Example(f"x#{learnt}", np.arange(9), np.arange(9) >= 9 - learnt, {})

    dropped: list[Dropped] = []
    kept = list(of_length(map(example, (1, 2, 5, 6)), 2, 5, dropped.append))
    assert [one.where for one in kept] == ["x#2", "x#5"]
    assert dropped == [
        Dropped("x#1", "too short", "1 tokens to learn"), Dropped("x#6", "too long", "6 tokens to learn"),
    ]  # fmt: skip
    assert len(list(of_length(map(example, (1, 8)), 0, None, dropped.append))) == 2


def test_a_template_that_leaves_something_out() -> None:
    forgetful = ChatTemplate(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    check_template(talk("x#1", "a question", "an answer"), forgetful)
    system = Conversation("x#2", [{"role": "system", "content": "Be short."}, *talk("", "a", "b").messages])
    with pytest.raises(BadRecord, match="x#2: the chat template leaves out message 1, of the system"):
        check_template(system, forgetful)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    calling = Conversation("x#3", [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]},
    ])  # fmt: skip
    with pytest.raises(BadRecord, match="x#3: the chat template leaves out message 2, of the assistant: its call of a"):
        check_template(calling, forgetful)
    check_template(Conversation("x#4", [{"role": "text", "content": "words"}]), forgetful)


def test_real_files(shared_data: Path) -> None:
    conversations = list(read_conversations(open_records(str(shared_data / "sft" / "instruction-data.json"))))
    dropped: list[Dropped] = []
    kept = list(without_duplicates(conversations, 0.8, dropped.append))
    assert len(kept) + len(dropped) == 1100
    assert len(kept) > 1000
    for conversation in kept[:50]:
        check_template(conversation, ChatTemplate.preset("chatml"))
    shared = shared_with_training(conversations[:900], conversations[850:900])
    assert len(shared) == 50
