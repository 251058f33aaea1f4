"""What is left out before anything is learnt: duplicates, what is too short or too long, what a template would lose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from groundup.data import Dropped, NearDuplicates
from groundup.data.dedup import content_key
from groundup.posttraining.conversations import BadRecord, Conversation, Skip
from groundup.posttraining.encoding import Example
from groundup.tokenizer import ChatTemplate


def text_of(conversation: Conversation) -> str:
    """All that is said in a conversation, with who says it: what two duplicates have in common."""
    parts = []
    for message in conversation.messages:
        calls = json.dumps(message["tool_calls"], sort_keys=True) if message.get("tool_calls") else ""
        parts.append(f"{message['role']}: {_said(message)} {calls}")
    return "\n".join(parts)


def without_duplicates(conversations: Iterable[Conversation], near: float | None, skip: Skip) -> Iterator[Conversation]:
    """Leave out what was there before; the first of several stays.

    Args:
        near: share of runs of five words from which on conversations count as the same; None for those alone that are
            the same but for white space.
        skip: is told of the others, and of which one they repeat.
    """
    exact: dict[bytes, str] = {}
    alike = None if near is None else NearDuplicates(near)
    kept: list[str] = []
    for conversation in conversations:
        text = text_of(conversation)
        key = content_key(text)
        if key in exact:
            skip(Dropped(conversation.where, "duplicate", f"of {exact[key]}"))
            continue
        exact[key] = conversation.where
        if alike is not None and (found := alike(text)) is not None:
            number, share = found
            skip(Dropped(conversation.where, "near duplicate", f"of {kept[number]}, {share:.0%} alike"))
            continue
        kept.append(conversation.where)
        yield conversation


class Shared(NamedTuple):
    """A conversation to measure on that is also one to learn from.

    Args:
        held_out, train: where each stands.
        alike: share of their runs of five words, estimated; 1 where they are the same.
    """

    held_out: str
    train: str
    alike: float


def shared_with_training(
    train: Iterable[Conversation], held_out: Iterable[Conversation], near: float = 0.8
) -> list[Shared]:
    """What is measured on although it is learnt: a score on it says little.

    Args:
        near: share of runs of five words from which on two count as the same.
    """
    exact: dict[bytes, str] = {}
    alike, kept = NearDuplicates(near), []
    for conversation in train:
        text = text_of(conversation)
        exact.setdefault(content_key(text), conversation.where)
        if alike(text) is None:
            kept.append(conversation.where)
    found = []
    for conversation in held_out:
        text = text_of(conversation)
        if (where := exact.get(content_key(text))) is not None:
            found.append(Shared(conversation.where, where, 1.0))
        elif (like := alike.find(text)) is not None:
            found.append(Shared(conversation.where, kept[like[0]], like[1]))
    return found


def of_length(examples: Iterable[Example], least: int, most: int | None, skip: Skip) -> Iterator[Example]:
    """Leave out examples of which too little or too much is to be learnt.

    Args:
        least, most: tokens to learn.
        skip: is told of the others.
    """
    for example in examples:
        learnt = int(example.learn.sum())
        if learnt < least:
            skip(Dropped(example.where, "too short", f"{learnt} tokens to learn"))
        elif most is not None and learnt > most:
            skip(Dropped(example.where, "too long", f"{learnt} tokens to learn"))
        else:
            yield example


def check_template(conversation: Conversation, template: ChatTemplate) -> None:
    """See that a template writes down all that is said; some leave out system messages, or calls of tools.

    Raises:
        BadRecord: something is left out.
        GroundupError: the template refuses the conversation.
    """
    if conversation.messages[0]["role"] == "text":
        return
    text = template.render(conversation.messages, conversation.tools)
    for number, message in enumerate(conversation.messages, 1):
        names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        for part, what in ((_said(message).strip(), "what it says"), *((name, "its call of a tool") for name in names)):
            if part not in text:
                raise BadRecord(
                    f"{conversation.where}: the chat template leaves out message {number}, of the {message['role']}: "
                    f"{what} would not be seen. Choose another template, or leave such records out with --skip-bad."
                )


def _said(message: dict[str, Any]) -> str:
    """A message's text; of several parts, all of them."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return str(content)
