"""``groundup models``: what is kept of the hub, told and removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fake_hub import FakeHub
from groundup.inference import LanguageModel
from groundup.model import ModelConfig, Transformer
from groundup.tokenizer import Tokenizer

NAME = "hf:ann/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 9], 280, show_progress=False)
    torch.manual_seed(3)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=32, n_layer=1, n_head=2, n_embd=8, n_ff=13)
    place = tmp_path_factory.mktemp("made") / "tiny"
    LanguageModel(Transformer(config), tokenizer).save(place)
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != "vocabulary.txt"}


def test_a_models_life(hub: type[FakeHub], files: dict[str, bytes], run: Callable) -> None:
    assert "No models of the hub are kept here" in run("models", "list").out
    got = run("models", "get", NAME)
    assert got.code == 0
    folder = Path(got.out.splitlines()[-1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files

    listed = run("models", "list").out
    (line,) = [line for line in listed.splitlines() if line.startswith(NAME)]
    size = sum(map(len, files.values()))
    assert line.split() == [NAME, "a" * 12, "ready", str(len(files)), f"{size / 1000:#.3g}".rstrip("."), "kB"]

    for words in (["verify"], ["verify", NAME], ["verify", "ann/tiny"], ["verify", "--model", NAME]):
        said = run("models", *words)
        assert (said.code, f"{NAME}: {len(files)} files, " in said.out) == (0, True)

    said = run("generate", NAME, "the cat", "--max-tokens", "2", "--seed", "1")
    assert (said.code, said.out.startswith("the cat")) == (0, True)

    removed = run("models", "remove", NAME)
    assert (removed.code, f"{NAME}: removed, " in removed.out) == (0, True)
    assert not folder.exists()
    assert run("models", "remove", NAME).line == f"{NAME}: this model is not kept here. See groundup models list."


def test_damage_is_told_by_verify_and_mended_by_get(hub: type[FakeHub], run: Callable) -> None:
    folder = Path(run("models", "get", NAME).out.splitlines()[-1])
    weights = (folder / "model.safetensors").resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert "incomplete" in run("models", "list").out
    said = run("models", "verify")
    assert said.code == 1
    assert f"model.safetensors: it has {len(content) - 1:,} bytes, the hub's {len(content):,}" in said.out
    assert said.line == f"damaged: {NAME}. Fetch it again: groundup models get {NAME}"
    hub.asked.clear()
    assert run("models", "get", NAME).code == 0
    assert hub.downloads() == ["model.safetensors"]
    assert run("models", "verify").code == 0


def test_mistakes(hub: type[FakeHub], run: Callable) -> None:
    assert run("models").code == 2
    assert "no such command. Did you mean verify?" in run("models", "verfy").line
    assert "written hf:owner/name" in run("models", "get", "tiny").line
    said = run("models", "get", "hf:ann/other")
    assert (said.code, "the hub knows no such repository" in said.line) == (1, True)
    run("models", "get", NAME)
    said = run("models", "verify", "hf:ann/tinny")
    assert (said.code, "not kept here. Did you mean hf:ann/tiny?" in said.line) == (2, True)


def test_nothing_to_verify_is_said(hub: type[FakeHub], run: Callable) -> None:
    done = run("models", "verify")
    assert (done.code, done.out) == (0, run("models", "list").out)
    assert "No models of the hub are kept here" in done.out
