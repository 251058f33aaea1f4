"""Tokens as text, as they come: whole characters only, ended by the first stop text, none of which gets out."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from groundup.inference.requests import Alternatives, Event, Finish, Request
from groundup.tokenizer import Tokenizer


class TextStream:
    """Text of one completion as it grows.

    Args:
        continued: whether it goes on from other text; where not, the space that SentencePiece writes first is no part
            of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, continued: bool = True) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.continued = continued
        self.special = set(tokenizer.special_tokens.values())
        self.text = ""
        self.taken = self.count = 0  # characters shown, tokens read
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> bool:
        """Add a token; True once a stop text has been met."""
        written = self.tokenizer.decode_bytes([token], continued=self.continued)
        self.continued = token not in self.special
        return self._extend(self._decoder.decode(written))

    def _extend(self, text: str) -> bool:
        self.text += text
        ends = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """What may be shown now and was not yet: all but a tail that could still become a stop text."""
        if final and not self.stopped:
            self._extend(self._decoder.decode(b"", final=True))
        held = 0
        if not final and not self.stopped:
            held = max((_overlap(self.text, stop) for stop in self.stop), default=0)
        piece = self.text[self.taken : len(self.text) - held]
        self.taken += len(piece)
        return piece

    def finished(self) -> str:
        """The whole text."""
        self.take(final=True)
        return self.text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Answer:
    """What one completion has become.

    Args:
        text: without the prompt.
        tokens: its ids, up to where it was ended.
        finish: why it ended.
        logprobs, alternatives: of each token, where asked for; see :class:`groundup.inference.requests.Completion`.
        score: by which a beam search has ranked it.
    """

    text: str
    tokens: list[int]
    finish: Finish
    logprobs: list[float]
    alternatives: list[Alternatives]
    score: float | None = None


class Generation:
    """A request whose tokens become text.

    Args:
        request: on its way through the engine.
        tokenizer: of the model.
        continued: whether the answer goes on from other text.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, *, continued: bool) -> None:
        self.request, self.tokenizer, self.continued = request, tokenizer, continued
        stop = request.params.stop
        if stop:
            request.stopped = self._stopped
        self._streams = {id(one): TextStream(tokenizer, stop, continued=continued) for one in request.completions}

    def _stopped(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens, continued=self.continued)
        return any(stop in text for stop in self.request.params.stop)

    def push(self, event: Event) -> None:
        """Take a token in; a completion that has met a stop text ends, and what was chosen after it is dropped."""
        completion = event.completion
        stream = self._streams[id(completion)]
        if stream.stopped:
            return
        stream.count += 1
        if stream.push(event.token):
            completion.finish = "stopped"
            for kept in (completion.tokens, completion.logprobs, completion.alternatives):
                del kept[stream.count :]

    def take(self, events: Iterable[Event] = ()) -> str:
        """Take tokens in. What may be shown now of the first completion, and was not yet."""
        for event in events:
            self.push(event)
        completion = self.request.completions[0]
        return self._streams[id(completion)].take(final=completion.finish is not None)

    def answers(self) -> list[Answer]:
        """What has become of all completions, when they have ended."""
        return [
            Answer(
                text=self._streams[id(one)].finished(),
                tokens=one.tokens,
                finish=one.finish or "cancelled",
                logprobs=one.logprobs,
                alternatives=one.alternatives,
                score=one.score,
            )
            for one in self.request.completions
        ]
