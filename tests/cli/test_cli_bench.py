"""``groundup bench decode``: what it measures, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from groundup.inference import EngineSettings
from groundup.inference.speed import decode_speed, memory_bandwidth, weights_read
from groundup.model import ModelConfig, Transformer, quantize_model, save_model
from groundup.tokenizer import Tokenizer

SIZES = dict(vocab_size=300, context_length=40, n_layer=2, n_head=2, n_embd=64, n_ff=96)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    Tokenizer.train(["the cat sat on the mat. " * 30], 300, show_progress=False).save(folder)
    save_model(Transformer(ModelConfig.from_dict(SIZES)), folder)
    return folder


def test_a_row_for_each_number_of_texts(model: Path, run: Callable) -> None:
    said = run("bench", "decode", model, "--batch", "[1,3]", "--prompt", "7", "--new", "11", "--device", "cpu")
    assert said.code == 0, said.err
    assert "7 tokens read, 11 written" in said.out
    rows = [line.split() for line in said.out.splitlines() if re.match(r"\s*\d+ ", line)]
    assert [row[0] for row in rows] == ["1", "3"]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_a_short_context_is_shared_out(model: Path, run: Callable) -> None:
    assert "26 tokens read, 14 written" in run("bench", "decode", model, "--device", "cpu").out
    assert "30 tokens read, 10 written" in run("bench", "decode", model, "--prompt", "30", "--device", "cpu").out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", "39", "--new", "2"], "39 tokens and 2 new ones are more than the model's context of 40"),
        (["--batch", "[0]"], "--batch must be at least 1"),
        (["--new", "1"], "--new must be at least 2"),
        (["--prompt", "0"], "--prompt must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(model: Path, run: Callable, words: list[str], line: str) -> None:
    said = run("bench", "decode", model, *words)
    assert said.code == 2
    assert line in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_weights_that_are_read() -> None:
    """Of a token embedding only some rows, unless it is the head."""
    tied = Transformer(ModelConfig.from_dict(SIZES | {"tie_embeddings": True}))
    untied = Transformer(ModelConfig.from_dict(SIZES | {"tie_embeddings": False}))
    everything = 4 * sum(parameter.numel() for parameter in tied.parameters())
    assert weights_read(tied) == everything == weights_read(untied)
    quantize_model(untied, "int8", skip=["embedding"])
    codes = sum(layer.nbytes for layer in untied.modules() if hasattr(layer, "nbytes"))
    norms = 4 * sum(parameter.numel() for name, parameter in untied.named_parameters() if "embedding" not in name)
    assert weights_read(untied) == codes + norms


def test_speeds_are_those_of_the_steps() -> None:
    speed = decode_speed(Transformer(ModelConfig.from_dict(SIZES)), 3, 7, 20, EngineSettings(prefix_cache=False))
    assert speed.batch == 3
    assert 0 < speed.step <= speed.slow_step
    assert speed.written == pytest.approx(3 / speed.step, rel=0.9)
    assert speed.bandwidth == speed.step_bytes / speed.step
    assert memory_bandwidth(torch.device("cpu"), rounds=1) > 1e8
