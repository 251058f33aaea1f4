"""A hub of models on this machine: what reading one asks of the real one, with faults to order."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
from typing import Any

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The repository ann/tiny at two commits. Files of ``large`` kinds have a SHA-256, as in Git LFS."""

    commits: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - all of these are set anew by reset
    breaks: dict[str, list[int]] = {}  # noqa: RUF012
    """Per file after how many bytes each of the next downloads breaks off."""
    damaged: set[str] = set()  # noqa: RUF012
    """Files whose last byte comes wrong."""
    asked: list[tuple[str, str, str | None]] = []  # noqa: RUF012
    """Method, what for, and range of every request."""
    tokens: set[str | None] = set()  # noqa: RUF012
    """What the requests for files were authorized with."""
    elsewhere: str | None = None
    """The address of another server that large files are sent from, as the hub does."""
    tokens_elsewhere: set[str | None] = set()  # noqa: RUF012
    """What the requests there were authorized with."""

    @classmethod
    def reset(cls, files: dict[str, bytes]) -> None:
        cls.commits = {COMMITS["main"]: files, COMMITS["v1"]: dict(files)}
        cls.breaks, cls.damaged, cls.asked, cls.tokens = {}, set(), [], set()
        cls.elsewhere, cls.tokens_elsewhere = None, set()

    @classmethod
    def downloads(cls) -> list[str]:
        """The names of the files that were sent, in order."""
        return [name for method, name, _ in cls.asked if method == "GET" and not name.startswith("/api")]

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        path = self.path.partition("?")[0].removeprefix("/elsewhere")
        if path.startswith("/api/models/ann/tiny"):
            revision = path.removeprefix("/api/models/ann/tiny").removeprefix("/revision/") or "main"
            self.asked.append((method, path, None))
            commit = COMMITS.get(revision, revision)
            if commit not in self.commits:
                return self.refuse("RevisionNotFound")
            files = self.commits[commit]
            told = {"id": "ann/tiny", "sha": commit, "siblings": [sibling(*file) for file in files.items()], "tags": []}
            return self.send(200, json.dumps(told).encode(), {})
        for commit, files in self.commits.items():
            name = path.removeprefix(f"/ann/tiny/resolve/{commit}/")
            if name in files:
                return self.send_file(method, name, files[name], commit)
        return self.refuse("RepoNotFound")

    def send_file(self, method: str, name: str, content: bytes, commit: str) -> None:
        wanted, token, moved = self.headers.get("Range"), self.headers.get("Authorization"), "/elsewhere" in self.path
        (self.tokens_elsewhere if moved else self.tokens).add(token)
        if method == "GET" and is_large(name) and self.elsewhere and not moved:
            return self.send(302, b"", {"Location": f"{self.elsewhere}/elsewhere{self.path}"})
        self.asked.append((method, name, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        if is_large(name):
            headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if name in self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if method == "HEAD":
            return self.send(200, content, headers, end=0)
        end = None
        if self.breaks.get(name):
            end = self.breaks[name].pop(0)
        return self.send(206 if start else 200, content[start:], headers, end)

    def send(self, status: int, body: bytes, headers: dict[str, str], end: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:end])

    def refuse(self, code: str) -> None:
        self.send(404, b"", {"X-Error-Code": code})

    def log_message(self, *_: object) -> None: ...


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", "tokenizer.json"))


def sibling(name: str, content: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
    if is_large(name):
        told["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
    return told
