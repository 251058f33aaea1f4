"""From logits to what happens next: tokens are chosen, texts end, fork, or go on with a guess."""

# R rows of logits   T positions of a prompt   V vocabulary

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groundup.inference.drafts import Drafter
from groundup.inference.requests import Event, Finish, Request, Text
from groundup.inference.sampler import Choice, prompt_logprobs, sample
from groundup.inference.scheduler import Scheduler, Work
from groundup.inference.search import Search
from groundup.runtime import GroundupError


class Decoder:
    """Goes on from what was computed.

    Args:
        scheduler: the queues, and the cache.
        context: positions of the model's context.
        vocab_size: ids that may be chosen are below it.
        end_of_text: the tokens that end a text, and are not part of it.
        drafter: who guesses tokens; None for nobody.
        drafts: most tokens that are guessed at once.
    """

    def __init__(
        self, scheduler: Scheduler, *, context: int, vocab_size: int, end_of_text: frozenset[int],
        drafter: Drafter | None, drafts: int,
    ) -> None:  # fmt: skip
        self.scheduler, self.paged, self.context, self.vocab_size = scheduler, scheduler.paged, context, vocab_size
        self.end_of_text, self.drafter, self.drafts = end_of_text, drafter, drafts

    @staticmethod
    def wanted(work: Work) -> int:
        """Of a sequence's last tokens, those whose logits are looked at."""
        if work.text.request.params.prompt_logprobs is not None and work.text.pending > 1:
            return work.queries
        return 1 + len(work.text.drafts) if work.last else 0

    def go_on(self, works: Sequence[Work], logits: Sequence[Tensor | GroundupError]) -> list[Event]:
        """Take note of what was computed, and choose tokens where a sequence has been read to its end.

        Args:
            logits: for each sequence those that were :meth:`wanted`, or why there are none.
        """
        plain: list[tuple[Text, Tensor]] = []
        events: list[Event] = []
        searches: dict[Search, None] = {}
        for work, found in zip(works, logits, strict=True):
            text = work.text
            if isinstance(found, GroundupError):
                text.request.fail(found)
                continue
            if text.request.params.prompt_logprobs is not None and text.pending > 1:
                self._note_prompt(text, found)
                found = found[-1:]
            text.computed += work.queries - len(text.drafts)
            if text.search is not None:
                if work.last:
                    text.search.note(text, found[-1])
                    searches[text.search] = None
            elif text.drafts:
                events += self._verified(text, found)
            elif work.last:
                plain += [(each, found[-1]) for each in self._forked(text)]
        if plain:
            choices = sample(torch.stack([row for _, row in plain]), [text.state for text, _ in plain])
            for (text, _), choice in zip(plain, choices, strict=True):
                events += self.taken(text, choice)
        for text in [work.text for work in works]:
            if text.completion.finish is None:
                assert text.held is not None
                salt = text.request.salt if self.scheduler.reuse else None
                self.paged.computed(text.held, text.tokens[text.start :], text.computed, salt)
                self._guess(text)
        for search in searches:
            if search.ready and search.request.finish is None:
                events += search.advance(self)
        return events

    def _forked(self, text: Text) -> list[Text]:
        """The sequence, and when its prompt has just been read, those that are to go on from it in other ways."""
        found = [text]
        for number, completion in enumerate(text.request.completions[1:] if text.forks else (), start=1):
            assert text.held is not None
            other = replace(
                text, completion=completion, tokens=list(text.tokens), state=text.state.fork(number),
                held=self.paged.fork(text.held), drafts=[], forks=False,
            )  # fmt: skip
            self.scheduler.fork(other)
            found.append(other)
        text.forks = False
        return found

    def _verified(self, text: Text, logits_RV: Tensor) -> list[Event]:
        """Let the sampler choose where tokens were guessed, up to the first place where it chooses another."""
        events: list[Event] = []
        drafts, text.drafts = text.drafts, []
        for row, guess in enumerate([*drafts, None]):
            (choice,) = sample(logits_RV[row : row + 1], [text.state])
            events += self.taken(text, choice)
            if text.completion.finish is not None or isinstance(choice, GroundupError) or choice.token != guess:
                break
            text.computed += 1
        return events

    def ending(self, request: Request, token: int) -> Finish | None:
        """Why a token ends a text, if it does."""
        if not request.params.ignore_end and token in self.end_of_text:
            return "end_of_text"
        return "stopped" if token in request.params.stop_tokens else None

    def taken(self, text: Text, choice: Choice | GroundupError, *, written: bool = False) -> list[Event]:
        """A token was chosen: write it down, and see whether it is the last.

        Args:
            written: it is among the text's tokens already, as its last.
        """
        request, completion = text.request, text.completion
        if isinstance(choice, GroundupError):
            request.fail(choice)
            return []
        if request.seconds_to_first is None:
            request.seconds_to_first = time.monotonic() - request.arrived
        params, token = request.params, choice.token
        if finish := self.ending(request, token):
            completion.finish, completion.stop_token = finish, token
            return []
        try:
            text.state.observe(token)
        except GroundupError as error:  # a grammar gives up
            request.fail(error)
            return []
        if not written:
            text.tokens.append(token)
        completion.tokens.append(token)
        if choice.logprob is not None:
            completion.logprobs.append(choice.logprob)
        if choice.top is not None:
            completion.alternatives.append(choice.top)
        full = text.length > self.context and not request.slide
        if len(completion.tokens) >= params.max_tokens or full:
            completion.finish = "length"
        return [Event(request, completion, token)]

    def _guess(self, text: Text) -> None:
        """Have somebody guess what comes next, as far as there may be more at all."""
        if self.drafter is None or text.search is not None or text.pending != 1 or not text.completion.tokens:
            return
        left = text.request.params.max_tokens - len(text.completion.tokens) - 1
        most = min(self.drafts, left, self.context - text.length)
        if most > 0 and self.scheduler.regime(text.length + most) == text.regime:
            guesses = self.drafter.propose(text.tokens, most)
            text.drafts = [token for token in guesses[:most] if 0 <= token < self.vocab_size]

    @staticmethod
    def _note_prompt(text: Text, logits_TV: Tensor) -> None:
        """Log-probabilities of the prompt's own tokens."""
        request = text.request
        begin = text.start + text.computed + 1
        targets = request.prompt[begin : begin + len(logits_TV)]
        if request.params.prompt_logprobs is not None and targets and len(request.prompt_logprobs) == begin - 1:
            found = prompt_logprobs(logits_TV[: len(targets)], targets, request.params.prompt_logprobs)
            request.prompt_logprobs += found
