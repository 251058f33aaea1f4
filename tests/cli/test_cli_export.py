"""``groundup export``: the folder that it writes, the table it shows, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import groundup
from groundup.evaluation import divergence
from groundup.model import ModelConfig, Transformer, load_model, quantize_model, save_model
from groundup.model.quantized import QuantizedLinear
from groundup.runtime.console import byte_size
from groundup.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, and the dog sat on the cat; naïve über straße. " * 30


def model_of(vocab_size: int, **fields: object) -> Transformer:
    torch.manual_seed(41)
    sizes = dict(vocab_size=vocab_size, context_length=23, n_layer=2, n_head=2, n_embd=44, n_ff=31, init_std=0.2)
    return Transformer(ModelConfig.from_dict(sizes | fields)).eval()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer.train([TEXT], 300, show_progress=False)
    save_model(model_of(tokenizer.vocab_size), folder, eos_id=tokenizer.end_of_text_id)
    tokenizer.save(folder)
    return folder


def test_int4_with_its_loss(model: Path, tmp_path: Path, run: Callable) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--to", "int4", "--group", "32", "--zero-point", "true", "--data", tmp_path / "text.txt"]
    words += ["--tokens", "211"]
    said = run("export", model, *words, "--out", tmp_path / "small")
    assert said.code == 0, said.err
    expected = quantize_model(load_model(model), "int4", group=32, zero_point=True)
    loaded = groundup.load(tmp_path / "small", device="cpu")
    ids = torch.randint(200, (2, 23))
    assert torch.equal(loaded.model(ids), expected.eval()(ids))
    assert loaded.tokenizer.encode(TEXT) == Tokenizer.load(model).encode(TEXT)

    tokenizer = loaded.tokenizer
    sizes = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    end = tokenizer.end_of_text_id or 0
    sizes[end] = 0
    found = divergence(
        load_model(model), expected, torch.tensor(tokenizer.encode(TEXT)[:211]).numpy(), sizes.numpy(), 23, start_id=end
    )
    header, original, changed = (line.split("  ") for line in said.out.splitlines()[:3])
    assert [cell.strip() for cell in header if cell] == [
        "model", "weights on disk", "read in", "perplexity", "bits per byte", "KL per token", "same first choice",
    ]  # fmt: skip
    assert f"{found.perplexity:.3f}" in "  ".join(original)
    for figure in (f"{found.changed_perplexity:.3f}", f"{found.kl:.5f}", f"{found.agreement:.1%}"):
        assert figure in "  ".join(changed)
    assert "the head, which is the embedding too" in said.out
    assert "measured on 211 tokens" in said.out
    assert found.kl > 0


@pytest.mark.parametrize("to", ["int8", "int4", "nf4"])
def test_without_text_the_loss_is_not_measured(model: Path, run: Callable, to: str) -> None:
    said = run("export", "tiny", "--to", to)
    assert said.code == 0, said.err
    assert "give a text with --data" in said.out
    assert "perplexity" not in said.out
    folder = model.parent / f"tiny-{to}"
    assert isinstance(load_model(folder).get_submodule("blocks.1.feed_forward.down"), QuantizedLinear)
    chosen = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (chosen["group"], chosen["zero_point"]) == (64, to == "int4")
    assert chosen["kind"] == to
    size = (folder / "model.safetensors").stat().st_size
    assert byte_size(size) in said.out.splitlines()[2]
    assert size < (model / "model.safetensors").stat().st_size


def test_hf_is_the_same_model_for_other_tools(model: Path, run: Callable, tmp_path: Path) -> None:
    import transformers

    assert run("export", model, "--out", tmp_path / "other").code == 0
    ids = torch.randint(200, (2, 23))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval()
    torch.testing.assert_close(theirs(ids).logits, load_model(model).eval()(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "kind", "left"),
    [
        (["int8"], QuantizedLinear, "embeddings and norms"),
        (["int4"], QuantizedLinear, "embeddings and norms"),
        (["nf4"], torch.nn.Linear, "the head, embeddings and norms"),
        (["int8", "--head", "false"], torch.nn.Linear, "the head, embeddings and norms"),
    ],
)
def test_an_untied_head(model: Path, run: Callable, words: list[str], kind: type, left: str) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()
    save_model(model_of(Tokenizer.load(model).vocab_size, tie_embeddings=False), model)
    said = run("export", model, "--to", *words, "--out", "small")
    assert f"Left as they were: {left}:" in said.out
    assert type(load_model(model.parent / "small").head) is kind


def test_what_makes_no_sense_is_refused_in_one_line(model: Path, run: Callable) -> None:
    for words, line in (
        (["--to", "int3"], "--to int3 is not one of hf, gguf, int8, int4, nf4, adapter. Did you mean int8"),
        (["--to", "int4", "--out", "tiny"], "--out tiny is where the model itself lies"),
        (["--to", "int4", "--group", "48"], "group 48 is not one of 32, 64, 128"),
        (["--to", "int8", "--zero-point", "true"], "a zero point is an option of int4, not of int8"),
        (["--zero-point", "true"], "--zero-point is for quantized models"),
        (["--data", "nowhere.txt"], "--data is for quantized models"),
        (["--to", "int8", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--to", "int8", "--tokens", "0"], "--tokens 0"),
    ):
        said = run("export", "tiny", *words)
        assert said.code == 2 or "nowhere" in line, words
        assert line in said.line, words
        assert not (model.parent / "tiny-int8").exists()  # refused before anything is written
    assert run("export", "nothing-here", "--to", "int8").code in (1, 2)
    assert run("export", "tiny", "--to", "int8").code == 0
    assert "quantized already (int8)" in run("export", "tiny-int8", "--to", "int4").line


def test_a_folder_with_anything_else_in_it_is_not_replaced(model: Path, run: Callable) -> None:
    (model.parent / "mine").mkdir()
    (model.parent / "mine" / "notes.txt").write_text("mine")
    assert "notes.txt is here already" in run("export", model, "--to", "int8", "--out", "mine").line
    assert (model.parent / "mine" / "notes.txt").read_text() == "mine"


def test_a_file_for_llama_cpp_reads_back_to_the_same_text(run: Callable, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    said = run("export", model, "--to", "gguf", "--kind", "f32", "--out", target)
    assert (said.code, said.err) == (0, "")
    assert f"written: {target}" in said.out
    words = ("the cat", "--temperature", "0", "--max-tokens", "9")
    assert run("generate", target, *words).out == run("generate", model, *words).out
    assert "not written: f32, f16, q8_0, q4_0 are" in run("export", model, "--to", "gguf", "--kind", "q9").line
