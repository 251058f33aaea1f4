"""The commands at work, on small input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from groundup.cli import doctor as doctor_command
from groundup.config import keys_of, read_recipe
from groundup.model import PRESETS, ModelConfig
from groundup.model import explain as costs_of
from groundup.runtime import doctor as doctor_room
from groundup.runtime.doctor import Finding
from groundup.tokenizer import Tokenizer
from groundup.training import PretrainRecipe

Run = Callable[..., Any]
TEXT = "The cat sat on the mat, and the dog sat on the log.\nGrüße, 世界! def read(path): return open(path)\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tokenizer"
    Tokenizer.train([TEXT * 8], 300, show_progress=False).save(folder)
    return folder


# ---- tokenizer


def test_a_tokenizer_is_trained_and_takes_text_there_and_back(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    folder = tmp_path / "tok"
    trained = run("tokenizer", "train", text, "--vocab-size", 290, "--out", folder)
    assert (trained.code, trained.err) == (0, "")
    assert f"{folder}: 290 tokens from " in trained.out
    for part in ("The cat", "Grüße, 世界!", " \n\ttabs  ", "# not a comment", "null", "5", "[1, 2]", "'quoted'"):
        encoded = run("tokenizer", "encode", folder, part)
        ids = [int(word) for word in encoded.out.split()]
        assert ids == Tokenizer.load(folder).encode(part)
        assert run("tokenizer", "encode", folder, stdin=part.encode()).out == encoded.out
        assert run("tokenizer", "encode", folder, "-", stdin=part.encode()).out == encoded.out
        assert run("tokenizer", "encode", folder, f"--text={part}").out == encoded.out
        assert run("tokenizer", "decode", folder, encoded.out.strip()).out == part + "\n"
        assert run("tokenizer", "decode", folder, stdin=encoded.out.replace(" ", ",").encode()).out == part + "\n"


def test_a_tokenizer_of_real_text(run: Run, shared_data: Path, tmp_path: Path) -> None:
    real = (shared_data / "pretrain" / "tinyshakespeare.txt").read_text()[:60_000]
    (tmp_path / "text.txt").write_text(real)
    assert run("tokenizer", "train", tmp_path / "text.txt", "--vocab-size=400", f"--out={tmp_path / 'tok'}").code == 0
    ids = run("tokenizer", "encode", tmp_path / "tok", stdin=real.encode()).out
    assert run("tokenizer", "decode", tmp_path / "tok", stdin=ids.encode()).out == real + "\n"
    assert len(ids.split()) < len(real) / 1.7


def test_special_tokens_are_only_read_when_asked_for(run: Run, tokenizer: Path) -> None:
    plain = run("tokenizer", "encode", tokenizer, "<|endoftext|>").out.split()
    special = run("tokenizer", "encode", tokenizer, "<|endoftext|>", "--allow-special").out.split()
    assert len(plain) > 1
    assert len(special) == 1


def test_a_text_is_shown_cut_into_tokens(run: Run, tokenizer: Path) -> None:
    said = run("tokenizer", "inspect", tokenizer, "The cat")
    *_, shown, counted = said.out.splitlines()
    assert shown.replace("|", "") == "The cat"
    assert shown.count("|") == len(Tokenizer.load(tokenizer).encode("The cat"))
    assert re.fullmatch(r"\d+ tokens, 7 bytes, \d\.\d\d bytes per token", counted)
    assert "needs a text" in run("tokenizer", "inspect", tokenizer, stdin=b"").line


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["encode"], b"caf\xe9", "standard input: byte 3 is not UTF-8 text."),
        (["inspect"], b"\xff\xfe", "standard input: byte 0 is not UTF-8 text."),
        (["decode", "-"], b"\x80", "standard input: byte 0 is not UTF-8 text."),
        (["decode", "1 2 x"], b"", "x is not a token id"),
        (["decode", "-1"], b"", "-1"),
        (["decode", "99999"], b"", "99999"),
        (["decode", "9" * 5000], b"", "9"),
    ],
)
def test_what_is_no_text_and_no_id(words: list[str], stdin: bytes, message: str, run: Run, tokenizer: Path) -> None:
    said = run("tokenizer", words[0], tokenizer, *words[1:], stdin=stdin)
    assert said.code in (1, 2)
    assert message in said.line


# ---- explain


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_explained(name: str, run: Run) -> None:
    config = ModelConfig.preset(name)
    said = run("explain", name)
    assert (said.code, said.err) == (0, "")
    counts = re.findall(r"^ ?([a-z][\w -]+?)  +([\d,]+) +[\d.]+%", said.out, flags=re.MULTILINE)
    assert sum(int(count.replace(",", "")) for _, count in counts) == costs_of(config).total_parameters
    assert f"at a context of {config.context_length:,}" in said.out


def test_gpt2_is_as_large_as_everybody_knows(run: Run) -> None:
    said = run("explain", "gpt2-124m", "--context", 512, "--micro-batch=4").out
    assert said.startswith("gpt2-124m: 124M parameters\n")
    assert "at a context of 512" in said
    assert "micro-batch of 4" in said
    longer = run("explain", "gpt2-124m").out
    kv = {text: re.search(r"KV cache per token +([\d,]+) B", text) for text in (said, longer)}
    assert [found and found[1] for found in kv.values()] == ["36,864", "36,864"]  # 2 x 12 layers x 768 x 2 bytes


def test_a_recipe_and_a_folder_are_explained(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {vocab_size: 1000, n_layer: 2, n_head: 2, n_embd: 64, context_length: 128}\n")
    config = ModelConfig(vocab_size=1000, n_layer=2, n_head=2, n_embd=64, context_length=128)
    assert f"token embedding {64_000:>14,}".split() == run("explain", recipe).out.splitlines()[1].split()[:3]
    folder = tmp_path / "model"
    folder.mkdir()
    from groundup.model import Transformer, save_model

    save_model(Transformer(config), folder)
    by_folder, by_recipe = run("explain", folder), run("explain", recipe)
    assert by_folder.code == 0
    assert by_folder.out.splitlines()[1:] == by_recipe.out.splitlines()[1:]


def test_active_parameters_and_the_stack_are_shown(run: Run) -> None:
    said = run("explain", "mixtral-8x7b", "--context", 4096).out
    assert said.startswith("mixtral-8x7b: 46.7B parameters, 12.9B active per token\n")
    assert "│ mixture of experts" in said
    assert "32 × (layers 1 to 32)" in said
    assert "Of 8 experts, 2 are read per step" in said


def test_time_energy_and_price_follow_from_the_figures_shown(run: Run) -> None:
    said = run("explain", "gpt2-124m", "--hardware", "a100", "--tokens", "30B", "--context", 1024)
    assert (said.code, said.err) == (0, "")
    costs = costs_of(ModelConfig.preset("gpt2-124m"))
    hours = 3e10 * costs.training_flops_per_token / (0.4 * 312e12) / 3600
    found = re.search(r"a100 +1 +(\S+) (\w+) +(\S+) kWh +(\S+) USD", said.out)
    assert found is not None
    assert found[2] == "days"
    shown = [float(found[number]) for number in (1, 3, 4)]
    assert shown == [pytest.approx(true, rel=0.01) for true in (hours / 24, 0.4 * hours, 1.8 * hours)]
    assert "Assumed: 30B tokens to train on, as asked." in said.out
    assert "a100: NVIDIA A100 SXM 80 GB, 40% of 312 TFLOP/s, 2.04 TB/s, 80.0 GB, 400 W, 1.80 USD/h" in said.out


def test_all_machines_stand_side_by_side(run: Run) -> None:
    from groundup.model.hardware import HARDWARE

    said = run("explain", "tiny", "--hardware", "all").out
    rows = re.findall(r"^ (\S+) +\d+ +[\d.]+k? \w+ .*tokens/s", said, flags=re.MULTILINE)
    assert rows == list(HARDWARE)
    assert "20 per active parameter (Hoffmann et al. 2022)" in said


def test_memory_follows_the_flags(run: Run) -> None:
    def figure(label: str, *flags: object) -> float:
        found = re.search(rf"{label} +([\d.]+) (\w\w)", run("explain", "llama3-8b", "--context", 2048, *flags).out)
        assert found is not None
        return float(found[1]) * {"MB": 1e6, "GB": 1e9, "TB": 1e12}[found[2]]

    serve = [figure("memory to serve", "--dtype", dtype) for dtype in ("float32", "bfloat16", "int8", "int4")]
    assert serve == sorted(serve, reverse=True)
    one, five = (figure("KV cache, full context", "--batch", batch) for batch in (1, 5))
    assert five == pytest.approx(5 * one, rel=0.01)
    kept = [figure("activations", "--checkpointing", how) for how in ("none", "selective", "block")]
    assert kept == sorted(kept, reverse=True)
    assert figure("moments", "--optimizer", "muon") < figure("moments")


def test_a_model_is_drawn_into_a_file(run: Run, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    said = run("explain", "deepseek-v3", "--svg", tmp_path / "model.svg")
    assert said.out.endswith(f"drawn into {tmp_path / 'model.svg'}\n")
    words = [element.text for element in ElementTree.parse(tmp_path / "model.svg").iter()]
    assert "deepseek-v3: 671B parameters" in words
    assert "latent attention" in words


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("hardware", "H100", "hardware = H100: no machine of that name is known. Did you mean"),
        ("dtype", "bfloat", "dtype = bfloat is not one of float32, bfloat16, int8, int4. Did you mean bfloat16?"),
        ("checkpointing", "blocks", "checkpointing = blocks is not one of none, selective, block. Did you mean block?"),
        ("optimizer", "adam", "optimizer = adam is not one of adamw, muon. Did you mean adamw?"),
        ("batch", "0", "batch = 0 must be at least 1."),
        ("tokens", "many", "tokens = many should be a number of at least 1, such as"),
        ("tokens", "-3B", "tokens = -3B should be a number of at least 1, such as"),
        ("tokens", "nan", "tokens = nan should be a number of at least 1, such as"),
    ],
)
def test_a_wrong_flag_of_explain_is_one_line(flag: str, value: str, message: str, run: Run) -> None:
    said = run("explain", "tiny", f"--{flag}={value}")
    assert (said.code, said.out) == (2, "")
    assert message in said.line


# ---- doctor and data


def test_the_doctor_shows_its_findings_as_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("torch", "ok", "2.13"), Finding("pyarrow", "note", "pip install 'groundup[data]'")]
    monkeypatch.setattr(doctor_room, "examine", lambda _folder: findings)
    said = run("doctor")
    assert (said.code, said.err) == (0, "")
    assert [line.rstrip() for line in said.out.splitlines()[:2]] == [
        "ok    torch    2.13",
        "note  pyarrow  pip install 'groundup[data]'",
    ]
    findings.append(Finding("disk", "fail", "cannot write at runs"))
    said = run("doctor")
    assert said.code == 1
    assert said.line == "doctor: disk would not work here; the lines above say how to mend it."
    assert "cannot write at runs" in said.out
    assert set(doctor_command.STYLES) == {"ok", "note", "fail"}


def test_a_text_is_prepared_and_inspected(run: Run, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "prepared"
    text.write_text("\n".join(f"Line {number} says {number * 7919 % 1000}." for number in range(500)))
    prepared = run("data", "prepare", text, "--out", out, "--vocab-size", 280)
    assert prepared.code == 0
    inspected = run("data", "inspect", out)
    assert (inspected.code, inspected.err) == (0, "")
    rows = [line.split() for line in inspected.out.splitlines()]
    assert rows[0][:4] == ["part", "documents", "bytes", "tokens"]
    assert [row[0] for row in rows[1:3]] == ["train", "val"]
    assert inspected.out.splitlines()[-1] == f"{out}: vocabulary of 280"
    assert prepared.out.endswith(inspected.out)


def test_the_named_sources_are_listed(run: Run) -> None:
    said = run("data", "list")
    assert said.code == 0
    assert {"stdlib", "shakespeare"} <= {line.split()[0] for line in said.out.splitlines() if line[:1].isalpha()}


# ---- recipes


def test_the_resolved_recipe_is_shown_and_can_be_saved_and_used(run: Run, tmp_path: Path) -> None:
    said = run("demo", "--print-config", "--seed", 3, "--n-layer=2")
    assert (said.code, said.err) == (0, "")
    shown = yaml.safe_load(said.out)
    assert (shown["seed"], shown["model"]["n_layer"], shown["out"], shown["minutes"]) == (3, 2, "runs/demo", 5)
    saved = tmp_path / "mine.yaml"
    saved.write_text(said.out)
    assert set(read_recipe(saved, PretrainRecipe).values) <= set(keys_of(PretrainRecipe))
    again = run("pretrain", saved, "--print-config")
    assert again.out == said.out


@pytest.mark.parametrize("flag", ["--n-embd=100", "--n-head=5"])
def test_one_side_of_the_shape_can_be_given_alone(flag: str, run: Run) -> None:
    """The other side is derived: its default is no contradiction."""
    assert run("demo", flag, "--print-config").code == 0


def test_what_will_be_derived_is_not_shown_as_decided(run: Run) -> None:
    """Otherwise a saved --print-config would be another run."""
    shown = yaml.safe_load(run("demo", "--print-config").out)
    for section, key in (("model", "n_layer"), ("model", "n_ff"), ("model", "dropout"), ("optim", "learning_rate")):
        assert shown[section].get(key) is None, key


# ---- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A model that was never trained: what it says is of no interest, only that it says it in the same way."""
    import torch

    from groundup.inference import LanguageModel
    from groundup.model import Transformer

    torch.manual_seed(5)
    tok = Tokenizer.load(tokenizer)
    config = ModelConfig(vocab_size=tok.vocab_size, context_length=64, n_layer=1, n_head=2, n_embd=16)
    folder = tmp_path_factory.mktemp("cli") / "model"
    LanguageModel(Transformer(config), tok).save(folder)
    return folder


