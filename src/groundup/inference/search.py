"""Searches: a request's text is looked for among several that are computed side by side.

Beam search keeps the best few beginnings at each length; diverse beam search does so in groups that keep apart;
contrastive search tries the likeliest next tokens, and takes one that is likely and unlike what came before.

A search moves on when all of its texts have been computed up to their last token. Whatever else the engine does to
texts in between (preempt them, read them again, compute only some of them in a step), it does to these.
"""

# V vocabulary   K tokens that are tried   T tokens of the context   E embedding

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.inference.requests import Completion, Event, Text
from groundup.inference.sampler import NOTHING_LEFT, Choice, described, edited, likeliest
from groundup.inference.sampling import NOT_FINITE, on_cpu
from groundup.inference.truncation import Floats
from groundup.runtime import GroundupError

if TYPE_CHECKING:
    from groundup.inference.decoder import Decoder


def search_from(text: Text) -> Search | None:
    """The search that a request asks for, which starts from its prompt; None for none."""
    params = text.request.params
    if params.beams > 1:
        return Beams(text)
    return Contrastive(text) if params.contrastive_alpha else None


class Search:
    """Texts of one request that wait for each other.

    Args:
        first: the prompt.

    Attributes:
        live: the texts that are computed now.
        sees: whether it looks at features.
    """

    sees = False

    def __init__(self, first: Text) -> None:
        self.request, self.live = first.request, [first]
        self._logits: dict[Text, Tensor] = {}

    def note(self, text: Text, logits_V: Tensor) -> None:
        """A text was computed to its end, and waits."""
        text.waits = True
        self._logits[text] = on_cpu(logits_V)

    def see(self, text: Text, features_TE: Tensor) -> None:
        """Features of a text's tokens from ``text.computed`` on have been computed."""

    @property
    def ready(self) -> bool:
        """Whether nobody is waited for any more."""
        return all(text.waits for text in self.live)

    def advance(self, decoder: Decoder) -> list[Event]:
        """Go on to the next token. What goes wrong ends the request, and what was chosen before stays."""
        events: list[Event] = []
        try:
            with torch.inference_mode():
                for event in self._events(decoder):  # one by one, so that those before an error are kept
                    events.append(event)
        except GroundupError as error:
            self.request.fail(error)
        return events

    def _events(self, decoder: Decoder) -> Iterator[Event]:
        raise NotImplementedError

    def _succeed(self, decoder: Decoder, children: Sequence[tuple[Text, Text]]) -> None:
        """Other texts are computed from now on, each going on from one that was."""
        decoder.scheduler.succeed(self.live, children)
        self.live = [child for _, child in children]
        self._logits = {}


class _Beam(NamedTuple):
    """A text, and the sum of its edited log-probabilities so far."""

    text: Text
    score: float


class _Try(NamedTuple):
    """A token that may follow a text, and the sum with it."""

    score: float
    text: Text
    token: int


class _Grown(NamedTuple):
    """A text that goes on, the one it goes on from, and its sum."""

    score: float
    parent: Text
    child: Text


@dataclass
class _Group:
    """Beams that compete with each other.

    Args:
        size: how many there are at most.
        beams: those that go on, the best first; none once the group has ended.
        ended: the best texts that have ended, at most ``size``, the best first.
    """

    size: int
    beams: list[_Beam]
    ended: list[Completion] = field(default_factory=list)


class _Read(NamedTuple):
    """What the model said after a text: log-probabilities, as they are and after penalties, biases and bans."""

    logp_V: Tensor
    edited_V: Floats


