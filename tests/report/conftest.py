"""A run folder as a real run leaves it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from groundup.report import MetricsWriter, add_samples, read_metrics
from groundup.runtime import write_json


@pytest.fixture
def measured_run(finished_run: Path) -> Path:
    """The same run with everything that a newer version notes: utilisation, gradients, memory, hardware."""
    old = read_metrics(finished_run / "metrics.jsonl")
    (finished_run / "metrics.jsonl").unlink()
    with MetricsWriter(finished_run / "metrics.jsonl") as metrics:
        for row in old:
            step, place = row["step"], {key: row[key] for key in ("step", "tokens", "seconds")}
            if row["kind"] == "train":
                row |= {"mfu": 0.31 + 0.02 * (step % 3), "grad_norm": 0.4 + 3 / step + 0.1 * (step % 7)}
                row |= {"memory_bytes": 1_150_000_000 + 90_000_000 * (step > 60), "seconds_left": 30 - 0.25 * step}
            metrics.write(row)
            if step % 4 == 0 and row["kind"] == "train":
                watched = {
                    "cpu_percent": 91.0 + step % 5,
                    "memory_bytes": 1_200_000_000,
                    "gpu_percent": 40.0 + step / 4,
                }
                watched |= {"gpu_memory_bytes": 2_500_000_000, "watts": 60.0 + step % 9, "energy_joules": 16.0 * step}
                watched |= {"co2_grams": 16.0 * step * 445 / 3.6e6, "watts_from": "cpu+gpu"}
                metrics.write({"kind": "hardware", **place, **watched})
    return finished_run


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
