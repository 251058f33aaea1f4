"""What is asked of the engine, and what comes of it: requests, their completions, and the sequences they become."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from groundup.inference.paged import Held
from groundup.inference.sampler import SamplerState, TokenMask
from groundup.inference.sampling import SamplingParams
from groundup.runtime import GroundupError

if TYPE_CHECKING:
    from groundup.inference.search import Search

Finish = Literal["length", "end_of_text", "stopped", "cancelled", "error"]
Alternatives = list[tuple[int, float]]
"""Tokens and their log-probabilities in nats, the likeliest first."""


@dataclass
class Completion:
    """One text that continues a prompt.

    Args:
        tokens: what was generated so far; neither the end-of-text token nor a stop token is among them.
        finish: why it ended: ``max_tokens`` or the model's context was reached (``length``), the model ended it, a
            stop text or token was met (``stopped``), nobody wants it any more (``cancelled``), or it cannot go on
            (``error``). None while it goes on; may be set from outside.
        logprobs: log-probability of each token in the model's own distribution, in nats, where asked for.
        alternatives: the likeliest tokens at each place, where asked for.
        stop_token: the token that ended it, if one did.
        score: what a beam search ranks it by: its log-probability in nats as edited by penalties and biases, over its
            length to the power of ``length_penalty``. None where there was no such search.
    """

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    stop_token: int | None = None
    score: float | None = None


class Event(NamedTuple):
    """A token was chosen.

    Args:
        request: whose it is.
        completion: of the request; the token is among its tokens.
        token: the id.
    """

    request: Request
    completion: Completion
    token: int


@dataclass(eq=False)
class Request:
    """A prompt, and how it is to be continued.

    Args:
        prompt: token ids, at least one.
        params: how tokens are chosen, and how many completions there are to be.
        priority: a lower number goes first, and may take the place of a higher one.
        tenant: requests of different tenants share nothing of the cache.
        slide: let the context be a window: a text that outgrows it loses its first half and goes on (see
            :func:`window_start`). Otherwise it ends there, and a prompt longer than the context is an error.
        live: somebody watches its tokens come: prompts of others are read only as fast as does not hold it up. Where
            nobody watches any, prompts are read as fast as they can be.
        mask: what a grammar allows; copied for each completion.
        stopped: whether some generated tokens hold a stop text, which a beam search has to know of each of its texts;
            None where nobody can tell, or there is none. Elsewhere whoever reads the tokens ends the completion.
        completions: one for each that is to be made: ``best_of`` of them while they are, ``n`` in the end.
        prompt_logprobs: of each token of the prompt but the first, where asked for.
        error: what went wrong, where something did.
        cached: tokens of the prompt that were found in the cache.
        seconds_to_first: from the request to its first token.
        salt: what else besides the tokens must be the same to share something of the cache: the tenant, and the weights
            that the engine computes with.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    tenant: str = ""
    slide: bool = False
    live: bool = True
    mask: TokenMask | None = None
    stopped: Callable[[Sequence[int]], bool] | None = None
    completions: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, Alternatives]] = field(default_factory=list)
    error: GroundupError | None = None
    cached: int = 0
    seconds_to_first: float | None = None

    def __post_init__(self) -> None:
        self.salt = self.tenant
        self.arrived = time.monotonic()
        self.events: deque[Event] = deque()  # not yet taken by whoever waits for them
        self.wake: Callable[[], None] | None = None  # called when there are new ones, or the request has ended
        self.completions = [Completion() for _ in range(self.params.best_of or self.params.n)]

    @property
    def tokens(self) -> list[int]:
        """Those of the first completion."""
        return self.completions[0].tokens

    @property
    def finish(self) -> Finish | None:
        """Why it ended: that of the first completion, once all have."""
        return None if any(one.finish is None for one in self.completions) else self.completions[0].finish

    def end(self, finish: Finish) -> None:
        """End what has not ended yet: the engine lets go of it before its next step."""
        for completion in self.completions:
            completion.finish = completion.finish or finish

    def fail(self, error: GroundupError) -> None:
        """End it with an error; what was generated stays."""
        self.error = error
        self.end("error")


@dataclass(eq=False)
class Text:
    """One completion on its way through the engine.

    Args:
        tokens: the prompt and what was generated.
        completion: what was generated.
        state: what its sampler remembers.
        order: of arrival.
        start: the place in ``tokens`` where its context begins.
        computed: of the tokens from there on, those whose keys and values are in the cache.
        read: tokens that are read many at a time (the prompt, or all when a window has moved); those after it came one
            by one.
        held: its blocks.
        regime: what its keys hang on besides the tokens; see :class:`groundup.inference.scheduler.Scheduler`.
        drafts: tokens that are tried next, all in one step, and taken back if they are not what the sampler chooses.
        forks: whether the request's other completions go on from this one, as soon as its prompt has been read.
        search: what it is one of several texts of; None where it goes on by itself.
        waits: it is computed to its end, and others of the search are not yet.
    """

    request: Request
    completion: Completion
    tokens: list[int]
    state: SamplerState
    order: int = 0
    start: int = 0
    computed: int = 0
    read: int = 0
    held: Held | None = None
    regime: Any = None
    drafts: list[int] = field(default_factory=list)
    forks: bool = False
    search: Search | None = None
    waits: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing of it is wanted any more. What a search tries is no completion yet: its request tells."""
        return self.completion.finish is not None or (self.search is not None and self.request.finish is not None)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower."""
        return self.request.priority, self.order

    @property
    def length(self) -> int:
        """Tokens of its context."""
        return len(self.tokens) - self.start

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return self.length - self.computed


def window_start(length: int, context: int) -> int:
    """Where the window of a sequence of ``length`` tokens starts: 0 while it fits, then moved on by half a context each
    time it is full. It depends on nothing else, so that neither the prompt's share nor the batch changes a result.
    """
    hop = context - context // 2
    return 0 if length <= context else -(-(length - context) // hop) * hop
