"""Files of examples, in the forms that people have them, as conversations.

    alpaca              {"instruction": …, "input": …, "output": …}          also response, system, history
    sharegpt            {"conversations": [{"from": "human", "value": …}, …]}         also system, tools
    messages            {"messages": [{"role": "user", "content": …}, …]}             also tools (OpenAI's form)
    prompt-completion   {"prompt": …, "completion": …}    also response, answer; texts, or lists of messages
    text                {"text": …}                                             all of it is to be learnt

The form is found out by looking at the first record; what does not have it is bad, and named with its number. Where the
fields of a file are called otherwise, ``columns`` says which is which. A tool call may be OpenAI's ``tool_calls`` or
ShareGPT's turn ``function_call``; tools may be JSON in a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from groundup.data import Dropped
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest

Form = Literal["alpaca", "sharegpt", "messages", "prompt-completion", "text"]
FORMS: tuple[str, ...] = get_args(Form)
Message = dict[str, Any]
Skip = Callable[[Dropped], None]

_ANSWERS = ("output", "response", "completion", "answer")
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip


class BadRecord(GroundupError):  # noqa: N818 - it is the record that is bad
    """A record that is no example: why, and how to mend it."""


@dataclass(frozen=True)
class Conversation:
    """An example to learn from.

    Args:
        where: file and number of the record, for messages.
        messages: dictionaries with ``role`` and ``content``, as chat templates take them; of the form ``text`` one,
            whose role is ``text``.
        tools: JSON schemas of the functions that the assistant may call.
        record: the record itself, for what else stands in it.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def form_of(record: Any) -> Form | None:
    """The form that a record has, by its fields; None where it is none that is known."""
    if not isinstance(record, Mapping):
        return None
    turns = next((record[name] for name in ("messages", "conversations", "conversation") if record.get(name)), None)
    if turns is not None:
        first = turns[0] if isinstance(turns, list) else next(iter(_parsed(turns) or [None]), None)
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    answered = any(name in record for name in _ANSWERS)
    if "instruction" in record and answered:
        return "alpaca"
    if "prompt" in record and answered:
        return "prompt-completion"
    return "text" if "text" in record else None


def read_conversations(
    records: Iterable[tuple[str, Any]], form: Form | Literal["auto"] = "auto",
    columns: Mapping[str, str] | None = None, skip: Skip | None = None,
) -> Iterator[Conversation]:  # fmt: skip
    """Make conversations of records.

    Args:
        records: each with its name, such as ``train.jsonl#12``.
        form: that they all have; ``auto`` takes the first one's.
        columns: for a field of the form, what it is called in the file, as in ``{"prompt": "question"}``.
        skip: is told of records that are bad; without it the first one ends the reading.

    Raises:
        BadRecord: a record is bad; the line names it.
        UsageError: no form fits, or ``columns`` names a field that no record has.
    """
    settled: Form | None = None if form == "auto" else form
    for where, value in records:
        record = _renamed(value, columns or {}, where)
        if settled is None:
            settled = form_of(record)
            if settled is None:
                raise UsageError(_unknown(where, value))
        try:
            yield _conversation(where, record, settled)
        except BadRecord as error:
            leave_out(where, error, skip)


def leave_out(where: str, error: GroundupError, skip: Skip | None) -> None:
    """Tell of a record that cannot be used.

    Args:
        where: its name.
        skip: whom to tell; without it the record ends the reading.

    Raises:
        BadRecord: nobody is to be told; the line says how to mend it.
    """
    if skip is not None:
        skip(Dropped(where, "bad record", str(error)))
        return
    told = any(word in str(error) for word in ("Mend", "Give"))
    mend = "Or leave" if told else "Mend the record, or leave"
    raise BadRecord(f"{where}: {error} {mend} such records out with --skip-bad.") from None


def _renamed(record: Any, columns: Mapping[str, str], where: str) -> Any:
    if not columns or not isinstance(record, Mapping):
        return record
    for name in columns.values():
        if name not in record:
            raise UsageError(f"{where}: there is no field {name!r} in it.{nearest(name, [str(key) for key in record])}")
    others = {key: value for key, value in record.items() if key not in columns}
    return others | {name: record[column] for name, column in columns.items()}


def _unknown(where: str, record: Any) -> str:
    if not isinstance(record, Mapping):
        return f"{where}: a {type(record).__name__}, and not a record with named fields, as one of {', '.join(FORMS)}."
    fields = ", ".join(map(str, record))[:120]
    return (
        f"{where}: its fields ({fields}) are those of no form that is known ({', '.join(FORMS)}). Say which is which, "
        "as in --columns '{prompt: question, completion: answer}'."
    )


def _conversation(where: str, record: Any, form: Form) -> Conversation:
    if not isinstance(record, Mapping):
        raise BadRecord(f"it is a {type(record).__name__}, and not a record with named fields.")
    if (own := form_of(record)) != form:
        raise BadRecord(f"it has the form {own or 'of nothing that is known'}, those before it have {form}.")
    if form == "text":
        return Conversation(where, [{"role": "text", "content": _text(record, "text")}], None, record)
    messages = _MAKERS[form](record)
    check_messages(messages)
    return Conversation(where, messages, _tools(record), record)


