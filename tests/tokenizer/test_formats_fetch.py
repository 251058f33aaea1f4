"""Vocabularies by name, from a hub and a publisher that are played on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from groundup.runtime import GroundupError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.formats import fetch

COMMIT = "a" * 40


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def fails(spec: str, **arguments: Any) -> str:
    with pytest.raises(GroundupError) as caught:
        Tokenizer.load(spec, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- OpenAI's files


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves one file, as well as the class attributes say."""

    content = b""
    break_after: int | None = None
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012 - set anew for each test

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.asked.append((self.path, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) if self.break_after is None else start + self.break_after
        self.wfile.write(self.content[start:end])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def publisher(
    loopback: Callable, vocabularies: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[type[Publisher]]:
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Publisher, "asked", [])
    monkeypatch.setattr(Publisher, "break_after", None)
    monkeypatch.setattr(Publisher, "content", (vocabularies / "r50k_base.tiktoken").read_bytes())
    with loopback(Publisher) as address:
        monkeypatch.setattr(fetch, "ADDRESS", f"{address}/encodings/")
        yield Publisher


def test_openais_vocabulary_is_fetched_once_and_goes_on_where_it_broke_off(
    publisher: type[Publisher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.break_after = 500_000
    message = fails("r50k")
    assert "broke off. Run the same command again: it goes on after 500,000 bytes" in message
    publisher.break_after = None
    tok = Tokenizer.load("r50k")
    assert publisher.asked == [
        ("/encodings/r50k_base.tiktoken", None),
        ("/encodings/r50k_base.tiktoken", "bytes=500000-"),
    ]
    assert (tok.vocab_size, tok.end_of_text_id) == (50257, 50256)
    assert [path.name for path in (tmp_path / "data" / "tokenizers").iterdir()] == ["r50k_base.tiktoken"]
    monkeypatch.setattr(fetch, "ADDRESS", nobody() + "/")
    for name in ("r50k", "r50k_base", "openai:r50k_base"):
        assert Tokenizer.load(name).fingerprint == tok.fingerprint


def test_a_wrong_file_is_fetched_again_or_refused(publisher: type[Publisher], tmp_path: Path) -> None:
    kept = tmp_path / "data" / "tokenizers" / "r50k_base.tiktoken"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"IQ== 0\n")  # cut short by another hand
    assert Tokenizer.load("r50k").vocab_size == 50257
    kept.unlink()
    publisher.content = publisher.content[:-10] + b"xxxxxxxxx\n"
    assert "not the file it should be (SHA-256" in fails("openai:r50k")
    assert list(kept.parent.iterdir()) == []


def test_openais_vocabulary_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "ADDRESS", nobody() + "/")
    assert "no connection (" in (message := fails("openai:cl100k"))
    assert message.endswith("Check the network, or pass a path to a file you have.")


@pytest.mark.usefixtures("publisher")
def test_a_path_wins_over_a_name(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "r50k")
    assert Tokenizer.load("r50k").fingerprint == small.fingerprint
    assert Tokenizer.load("openai:r50k").vocab_size == 50257


# ---- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The answers of the hub that reading a tokenizer needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - set anew for each test
    damaged: set[str] = set()  # noqa: RUF012
    lfs: set[str] = set()  # noqa: RUF012
    downloads: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def sibling(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        told: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
        if name in self.lfs:
            told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return told

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/ann/tiny", f"/api/models/ann/tiny/revision/{COMMIT}"):
            siblings = [self.sibling(name) for name in self.files]
            body = json.dumps({"id": "ann/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        elif (name := path.removeprefix(f"/ann/tiny/resolve/{COMMIT}/")) in self.files:
            body = self.files[name]
            if name in self.damaged:
                body = body[:-1] + b"?"
            if with_body:
                self.downloads.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(loopback: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Tokenizer) -> Iterator[type[Hub]]:
    """A repository that holds ``small`` beside weights and code."""
    small.save(tmp_path / "made")
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir() if path.suffix == ".json"}
    others = {"model.safetensors": b"weights", "modeling.py": b"code", "original/x.model": b"", "config.json": b"{}"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in (("downloads", []), ("damaged", set()), ("files", made | others), ("lfs", {"tokenizer.json"})):
        monkeypatch.setattr(Hub, name, value)
    with loopback(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield Hub


def test_only_the_tokenizers_files_are_fetched_and_only_once(hub: type[Hub], small: Tokenizer) -> None:
    for _ in range(2):
        assert Tokenizer.load("hf:ann/tiny").fingerprint == small.fingerprint
    assert sorted(hub.downloads) == ["tokenizer.json", "tokenizer_config.json"]


def test_offline_what_was_fetched_before_is_used(
    hub: type[Hub], small: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = nobody()
    online = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "the hub cannot be reached (" in (message := fails("hf:ann/tiny"))
    assert message.endswith("Check the network, or pass a path to a file you have.")
    monkeypatch.setenv("HF_ENDPOINT", online)
    Tokenizer.load("hf:ann/tiny")
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert Tokenizer.load("hf:ann/tiny").fingerprint == small.fingerprint
    assert "using its 2 files that were downloaded before" in " ".join(capsys.readouterr().err.split())
    assert len(hub.downloads) == 2


def test_a_damaged_download_is_refused(hub: type[Hub]) -> None:
    hub.damaged = {"tokenizer.json"}  # of which the hub gives the SHA-256: it never comes into the cache
    assert "tokenizer.json: not the file it should be (SHA-256" in fails("hf:ann/tiny")
    hub.damaged = {"tokenizer_config.json"}
    message = fails("hf:ann/tiny")
    assert "tokenizer_config.json is damaged (its digest is" in message
    assert "also when fetched again, and was removed. Run the same command again later" in message


def test_a_revision(hub: type[Hub], small: Tokenizer) -> None:
    with pytest.raises(GroundupError):
        Tokenizer.load("hf:ann/tiny@v9")
    assert Tokenizer.load(f"hf:ann/tiny@{COMMIT}").fingerprint == small.fingerprint


def test_the_checksum_that_the_caller_insists_on(hub: type[Hub], small: Tokenizer) -> None:
    digest = hashlib.sha256(hub.files["tokenizer.json"]).hexdigest()
    assert Tokenizer.load("hf:ann/tiny", sha256=digest).fingerprint == small.fingerprint
    assert "not the file it should be" in fails("hf:ann/tiny", sha256="0" * 64)


def test_a_file_or_a_folder_in_a_repository(hub: type[Hub], small: Tokenizer, tmp_path: Path) -> None:
    small.save_tiktoken(tmp_path / "small.tiktoken")
    ranks = (tmp_path / "small.tiktoken").read_bytes()
    hub.files = {"old/tokenizer.json": hub.files["tokenizer.json"], "small.tiktoken": ranks, "x.gguf": b"GGUF"}
    assert Tokenizer.load("hf:ann/tiny:old").fingerprint == small.fingerprint
    assert Tokenizer.load("hf:ann/tiny:old/tokenizer.json").fingerprint == small.fingerprint
    assert Tokenizer.load("hf:ann/tiny", pattern="gpt4").merges == small.merges
    assert Tokenizer.load("hf:ann/tiny:small.tiktoken", pattern="gpt4").merges == small.merges
    assert "x.gguf" not in hub.downloads


def test_repositories_without_a_tokenizer(hub: type[Hub]) -> None:
    hub.files = {"model.safetensors": b"weights", "old/tokenizer.json": b"{}"}
    assert "no tokenizer in this repository. Name one of its files, as in hf:owner/name:old" in fails("hf:ann/tiny")
    hub.files = {"model.safetensors": b"weights"}
    assert fails("hf:ann/tiny").endswith("no tokenizer in this repository.")
    assert "the hub knows no such repository" in fails("hf:ann/other")
