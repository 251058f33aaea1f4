"""A run folder as a real run leaves it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from groundup.report import MetricsWriter, add_samples
from groundup.runtime import write_json


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo"
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        for step in range(1, 121):
            loss = 3 + 6 * math.exp(-step / 20)
            row = {"step": step, "tokens": 4096 * step, "seconds": 0.25 * step, "loss": loss, "bits_per_byte": loss / 2}
            metrics.write({"kind": "train", **row, "tokens_per_second": 16_384.0, "learning_rate": 0.003})
            if step % 30 == 0:
                metrics.write({"kind": "eval", **row})
    for step in (60, 120):
        prompt = {"step": step, "temperature": 0.8, "prompt": "def main("}
        add_samples(run, [{**prompt, "text": "):\n  <script>alert('x')</script>\x1b &amp; \udce9"}])
    write_json(run / "environment.json", {"python": "3.11.7", "cores": 2, "memory_bytes": 16_000_000_000})
    plan = {"section": "model", "key": "n_layer", "value": 4, "why": "depth 4 <b>"}
    write_json(run / "plan.json", {"rows": [plan]})
    write_json(run / "data" / "stats.json", {"dropped": {"not UTF-8": 2}, "seconds": {"clean": 5.4}})
    write_json(
        run / "evaluation.json",
        {
            "val_bytes": 712_345,
            "rows": [
                {"name": "this model (1.3M)", "kind": "model", "bits_per_byte": 1.52, "seconds": 9.1, "note": "<i>n"},
                {"name": "gzip -9", "kind": "compressor", "bits_per_byte": 2.45, "seconds": 0.04, "note": ""},
                {"name": "byte 6-gram, Kneser-Ney", "kind": "ngram", "bits_per_byte": 1.47, "seconds": 0.9},
            ],
        },
    )
    (run / "recipe.yaml").write_text("model:\n  n_layer: 4  # </pre><script>\n")
    return run
