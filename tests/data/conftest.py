"""What the data room's tests share."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on a free loopback port while the block runs; gives the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``serving``, past any proxy that the environment names."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return serving
