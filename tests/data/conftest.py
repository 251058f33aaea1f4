"""What the data room's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from groundup.data import ShardWriter, TokenSet

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