def check_messages(messages: list[Message]) -> None:
    """See that there is something to learn, and something that it answers.

    Raises:
        BadRecord: there is not.
    """
    if not messages:
        raise BadRecord("there are no messages in it.")
    first = next((message["role"] for message in messages if message["role"] not in ("system", "developer")), None)
    if first == "assistant":
        raise BadRecord("the assistant speaks first; a message of the user must come before.")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("there is nothing to learn from: no message is the assistant's.")
    for number, message in enumerate(messages):
        said = message.get("content")
        if message["role"] == "assistant" and not message.get("tool_calls") and not (said and str(said).strip()):
            raise BadRecord(f"message {number + 1}, of the assistant, is empty.")


# ---- the forms


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    """Taori et al. 2023; ``system`` and ``history`` as LLaMA-Factory has them."""
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    for turn in record.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRecord("history must be a list of pairs of texts: what was asked, what was answered.")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = _text(record, "instruction")
    if record.get("input"):
        asked = f"{asked}\n\n{_text(record, 'input')}"
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": _answer(record)}]


def _prompt_completion(record: Mapping[str, Any]) -> list[Message]:
    prompt, answer = record["prompt"], next(record[name] for name in _ANSWERS if name in record)
    if isinstance(prompt, list):
        answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return [_message(message, number) for number, message in enumerate([*prompt, *answers], 1)]
    before = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    asked = {"role": "user", "content": _text(record, "prompt")}
    return [*before, asked, {"role": "assistant", "content": _answer(record)}]


def _messages(record: Mapping[str, Any]) -> list[Message]:
    return [_message(message, number) for number, message in enumerate(_turns(record), 1)]


def _message(message: Any, number: int) -> Message:
    """A message in OpenAI's form, as templates want it: the arguments of a call are data, not JSON in a text."""
    if not isinstance(message, Mapping):
        raise BadRecord(f"message {number} is a {type(message).__name__}, and not a record with role and content.")
    if not isinstance(message.get("role"), str):
        raise BadRecord(f"message {number} has no role.")
    found = dict(message)
    if calls := found.get("tool_calls"):
        found["tool_calls"] = [_call(call, number) for call in calls] if isinstance(calls, list) else _no_call(number)
    if found.get("content") is None and not calls:
        raise BadRecord(f"message {number}, of the {found['role']}, has no content.")
    return found


def _sharegpt(record: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    for number, turn in enumerate(_turns(record), 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadRecord(f"message {number} has no text in a field value.")
        speaker = turn.get("from")
        if not isinstance(speaker, str):
            raise BadRecord(f"message {number} does not say who speaks: it has no field from.")
        role = _SPEAKERS.get(speaker)
        if role is None:
            raise BadRecord(
                f"message {number} is from {speaker[:40]!r}, who is not known.{nearest(speaker, _SPEAKERS)}"
            )
        if role != "call":
            messages.append({"role": role, "content": turn["value"]})
            continue
        calls = _parsed(turn["value"])
        calls = calls if isinstance(calls, list) else [calls]
        said = {"role": "assistant", "content": "", "tool_calls": [_call(call, number) for call in calls]}
        messages.append(said)
    return messages


_MAKERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "prompt-completion": _prompt_completion,
}  # fmt: skip


# ---- what stands in them


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise BadRecord(f"its field {name} is {_what(value)}, and not a text.")
    return value


def _answer(record: Mapping[str, Any]) -> str:
    return _text(record, next(name for name in _ANSWERS if name in record))


def _turns(record: Mapping[str, Any]) -> list[Any]:
    """The list of turns; JSON in a text where the file has no lists (CSV)."""
    name = next(name for name in ("messages", "conversations", "conversation") if record.get(name))
    turns = _parsed(record[name])
    if not isinstance(turns, list):
        raise BadRecord(f"its field {name} is {_what(record[name])}, and not a list of messages.")
    return turns


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """JSON schemas of functions, each wrapped as OpenAI does."""
    tools = record.get("tools")
    if not tools:
        return None
    tools = _parsed(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("its field tools is not a list of JSON schemas of functions.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _call(call: Any, number: int) -> dict[str, Any]:
    """A call of a function as OpenAI wraps it, its arguments as data."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        _no_call(number)
    assert isinstance(inner, Mapping)
    arguments = _parsed(inner.get("arguments", {}))
    outer = dict(call) if "function" in call else {"type": "function"}
    return outer | {"function": dict(inner) | {"arguments": {} if arguments is None else arguments}}


def _no_call(number: int) -> Any:
    raise BadRecord(f'message {number} calls a tool, but not as {{"name": …, "arguments": {{…}}}}.')


def _parsed(value: Any) -> Any:
    """What JSON in a text says; anything else as it is, and None for a text that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _what(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
