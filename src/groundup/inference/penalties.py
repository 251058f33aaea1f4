"""What the tokens so far, and wishes about single tokens, do to the next logits: penalties, biases, bans."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from groundup.inference.sampling import SamplingParams
from groundup.inference.truncation import Floats
from groundup.runtime import UsageError

Flags = NDArray[np.bool_]

# Runs of tokens are known by their values as polynomials over a prime field (Karp & Rabin 1987), so that a token costs
# the same however long the runs are. Two of a million different runs share a number with a probability near 1e-7.
_PRIME = 2**61 - 1
_BASE = 0x16A09E667F3BCC90  # the digits of the root of 2: any number will do that has nothing to do with token ids


def flags(tokens: Iterable[int], vocab_size: int) -> Flags:
    """True at some tokens, bool V; those outside the vocabulary are left out."""
    flags_V = np.zeros(vocab_size, dtype=np.bool_)
    flags_V[[token for token in tokens if token < vocab_size]] = True
    return flags_V


def only(logits_V: Floats, allowed_V: Flags) -> Floats:
    """New logits: -inf at all tokens that are not allowed."""
    return np.where(allowed_V, logits_V, np.float32(-np.inf))


class History:
    """What a sequence's tokens were, as far as its parameters care.

    Args:
        params: how tokens are chosen.
        prompt: token ids; those outside the vocabulary cannot be chosen, and only matter to runs of tokens.
        vocab_size: length of the logits.
        end_tokens: forbidden, like the stop tokens, before ``min_tokens``.

    Raises:
        UsageError: a token that the parameters name is outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], *, vocab_size: int, end_tokens: frozenset[int]
    ) -> None:
        _check_tokens(params, vocab_size)
        self.params, self.vocab_size, self.taken = params, vocab_size, 0
        self._ends = sorted({*params.stop_tokens, *(() if params.ignore_end else end_tokens)})
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.intp)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float64)
        self._allowed_V = None if params.allowed_tokens is None else flags(params.allowed_tokens, vocab_size)
        self._seen_V = None if params.repetition_penalty == 1.0 else flags(prompt, vocab_size)
        counted = params.presence_penalty or params.frequency_penalty
        self._counts_V = np.zeros(vocab_size, dtype=np.float32) if counted else None
        self._ordered = bool(params.bad_tokens or params.no_repeat_ngram)
        self._tokens: list[int] = []  # prompt and output, where their order matters
        self._run = 0  # the last no_repeat_ngram - 1 tokens, as one number
        self._oldest = pow(_BASE, max(0, params.no_repeat_ngram - 2), _PRIME)  # what the first of them counts for
        self._followers: dict[int, set[int]] = {}  # of each run so far
        if self._ordered:
            for token in prompt:
                self._append(token)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever changed: the parameters ask for none of this."""
        kept = (self._allowed_V, self._seen_V, self._counts_V)
        may_ban = self._ordered or (self.params.min_tokens and self._ends)
        return not may_ban and not self.params.logit_bias and all(each is None for each in kept)

    def copy(self) -> History:
        """One that goes on by itself."""
        twin = object.__new__(History)
        twin.__dict__.update(self.__dict__)
        twin._seen_V = None if self._seen_V is None else self._seen_V.copy()
        twin._counts_V = None if self._counts_V is None else self._counts_V.copy()
        twin._tokens = list(self._tokens)
        twin._followers = {run: set(tokens) for run, tokens in self._followers.items()}
        return twin

    def observe(self, token: int) -> None:
        """A token was added to the output."""
        self.taken += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1.0
        if self._ordered:
            self._append(token)

    def _append(self, token: int) -> None:
        size = self.params.no_repeat_ngram
        if size and len(self._tokens) >= size - 1:
            self._followers.setdefault(self._run, set()).add(token)
        if size > 1:
            first = self._tokens[1 - size] + 1 if len(self._tokens) >= size - 1 else 0
            self._run = ((self._run - first * self._oldest) * _BASE + token + 1) % _PRIME
        self._tokens.append(token)

    def edit(self, logits_V: Floats, *, may_end: bool = False) -> Floats:
        """Penalties, then biases, then bans. The repetition penalty comes first, as it depends on a logit's sign.

        Args:
            logits_V: not changed.
            may_end: end and stop tokens are not forbidden, however few tokens there are.

        Returns:
            New logits; -inf for what is forbidden. They may overflow to infinities where penalties or biases are huge.
        """
        logits_V = logits_V.copy()
        params = self.params
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self._seen_V is not None:
                ids = np.flatnonzero(self._seen_V)
                some, penalty = logits_V[ids], np.float32(params.repetition_penalty)
                logits_V[ids] = np.where(some < 0, some * penalty, some / penalty)
            if self._counts_V is not None:
                ids = np.flatnonzero(self._counts_V)
                each, once = np.float32(params.frequency_penalty), np.float32(params.presence_penalty)
                logits_V[ids] -= each * self._counts_V[ids] + once
            if len(self._bias_ids):
                logits_V[self._bias_ids] += self._bias.astype(np.float32)
        if self._allowed_V is not None:
            logits_V = only(logits_V, self._allowed_V)
        if forbidden := self._forbidden(may_end):
            logits_V[forbidden] = -np.inf
        return logits_V

    def _forbidden(self, may_end: bool) -> list[int]:
        """Tokens that may not come next; those outside the vocabulary cannot anyway."""
        params = self.params
        found = list(self._ends) if self.taken < params.min_tokens and not may_end else []
        found += [run[-1] for run in params.bad_tokens if self._ends_with(run[:-1])]
        if params.no_repeat_ngram and len(self._tokens) >= params.no_repeat_ngram - 1:
            found += self._followers.get(self._run, ())
        return [token for token in found if token < self.vocab_size]

    def _ends_with(self, run: tuple[int, ...]) -> bool:
        return not run or tuple(self._tokens[-len(run) :]) == run


def _check_tokens(params: SamplingParams, vocab_size: int) -> None:
    named: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias, "allowed_tokens": params.allowed_tokens or (),
        "stop_tokens": params.stop_tokens, "bad_tokens": (token for run in params.bad_tokens for token in run),
    }  # fmt: skip
    for name, tokens in named.items():
        largest = max(tokens, default=0)
        if largest >= vocab_size:
            raise UsageError(f"{name}: the token id {largest} is outside the vocabulary of {vocab_size}.")
