"""What a model does with a text, as numbers: token probabilities, attention weights, the logit lens.

The engine's room computes them (inference/inspection.py), this one shows them; here is what they agree on.
"""

# T tokens of the text   N of them that are looked into   K likeliest tokens   L layers looked at   H heads

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Inspection:
    """A text as a model reads it. Positions count from 0, layers too: layer 3 is ``blocks.3``.

    Args:
        model: what the model is called.
        ids_T: the tokens; the first ``start`` of them stand before the text, such as ``<s>``.
        tokens: each as one can read it, white space as signs, half characters as ``\\xe4``.
        notes: id and bytes of each in one line.
        start: how many tokens stand before the text.
        n_bytes: UTF-8 bytes of the text's tokens that are predicted.
        logprob_T: log-probability of each token in nats, given those before it; NaN where nothing stands before.
        rank_T: its place among all tokens then, 1 for the likeliest; 0 where nothing stands before.
        entropy_T: of what is expected after each position, in bits.
        next_ids_TK, next_probabilities_TK: the likeliest tokens after each position, and their probabilities.
        layers: the layers that are looked into.
        attention_LHNN: how much each of the first N positions looks at each; rows add up to 1, or less with attention
            sinks.
        lens_ids_LNK, lens_probabilities_LNK: the same as ``next``, had the model ended after that layer.
        lens_probability_LN, lens_rank_LN: of the token that really follows, as that layer has it; NaN and 0 where none
            does.
        names: every id that is mentioned, as one can read it.
        left_out: what of the text was not looked into, in words.
    """

    model: str
    ids_T: Ints
    tokens: tuple[str, ...]
    notes: tuple[str, ...]
    start: int
    n_bytes: int
    logprob_T: Floats
    rank_T: Ints
    entropy_T: Floats
    next_ids_TK: Ints
    next_probabilities_TK: Floats
    layers: tuple[int, ...]
    attention_LHNN: Floats
    lens_ids_LNK: Ints
    lens_probabilities_LNK: Floats
    lens_probability_LN: Floats
    lens_rank_LN: Ints
    names: Mapping[int, str]
    left_out: tuple[str, ...] = ()

    @property
    def bits(self) -> Floats:
        """The surprise of each token in bits, -log2 of its probability; shape T."""
        return -self.logprob_T / math.log(2)

    @property
    def scored(self) -> int:
        """How many tokens something stands before."""
        return int(np.isfinite(self.logprob_T).sum())

    @property
    def total_bits(self) -> float:
        """The surprise of all of them together."""
        return float(np.nansum(self.bits))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the text; NaN where no token of it is predicted."""
        return self.total_bits / self.n_bytes if self.n_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Of the tokens that are predicted; NaN where none is."""
        return float(2 ** (self.total_bits / self.scored)) if self.scored else math.nan

    @property
    def looked_into(self) -> int:
        """N."""
        return self.attention_LHNN.shape[-1]

    def expected(self, position: int) -> list[tuple[str, float]]:
        """The likeliest tokens in the place of the one at a position, and their probabilities; none at the first."""
        if position == 0:
            return []
        return self._named(self.next_ids_TK[position - 1], self.next_probabilities_TK[position - 1])

    def lens(self, layer: int, position: int) -> list[tuple[str, float]]:
        """The likeliest tokens after a position, had the model ended after ``layers[layer]``."""
        return self._named(self.lens_ids_LNK[layer, position], self.lens_probabilities_LNK[layer, position])

    def _named(self, ids_K: Ints, probabilities_K: Floats) -> list[tuple[str, float]]:
        return [(self.names[int(n)], float(p)) for n, p in zip(ids_K, probabilities_K, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: lists and numbers, null where there is none."""
        bits_T = self.bits
        return {
            "model": self.model,
            "bytes": self.n_bytes,
            "tokens_predicted": self.scored,
            "bits": _number(self.total_bits),
            "bits_per_byte": _number(self.bits_per_byte),
            "perplexity": _number(self.perplexity),
            "left_out": list(self.left_out),
            "tokens": [
                {
                    "position": t,
                    "id": int(self.ids_T[t]),
                    "token": token,
                    "logprob": _number(self.logprob_T[t]),
                    "bits": _number(bits_T[t]),
                    "rank": int(self.rank_T[t]) or None,
                    "entropy": _number(self.entropy_T[t - 1]) if t else None,
                    "expected": _pairs(self.expected(t)),
                }
                for t, token in enumerate(self.tokens)
            ],
            "then": _pairs(self._named(self.next_ids_TK[-1], self.next_probabilities_TK[-1])),
            "layers": list(self.layers),
            "lens": [
                [
                    {
                        "expected": _pairs(self.lens(layer, n)),
                        "probability": _number(self.lens_probability_LN[layer, n]),
                        "rank": int(self.lens_rank_LN[layer, n]) or None,
                    }
                    for n in range(self.looked_into)
                ]
                for layer in range(len(self.layers))
            ],
            # Row n has the n + 1 positions that it may see.
            "attention": [
                [[[_number(w) for w in row[: n + 1]] for n, row in enumerate(head)] for head in layer]
                for layer in self.attention_LHNN
            ],
        }


def _number(value: float) -> float | None:
    """Six digits, which is what float32 is good for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _pairs(expected: Sequence[tuple[str, float]]) -> list[list[Any]]:
    return [[token, _number(probability)] for token, probability in expected]
