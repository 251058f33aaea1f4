"""``groundup tokenizer`` at work: train, import, inspect, bench."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groundup.tokenizer import Tokenizer

Run = Callable[..., Any]
TEXT = "The cat sat on the mat, and the dog sat on the log.\nGrüße, 世界! def read(path): return open(path)\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tokenizer"
    Tokenizer.train([TEXT * 8], 300, show_progress=False).save(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Texts in three languages, and two files that hold none."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [
        {"lang": "en", "text": "The cat sat on the mat. " * 20},
        {"lang": "de", "text": "Die Katze saß auf der Matte. " * 20},
        {"lang": "zh", "text": "猫坐在垫子上。" * 20},
    ]
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (folder / "plain.txt").write_text("Кошка сидела на коврике. " * 20, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (folder / "empty.txt").write_bytes(b"")
    return folder


# ---- train


def test_training_says_what_it_read_and_what_it_left_out(run: Run, corpus: Path, tmp_path: Path) -> None:
    said = run("tokenizer", "train", corpus, "--vocab-size", 300, "--out", tmp_path / "tok")
    assert (said.code, said.err) == (0, "")
    line = said.out.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'tok'}: 300 tokens from 4 documents (left out: ")
    assert "1 empty" in line


def test_training_equals_the_library(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 30)
    assert run("tokenizer", "train", tmp_path / "a.txt", "--vocab-size=310", f"--out={tmp_path / 'tok'}").code == 0
    expected = Tokenizer.train([TEXT * 30], 310, show_progress=False)
    assert Tokenizer.load(tmp_path / "tok").fingerprint == expected.fingerprint


def test_a_vocabulary_size_comes_from_the_size_of_the_text(run: Run, tmp_path: Path) -> None:
    words = " ".join(f"word{number} and{number % 97}" for number in range(20_000))
    (tmp_path / "a.txt").write_text(words)
    assert run("tokenizer", "train", tmp_path / "a.txt", "--out", tmp_path / "tok").code == 0
    from groundup.data import suggest_vocab_size

    assert Tokenizer.load(tmp_path / "tok").vocab_size == suggest_vocab_size(len(words))


def test_texts_are_read_one_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many documents exist as are counted at once: a corpus may be larger than memory."""
    import weakref

    from groundup.data import sources
    from groundup.data.document import Document

    class Text(str):
        __slots__ = ("__weakref__",)

    alive: list[weakref.ref[Text]] = []
    most = 0

    def documents(path: Path, skip: object) -> Any:
        nonlocal most
        for number in range(200):
            text = Text(f"text number {number} of many texts. " * 3)
            alive.append(weakref.ref(text))
            yield Document(text, str(number))
            del text
            most = max(most, sum(ref() is not None for ref in alive))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(sources, "read_file", documents)
    monkeypatch.setattr("groundup.tokenizer.train.BATCH", 500)  # characters
    said = run("tokenizer", "train", tmp_path / "a.txt", "--vocab-size", 280, "--out", tmp_path / "tok")
    assert "280 tokens from 200 documents" in said.out
    assert most < 20


