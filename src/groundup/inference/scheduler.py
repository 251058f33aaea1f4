"""Who gets how many tokens in the next step of the engine.

    1  sequences that are being continued: a token each (and drafts), before anything else
    2  prompts that are being read, in pieces: as many tokens as do not hold up those above that somebody watches
    3  requests that wait, as long as the cache has room for their prompts

When the cache is full, the last to come gives its blocks back and waits; what it had computed is found again if nobody
needed the room (Kwon et al. 2023, section 4.5, recomputation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from groundup.inference.paged import Held, PagedCache
from groundup.inference.requests import Text, window_start
from groundup.runtime import GroundupError

PATIENCE = 2.2  # a step in which prompts are read takes at most this many times as long as the usual one before
SHARE = 0.6  # of what a step takes by itself by now, that is given to prompts at least: texts have grown meanwhile
FIRST_READ = 32  # tokens of a prompt, before anybody knows what they cost
FEWEST_READ = 2  # tokens of a prompt, however slow they are: it must come to an end
REFRESH = 16  # steps in which something is read, before one without: texts grow, and so does what they take themselves
LATELY = 0.3  # what the last step weighs in the averages


class Work(NamedTuple):
    """Tokens of a sequence that are computed in a step.

    Args:
        queries: how many of those pending, drafts included.
        last: whether the next token can be chosen afterwards.
    """

    text: Text
    queries: int
    last: bool


class Pace:
    """How long steps have taken, and so how much of a prompt can be read without holding up the others.

    Args:
        most: tokens of a step.

    Attributes:
        step: seconds of a step in which nothing is read, lately.
        usual: the same before the reading began, or since others are continued: what their readers are used to.
        token: seconds that one token of a prompt adds.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.step: float | None = None
        self.usual: float | None = None
        self.token: float | None = None
        self._since = 0  # steps since one in which nothing was read
        self._of = 0  # how many were continued in what is usual

    def note(self, continued: int, read: int, seconds: float) -> None:
        """A step was made."""
        if read == 0:
            others = continued != self._of
            self.step = self._mean(None if others else self.step, seconds)
            if self._since == 0 or others:
                self.usual, self._of = self.step, continued
            self._since = 0
            return
        self._since += 1
        if continued == 0 or self.step is not None:
            own = seconds - (self.step or 0.0) if continued else seconds
            self.token = self._mean(self.token, max(own, 0.0) / read)

    @staticmethod
    def _mean(before: float | None, now: float) -> float:
        return now if before is None else (1 - LATELY) * before + LATELY * now

    def reading(self, continued: int) -> int:
        """Tokens of prompts that may be read in a step with so many sequences that are continued."""
        if continued == 0:
            return self.most
        if self._since >= REFRESH:
            return 0
        if self.step is None or self.usual is None or not self.token:
            return min(self.most, FIRST_READ)
        seconds = max(PATIENCE * self.usual - self.step, SHARE * self.step)
        return max(FEWEST_READ, min(self.most, int(seconds / self.token)))