class Beams(Search):
    """Beam search, and diverse beam search (Vijayakumar et al. 2016) where there are several groups.

    Of all tokens that may follow one of a group's texts those with the largest sums of log-probabilities are looked at,
    ``size`` for each token that could end a text and ``size`` more, so that as many remain where many end. A text that
    ends counts only if it is among the first ``size``. This, and when a group ends, is as in transformers, so that the
    results are the same.

    Scores are sums of log-probabilities after all edits, which are not normalised again, as in transformers.
    Where a grammar leaves fewer texts than were asked for, there are fewer completions.
    """

    def __init__(self, first: Text) -> None:
        super().__init__(first)
        first.completion = Completion()  # the request's own are filled when it is known which texts are the best
        params = self.request.params
        size = params.beams // params.beam_groups
        self._groups = [_Group(size, [_Beam(first, 0.0)]) for _ in range(params.beam_groups)]

    def _events(self, decoder: Decoder) -> Iterator[Event]:
        read = {}
        for text in self.live:
            logp_V = self._logits[text].log_softmax(dim=-1)
            read[text] = _Read(logp_V, edited(logp_V, text.state))
        followed: Counter[int] = Counter()
        children: list[tuple[Text, Text]] = []
        for group in self._groups:
            grown = self._grow(group, read, followed, decoder) if group.beams else []
            group.beams = [_Beam(one.child, one.score) for one in grown]
            children += [(one.parent, one.child) for one in grown]
            followed.update(one.child.tokens[-1] for one in grown)
        if children:
            self._succeed(decoder, children)
        else:
            yield from self._found()

    def _grow(
        self, group: _Group, read: Mapping[Text, _Read], followed: Mapping[int, int], decoder: Decoder
    ) -> list[_Grown]:
        """A group's next beams, the best first; none where it has ended."""
        request = self.request
        params, length = request.params, len(group.beams[0].text.completion.tokens) + 1
        fits = params.max_tokens if request.slide else decoder.context - len(request.prompt) + 1
        longest = min(params.max_tokens, fits)
        ends = len(set(params.stop_tokens) | (set() if params.ignore_end else decoder.end_of_text))
        grown: list[_Grown] = []
        for rank, one in enumerate(self._tries(group, read, followed, max(2, 1 + ends) * group.size)):
            if rank >= group.size and len(grown) == group.size:
                break
            written = self._written(one, read[one.text], decoder)
            if written.finish is None and length == longest:
                written.finish = "length"
            if written.finish is None and len(grown) < group.size:
                grown.append(_Grown(one.score, one.text, self._child(one, written)))
            elif written.finish is not None and rank < group.size:
                written.score = one.score / length**params.length_penalty
                group.ended.append(written)
        group.ended = sorted(group.ended, key=_place)[: group.size]
        return grown if grown and self._may_improve(group, grown[0].score, length, longest) else []

    def _tries(self, group: _Group, read: Mapping[Text, _Read], followed: Mapping[int, int], count: int) -> list[_Try]:
        """The ``count`` best tokens after any of a group's texts, the best first."""
        tries: list[_Try] = []
        for text, score in group.beams:
            edited_V = read[text].edited_V
            if followed:
                edited_V = edited_V.copy()
                for token, times in followed.items():
                    edited_V[token] -= self.request.params.diversity_penalty * times
            ids = likeliest(edited_V, count)
            tries += [
                _Try(score + value, text, token)
                for token, value in zip(ids.tolist(), edited_V[ids].tolist(), strict=True)
                if value > -torch.inf
            ]
        return sorted(tries, key=lambda one: -one.score)[:count]

    def _written(self, one: _Try, read: _Read, decoder: Decoder) -> Completion:
        """What a text becomes with a token; it has a finish where the token ends it."""
        before, token = one.text.completion, one.token
        if finish := decoder.ending(self.request, token):
            return replace(before, finish=finish, stop_token=token)
        choice = described(read.logp_V, token, one.text.state)
        written = Completion([*before.tokens, token])
        if choice.logprob is not None:
            written.logprobs = [*before.logprobs, choice.logprob]
        if choice.top is not None:
            written.alternatives = [*before.alternatives, choice.top]
        if self.request.stopped is not None and self.request.stopped(written.tokens):
            written.finish = "stopped"
        return written

    @staticmethod
    def _child(one: _Try, written: Completion) -> Text:
        state = one.text.state.fork(0)
        state.observe(one.token)
        tokens = [*one.text.tokens, one.token]
        return replace(one.text, completion=written, tokens=tokens, state=state, held=None, waits=False)

    def _may_improve(self, group: _Group, best: float, length: int, longest: int) -> bool:
        """Whether a text that goes on might still be better than one that has ended, as ``early_stopping`` sees it.

        Args:
            best: the largest sum of those that go on.
        """
        params = self.request.params
        if len(group.ended) < group.size:
            return True
        if params.early_stopping == "full":
            return False
        counted = longest if params.early_stopping == "never" and params.length_penalty > 0.0 else length
        return -best / counted**params.length_penalty < _place(group.ended[-1])

    def _found(self) -> Iterator[Event]:
        """All groups have ended: the best of their texts are the request's completions.

        Raises:
            GroundupError: there is none, as nothing may follow any text.
        """
        found = sorted((one for group in self._groups for one in group.ended), key=_place)
        if not found:
            raise GroundupError(NOTHING_LEFT)
        request = self.request
        request.seconds_to_first = time.monotonic() - request.arrived
        del request.completions[len(found) :]
        for completion, best in zip(request.completions, found, strict=False):
            completion.tokens, completion.logprobs, completion.alternatives = (
                list(best.tokens), list(best.logprobs), list(best.alternatives)
            )  # fmt: skip
            completion.score, completion.stop_token = best.score, best.stop_token
            completion.finish = completion.finish or best.finish
            for token in best.tokens:
                yield Event(request, completion, token)


