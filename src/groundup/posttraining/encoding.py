"""Conversations as token ids, and which of them are to be learnt."""

# N examples   T tokens

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from groundup.data import Dropped
from groundup.posttraining.conversations import BadRecord, Conversation, Skip, leave_out
from groundup.runtime import GroundupError
from groundup.tokenizer import Tokenizer

TooLong = Literal["refuse", "cut", "drop"]


class Example(NamedTuple):
    """A conversation as token ids.

    Args:
        where: file and number of the record.
        ids: int64 T, the first of which nobody has to predict.
        learn: bool T: those that are to be predicted.
        record: the record it came from.
    """

    where: str
    ids: npt.NDArray[np.int64]
    learn: npt.NDArray[np.bool_]
    record: Mapping[str, Any]

    @property
    def positions(self) -> int:
        """How many positions of a row it takes: each token but the last is an input."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class Encoding:
    """How conversations become examples.

    Args:
        tokenizer: with a chat template, unless all conversations are plain texts.
        context_length: positions that the model sees.
        turns: learn every answer of the assistant, or the last one.
        too_long: what becomes of an example that does not fit: ``refuse`` ends with a line that names it, ``cut`` keeps
            its beginning, ``drop`` leaves it out and counts it.
    """

    tokenizer: Tokenizer
    context_length: int
    turns: Literal["all", "last"] = "all"
    too_long: TooLong = "refuse"

    def examples(self, conversations: Iterable[Conversation], skip: Skip | None = None) -> Iterator[Example]:
        """Encode conversations.

        Args:
            skip: is told of those that cannot be used; without it the first one ends the reading. What ``too_long``
                drops is told, too, but ends nothing.

        Raises:
            BadRecord: a conversation cannot be used; the line names it.
        """
        for conversation in conversations:
            try:
                example = self._fitted(self.encode(conversation))
            except BadRecord as error:
                leave_out(conversation.where, error, skip)
                continue
            if example is not None:
                yield example
            elif skip is not None:
                skip(Dropped(conversation.where, "longer than the context"))

    def encode(self, conversation: Conversation) -> Example:
        """One conversation, however long.

        Raises:
            BadRecord: the chat template refuses it.
        """
        tok, messages = self.tokenizer, conversation.messages
        if messages[0]["role"] == "text":
            end = tok.end_of_text_id
            ends = [] if end is None else [end]
            ids = [*(list(tok.vocabulary.prefix) or ends), *tok.encode(messages[0]["content"]), *ends]
            mask = [0] + [1] * (len(ids) - 1)
        else:
            try:
                ids, mask = tok.apply_chat_template_with_mask(messages, conversation.tools, self.turns)
            except GroundupError as error:
                raise BadRecord(str(error)) from error
        learn = np.array(mask, bool)
        if len(learn):
            learn[0] = False  # nothing comes before it
        if not learn.any():
            raise BadRecord("there is nothing to learn from: no token in it is the assistant's.")
        return Example(conversation.where, np.array(ids, np.int64), learn, conversation.record)

    def _fitted(self, example: Example) -> Example | None:
        """The example, as far as it fits into the context; None where it is left out."""
        if example.positions <= self.context_length:
            return example
        if self.too_long == "drop":
            return None
        if self.too_long == "refuse":
            raise BadRecord(
                f"it has {len(example.ids):,} tokens, the context holds {self.context_length:,}. Give --too-long cut "
                "or drop, or a model with a longer context."
            )
        kept = slice(0, self.context_length + 1)
        if not example.learn[kept].any():
            raise BadRecord(
                f"what is to be learnt from it lies behind the {self.context_length:,} positions of the context."
            )
        return example._replace(ids=example.ids[kept], learn=example.learn[kept])
