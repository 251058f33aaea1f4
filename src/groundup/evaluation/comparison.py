"""The model beside its yardsticks: the content of a run's ``evaluation.json``."""

from __future__ import annotations

import time
from typing import Any

from groundup.evaluation.compressors import compressor_rows
from groundup.evaluation.ngram import KneserNeyModel
from groundup.runtime import progress
from groundup.runtime.console import quantity

NGRAM_ORDER = 6
MAX_TRAIN_BYTES = 32_000_000  # counted in seconds and in half a gigabyte, where the text is language or code


def compare(
    model_row: dict[str, Any],
    train: bytes,
    val: bytes,
    *,
    max_train_bytes: int = MAX_TRAIN_BYTES,
) -> dict[str, Any]:
    """Measure the compressors and the n-gram on the held-out text, and set the model's measure beside them.

    Args:
        model_row: the model's ``name``, ``bits_per_byte`` and ``seconds``, and a ``note`` if there is more to
            say.
        train: the text the model was trained on; the n-gram counts its first ``max_train_bytes``.
        val: the held-out text that ``model_row`` was measured on.

    Returns:
        ``{"val_bytes": …, "rows": [{"name", "kind", "bits_per_byte", "seconds", "note"}, …]}``, the model
        first.

    Raises:
        GroundupError: one of the texts is empty.
    """
    rows: list[dict[str, Any]] = [{"note": "", **model_row, "kind": "model"}]
    with progress("compare with gzip, xz and a 6-gram", total=3) as bar:
        rows += compressor_rows(val)
        bar.update(2)
        rows.append(ngram_row(train, val, max_train_bytes))
        bar.update(3)
    return {"val_bytes": len(val), "rows": rows}


def ngram_row(train: bytes, val: bytes, max_train_bytes: int = MAX_TRAIN_BYTES) -> dict[str, Any]:
    """Train the byte 6-gram on the beginning of ``train`` and measure it on ``val``. Seconds count both."""
    started = time.perf_counter()
    counted = train[:max_train_bytes]
    bits = KneserNeyModel(NGRAM_ORDER).fit(counted).bits_per_byte(val)
    if len(counted) < len(train):
        part = f"the first {quantity(len(counted))} of the {quantity(len(train))} bytes"
    else:
        part = f"all {quantity(len(train))} bytes"
    return {
        "name": f"byte {NGRAM_ORDER}-gram, Kneser-Ney",
        "kind": "ngram",
        "bits_per_byte": bits,
        "seconds": time.perf_counter() - started,
        "note": f"trained on {part} of the same training text",
    }
