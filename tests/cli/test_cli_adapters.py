"""``--adapter`` and adapters as MODEL, wherever a model is named on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundup
from groundup.model import ModelConfig, Transformer, load_model, quantize_model, save_model
from groundup.model.adapter_model import AdapterNote, absorb, save_adapter_model, stack_adapters
from groundup.model.adapters import LoraConfig, adapted_layers, add_adapter
from groundup.model.quantized import Scheme
from groundup.model.token_rows import add_token_rows
from groundup.runtime.console import byte_size
from groundup.runtime.files import write_checksums
from groundup.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, and the dog sat on the cat; naïve über straße. " * 30
SAYS = ("the cat", "--temperature", "0", "--max-tokens", "9", "--device", "cpu")


def stirred(model: Transformer, seed: int, **fields: Any) -> Transformer:
    """An adapter as after training: no B is 0."""
    torch.manual_seed(seed)
    add_adapter(model, LoraConfig(**{"rank": 2, "alpha": 4.0} | fields))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora("default").B, std=0.3)
    return model


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer.train([TEXT], 300, show_progress=False)
    torch.manual_seed(41)
    sizes = dict(vocab_size=tokenizer.vocab_size, context_length=23, n_layer=2, n_head=2, n_embd=44, n_ff=31)
    save_model(Transformer(ModelConfig.from_dict(sizes | {"init_std": 0.2})), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def a(base: Path) -> Path:
    save_adapter_model(stirred(load_model(base), 1), base.with_name("a"), str(base))
    return base.with_name("a")


@pytest.fixture
def b(base: Path) -> Path:
    save_adapter_model(stirred(load_model(base), 2, targets=("q", "down")), base.with_name("b"), "tiny")
    return base.with_name("b")


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Path:
    """A run that trained an adapter with a new token on its base in four bits."""
    from groundup.model import resize_embeddings
    from groundup.posttraining.vocabulary import with_template

    tokenizer, _ = with_template(Tokenizer.load(base), "chatml")
    before = load_model(base)
    old = before.config.vocab_size
    model = resize_embeddings(before, tokenizer.vocab_size)
    stirred(quantize_model(model, "nf4"), 3, targets=("q", "v"))
    add_token_rows(model, "default", range(old, tokenizer.vocab_size))
    place = tmp_path / "run" / "checkpoints" / "step-000007"
    save_adapter_model(model, place, "../../../tiny", Scheme("nf4"))
    tokenizer.save(place)
    (place / "training_state").mkdir()
    (place / "training_state" / "state.json").write_text("{}")
    write_checksums(place)
    (place.parent / "best").symlink_to(place.name)
    return tmp_path / "run"


def test_generate(base: Path, a: Path, b: Path, run: Callable) -> None:
    plain, one, two, both = (
        run("generate", base, *SAYS, *(word for adapter in adapters for word in ("--adapter", adapter)))
        for adapters in ((), (a,), (b,), (a, b))
    )
    assert [said.code for said in (plain, one, two, both)] == [0] * 4
    assert len({said.out for said in (plain, one, two, both)}) == 4
    assert run("generate", a, *SAYS).out == one.out
    assert run("generate", a, *SAYS, f"--adapter={b}").out == both.out
    assert run("generate", base, *SAYS, "--adapter", json.dumps([str(a), str(b)])).out == both.out
    expected = groundup.load(base, adapters=[a, b], device="cpu").generate("the cat", max_tokens=9, temperature=0.0)
    assert both.out == f"the cat{expected}\n"


def test_chat_inspect_and_bench(base: Path, a: Path, b: Path, run: Callable, tmp_path: Path) -> None:
    words = ("--temperature", "0", "--max-tokens", "9", "--device", "cpu")
    said = [run("chat", *model, *words, stdin=b"the cat\n").out for model in ((base,), (base, "--adapter", a), (a,))]
    assert said[0].splitlines()[2:] != said[1].splitlines()[2:] == said[2].splitlines()[2:]
    for model, name in (((base, "--adapter", a, "--adapter", b), "both"), ((base,), "plain")):
        found = run("inspect", *model, "--text", "the cat sat", "--json", tmp_path / f"{name}.json", "--device", "cpu")
        assert found.code == 0, found.err
    both, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "plain"))
    assert both != plain
    lm = groundup.load(base, adapters=[a, b], device="cpu")
    assert -lm.score(["the cat sat"])[0] == pytest.approx(both["bits"] * 0.6931471805599453, rel=1e-4)
    words = ("--batch", "[1]", "--prompt", "5", "--new", "3", "--device", "cpu")
    bench = run("bench", "decode", a, "--adapter", b, *words)
    assert bench.code == 0, bench.err
    assert "5 tokens read, 3 written" in bench.out


def test_explain(a: Path, base: Path, trained: Path, run: Callable) -> None:
    parameters = sum(2 * (o + i) for o, i in [(44, 44)] * 4 + [(31, 44)] * 2 + [(44, 31)]) * 2
    said, plain = " ".join(run("explain", a).out.split()), " ".join(run("explain", base).out.split())
    assert f"adapter of rank 2 on 14 layers, {parameters:,} parameters, for {base}: the costs are" in said
    assert "adapter" not in plain
    found = " ".join(run("explain", trained).out.split())
    assert "on 4 layers, 704 parameters and rows for 2 tokens, for ../../../tiny in nf4" in found


@pytest.mark.parametrize("to", ["hf", "int8", "gguf"])
def test_export_merges(base: Path, a: Path, b: Path, run: Callable, to: str) -> None:
    more = ("--kind", "f32") if to == "gguf" else ()
    place = base.with_name("out.gguf" if to == "gguf" else "out")
    said = run("export", base, "--adapter", a, "--adapter", b, "--to", to, "--out", place, "--device", "cpu", *more)
    assert said.code == 0, said.err
    weights = sum(file.stat().st_size for place in (base, a, b) for file in place.glob("*.safetensors"))
    assert byte_size(weights) in said.out.splitlines()[1], "of the base and both adapters"
    expected = absorb(stack_adapters(load_model(base), {"a": a, "b": b})).eval()
    expected = quantize_model(expected, "int8") if to == "int8" else expected
    ids = torch.randint(250, (2, 23))
    with torch.inference_mode():
        found = groundup.load(place, device="cpu").model(ids)
        torch.testing.assert_close(found, expected(ids), rtol=1e-4, atol=1e-4)


def test_export_of_a_run_with_an_adapter_is_whole_for_other_tools(trained: Path, run: Callable, tmp_path: Path) -> None:
    """Rows for new tokens, and what four bits stand for in the layers that have no adapter."""
    import transformers

    said = run("export", trained, "--to", "hf", "--device", "cpu")
    assert said.code == 0, said.err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run-hf").eval()
    kept = groundup.load(trained, merge=False, device="cpu")
    ids = torch.randint(kept.tokenizer.vocab_size, (2, 23))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, kept.model(ids), rtol=1e-3, atol=1e-3)
    assert groundup.load(tmp_path / "run-hf").tokenizer.fingerprint == kept.tokenizer.fingerprint
    prompt = dict(max_tokens=7, temperature=0.0)
    assert groundup.load(tmp_path / "run-hf", device="cpu").generate("the cat", **prompt) == kept.generate(
        "the cat", **prompt
    )


def test_export_of_the_adapter_alone(trained: Path, b: Path, run: Callable, tmp_path: Path) -> None:
    said = run("export", trained, "--to", "adapter", "--out", tmp_path / "far" / "away")
    assert said.code == 0, said.err
    assert "adapter of rank 2 on 4 layers" in said.out
    assert "It brings tokens; for PEFT give its base as many: resize_token_embeddings(" in " ".join(said.out.split())
    place = tmp_path / "far" / "away"
    assert not (place / "training_state").exists()
    assert AdapterNote.read(place).base == str(tmp_path / "tiny"), "no longer where it was counted from"
    shutil.move(tmp_path / "run", tmp_path / "gone")
    assert run("generate", place, *SAYS).out == run("generate", tmp_path / "gone", *SAYS).out
    said = run("export", b, "--to", "adapter")
    assert (said.code, "PEFT" in said.out) == (0, False), said.err
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    theirs, ids = peft.PeftModel.from_pretrained(base, tmp_path / "b-adapter").eval(), torch.randint(250, (2, 23))
    with torch.inference_mode():
        expected = groundup.load(b, device="cpu", merge=False).model(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_refused_in_one_line(base: Path, a: Path, b: Path, run: Callable) -> None:
    for words, line in (
        (["export", base, "--to", "adapter"], "a whole model, not an adapter"),
        (["export", a, "--to", "adapter", "--adapter", b], "leave --adapter out"),
        (["export", a, "--to", "adapter", "--out", b], "is here already and would be lost"),
        (["export", a, "--to", "adapter", "--data", "x"], "--data is for quantized models"),
        (["export", a, "--to", "hf", "--out", a], "is where the model itself lies"),
        (["generate", base, "x", "--adapter", base], "this is no adapter"),
        (["generate", base, "x", "--adapter", "c"], "c: no such folder"),
        (["generate", base, "x", "--adapter"], "--adapter needs a value"),
    ):
        said = run(*words)
        assert said.code == 2, (words, said)
        assert line in said.line, words
    shutil.move(base, base.with_name("moved"))
    assert "the adapter's base model" in run("generate", a, "x").line
    assert "this adapter is for" in run("generate", "moved", "x", "--adapter", a).line


def test_a_flag_of_texts_may_come_again(base: Path, run: Callable) -> None:
    """Also the stop texts of generate: each of them ends the answer."""
    whole = run("generate", base, *SAYS).out
    assert len(whole) > 9
    for words in (["--stop", whole[8], "--stop", "###"], ["--stop=###", f"--stop={whole[8]}"]):
        assert run("generate", base, *SAYS, *words).out == whole[: whole.index(whole[8], 7)] + "\n"
