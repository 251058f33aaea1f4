"""evaluation.json: the model's row first, the yardsticks measured on the same held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundup.evaluation import KneserNeyModel, compare
from groundup.runtime import GroundupError


def test_compare_on_real_text(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "tinyshakespeare.txt").read_bytes()
    train, val = text[:300_000], text[-40_000:]
    result = compare({"name": "this model", "bits_per_byte": 2.0, "seconds": 1.5}, train, val)
    assert json.loads(json.dumps(result)) == result
    assert result["val_bytes"] == 40_000
    assert [row["kind"] for row in result["rows"]] == ["model", "compressor", "compressor", "ngram"]
    assert all({"name", "kind", "bits_per_byte", "seconds", "note"} <= row.keys() for row in result["rows"])
    model, gzip, xz, ngram = (row["bits_per_byte"] for row in result["rows"])
    assert model == 2.0
    assert ngram == KneserNeyModel(6).fit(train).bits_per_byte(val)
    assert ngram < xz < gzip < 8
    assert result["rows"][3]["note"] == "trained on all 300k bytes of the same training text"


def test_a_cut_training_text_is_said(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "the-verdict.txt").read_bytes()
    result = compare({"name": "m", "bits_per_byte": 2.0}, text, text[:2_000], max_train_bytes=5_000)
    ngram = result["rows"][3]
    assert ngram["note"] == "trained on the first 5k of the 20.5k bytes of the same training text"
    assert ngram["bits_per_byte"] == KneserNeyModel(6).fit(text[:5_000]).bits_per_byte(text[:2_000])


def test_empty_texts_are_told() -> None:
    row = {"name": "m", "bits_per_byte": 2.0, "seconds": 0.0}
    with pytest.raises(GroundupError, match="held-out text is empty"):
        compare(row, b"text", b"")
    with pytest.raises(GroundupError, match="training text is empty"):
        compare(row, b"", b"text")
