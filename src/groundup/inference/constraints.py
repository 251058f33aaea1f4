"""Answers that follow a JSON schema, a regular expression or a grammar: before each token, which ones may come.

The parsing is that of the library ``llguidance`` (an Earley parser over a lexer of regular expression derivatives,
walked over the vocabulary as a trie of bytes), so a token that is a part of a character is allowed where that character
is. What comes from strangers is compiled in a process of its own first (constraint_trial.py).
"""

# V vocabulary

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from groundup.inference import constraint_trial
from groundup.inference.constraint_trial import LONGEST, SECONDS, TIMERS, parser_limits, vocabulary
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "grammar"]

MAX_BYTES: dict[Kind, int] = {"json_schema": 1 << 18, "regex": 1 << 14, "grammar": 1 << 17}
"""The longest text of each kind."""
MAX_DEPTH = 64
"""How deep brackets may be nested."""

MAX_KEPT = 16
"""How many compiled descriptions are kept for each tokenizer, and as many times four that were tried."""

_STRINGS_AND_BRACKETS = re.compile(r'\\.|"(?:[^"\\\n]++|\\.)*+"|[][(){}]', re.DOTALL)
_STARTING = 10.0  # seconds that a new process may take besides, on a machine that is busy
_SIMPLER = "Make it simpler: fewer alternatives, repetitions and definitions."
_trials = threading.BoundedSemaphore(max(2, (os.cpu_count() or 2) // 2))


class Constraint:
    """What a schema, an expression or a grammar allows at one place of one answer (a ``TokenMask`` of sampler.py).

    Make one with :meth:`make`.

    Args:
        matcher: the library's parser at that place.
        tokens: how many the tokenizer has; the parser has one more, which stands for the end of an answer.
        vocab_size: V, of the model, which may have more than the tokenizer.
        end_tokens: those that end an answer.
    """

    def __init__(self, matcher: Any, tokens: int, vocab_size: int, end_tokens: Collection[int]) -> None:
        self._matcher, self._tokens, self._vocab_size = matcher, tokens, vocab_size
        self._ends = tuple(sorted(token for token in end_tokens if 0 <= token < vocab_size))
        self._mask_V: Tensor | None = None
        self._ended = self._finished = False
        self._problem: str | None = None

    @classmethod
    def make(
        cls, tokenizer: Tokenizer, *, json_schema: str | dict | None = None, regex: str | None = None,
        grammar: str | None = None, vocab_size: int | None = None, end_tokens: Collection[int] | None = None,
    ) -> Constraint:  # fmt: skip
        """A constraint at the beginning of an answer, from exactly one of three descriptions.

        Args:
            tokenizer: of the model.
            json_schema: draft 2020-12; properties come in the order of the schema.
            regex: what the whole answer must match, in Rust's syntax: no look-around, no back-references.
            grammar: Lark's (rules in lower case, terminals in upper case, beginning with ``start``), or EBNF with
                ``::=`` as llama.cpp has it, beginning with ``root``.
            vocab_size: V, where the model has more tokens than the tokenizer; None for the tokenizer's.
            end_tokens: ids that end an answer; None for the tokenizer's own.

        Raises:
            UsageError: not exactly one is given; it is invalid, asks for what is not supported, takes too much to
                compile, or no answer satisfies it; or llguidance is not installed.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        kinds = [kind for kind in MAX_BYTES if given[kind] is not None]
        if len(kinds) != 1:
            what = f"{' and '.join(kinds)} are given together" if kinds else "there is nothing to constrain by"
            raise UsageError(f"{what}: give one of json_schema, regex and grammar.")
        if find_spec("llguidance") is None:
            raise UsageError(f"{kinds[0]} needs the package llguidance: pip install 'groundup[constraints]'")
        text = _text(kinds[0], given[kinds[0]])
        check_limits(kinds[0], text)
        compiled = _tried(kinds[0], text, tuple(sorted(tokenizer.special_tokens)))
        known = _known(tokenizer)
        own = tokenizer.end_of_text_id
        ends = end_tokens if end_tokens is not None else () if own is None else (own,)
        return cls(known.matcher(kinds[0], compiled), known.size, vocab_size or known.size, ends)

    def copy(self) -> Constraint:
        """The same place in an answer, to go on from in another way."""
        made = Constraint(self._matcher.deep_copy(), self._tokens, self._vocab_size, self._ends)
        made._mask_V, made._ended, made._finished = self._mask_V, self._ended, self._finished
        made._problem = self._problem
        return made

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool V on the CPU, not to be written to.

        No token at all once the answer has ended, or where it cannot be continued (see :attr:`problem`).
        """
        if self._mask_V is None:
            self._mask_V = self._next_mask()
        return self._mask_V

    def advance(self, token: int) -> None:
        """Go past a token. One that was not allowed leaves an answer that nothing can continue."""
        if self._ended:
            return
        if not (0 <= token < self._vocab_size and self.allowed()[token]):
            self._problem = self.problem or f"token {token} is not allowed where it came."
        elif token in self._ends:
            self._ended = True
        else:
            self._matcher.consume_token(token)
        self._mask_V = None

    def finished(self) -> bool:
        """Whether the answer is complete, and nothing but an end token may follow."""
        self.allowed()
        return self._finished

    @property
    def problem(self) -> str | None:
        """Why the answer cannot be continued, where it cannot."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else self._problem

    def _next_mask(self) -> Tensor:
        mask_V = np.zeros(self._vocab_size, np.bool_)  # NumPy: torch would wake its threads for each step
        self._finished = self._ended
        if not self._ended and self.problem is None:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
            if not self._matcher.is_error():
                may_end, size, ends = bits[self._tokens], min(self._tokens, self._vocab_size), list(self._ends)
                mask_V[:size] = bits[:size]
                mask_V[ends] = False
                self._finished = bool(may_end and not mask_V.any())
                mask_V[ends] = may_end
        return torch.from_numpy(mask_V)


# ---- from a description to a grammar that is safe to compile


def check_limits(kind: Kind, text: str) -> None:
    """See that a description is of a size that is worth compiling.

    Raises:
        UsageError: it is no text, is longer than :data:`MAX_BYTES`, or its brackets are nested deeper than
            :data:`MAX_DEPTH`.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{kind}: character {error.start} is a lone surrogate, which no text holds.") from error
    if size > MAX_BYTES[kind]:
        raise UsageError(f"{kind}: {size:,} bytes; at most {MAX_BYTES[kind]:,} are compiled. Make it smaller.")
    depth = deepest = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise UsageError(f"{kind}: nested {deepest:,} deep; at most {MAX_DEPTH} are compiled. Make it flatter.")


def _text(kind: Kind, given: Any) -> str:
    """A description as text; a schema may be given as what its JSON stands for."""
    if isinstance(given, str):
        return given
    if kind != "json_schema":
        raise UsageError(f"{kind}: a text is expected, not {type(given).__name__}.")
    try:
        return json.dumps(given, allow_nan=False)
    except RecursionError as error:
        raise UsageError(f"{kind}: nested too deep; at most {MAX_DEPTH} are compiled. Make it flatter.") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{kind}: it cannot be written as JSON ({error}).") from error


@lru_cache(maxsize=4 * MAX_KEPT)
def _tried(kind: Kind, text: str, names: tuple[str, ...]) -> str:
    """The library's grammar for a description, once compiling it has done no harm to another process.

    Args:
        names: the special tokens that a grammar may refer to.
    """
    request = json.dumps({"kind": kind, "text": text, "names": names})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["MALLOC_ARENA_MAX"] = "1"  # each arena would take a part of the address space that is allowed
    command = [sys.executable, "-P", "-m", constraint_trial.__name__]
    with _trials:
        try:
            done = subprocess.run(
                command, input=request.encode(), capture_output=True, env=environment, timeout=LONGEST + _STARTING
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"{kind}: it takes too long to compile. {_SIMPLER}") from error
        except OSError as error:
            raise GroundupError(f"{kind}: no process can be started to compile it in ({error}).") from error
    if -done.returncode in {number for number, *_ in TIMERS}:
        raise UsageError(f"{kind}: it takes longer than {SECONDS:g} s to compile. {_SIMPLER}")
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError as error:  # it died of what it was given
        raise UsageError(f"{kind}: it takes too much memory to compile. {_SIMPLER}") from error
    if "error" in answer:
        raise UsageError(f"{kind}: {_reason(answer['error'])}")
    return answer["grammar"]


def _reason(message: str) -> str:
    """What the library says, in one line, without the source that it quotes."""
    message = re.sub(r"^at 1\(8\): (failed to compile JSON schema: )?", "", message)  # where we put it ourselves
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it cannot be compiled"]
    if "NoExtension" in lines[0] or "nsatisfiable" in lines[0]:
        why = lines[0].partition("nsatisfiable schema: ")[2]
        return "no answer can satisfy it" + (f" ({why})." if why else ".")
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    said = said if len(said) <= 200 else said[:200] + "…"
    return said.rstrip(".") + "."


# ---- vocabularies


class _Known:
    """A tokenizer's vocabulary as the library has it, and what was compiled over it last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        parts = tokenizer.vocabulary
        self.size = len(parts.tokens)
        never = {*parts.special_tokens.values(), self.size} | ({parts.unknown} if parts.unknown is not None else set())
        self._tokens = vocabulary([*parts.tokens, b"<|end of answer|>"], sorted(never))
        self._compiled = lru_cache(maxsize=MAX_KEPT)(self._compile)

    def matcher(self, kind: Kind, grammar: str) -> Any:
        """A parser of its own at the beginning of an answer."""
        return self._compiled(kind, grammar).deep_copy()

    def _compile(self, kind: Kind, grammar: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # no token may begin what some bytes could
        if matcher.is_error():
            raise UsageError(f"{kind}: {_reason(matcher.get_error())}")
        return matcher


_vocabularies: WeakKeyDictionary[Tokenizer, _Known] = WeakKeyDictionary()


def _known(tokenizer: Tokenizer) -> _Known:
    """What is known of a tokenizer; building it takes about 3 µs per token."""
    found = _vocabularies.get(tokenizer)
    if found is None:
        found = _vocabularies[tokenizer] = _Known(tokenizer)
    return found
