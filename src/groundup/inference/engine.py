"""The engine: requests in, tokens out, one step for all of them at a time (continuous batching; Yu et al. 2022).

requests ──► scheduler ──► paged cache ──► runner (the model) ──► sampler ──► tokens
                 ▲                                                    │
                 └────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groundup.inference.decoder import Decoder
from groundup.inference.drafts import Drafter
from groundup.inference.paged import BLOCK, PagedCache
from groundup.inference.requests import Event, Request, Text
from groundup.inference.runner import Runner
from groundup.inference.sampler import SamplerState
from groundup.inference.scheduler import Scheduler, Work
from groundup.inference.search import search_from
from groundup.model import Transformer
from groundup.model.parts import cache_bytes
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.device import memory_left

CONTEXTS_KEPT = 64  # the cache has room for so many full contexts, where memory allows
MEMORY_SHARE = 0.3  # of what is left, for the cache
GRID = 64  # tokens of a prompt that are read at once where results must not hang on who else is there


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use.

    Args:
        cache_tokens: positions that the cache holds, all sequences together; 0 chooses by the memory that is left.
        block: positions of a block of the cache.
        step_tokens: most tokens computed in one step; 0 chooses.
        max_sequences: most sequences that run at once.
        prefix_cache: keep what was computed of ended requests, for others that begin alike.
        reproducible: a seeded request gives the same text alone and among others, bit for bit, at the price of running
            each sequence by itself.
        drafts: most tokens that are guessed at once, where there is somebody to guess.
        compiled: where the model can, compute by compiled kernels on a CPU, and replay recorded steps on a CUDA device.
    """

    cache_tokens: int = 0
    block: int = BLOCK
    step_tokens: int = 0
    max_sequences: int = 256
    prefix_cache: bool = True
    reproducible: bool = False
    drafts: int = 8
    compiled: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "step_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} = {getattr(self, name)} must be at least 0 (0 chooses).")
        for name in ("block", "max_sequences", "drafts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} must be at least 1.")