def _place(one: Completion) -> float:
    """Lower is better."""
    assert one.score is not None
    return -one.score


class _Tried(NamedTuple):
    """A token that is tried: its probability, and what is told of it if it is taken."""

    p: float
    choice: Choice


class Contrastive(Search):
    """Contrastive search (Su et al. 2022, eq. 5): a token is weighed by its probability, and by how much its features
    are like those of a token before it.

    Features are what the head gets: the last layer's output after its norm. Each of the K tokens that are tried is a
    text of its own for one step, which gives its features; the logits that come with them serve the next token. The end
    token is tried like all others. The last place of the context cannot be filled by a token that is weighed: without a
    sliding window the text ends there.
    """

    sees = True

    def __init__(self, first: Text) -> None:
        super().__init__(first)
        self._seen_TE = torch.empty(0, 0)  # normed features of what all live texts have in common; it has spare rows
        self._own: dict[Text, Tensor] = {}  # of the last token of each
        self._tried: dict[Text, _Tried] = {}

    def see(self, text: Text, features_TE: Tensor) -> None:
        """Keep them, scaled to length 1. A text that is read again, for whatever reason, writes the same once more."""
        normed_TE = F.normalize(features_TE.float(), dim=-1)
        begin, end = text.computed, text.computed + len(normed_TE)
        if end > len(self._seen_TE):
            longer_TE = normed_TE.new_zeros(2 * end, normed_TE.shape[1])
            if len(self._seen_TE):
                longer_TE[: len(self._seen_TE)] = self._seen_TE
            self._seen_TE = longer_TE
        if end == text.length:
            self._own[text] = normed_TE[-1]
            end -= 1
        self._seen_TE[begin:end] = normed_TE[: end - begin]

    def _events(self, decoder: Decoder) -> Iterator[Event]:
        chosen = self.live[0]
        if self._tried:
            chosen = self._best()
            yield from decoder.taken(chosen, self._tried[chosen].choice, written=True)
        if chosen.completion.finish is None and chosen.length >= decoder.context and not self.request.slide:
            chosen.completion.finish = "length"
        if chosen.completion.finish is None:
            self._branch(decoder, chosen)

    def _best(self) -> Text:
        """The text whose last token is taken.

        Raises:
            GroundupError: features are not finite.
        """
        alpha, texts = self.request.params.contrastive_alpha, self.live
        seen_TE = self._seen_TE[: texts[0].length - 1]
        likeness_K = (torch.stack([self._own[text] for text in texts]) @ seen_TE.T).amax(dim=1).cpu()
        scores_K = (1.0 - alpha) * torch.tensor([self._tried[text].p for text in texts]) - alpha * likeness_K
        if not bool(scores_K.isfinite().all()):
            raise GroundupError(NOT_FINITE)
        return texts[int(scores_K.argmax())]

    def _branch(self, decoder: Decoder, chosen: Text) -> None:
        """Try the likeliest tokens after a text.

        Raises:
            GroundupError: its logits are not finite, or nothing may follow it.
        """
        logits_V, state, top_k = self._logits[chosen], chosen.state, self.request.params.top_k
        assert top_k is not None
        edited_V = edited(logits_V, state)
        ids = [token for token in likeliest(edited_V, top_k).tolist() if edited_V[token] > -torch.inf]
        if not ids:
            raise GroundupError(NOTHING_LEFT)
        self._seen_TE[chosen.length - 1] = self._own[chosen]
        p_V, logp_V = torch.from_numpy(edited_V).softmax(dim=-1), logits_V.log_softmax(dim=-1)
        # They share their sampler's state, as only one of them will be taken.
        children = [replace(chosen, tokens=[*chosen.tokens, token], held=None, waits=False) for token in ids]
        self._tried = {
            child: _Tried(float(p_V[token]), described(logp_V, token, state))
            for child, token in zip(children, ids, strict=True)
        }
        self._own = {}
        self._succeed(decoder, [(chosen, child) for child in children])