@pytest.mark.parametrize("prompt", ["The cat", "# Introduction", "null", "- a list", "Grüße"])
def test_a_prompt_is_continued_however_it_is_given(prompt: str, run: Run, model: Path) -> None:
    said = run("generate", model, f"--prompt={prompt}" if prompt != "null" else "-", "--max-tokens=7", "--seed=3",
               stdin=prompt.encode())  # fmt: skip
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(prompt)
    assert len(said.out) > len(prompt) + 1
    assert run("generate", model, "--max-tokens=7", "--seed=3", stdin=prompt.encode()).out == said.out
    if prompt[0] not in "-n":
        assert run("generate", model, prompt, "--max-tokens=7", "--seed", 3).out == said.out
        assert run("generate", model, prompt, "--max-tokens=7", "--seed", 4).out != said.out


def test_a_prompt_that_is_not_text(run: Run, model: Path) -> None:
    assert "standard input: byte 1 is not UTF-8 text" in run("generate", model, "-", stdin=b"a\xff").line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens=-1"], "max_tokens"), (["--temperature=-1"], "temperature"), (["--top-p=0"], "top_p"),
        (["--top-k=0"], "top_k"), (["--min-p=2"], "min_p"), (["--device=abacus"], "abacus"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_one_line(flags: list[str], message: str, run: Run, model: Path) -> None:
    said = run("generate", model, "The", *flags)
    assert said.code == 2
    assert message in said.line


def test_a_conversation(run: Run, model: Path) -> None:
    said = run(
        "chat", model, "--max-tokens=3", "--seed=1",
        stdin=b"/help\n/set temperature 0\n/set temperature cold\n/set top_p 7\n/set colour 3\n/what\n"
        b"\nThe cat\n/new\n/quit\nnever",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    for expected in (
        "parameters, context of 64 tokens",
        "/set KEY VALUE",
        "temperature = 0.0",
        "/set: temperature = 'cold' should be a number.",
        "top_p = 7.0 must be above 0 and at most 1.",
        "colour cannot be set. Known: max_tokens, temperature, top_k, top_p,",
        "/what is not a command.",
        "(forgotten)",
    ):
        assert expected in said.out
    assert "never" not in said.out
    assert run("chat", model, stdin=b"").code == 0, "the end of the input is the end of the conversation"


def test_a_conversation_in_another_encoding_ends_in_one_line(run: Run, model: Path) -> None:
    said = run("chat", model, "--max-tokens=3", stdin=b"caf\xe9\n")
    assert said.code == 2
    assert said.err.startswith("groundup: standard input: byte 3 is not UTF-8 text.")


def test_a_model_folder_is_json_and_safetensors_only(model: Path) -> None:
    assert {path.suffix for path in model.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt", ".jinja"}
    assert json.loads((model / "config.json").read_text())


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a chat template."""
    import torch

    from groundup.inference import LanguageModel
    from groundup.model import Transformer

    torch.manual_seed(7)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["the cat sat on the mat, and the dog sat on the cat. " * 9]
    tok = Tokenizer.train(texts, 320, special_tokens=names, show_progress=False).with_chat_template("chatml")
    config = ModelConfig(vocab_size=tok.vocab_size, context_length=512, n_layer=1, n_head=2, n_embd=16)
    folder = tmp_path_factory.mktemp("chat") / "model"
    LanguageModel(Transformer(config), tok).save(folder)
    return folder


def test_a_conversation_by_template_is_kept_taken_back_saved_and_loaded(
    run: Run, chat_model: Path, tmp_path: Path
) -> None:
    saved, page = tmp_path / "talk.json", tmp_path / "talk.md"
    said = run(
        "chat", chat_model, "--max-tokens=5", "--seed=1", "--system", "Be kind.",
        stdin=f"The cat\nThe dog\n/undo\n/save {saved}\n/export {page}\n/again\n/set\n/load {tmp_path}/none\n"
        f"two \\\nlines\n/new\n/load {saved}\n/undo\n/undo\n/again\n/save\n".encode(),
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    assert "continues your text" not in said.out
    talk = json.loads(saved.read_text())
    assert talk["system"] == "Be kind."
    assert [one["role"] for one in talk["messages"]] == ["user", "assistant"]
    assert talk["messages"][0]["content"] == "The cat"
    assert page.read_text().startswith("**system**\n\nBe kind.\n\n**user**\n\nThe cat\n\n**assistant**")
    for expected in (
        "(taken back)", "(saved:", "max_tokens = 5", "none: no such file", "(loaded: 2 messages)",
        "Nothing was said yet.", "/save FILE: where to?",
    ):  # fmt: skip
        assert expected in said.out, expected
    plain = run("chat", chat_model, "--template=none", "--max-tokens=3", stdin=b"The cat\n")
    assert "continues your text" in plain.out
    again = run("chat", chat_model, "--load", saved, "--max-tokens=3", stdin=b"/undo\n")
    assert "(loaded: 2 messages)" in again.out


def test_a_file_of_prompts(run: Run, model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"The cat"\n{"prompt": "The dog", "max_tokens": 2}\n3\n')
    words = ("generate", model, "--input", source, "--output", target, "--max-tokens=4", "--seed=1")
    assert "2 prompts answered, 0 were there, 1 failed." in run(*words).out
    assert "0 prompts answered, 2 were there, 1 failed." in run(*words).out
    assert len(target.read_text().splitlines()) == 3
    assert "--input and --output belong together" in run("generate", model, "--input", source).line
    assert "give one of a prompt, --file and --input" in run("generate", model, "x", *words[2:]).line
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The cat")
    said = run("generate", model, "--file", prompt, "--max-tokens=4", "--seed=1")
    assert said.out == run("generate", model, "The cat", "--max-tokens=4", "--seed=1", "--guess=true").out
    several = run("generate", model, "The cat", "--n=2", "--max-tokens=4", "--seed=1")
    assert "--- 2 of 2" in several.out
