"""What the data room's tests share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from remote_corpus import LINE

from groundup.data import CorpusRecipe, PreparedData, ShardWriter, TokenSet, places, prepare

# What a shard writer asks of a tokenizer; its ids need no text behind them.
NUMBERS = SimpleNamespace(vocab_size=1009, end_of_text_id=1008, fingerprint="f" * 64)


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., TokenSet]:
    """Writes token shards from lists of ids, three bytes of text per id."""

    def make(documents: list[list[int]], shard_tokens: int = 10**6, tokenizer: SimpleNamespace = NUMBERS) -> TokenSet:
        folder = tmp_path / f"tokens-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        writer = ShardWriter(folder, tokenizer, shard_tokens)
        for ids in documents:
            writer.add(np.array(ids, np.uint16), text_bytes=3 * len(ids))
        writer.close()
        return TokenSet.open(folder)

    return make


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A corpus of many shards of at most 499 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    chosen = random.Random(7)
    for number in range(41):
        (folder / "texts" / f"{number:02d}.txt").write_text(" ".join(chosen.choices(LINE.split(), k=101 + number)))
    made = prepare(str(folder / "texts"), folder / "out", vocab_size=277, corpus=CorpusRecipe(shard_tokens=499))
    assert len(made.train._entries) > 6
    return made


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and no waiting before something is tried again."""
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("GROUNDUP_CACHE_BYTES", raising=False)
    monkeypatch.setattr(places, "_PAUSES", (0.0, 0.0))
