"""The page of an inspection: one file with the text coloured by surprise, attention maps and the logit lens.

Unlike the other pages it has a script, which draws the maps; its hash is all that the page's policy lets run.
"""

# T tokens of the text   N of them that are looked into   L layers looked at   H heads

from __future__ import annotations

import base64
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from groundup.report.facts import Fact
from groundup.report.html import templates
from groundup.report.inspection import Inspection
from groundup.runtime import write_atomic, write_json

MOST_BITS = 14  # the surprise of tokens in full colour
MOST_TOKENS = 4000  # that a page shows; a browser gets slow beyond
MOST_WEIGHTS = 4_000_000  # attention weights, a byte each, that a page holds
MOST_CELLS = 6000  # of the lens
LONGEST_LABEL = 12  # characters of a token beside a map


@dataclass(frozen=True)
class TokenView:
    """One token as the page shows it."""

    at: int
    text: str
    given: bool
    breaks: bool
    shade: str
    bits: str
    rank: str
    entropy: str
    note: str
    expected: list[tuple[str, float]]

    @property
    def facts(self) -> str:
        """What there is to say of it in one line."""
        if not self.rank:
            return "the beginning: nothing stands before it"
        return f"{self.bits} bits, rank {self.rank}, among {self.entropy} bits of doubt"


def write_inspection(found: Inspection, path: str | os.PathLike[str]) -> Path:
    """Write an inspection as a page.

    Returns:
        The path of the page.

    Raises:
        GroundupError: it cannot be written.
    """
    page = Path(path)
    write_atomic(page, render_inspection(found).encode("utf-8", "replace"))
    return page


def write_inspection_json(found: Inspection, path: str | os.PathLike[str]) -> Path:
    """Write all numbers of an inspection as JSON.

    Returns:
        The path of the file.

    Raises:
        GroundupError: it cannot be written.
    """
    write_json(path, found.to_dict())
    return Path(path)


def render_inspection(found: Inspection) -> str:
    """The page as text."""
    environment = templates()
    script = environment.get_template("inspection.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tokens = [_token(found, position) for position in range(min(len(found.tokens), MOST_TOKENS))]
    shown = shown_positions(found)
    columns = min(found.looked_into, max(1, MOST_CELLS // len(found.layers)))
    return environment.get_template("inspection.html.j2").render(
        found=found,
        facts=_facts(found),
        most_bits=MOST_BITS,
        tokens=tokens,
        heads=found.attention_LHNN.shape[1],
        lens=_lens(found, columns),
        left_out=_left_out(found, shown, columns),
        numbers={
            "tokens": [
                {
                    "at": t.at,
                    "note": t.note,
                    "facts": t.facts,
                    "expected": [(text, round(p, 5)) for text, p in t.expected],
                }
                for t in tokens
            ],
            "attention": _weights(found, shown),
        },
        script=Markup(script),  # ours, without a word of the text
        script_hash=f"sha256-{digest}",
    )


def shown_positions(found: Inspection) -> int:
    """Of how many positions a page has room for the attention of every head."""
    each = MOST_WEIGHTS / (len(found.layers) * found.attention_LHNN.shape[1])
    return max(1, min(found.looked_into, int((math.sqrt(1 + 8 * each) - 1) / 2)))


def label(token: str) -> str:
    """A token beside a map."""
    return token if len(token) <= LONGEST_LABEL else f"{token[: LONGEST_LABEL - 1]}…"


def _facts(found: Inspection) -> list[Fact]:
    facts = [Fact(f"{found.bits_per_byte:.3f}", "bits per byte")] if found.n_bytes else []
    facts += [Fact(f"{found.scored:,}", "tokens predicted"), Fact(f"{found.total_bits:,.1f}", "bits in all")]
    if found.scored:
        facts.append(Fact(f"{found.perplexity:,.1f}", "perplexity per token"))
        facts.append(Fact(f"{(found.rank_T == 1).sum() / found.scored:.0%}", "of tokens were its first choice"))
    return facts


def _token(found: Inspection, position: int) -> TokenView:
    text, known = found.tokens[position], bool(found.rank_T[position])
    bits = float(found.bits[position]) if known else 0.0
    return TokenView(
        at=position,
        text=text,
        given=position < found.start,
        breaks=text.endswith("↵"),
        shade=f"{0.85 * min(1.0, bits / MOST_BITS):.3f}",
        bits=f"{bits:.2f}" if known else "",
        rank=f"{found.rank_T[position]:,}" if known else "",
        entropy=f"{found.entropy_T[position - 1]:.2f}" if known else "",
        note=found.notes[position],
        expected=found.expected(position),
    )


def _lens(found: Inspection, columns: int) -> dict[str, Any]:
    following = [*found.tokens[1:], "?"][:columns]
    rows = [
        {"layer": layer, "cells": [_cell(found, number, n, following[n]) for n in range(columns)]}
        for number, layer in enumerate(found.layers)
    ]
    return {"read": found.tokens[:columns], "really": following, "rows": rows}


def _cell(found: Inspection, layer: int, position: int, follows: str) -> dict[str, Any]:
    expected, rank = found.lens(layer, position), int(found.lens_rank_LN[layer, position])
    (text, probability), *_ = expected
    lines = [f"{name}  {share:.1%}" for name, share in expected]
    if rank:
        lines.append(f"really: {follows}, rank {rank:,}, {found.lens_probability_LN[layer, position]:.2%}")
    return {
        "text": label(text),
        "percent": f"{probability:.0%}",
        "shade": f"{0.6 * probability:.3f}",
        "hit": rank == 1,
        "note": "\n".join(lines),
    }


def _weights(found: Inspection, size: int) -> dict[str, Any]:
    """The maps as the script reads them: bytes of square roots, which keep small weights apart, in base64."""
    rows, columns = np.tril_indices(size)
    roots = np.sqrt(np.clip(found.attention_LHNN[:, :, rows, columns], 0.0, 1.0))
    encoded = base64.b64encode(np.round(255 * roots).astype(np.uint8).tobytes()).decode()
    return {
        "size": size,
        "heads": found.attention_LHNN.shape[1],
        "layers": found.layers,
        "labels": [label(token) for token in found.tokens[:size]],
        "weights": encoded,
    }


def _left_out(found: Inspection, shown: int, columns: int) -> list[str]:
    told, count = list(found.left_out), len(found.tokens)
    if shown < found.looked_into:
        told.append(f"the maps show the first {shown} of {found.looked_into} positions")
    if columns < found.looked_into:
        told.append(f"the lens shows the first {columns} of {found.looked_into} positions")
    if count > MOST_TOKENS:
        told.append(f"the text is shown up to token {MOST_TOKENS:,} of {count:,}")
    return told