class Engine:
    """Decodes requests on one model. Several threads may use it.

    Greedy decoding gives the tokens of the plain loop that recomputes everything for every token, whatever else is in
    the batch, however prompts are cut, and whatever is found in the cache.

    Args:
        model: the weights; put into evaluation mode.
        end_of_text: the tokens that end a text, and are not part of it.
        vocab_size: choose among the ids below this one only, for a model whose vocabulary was padded past its
            tokenizer's; None for all.
        settings: what it may use.
        drafter: who guesses tokens (speculative decoding); None for nobody.
    """

    def __init__(
        self, model: Transformer, *, end_of_text: int | Iterable[int] | None = None, vocab_size: int | None = None,
        settings: EngineSettings | None = None, drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.drafter = model.eval(), settings or EngineSettings(), drafter
        ends = () if end_of_text is None else (end_of_text,) if isinstance(end_of_text, int) else end_of_text
        self.end_of_text = frozenset(ends)
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._driver: threading.Thread | None = None
        self._scheduler: Scheduler | None = None
        self._weights = ""  # what they are called that the model computes with, where there are several

    # ---- what there is, made when it is first needed: a model may still move to another device or dtype before

    def _make(self) -> Scheduler:
        settings, config = self.settings, self.model.config
        device, dtype = self.model.device, self.model.dtype
        tokens = settings.cache_tokens or self._room(device, dtype)
        self.paged = PagedCache(config, tokens, size=settings.block, device=device, dtype=dtype)
        self._runner = Runner(
            self.model, self.paged, self.vocab_size, alone=settings.reproducible, compiled=settings.compiled
        )
        grows = any(rotary is not None and rotary.grows for rotary in (self.model.rotary, self.model.local_rotary))
        scheduler = Scheduler(
            self.paged, config.context_length,
            step_tokens=settings.step_tokens or (512 if device.type == "cpu" else 4096),
            max_sequences=settings.max_sequences,
            reuse=settings.prefix_cache and not settings.reproducible and not grows,
            regime=self._regime, grid=GRID if settings.reproducible else 0,
        )  # fmt: skip
        self._decoder = Decoder(
            scheduler, context=config.context_length, vocab_size=self.vocab_size, end_of_text=self.end_of_text,
            drafter=None if settings.reproducible else self.drafter, drafts=settings.drafts,
        )  # fmt: skip
        return scheduler

    def _regime(self, length: int) -> bool:
        """Whether a text is of those whose rotary frequencies are stretched as a whole (longrope)."""
        rotary = self.model.rotary
        return rotary is not None and rotary.scaling.kind == "longrope" and length > rotary.original_length

    def _room(self, device: torch.device, dtype: torch.dtype) -> int:
        """Positions that the cache is to hold: several contexts, as far as memory goes, one at least."""
        config = self.model.config
        each = max(1, cache_bytes(config, 1, config.context_length, dtype.itemsize) // config.context_length)
        left = memory_left(device)
        most = CONTEXTS_KEPT * config.context_length
        room = most if left is None else min(most, int(MEMORY_SHARE * left) // each)
        return max(room, config.context_length + self.settings.block)

    @property
    def scheduler(self) -> Scheduler:
        """The queues."""
        if self._scheduler is None:
            self._scheduler, self._made_for = self._make(), self._place
        return self._scheduler

    @property
    def _place(self) -> tuple[int, torch.dtype, torch.device]:
        weight = next(self.model.parameters())
        return weight.data_ptr(), weight.dtype, weight.device

    def change_weights(self, name: str, change: Callable[[], object]) -> None:
        """Have the model compute with other weights from now on.

        Keys and values in the cache are found only by requests that came under the name of those that they were
        computed with.

        Args:
            name: what the weights are called: the same for the same ones.
            change: does it. No step is made meanwhile.

        Raises:
            UsageError: a text is being continued.
        """
        with self._lock:
            if self._scheduler is not None:
                self._let_go()
            if self.busy:
                raise UsageError("the weights cannot change while a text is being continued. Wait for its end.")
            change()
            self._weights = name
            if self._scheduler is not None:
                self._runner.renew()

    # ---- requests

    def add(self, request: Request) -> None:
        """Take a request in. One that cannot be served ends with an error at once, and troubles nobody else."""
        with self._lock:
            if self._scheduler is not None and self._made_for != self._place and not self.busy:
                self._scheduler = None  # the model was moved or cast since
            params = request.params
            request.salt = f"{self._weights}\n{request.tenant}"
            ends = frozenset() if params.ignore_end else self.end_of_text
            try:
                self._check(request)
                state = SamplerState(
                    params, request.prompt, vocab_size=self.vocab_size, end_tokens=ends, mask=request.mask
                )
            except GroundupError as error:
                request.fail(error)
                return
            tokens = list(request.prompt)
            text = Text(request, request.completions[0], tokens, state, read=len(tokens))
            text.search = search_from(text)
            text.forks = len(request.completions) > 1 and text.search is None
            self.scheduler.add(text)
            self._arrived.notify_all()

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UsageError("the prompt is empty: give at least one token.")
        known, context = self.model.config.vocab_size, self.model.config.context_length
        outside = [token for token in request.prompt if not 0 <= token < known]
        if outside:
            raise UsageError(f"the token id {outside[0]} is outside the model's vocabulary of {known}.")
        if len(request.prompt) > context and not request.slide:
            raise UsageError(
                f"the prompt has {len(request.prompt):,} tokens, the model's context {context:,}. Shorten it, or let "
                "the context slide over it (slide)."
            )

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._scheduler is not None and bool(self._scheduler.texts)

    def run(self, requests: Sequence[Request]) -> Iterator[list[Event]]:
        """Decode until every one of these requests has ended; others that were added go on beside them.

        Yields:
            After each step, the tokens of them that were chosen. Setting ``finish`` on a completion between steps ends
            it; so does closing the iterator, for all of them.

        Raises:
            GroundupError: the first request that failed, when all have ended.
        """
        news = threading.Event()
        for request in requests:
            request.wake = news.set
            self.add(request)
        try:
            while any(request.finish is None for request in requests):
                if self._driver is None:
                    self.step()
                else:  # somebody else makes the steps: Ctrl-C is then no danger to what a step is in the middle of
                    news.wait()
                    news.clear()
                yield self._drained(requests)
            self._end_of_step()
            if left := self._drained(requests):
                yield left
        finally:
            for request in requests:
                request.wake = None
                request.end("cancelled")
            self._let_go()
        for request in requests:
            if request.error is not None:
                raise request.error

    def _end_of_step(self) -> None:
        """Wait until whoever makes a step has handed over what came of it: a completion ends a little before that."""
        with self._lock:
            pass

    @staticmethod
    def _drained(requests: Sequence[Request]) -> list[Event]:
        events: list[Event] = []
        for request in requests:
            while request.events:
                events.append(request.events.popleft())
        return events

    async def stream(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """The same for one request in an event loop, while a thread of the engine's own makes the steps.

        Yields:
            New tokens, as they come.

        Raises:
            GroundupError: the request failed.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        wake: Any = partial(loop.call_soon_threadsafe, news.set)
        request.wake = wake
        self.drive()
        self.add(request)
        try:
            while request.finish is None:
                await news.wait()
                news.clear()
                yield self._drained([request])
            await asyncio.to_thread(self._end_of_step)
            if left := self._drained([request]):
                yield left
        finally:
            request.wake = None
            request.end("cancelled")
            with self._arrived:
                self._arrived.notify_all()
        if request.error is not None:
            raise request.error

    def drive(self) -> None:
        """Have a thread of the engine's own make the steps from now on; it ends with the process."""
        with self._lock:
            if self._driver is None:
                self._driver = threading.Thread(target=self._drive, name="groundup-engine", daemon=True)
                self._driver.start()

    def _drive(self) -> None:
        while True:
            with self._arrived:
                while not self.busy:
                    self._arrived.wait()
            self.step()

    # ---- one step

    def step(self) -> None:
        """Compute one step for everybody. What was chosen is in the requests' ``events``."""
        with self._lock:
            self._let_go()
            if not self.busy:
                return
            try:
                self._step()
            except Exception as error:  # whatever it is: those who wait must hear of it, and the next ones be served
                failure = GroundupError(f"the engine failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                for text in self.scheduler.texts:
                    text.request.fail(failure)
            self._let_go()

    def _step(self) -> None:
        started = time.perf_counter()
        works = self.scheduler.plan()
        continued = sum(work.text.pending == 1 for work in works)
        read = sum(work.queries for work in works if work.text.pending > 1)
        if not works:
            return
        events = self._decoder.go_on(works, self._logits(works))
        self.scheduler.pace.note(continued, read, time.perf_counter() - started)
        for event in events:
            event.request.events.append(event)
        for request in {event.request for event in events}:
            if request.wake is not None:
                request.wake()

    def _let_go(self) -> None:
        """Give back what belongs to completions that have ended."""
        with self._lock:
            ended = [text for text in self.scheduler.texts if text.ended]
            for text in ended:
                self.scheduler.remove(text)
                self._settle(text.request)
                if text.request.wake is not None:
                    text.request.wake()

    @staticmethod
    def _settle(request: Request) -> None:
        """Of more completions than were asked for, keep those with the highest mean log-probability."""
        wanted, made = request.params.n, request.completions
        if request.finish is not None and len(made) > wanted and request.error is None:
            made.sort(key=lambda one: -sum(one.logprobs) / max(1, len(one.logprobs)))
            del made[wanted:]

    def _logits(self, works: Sequence[Work]) -> list[Tensor | GroundupError]:
        """Logits of each sequence; where the model fails on all together, each is tried alone."""
        wanted = [self._decoder.wanted(work) for work in works]
        try:
            return list(self._runner.run(works, wanted))
        except (RuntimeError, ValueError, IndexError) as error:
            if len(works) == 1:
                return [GroundupError(f"the model failed on this request: {error}")]
            return [self._logits([work])[0] for work in works]
