"""The sentence and the table about where the model stands are true whatever came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.report.run_folder import RunFolder
from groundup.report.standing import headline, listing, standings


def rows(model: Any, gzip: Any = 2.5, xz: Any = 2.0, ngram: Any = 1.5) -> list[dict]:
    return [
        {"name": "this model", "kind": "model", "bits_per_byte": model, "seconds": 1.5},
        {"name": "gzip -9", "kind": "compressor", "bits_per_byte": gzip, "seconds": 0.25},
        {"name": "xz -9e", "kind": "compressor", "bits_per_byte": xz},
        {"name": "byte 6-gram, Kneser-Ney", "kind": "ngram", "bits_per_byte": ngram},
    ]


def sentence(evaluation_rows: list[dict], metrics: list[dict] | None = None) -> str:
    return headline(RunFolder(Path("run"), "run", metrics=metrics or [], evaluation={"rows": evaluation_rows}))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (1.2, ": better than the byte 6-gram (1.500), xz -9e (2.000) and gzip -9 (2.500)."),
        (1.7, ": better than xz -9e (2.000) and gzip -9 (2.500); worse than the byte 6-gram (1.500)."),
        (2.0, ": better than gzip -9 (2.500); equal to xz -9e (2.000); worse than the byte 6-gram (1.500)."),
        (3.0, ": worse than the byte 6-gram (1.500), xz -9e (2.000) and gzip -9 (2.500)."),
    ],
)
def test_the_sentence(model: float, told: str) -> None:
    assert sentence(rows(model)) == f"On held-out text the model needs {model:.3f} bits per byte{told}"


@given(st.floats(0.01, 10), st.lists(st.floats(0.01, 10), min_size=3, max_size=3))
def test_the_sentence_says_of_each_what_the_shown_numbers_say(model: float, others: list[float]) -> None:
    told = sentence(rows(model, *others)).rstrip(".").split(": ")[1]
    seen = 0
    for part in told.split("; "):
        for name, bits in zip(("gzip", "xz", "6-gram"), others, strict=True):
            if name in part:
                shown, theirs = float(f"{model:.3f}"), float(f"{bits:.3f}")
                assert part.startswith("better" if shown < theirs else "worse" if shown > theirs else "equal")
                seen += 1
    assert seen == 3


def test_the_sentence_where_something_is_missing() -> None:
    assert sentence([rows(1.25)[0]]) == "On held-out text the model needs 1.250 bits per byte."
    assert "not a finite number" in sentence(rows(None))
    assert "gzip" not in sentence(rows(1.25, gzip=None))
    metrics = [{"kind": "train", "step": 7, "loss": 3.5}]
    assert sentence([], metrics).startswith("At step 7 the training loss was 3.500 nats per token.")
    metrics.append({"kind": "eval", "step": 8, "bits_per_byte": 2.5})
    metrics.append({"kind": "eval", "step": 9, "bits_per_byte": None})
    assert sentence([], metrics).startswith("At step 8 the model needed 2.500 bits per byte on held-out text.")
    assert sentence(rows(1.0)[1:], metrics).startswith("At step 8")
    assert sentence([]) == "Nothing has been measured on held-out text yet."


def test_the_table_is_sorted_and_says_what_the_model_needs() -> None:
    table = standings(rows(1.6, gzip=None, xz=2.0, ngram=1.59))
    assert [row.name for row in table] == ["byte 6-gram, Kneser-Ney", "this model", "xz -9e", "gzip -9"]
    assert [row.model_needs for row in table] == ["under 1% more bits", "", "20% fewer bits", ""]
    assert [row.bits_text for row in table] == ["1.590", "1.600", "2.000", "not finite"]
    assert [row.is_model for row in table] == [False, True, False, False]
    assert [row.seconds for row in table] == [None, 1.5, None, 0.25]
    assert standings(rows(2.00001))[1].model_needs in ("", "as many bits")
    assert {row.name: row.model_needs for row in standings(rows(2.00001))}["xz -9e"] == "as many bits"
    assert standings([]) == []


def test_listing() -> None:
    assert [listing(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
