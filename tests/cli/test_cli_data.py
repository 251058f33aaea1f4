"""``groundup data export|import``, and what the other commands of data make of a corpus that is prepared already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.data import PreparedData

Run = Callable[..., Any]


@pytest.fixture
def prepared(run: Run, tmp_path: Path) -> Path:
    text, out = tmp_path / "text.txt", tmp_path / "prepared"
    text.write_text("\n".join(f"Line {number} says {number * 7919 % 1000}." for number in range(500)))
    assert run("data", "prepare", text, "--out", out, "--vocab-size", 280).code == 0
    return out


@pytest.mark.parametrize("layout", ["nanogpt", "megatron"])
def test_there_and_back(run: Run, prepared: Path, tmp_path: Path, layout: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    said = run("data", "export", prepared, "--to", layout, there)
    assert (said.code, said.err) == (0, "")
    assert [line.split(":")[0].rsplit("/")[-1] for line in said.out.splitlines()][:2] == (
        ["train.bin", "val.bin"] if layout == "nanogpt" else ["train.bin", "train.idx"]
    )
    assert ("pickle.dump({'vocab_size': 280}" in said.out) == (layout == "nanogpt")
    said = run("data", "import", there, "--tokenizer", prepared / "tokenizer", back)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == f"{back}: vocabulary of 280"
    before, after = PreparedData.open(prepared), PreparedData.open(back)
    assert after.train.read(0, after.train.n_tokens).tolist() == before.train.read(0, before.train.n_tokens).tolist()
    assert run("data", "import", there / "train.bin", back).code == 0  # the tokenizer beside it


def test_mistakes_are_one_line(run: Run, prepared: Path, tmp_path: Path) -> None:
    np.array([5, 6, 7] * 9, "<u2").tofile(tmp_path / "mine.bin")
    said = run("data", "import", tmp_path / "mine.bin", tmp_path / "out")
    assert said.code == 2
    assert said.line.endswith("Name it with --tokenizer.")
    said = run("data", "import", tmp_path / "mine.bin", tmp_path / "out", "--tokenizer", prepared / "tokenizer")
    assert said.code == 0
    said = run("data", "export", prepared, tmp_path / "out2", "--to", "llama")
    assert said.code == 2
    assert "llama" in said.line
    assert run("data", "export", tmp_path, tmp_path / "out2").line.startswith(f"{tmp_path}: no prepared corpus")
    assert run("data", "export", prepared).code == 2
    said = run("data", "inspect", "abacus://bucket/corpus")
    assert (said.code, "nothing here reads abacus://" in said.line) == (2, True)


def test_what_is_prepared_is_shown_not_made_again(run: Run, prepared: Path, tmp_path: Path) -> None:
    said = run("data", "prepare", prepared, "--out", tmp_path / "again")
    assert said.code == 0
    assert said.out.splitlines()[0] == f"{prepared}: a prepared corpus, used as it is."
    assert said.out.splitlines()[-1] == f"{prepared}: vocabulary of 280"
    assert not (tmp_path / "again").exists()
    said = run("data", "prepare", prepared, "--out", tmp_path / "again", "--vocab-size", 300)
    assert said.code == 2
    assert "prepared with 280 tokens" in said.line


def test_the_held_out_part_is_chosen_by_split_seed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text("\n".join(f"Line {n} of {number}." for n in range(60)))
    held_out = []
    for split_seed in (1, 1, 2):
        words = ("--vocab-size", 280, "--split-seed", split_seed, "--val-fraction", 0.2)
        assert run("data", "prepare", folder, "--out", tmp_path / "out", *words).code == 0
        held_out.append(set(PreparedData.open(tmp_path / "out").texts("val")))
    assert held_out[0] == held_out[1] != held_out[2]
