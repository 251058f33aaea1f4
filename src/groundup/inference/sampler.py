"""From the logits of many sequences to their next tokens, each by its own parameters, history and random numbers."""

# R sequences   T positions   V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from groundup.inference.penalties import History, flags, only
from groundup.inference.sampling import NOT_FINITE, SamplingParams, candidates, on_cpu
from groundup.inference.truncation import Candidates, Floats, Ids, largest
from groundup.runtime import GroundupError

NOTHING_LEFT = "no token may come next: what the request allows and forbids leaves nothing."
_ROWS_AT_ONCE = 64  # of a prompt, when its log-probabilities are computed: a few megabytes of float32


class TokenMask(Protocol):
    """What a grammar allows."""

    def allowed(self) -> Tensor | None:
        """Which tokens may come next, bool V on the CPU; None for all."""

    def advance(self, token: int) -> None:
        """A token was taken."""

    def finished(self) -> bool:
        """Whether only an end token may follow."""

    def copy(self) -> TokenMask:
        """One that goes on by itself."""


class Choice(NamedTuple):
    """A token, and what the model thought of it.

    Args:
        token: its id.
        logprob: its log-probability in nats in the model's own distribution, before anything was edited, tempered or
            cut; None where nobody asked.
        top: the likeliest tokens of that distribution, as many as were asked for, the likeliest first and ties by id.
            The chosen one may be among them. None where nobody asked.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None


class SamplerState:
    """What choosing the next token of one sequence depends on, besides the logits.

    Args:
        params: how tokens are chosen.
        prompt: token ids.
        vocab_size: length of the logits.
        end_tokens: those that end the text; ``min_tokens`` forbids them for a while.
        stream: number of the completion among the ``n`` of its request, mixed into the seed; 0 leaves it as it is.
        mask: what a grammar allows.

    Raises:
        UsageError: a token that ``params`` name is outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], *, vocab_size: int,
        end_tokens: frozenset[int] = frozenset(), stream: int = 0, mask: TokenMask | None = None,
    ) -> None:  # fmt: skip
        self.params, self.end_tokens, self.mask = params, end_tokens, mask
        history = History(params, prompt, vocab_size=vocab_size, end_tokens=end_tokens)
        self.history = None if history.idle else history
        self.generator = _generator(params.seed, stream)
        self.mu = 2.0 * params.mirostat_tau  # what surprise mirostat cuts by, in bits
        self.offered_V: Tensor | None = None  # the distribution before mirostat cut it, until a token is taken
        self.wants_logprobs = params.logprobs is not None or (params.best_of or params.n) > params.n
        self.plainly_greedy = (
            params.temperature == 0.0 and self.history is None and mask is None and not self.wants_logprobs
        )

    def observe(self, token: int) -> None:
        """The token was taken."""
        if self.history is not None:
            self.history.observe(token)
        if self.mask is not None:
            self.mask.advance(token)
        if self.offered_V is not None:
            surprise = -math.log2(max(float(self.offered_V[token]), torch.finfo(torch.float32).tiny))
            self.mu -= self.params.mirostat_eta * (surprise - self.params.mirostat_tau)
            self.offered_V = None

    def fork(self, stream: int) -> SamplerState:
        """One with the same history that goes on with random numbers of its own."""
        twin = object.__new__(SamplerState)
        twin.__dict__.update(self.__dict__)
        twin.history = None if self.history is None else self.history.copy()
        twin.mask = None if self.mask is None else self.mask.copy()
        twin.generator = _generator(self.params.seed, stream)
        return twin


def _generator(seed: int | None, stream: int) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    if stream:
        # The mixing of SplitMix64 (Steele et al. 2014). PyTorch seeds a CPU generator with 32 bits only, so that every
        # bit of seed and stream has to reach the lower ones.
        mixed = (seed + stream * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        seed = mixed ^ mixed >> 31
    return generator.manual_seed(seed)


def sample(logits_RV: Tensor, states: Sequence[SamplerState]) -> list[Choice | GroundupError]:
    """Choose the next token of each sequence. The states change only in their random numbers: see ``observe``.

    A row's choice depends on its own logits and state alone, to the last bit: rows share only what is exact, the search
    for the largest logit of each. All else is computed row by row, on the CPU.

    Returns:
        For each row its choice, or why there is none: its logits are not finite, or nothing is allowed.
    """
    chosen: list[Choice | GroundupError | None] = [None] * len(states)
    greedy = [row for row, state in enumerate(states) if state.plainly_greedy]
    others = [row for row, state in enumerate(states) if not state.plainly_greedy]
    if greedy:
        for row, choice in zip(greedy, _argmax(_rows(logits_RV, greedy)), strict=True):
            chosen[row] = choice
    if others:
        for row, logits_V in zip(others, on_cpu(_rows(logits_RV, others)), strict=True):
            chosen[row] = _choose(logits_V, states[row])
    return [choice for choice in chosen if choice is not None]


def _rows(logits_RV: Tensor, rows: list[int]) -> Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]