@pytest.mark.parametrize("algorithm", ["bytes", "characters", "words"])
def test_the_small_tokenizers(run: Run, tmp_path: Path, algorithm: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ["--algorithm", algorithm, "--special-tokens", "<|endoftext|>,<|user|>", "--out", tmp_path / "tok"]
    said = run("tokenizer", "train", tmp_path / "a.txt", *flags)
    assert (said.code, said.err) == (0, "")
    tok = Tokenizer.load(tmp_path / "tok")
    assert {"<|endoftext|>", "<|user|>"} <= tok.special_tokens.keys()
    ids = run("tokenizer", "encode", tmp_path / "tok", "The cat").out.strip()
    assert len(ids.split()) == {"bytes": 7, "characters": 7, "words": 2}[algorithm]
    assert run("tokenizer", "decode", tmp_path / "tok", ids).out == "The cat\n"
    shown = run("tokenizer", "inspect", tmp_path / "tok", "The cat")
    assert shown.code == 0
    assert "The" in shown.out.replace("|", "")


def test_normalization_and_frequency(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("café cafe\u0301 " * 40, encoding="utf-8")
    flags = ["--vocab-size", 262, "--normalization", "NFC", "--min-frequency", 3, "--out", tmp_path / "tok"]
    assert run("tokenizer", "train", tmp_path / "a.txt", *flags).code == 0
    tok = Tokenizer.load(tmp_path / "tok")
    assert tok.encode("cafe\u0301") == tok.encode("café")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm", "wordpiece"], "algorithm = 'wordpiece' should be one of bpe, bytes, characters, words"),
        (["--normalization", "nfc"], "normalization = 'nfc' should be"),
        (["--vocab-size", "12"], "vocab_size = 12 is too small"),
        (["--special-tokens", "<|a|>,<|a|>"], "special token '<|a|>'"),
        (["--pattern", "(a"], "does not compile"),
        (["--pattern", "gtp4"], "Did you mean gpt4?"),
        (["--min-frequency", "0"], "min_frequency = 0"),
        (["--threads", "0"], "threads"),
        (["--limit", "0"], "--limit 0"),
    ],
)
def test_what_cannot_be_trained(run: Run, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    said = run("tokenizer", "train", tmp_path / "a.txt", "--out", tmp_path / "tok", *flags)
    assert said.code == 2
    assert message in said.line
    assert not (tmp_path / "tok").exists()


# ---- import


def test_a_tiktoken_file_becomes_a_folder(run: Run, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers" / "r50k_base.tiktoken"
    said = run("tokenizer", "import", source, "--out", tmp_path / "gpt2")
    assert (said.code, said.err) == (0, "")
    assert re.search(r"gpt2: 50,257 tokens from .*r50k_base\.tiktoken", said.out)
    assert run("tokenizer", "encode", tmp_path / "gpt2", "hello world").out == "31373 995\n"
    assert run("tokenizer", "encode", source, "hello world").out == "31373 995\n"


def test_a_tiktoken_file_of_ones_own_needs_a_pattern(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.tiktoken"
    tok = Tokenizer.load(tokenizer)
    tok.save_tiktoken(file)
    assert "pattern" in run("tokenizer", "import", file, "--out", tmp_path / "tok").line
    assert run("tokenizer", "import", file, "--out", tmp_path / "tok", "--pattern", "gpt4").code == 0
    assert Tokenizer.load(tmp_path / "tok").encode(TEXT) == tok.encode(TEXT)


@pytest.mark.parametrize(("name", "content"), [("x.tiktoken", b"%%% 0\n"), ("tokenizer.json", b"{"), ("x.gguf", b"GG")])
def test_a_damaged_vocabulary_is_one_line(run: Run, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    said = run("tokenizer", "import", tmp_path / name, "--out", tmp_path / "tok", "--pattern", "gpt4")
    assert said.code == 1
    assert name in said.line
    assert not (tmp_path / "tok").exists()


# ---- inspect


def test_inspect_shows_data_by_script(run: Run, tokenizer: Path, corpus: Path) -> None:
    said = run("tokenizer", "inspect", tokenizer, "--data", corpus)
    assert (said.code, said.err) == (0, "")
    assert "4 documents" in said.out
    assert "left out: " in said.out
    assert re.search(r"Cyrillic +1 +900 ", said.out) or re.search(r"Cyrillic +1 +", said.out)
    tok = Tokenizer.load(tokenizer)
    russian = "Кошка сидела на коврике. " * 20
    row = next(line for line in said.out.splitlines() if "Cyrillic" in line).split()
    assert row[1:4] == ["1", f"{len(russian.encode()):,}", f"{len(tok.encode(russian)):,}"]
    for wanted in ("longest tokens", "rarest tokens that occur", "tokens of the vocabulary never occur", "more tokens"):
        assert wanted in said.out


def test_inspect_writes_a_page(run: Run, tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = run("tokenizer", "inspect", tokenizer, "--data", corpus, "--html", page)
    assert said.code == 0
    assert f"page: {page}" in said.out
    assert "Кошка" not in said.err
    html = page.read_text(encoding="utf-8")
    assert "never occur" in html
    assert "data-note=" in html
    assert run("tokenizer", "inspect", tokenizer, "<script>", "--html", page).code == 0
    assert "<script" not in page.read_text(encoding="utf-8")


def test_special_tokens_are_shown_when_asked_for(run: Run, tokenizer: Path) -> None:
    plain = run("tokenizer", "inspect", tokenizer, "a<|endoftext|>")
    special = run("tokenizer", "inspect", tokenizer, "a<|endoftext|>", "--allow-special")
    assert special.out.splitlines()[0] == "a|<|endoftext|>|"
    assert plain.out.splitlines()[0] != special.out.splitlines()[0]


def test_inspect_of_a_long_text_is_cut(run: Run, tokenizer: Path) -> None:
    said = run("tokenizer", "inspect", tokenizer, stdin=b"\x00" * 7000)
    assert "… and 2,000 more tokens" in said.out
    assert said.out.endswith("7,000 tokens, 7,000 bytes, 1.00 bytes per token\n")


def test_inspect_takes_a_text_or_data(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    assert "not both" in run("tokenizer", "inspect", tokenizer, "a", "--data", "b").line
    assert "no such file" in run("tokenizer", "inspect", tokenizer, "--data", tmp_path / "nowhere").line
    said = run("tokenizer", "inspect", tokenizer, "a", "--html", tmp_path)
    assert said.code == 1
    assert str(tmp_path) in said.line


# ---- bench


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement sets for other libraries does not outlive the test."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.usefixtures("environment")
def test_bench_measures_this_tokenizer_and_its_peers(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text(TEXT * 200, encoding="utf-8")
    said = run("tokenizer", "bench", tokenizer, "--data", tmp_path / "a.txt", "--megabytes", 0.01, "--threads", 2)
    assert (said.code, said.err) == (0, "")
    rows = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert len(re.findall(r"\d+\.\d", rows["groundup"])) == 4
    assert rows["tiktoken"].rstrip().endswith("equal")
    assert rows["Hugging Face tokenizers"].rstrip().endswith("equal")
    tokens = int(rows["groundup"].split()[-1].replace(",", ""))
    size = (TEXT * 200).encode()[:10_000]
    assert tokens == len(Tokenizer.load(tokenizer).encode(size.decode("utf-8", "ignore")))


@pytest.mark.parametrize("flags", [["--megabytes", "0"], ["--threads", "0"], ["--data", "nowhere.txt"]])
def test_bench_refuses_nonsense(run: Run, tokenizer: Path, flags: list[str]) -> None:
    said = run("tokenizer", "bench", tokenizer, *flags)
    assert said.code in (1, 2)
    assert said.line


@pytest.mark.usefixtures("environment")
def test_a_library_that_cannot_load_it_is_said(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    Tokenizer.train([TEXT], algorithm="words", show_progress=False).save(tmp_path / "tok")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    said = run("tokenizer", "bench", tmp_path / "tok", "--data", tmp_path / "a.txt", "--threads", 1)
    assert said.code == 0
    assert re.search(r"^tiktoken .*cannot load", said.out, flags=re.MULTILINE)


# ---- all of them


@pytest.mark.parametrize("command", ["train", "encode", "decode", "inspect", "import", "bench"])
def test_help_names_every_flag(run: Run, command: str) -> None:
    said = run("tokenizer", command, "--help")
    assert said.code == 0
    assert "ARG:" not in said.out
    flags = {"train": "--algorithm", "inspect": "--html", "import": "--pattern", "bench": "--megabytes"}
    assert flags.get(command, "--help") in said.out


def test_help_loads_nothing_heavy(root: Path) -> None:
    heavy = "{'numpy', 'numba', 'torch', 'rich', 'jinja2', 'tiktoken', 'tokenizers'} & set(sys.modules)"
    command = "from groundup.cli.main import main; main(['tokenizer', '--help'])"
    code = f"import sys; {command}; print({heavy}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "src", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    assert "bench" in done.stdout
