from __future__ import annotations

import hashlib
import http.server
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from groundup.data import NAMED_SOURCES, NamedSource, get_source, open_source
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.download import download

CONTENT = random.Random(0).randbytes(3_000_017)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the class attributes say how well, and note what was asked for."""

    ranges = True
    break_after: int | None = None
    status: int | None = None
    content = CONTENT
    asked: list[str | None] = []  # noqa: RUF012 - set anew for each test

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if self.status or start > len(self.content):
            self.send_error(self.status or 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) if self.break_after is None else start + self.break_after
        self.wfile.write(self.content[start:end])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(Server, "asked", [])
    for name in ("ranges", "break_after", "status", "content"):
        monkeypatch.setattr(Server, name, getattr(Server, name))  # put back afterwards
    return Server


def test_downloads_once_and_keeps_what_is_whole(loopback: Callable, server: type[Server], tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with loopback(server) as address:
        for _ in range(2):
            assert download(f"{address}/a.bin", path, size=len(CONTENT), sha256=SHA256) == path
        assert server.asked == [None]
        path.write_bytes(b"changed")
        download(f"{address}/a.bin", path, size=len(CONTENT), sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_goes_on_where_it_broke_off(loopback: Callable, server: type[Server], tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "a.bin"
    with loopback(server) as address:
        server.break_after = 1_000_000
        for arrived in ("1,000,000", "2,000,000"):
            with pytest.raises(GroundupError, match=f"broke off. .*goes on after {arrived} bytes"):
                download(f"{address}/a.bin", path, size=size, sha256=SHA256)
            assert not path.exists()
        server.break_after = None
        download(f"{address}/a.bin", path, size=size, sha256=SHA256)
    assert server.asked == [None, "bytes=1000000-", "bytes=2000000-"]
    assert path.read_bytes() == CONTENT


def test_starts_over_where_the_server_knows_no_ranges(loopback: Callable, server: type[Server], tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    with loopback(server) as address:
        download(f"{address}/a.bin", tmp_path / "a.bin", size=len(CONTENT), sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_starts_over_where_the_part_is_longer_than_the_file(
    loopback: Callable, server: type[Server], tmp_path: Path
) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    with loopback(server) as address:
        download(f"{address}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert server.asked == ["bytes=3000021-", None]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_wrong_file_is_not_kept(loopback: Callable, server: type[Server], tmp_path: Path) -> None:
    with loopback(server) as address:
        with pytest.raises(GroundupError, match="SHA-256"):
            download(f"{address}/a.bin", tmp_path / "a.bin", sha256="0" * 64)
        server.content = b"short"
        with pytest.raises(GroundupError, match="broke off"):
            download(f"{address}/a.bin", tmp_path / "a.bin", size=len(CONTENT))
        server.content = CONTENT + b"longer"
        (tmp_path / "a.bin.part").unlink()
        with pytest.raises(GroundupError, match="3,000,023 bytes arrived, 3,000,017 expected"):
            download(f"{address}/a.bin", tmp_path / "a.bin", size=len(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_the_servers_refusal(loopback: Callable, server: type[Server], tmp_path: Path) -> None:
    server.status = 404
    with loopback(server) as address, pytest.raises(GroundupError, match="answered 404 Not Found"):
        download(f"{address}/a.bin", tmp_path / "a.bin")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_offline_is_told_at_once(closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = time.perf_counter()
    with pytest.raises(GroundupError, match=r"no connection \(.*refused.*\)\. Check the network"):
        download(f"http://127.0.0.1:{closed_port}/a.bin", tmp_path / "a.bin")
    assert time.perf_counter() - started < 10


def test_a_named_source_with_an_address(
    loopback: Callable, server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    server.content = text
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path / "from-the-environment"))
    with loopback(server) as address:
        named = NamedSource(
            description="a play",
            licence="public domain",
            size=len(text),
            url=f"{address}/input.txt",
            sha256=hashlib.sha256(text).hexdigest(),
        )
        monkeypatch.setitem(NAMED_SOURCES, "play", named)
        source = open_source("play")
        assert server.asked == []  # nothing is downloaded before it is read
        assert [document.text for document in source] == [text.decode()]
        assert [document.text for document in open_source("play", data_dir=tmp_path / "given")] == [text.decode()]
    assert (tmp_path / "from-the-environment" / "play" / "input.txt").is_file()
    assert (tmp_path / "given" / "play" / "input.txt").is_file()
    assert get_source("play") == tmp_path / "from-the-environment" / "play" / "input.txt"
    with pytest.raises(UsageError, match="stdlib is on this machine already"):
        get_source("stdlib")
    with pytest.raises(UsageError, match=r"not a named source\. Did you mean shakespeare\?"):
        get_source("shakespear")


def test_shakespeare_is_the_file_we_know(shared_data: Path) -> None:
    entry = NAMED_SOURCES["shakespeare"]
    raw = (shared_data / "pretrain" / "tinyshakespeare.txt").read_bytes()
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (entry.size, entry.sha256)
    assert all(named.description and named.licence for named in NAMED_SOURCES.values())
