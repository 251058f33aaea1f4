"""Text that is prepared already, by this groundup or an older one, and what holds it together."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from groundup.data import CorpusRecipe, PreparedData, prepare
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

LINE = "the of and a to in is you that it he was for on are as with his they at be this have from or"


def prose(n_words: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    return "\n".join(" ".join(chosen.choices(LINE.split(), k=8)) for _ in range(n_words // 8)) + "\n"


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """60 documents of some 800 bytes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(prose(240, seed=number))
    return folder


def test_a_digest_tells_corpora_apart(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "a", vocab_size=300)
    equal = prepare(str(corpus_folder), tmp_path / "b", vocab_size=300)
    other = prepare(str(corpus_folder), tmp_path / "c", vocab_size=300, corpus=CorpusRecipe(split_seed=4))
    assert len(made.digest()) == 64
    assert made.digest() == equal.digest() == PreparedData.open(tmp_path / "a").digest() != other.digest()
    (tmp_path / "a" / "val" / "manifest.json").unlink()
    with pytest.raises(GroundupError, match=r"val/manifest\.json"):
        made.digest()


# ---- what is held out, and whose choice that is


def test_what_is_held_out_is_chosen_by_its_own_seed(corpus_folder: Path, tmp_path: Path) -> None:
    held_out = [
        set(prepare(str(corpus_folder), tmp_path / str(number), corpus=CorpusRecipe(split_seed=key)).texts("val"))
        for number, key in enumerate((1337, 1337, 4))
    ]
    assert held_out[0] == held_out[1] != held_out[2]
    assert CorpusRecipe().split_seed == 1337


def as_made_before(out: Path, seed: int) -> None:
    """Write the inputs as a groundup did whose choice of what is held out hung on the seed."""
    stats = json.loads((out / "stats.json").read_text())
    del stats["inputs"]["corpus"]["split_seed"], stats["inputs"]["algorithm"]
    stats["inputs"]["seed"] = seed
    (out / "stats.json").write_text(json.dumps(stats))


@pytest.mark.parametrize(
    ("seed", "asked", "kept"), [(1337, 1337, True), (7, 1337, True), (7, 7, True), (7, 8, False), (1337, 8, False)]
)
def test_a_corpus_made_before_stays_good(
    corpus_folder: Path, tmp_path: Path, seed: int, asked: int, kept: bool
) -> None:
    out = tmp_path / "out"
    stamp = prepare(str(corpus_folder), out).folder.stat().st_ino
    as_made_before(out, seed)
    again = prepare(str(corpus_folder), out, corpus=CorpusRecipe(split_seed=asked))
    assert (again.folder.stat().st_ino == stamp) == kept
    if kept:
        prepare(str(corpus_folder), out, corpus=CorpusRecipe(split_seed=asked, val_fraction=0.1))
        assert out.stat().st_ino != stamp


# ---- text that is prepared already


def test_a_prepared_folder_is_opened_as_it_is(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = prepare(str(corpus_folder), tmp_path / "prepared", vocab_size=300)
    monkeypatch.setattr(Tokenizer, "train", None)  # would be called
    capsys.readouterr()
    for extra in ({}, {"vocab_size": 300}, {"tokenizer": made.tokenizer}, {"max_vocab_size": 270}):
        given = prepare(str(made.folder), tmp_path / "run" / "data", **extra)
        assert given.folder == made.folder
        assert given.train.n_tokens == made.train.n_tokens
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out.count("a prepared corpus, used as it is") == 4
    assert prepare(str(made.folder), made.folder).folder == made.folder
    with PreparedDataUntouched(made.folder):
        for extra, message in (
            ({"vocab_size": 512}, r"prepared with 300 tokens, not with vocab_size = 512"),
            ({"limit": 5}, r"taken as a whole\. Leave limit = 5 out"),
        ):
            with pytest.raises(UsageError, match=message):
                prepare(str(made.folder), tmp_path / "run", **extra)


class PreparedDataUntouched:
    """Every file of a folder has the same bytes afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _content(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def __enter__(self) -> None:
        self.before = self._content()

    def __exit__(self, *_: object) -> None:
        assert self._content() == self.before


def test_a_prepared_folder_with_another_tokenizer(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "prepared", vocab_size=300)
    other = Tokenizer.train([prose(5000)], vocab_size=280, show_progress=False)
    with pytest.raises(UsageError, match="prepared with another tokenizer than the given one"):
        prepare(str(made.folder), tmp_path / "out", tokenizer=other)


def test_a_damaged_prepared_folder_is_not_taken_for_text(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "prepared")
    (made.folder / "train" / "tokens-00000.bin").write_bytes(b"cut")
    with pytest.raises(GroundupError, match=r"tokens-00000\.bin"):
        prepare(str(made.folder), tmp_path / "out")


def test_texts_beside_a_stats_file_of_ones_own(corpus_folder: Path, tmp_path: Path) -> None:
    (corpus_folder / "stats.json").write_text('{"words": 3}')
    assert prepare(str(corpus_folder), tmp_path / "out").stats["documents"]["cleaned"] == 60
