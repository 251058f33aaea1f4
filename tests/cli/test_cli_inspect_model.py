"""``groundup inspect``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import groundup
from groundup.inference.inspection import inspect_text
from groundup.model import ModelConfig, Transformer, save_model
from groundup.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, naïve über straße 中文. "


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(43)
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer.train([TEXT * 9], 290, show_progress=False)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=37, n_layer=3, n_head=2, n_embd=20, n_ff=31, init_std=0.3
    )
    save_model(Transformer(config), folder, eos_id=tokenizer.end_of_text_id)
    tokenizer.save(folder)
    return folder


def test_figures_page_pictures_and_numbers(model: Path, tmp_path: Path, run: Callable) -> None:
    page, pictures, numbers = tmp_path / "page.html", tmp_path / "pictures", tmp_path / "numbers.json"
    words = ["--out", page, "--png", pictures, "--json", numbers, "--layers", "0,2", "--top", "3"]
    said = run("inspect", model, TEXT, *words)
    assert said.code == 0, said.err
    found = inspect_text(groundup.load(model, device="cpu"), TEXT, top=3, layers=[0, 2])
    assert f"{found.scored} tokens, {found.total_bits:,.1f} bits: {found.bits_per_byte:.3f} per byte" in said.out
    values = json.loads(numbers.read_text())
    assert values["layers"] == [0, 2]
    assert values["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-4)
    assert values["model"] == "tiny"
    assert "tiny, inspected" in page.read_text()
    assert sorted(path.name for path in pictures.iterdir()) == [
        "attention-layer-00.png", "attention-layer-02.png", "lens.png", "surprise.png",
    ]  # fmt: skip
    least = sorted(range(1, len(found.tokens)), key=lambda position: -found.bits[position])[0]
    assert f"{found.bits[least]:.1f}" in said.out


def test_a_text_from_standard_input_and_a_hint(model: Path, run: Callable) -> None:
    for words in ([], ["-"]):
        said = run("inspect", model, *words, "--positions", "5", stdin=TEXT.encode())
        assert said.code == 0, said.err
        assert "look into the first 5 of" in said.out
        assert "--out page.html" in said.out


def test_what_makes_no_sense_is_refused_in_one_line(model: Path, run: Callable) -> None:
    for words, line in (
        (["cat", "--layers", "3"], "there is no layer 3: this model has 3, from 0 to 2"),
        (["cat", "--layers", "first"], "--layers first should be numbers"),
        (["-"], "the text is empty"),
        (["cat sat " * 40], "the model reads 37 at once"),
        (["cat", "--top", "0"], "top = 0"),
    ):
        said = run("inspect", model, *words)
        assert said.code == 2, words
        assert line in said.line