def _argmax(logits_RV: Tensor) -> list[Choice | GroundupError]:
    """The first of the largest of each row."""
    if logits_RV.device.type == "cpu":
        array_RV: Floats = on_cpu(logits_RV).numpy()  # NumPy is some twenty times as fast here
        tokens = array_RV.argmax(axis=1)
        highest = array_RV[np.arange(len(tokens)), tokens]
        pairs = zip(tokens.tolist(), highest.tolist(), strict=True)
    else:
        highest_R, tokens_R = logits_RV.float().max(dim=1)
        pairs = zip(tokens_R.tolist(), highest_R.tolist(), strict=True)
    return [
        Choice(token, None, None) if math.isfinite(largest_logit) else GroundupError(NOT_FINITE)
        for token, largest_logit in pairs
    ]


def _choose(logits_V: Tensor, state: SamplerState) -> Choice | GroundupError:
    try:
        token = _offer(logits_V, state).draw(state.generator)
    except GroundupError as error:
        return error
    return described(logits_V.log_softmax(dim=-1), token, state) if state.wants_logprobs else Choice(token, None, None)


def described(logp_V: Tensor, token: int, state: SamplerState) -> Choice:
    """A token with as much of the model's own distribution as its request wants to know.

    Args:
        logp_V: log-probabilities, float32 on the CPU.
    """
    if not state.wants_logprobs:
        return Choice(token, None, None)
    logprob, top = _describe(logp_V, token, state.params.logprobs or 0)
    return Choice(token, logprob, None if state.params.logprobs is None else top)


def edited(logits_V: Tensor, state: SamplerState) -> Floats:
    """Logits, or log-probabilities, after penalties, biases, bans and the grammar; -inf for what may not come next.

    Args:
        logits_V: float32 on the CPU; not changed.

    Raises:
        GroundupError: they are not finite.
    """
    array_V: Floats = logits_V.numpy()
    if not math.isfinite(array_V.max()):
        raise GroundupError(NOT_FINITE)
    edited_V = array_V
    must_end = state.mask is not None and state.mask.finished()
    if state.history is not None:
        edited_V = state.history.edit(edited_V, may_end=must_end)
    if must_end and state.end_tokens:
        edited_V = only(edited_V, flags(state.end_tokens, len(edited_V)))
    elif state.mask is not None and (allowed := state.mask.allowed()) is not None:
        edited_V = only(edited_V, allowed.numpy())
    if edited_V is not array_V and not edited_V.max() < math.inf:
        raise GroundupError("the penalties or biases are so large that the logits overflow: choose smaller ones.")
    return edited_V


def _offer(logits_V: Tensor, state: SamplerState) -> Candidates:
    """What the next token is drawn from.

    Raises:
        GroundupError: the logits are not finite, or nothing is allowed.
    """
    edited_V = edited(logits_V, state)
    if edited_V.max() == -math.inf:
        raise GroundupError(NOTHING_LEFT)
    offer = candidates(torch.from_numpy(edited_V), state.params, state.mu)
    if offer.whole_V is not None:
        state.offered_V = offer.whole_V
    return offer


def distribution(logits_V: Tensor, state: SamplerState) -> Tensor:
    """What :func:`sample` draws from, float32 V on the CPU: after edits, grammar, temperature and cuts.

    Raises:
        GroundupError: the logits are not finite, or nothing is allowed.
    """
    return _offer(on_cpu(logits_V), state).dense(logits_V.shape[-1])


def prompt_logprobs(
    logits_TV: Tensor, targets_T: Sequence[int], count: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log-probability of the token that follows each position, in nats, and the likeliest ones there.

    Args:
        targets_T: the tokens that follow. One outside the vocabulary has a log-probability of -inf.
        count: how many of the likeliest.
    """
    found: list[tuple[float, list[tuple[int, float]]]] = []
    for start in range(0, len(targets_T), _ROWS_AT_ONCE):
        some_TV = on_cpu(logits_TV[start : start + _ROWS_AT_ONCE]).log_softmax(dim=-1)
        found += [
            _describe(logp_V, target, count)
            for logp_V, target in zip(some_TV, targets_T[start : start + _ROWS_AT_ONCE], strict=True)
        ]
    return found


def _describe(logp_V: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's log-probability, and the ``count`` likeliest tokens with theirs."""
    array_V: Floats = logp_V.numpy()
    own = float(array_V[token]) if token < len(array_V) else -math.inf
    if count == 0 or math.isnan(array_V[0]):
        return own, []
    ids = likeliest(array_V, count)
    return own, list(zip(ids.tolist(), array_V[ids].tolist(), strict=True))


def likeliest(values_V: Floats, count: int) -> Ids:
    """The tokens with the ``count`` largest values, the largest first and ties by id. No value is NaN."""
    ids = largest(values_V, min(count, len(values_V)))
    return ids[(-values_V[ids]).argsort(kind="stable")][:count]