class Scheduler:
    """The queue of those that wait, and those that run.

    Args:
        paged: the cache.
        context: the model's.
        step_tokens: most tokens of a step.
        max_sequences: that run at once.
        reuse: look for the beginnings of prompts in the cache.
        regime: what the keys of a text hang on, from its length; when it changes, all are computed again.
        grid: cut every prompt into pieces of so many tokens, and compute all else token by token, whoever else is
            there; 0 cuts as it comes.
    """

    def __init__(
        self, paged: PagedCache, context: int, *, step_tokens: int, max_sequences: int, reuse: bool = True,
        regime: Callable[[int], Any] = bool, grid: int = 0,
    ) -> None:  # fmt: skip
        self.paged, self.context, self.reuse, self.regime, self.grid = paged, context, reuse, regime, grid
        self.step_tokens, self.max_sequences = step_tokens, max_sequences
        self.pace = Pace(step_tokens)
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        self.preempted = 0
        self._arrived = 0

    @property
    def texts(self) -> list[Text]:
        """Everybody."""
        return self.running + self.waiting

    def add(self, text: Text) -> None:
        """One more that waits."""
        self._arrived += 1
        text.order = self._arrived
        self.waiting.append(text)

    def fork(self, text: Text) -> None:
        """One more that runs: it goes on from where another is, whose blocks it holds already."""
        self._arrived += 1
        text.order = self._arrived
        self.running.append(text)

    def succeed(self, parents: Sequence[Text], children: Sequence[tuple[Text, Text]]) -> None:
        """Texts take the places of others, with their rank and their blocks.

        Args:
            parents: all that go.
            children: each with the parent from which it goes on. Where a parent's blocks have been taken away, its
                children wait, and are computed again.
        """
        first: dict[Text, Held | None] = {}  # what the first child got: the others fork it
        for parent, child in children:
            if parent not in first:
                child.held = first[parent] = parent.held
                parent.held = None
            else:
                held = first[parent]
                child.held = None if held is None else self.paged.fork(held)
            (self.waiting if child.held is None else self.running).append(child)
        for parent in parents:
            self.remove(parent)

    def remove(self, text: Text) -> None:
        """Let go of one that has ended."""
        if text.held is not None:
            self.paged.release(text.held)
            text.held = None
        queue = self.running if text in self.running else self.waiting
        queue.remove(text)

    def plan(self) -> list[Work]:
        """What is computed in the next step; the cache has room for it."""
        while not (works := self._planned()) and self._make_way():
            pass
        return works

    def _make_way(self) -> bool:
        """Where nothing can be computed, take the blocks of a text that waits for others of its search: what came out
        of the model for it is kept, and they may be what has no room.
        """
        idle = [text for text in self.running if text.waits]
        if idle:
            self._preempt(idle[-1])
        return bool(idle)

    def _planned(self) -> list[Work]:
        self.running.sort(key=lambda text: text.rank)
        for text in self.running:
            self._slide(text)
        self._admit()
        works: list[Work] = []
        for text in [text for text in self.running if text.pending == 1]:
            if text in self.running and len(works) < self.step_tokens:
                works += self._continued(text, [work.text for work in works])
        live = len(works) if any(work.text.request.live for work in works) else 0
        left = min(self.step_tokens - sum(work.queries for work in works), self.pace.reading(live))
        if left > 0:
            works += self._read(left, [work.text for work in works])
        return works

    def _continued(self, text: Text, planned: Sequence[Text]) -> Iterable[Work]:
        end = text.computed + 1 + len(text.drafts)
        assert text.held is not None
        if text.drafts and not self.paged.reserve(text.held, text.computed, end):
            text.drafts, end = [], text.computed + 1  # no room for guesses
        if self._room(text, end, planned):
            yield Work(text, end - text.computed, last=True)

    def _room(self, text: Text, end: int, planned: Sequence[Text], ahead: int = 0) -> bool:
        """Have the cache make room for a sequence up to a place; the last to come give theirs up."""
        assert text.held is not None
        while not self.paged.reserve(text.held, text.computed, end, ahead):
            others = [other for other in self.running if other not in planned and other.rank > text.rank]
            if others:
                self._preempt(others[-1])
            elif len(self.running) > 1:
                self._preempt(text)
                return False
            else:
                text.request.fail(
                    GroundupError(
                        f"the cache has no room for {end} tokens: it holds {self.paged.count * self.paged.size} in "
                        "all. Ask for fewer tokens, or give the engine a larger cache."
                    )
                )
                return False
        return True

    def _preempt(self, text: Text) -> None:
        """Take a sequence's blocks away; it waits until there is room, and is computed again."""
        assert text.held is not None
        self.paged.release(text.held)
        text.held, text.computed, text.drafts = None, 0, []
        self.running.remove(text)
        self.waiting.append(text)
        self.preempted += 1

    def _slide(self, text: Text) -> None:
        """Move the window of a text that has outgrown the context, or its keys' regime: what is left is read anew."""
        start = window_start(len(text.tokens), self.context)
        regime = self.regime(len(text.tokens) - start)
        if start != text.start or regime != text.regime:
            assert text.held is not None
            text.regime = regime
            self.paged.release(text.held)
            text.held, text.start, text.computed, text.drafts = self.paged.open(), start, 0, []
            text.read = len(text.tokens)

    def _admit(self) -> None:
        """Let those that wait run, in their order, while there is room for what they have to read, and a block more for
        each that runs already.
        """
        for text in sorted((text for text in self.waiting if not text.waits), key=lambda text: text.rank):
            if len(self.running) >= self.max_sequences and not self._displace(text):
                break
            text.start = window_start(len(text.tokens), self.context)
            tokens = text.tokens[text.start :]
            text.regime = self.regime(len(tokens))
            reuse = self.reuse and not text.request.params.reads_prompt
            held, computed = self.paged.match(tokens, text.request.salt) if reuse else (self.paged.open(), 0)
            first = min(computed + self.step_tokens, len(tokens))
            while not (fits := self._fits(held, computed, first, len(tokens))) and self._displace(text):
                pass
            if not fits:
                self.paged.release(held)
                if not self.running:
                    text.request.fail(
                        GroundupError(
                            f"the prompt's {len(tokens)} tokens are more than the cache holds "
                            f"({self.paged.count * self.paged.size}). Give the engine a larger cache."
                        )
                    )
                break
            text.held, text.computed = held, computed
            if not text.completion.tokens:
                text.request.cached = computed
            self.waiting.remove(text)
            self.running.append(text)

    def _fits(self, held: Held, computed: int, first: int, length: int) -> bool:
        spare = len(self.running)
        missing = self.paged.missing(held, computed, first, length)
        if any(count + spare > group.pool.available for group, count in zip(self.paged.groups, missing, strict=True)):
            return False
        return self.paged.reserve(held, computed, first, ahead=length)

    def _displace(self, text: Text) -> bool:
        """Have one of a lower priority make room."""
        others = [other for other in self.running if other.request.priority > text.request.priority]
        if not others:
            return False
        self._preempt(max(others, key=lambda other: other.rank))
        return True

    def _read(self, left: int, planned: list[Text]) -> list[Work]:
        """Pieces of the prompts that are being read."""
        reading = [text for text in self.running if text not in planned and not text.waits]
        reading.sort(key=lambda text: text.rank)
        share = self._on_grid(reading, left) if self.grid else self._shared(reading, left)
        works: list[Work] = []
        for text, count in share.items():
            if count > 0 and text in self.running and self._room(text, text.computed + count, planned, text.length):
                works.append(Work(text, count, last=count == text.pending))
                planned.append(text)
        return works

    @staticmethod
    def _shared(reading: Sequence[Text], left: int) -> dict[Text, int]:
        """Tokens for each: half of them to the first in rank, the rest to those that need the fewest."""
        share: dict[Text, int] = {}
        if len(reading) > 1:
            share[reading[0]] = min(reading[0].pending, -(-left // 2))
        for text in sorted(reading, key=lambda text: text.pending):
            room = left - sum(share.values())
            share[text] = min(text.pending, share.get(text, 0) + room)
        return share

    def _on_grid(self, reading: Sequence[Text], left: int) -> dict[Text, int]:
        """Tokens for each as the grid has them; one piece at least."""
        share: dict[Text, int] = {}
        for text in reading:
            prompt = text.read - text.start
            piece = min(self.grid - text.computed % self.grid, prompt - text.computed) if text.computed < prompt else 1
            if not share or sum(share.values()) + piece <= left:
                share[text] = piece
        return share
