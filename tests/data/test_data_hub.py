from __future__ import annotations

import hashlib
import http.server
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from groundup.data import get_source, open_source
from groundup.data.hub import choose_files
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.hub import parse_hub_spec

COMMIT = "a" * 40
FILES = {
    "README.md": b"# stories",
    "data/train-00000.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "data/train-00001.jsonl": b'{"text": "three"}\n',
    "data/test-00000.jsonl": b'{"text": "held out"}\n',
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The three answers of the hub that reading a data set needs."""

    refuse: tuple[int, str] | None = None
    downloads: list[str] = []  # noqa: RUF012 - set anew for each test

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if self.refuse is not None:
            status, code = self.refuse
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "as the hub says")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/ann/stories"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "ann/stories", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        else:
            name = path.removeprefix(f"/datasets/ann/stories/resolve/{COMMIT}/")
            body = FILES[name]
            if with_body:
                self.downloads.append(name)
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
def hub(loopback: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "downloads", [])
    monkeypatch.setattr(Hub, "refuse", None)
    with loopback(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield Hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Points at a port that nobody listens on."""

    def go() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")

    return go


def fails(spec: str) -> str:
    started = time.perf_counter()
    with pytest.raises(GroundupError) as caught:
        list(open_source(spec))
    assert time.perf_counter() - started < 10
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(spec)
    return str(caught.value)


def test_reads_the_training_files_and_downloads_them_once(hub: type[Hub]) -> None:
    for _ in range(2):
        documents = list(open_source("hf:ann/stories"))
        assert [document.text for document in documents] == ["one", "two", "three"]
    assert documents[2].name == "ann/stories/data/train-00001.jsonl#1"
    assert hub.downloads == ["data/train-00000.jsonl", "data/train-00001.jsonl"]
    folder = get_source("hf:ann/stories")
    assert sorted(path.name for path in folder.iterdir()) == ["train-00000.jsonl", "train-00001.jsonl"]
    assert get_source("hf:ann/stories:data/train-00001.jsonl").read_bytes() == FILES["data/train-00001.jsonl"]


def test_limit_downloads_no_more_than_it_needs(hub: type[Hub]) -> None:
    assert [document.text for document in open_source("hf:ann/stories", limit=2)] == ["one", "two"]
    assert hub.downloads == ["data/train-00000.jsonl"]


def test_a_file_or_folder_inside(hub: type[Hub]) -> None:
    spec = "hf:ann/stories:data/test-00000.jsonl"
    assert [document.text for document in open_source(spec)] == ["held out"]
    assert len(list(open_source("hf:ann/stories:data"))) == 3
    assert "there is no dat in this data set. Did you mean data?" in fails("hf:ann/stories:dat")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((404, "RepoNotFound"), "the hub knows no such data set"),
        ((401, "RepoNotFound"), "the hub knows no such data set"),
        ((403, "GatedRepo"), "this data set is gated. Accept its terms"),
        ((500, ""), "the hub answered 500"),
    ],
)
def test_refusals(hub: type[Hub], refusal: tuple[int, str], words: str) -> None:
    hub.refuse = refusal
    assert words in fails("hf:ann/stories")


@pytest.mark.usefixtures("hub")
def test_offline_with_nothing_downloaded(offline: Callable[[], None]) -> None:
    offline()
    message = fails("hf:ann/stories")
    assert "the hub cannot be reached (" in message
    assert "Check the network, or pass a local path with --data" in message


@pytest.mark.usefixtures("hub")
def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and this data set is not in the cache" in fails("hf:ann/stories")


@pytest.mark.usefixtures("hub")
def test_offline_with_files_downloaded_before(offline: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    online = list(open_source("hf:ann/stories"))
    offline()
    assert list(open_source("hf:ann/stories")) == online
    assert "cannot be reached; using its 2 files that were downloaded before" in " ".join(
        capsys.readouterr().err.split()
    )


def test_specs() -> None:
    spec = parse_hub_spec("hf:HuggingFaceFW/fineweb-edu:sample/10BT/")
    assert (spec.repo, spec.inside) == ("HuggingFaceFW/fineweb-edu", "sample/10BT")
    for wrong in ("hf:", "hf:stories", "hf:a/b/c", "hf:a b/c"):
        with pytest.raises(UsageError, match="hf:owner/name"):
            open_source(wrong)


@pytest.mark.parametrize(
    ("names", "inside", "chosen"),
    [
        (["a.txt", "b.parquet", "c.jsonl"], "", ["b.parquet"]),
        (
            ["data/train-1.parquet", "data/train-0.parquet", "data/validation-0.parquet"],
            "",
            ["data/train-0.parquet", "data/train-1.parquet"],
        ),
        (["TinyStories-train.txt", "TinyStories-valid.txt", "README.md"], "", ["TinyStories-train.txt"]),
        (["books.jsonl.gz", "test.jsonl.gz"], "", ["books.jsonl.gz"]),
        (["contest.txt", "test.txt"], "", ["contest.txt"]),
        (["test.txt"], "", ["test.txt"]),
        (["v1/train.txt", "v2/train.txt"], "v2", ["v2/train.txt"]),
        (["v1/train.txt", "v2/train.txt"], "v1/train.txt", ["v1/train.txt"]),
        (["train/en/a.parquet", "train/en/b.parquet"], "train", ["train/en/a.parquet", "train/en/b.parquet"]),
    ],
)
def test_which_files(names: list[str], inside: str, chosen: list[str]) -> None:
    assert choose_files("hf:a/b", names, inside) == chosen


def test_several_parts_are_not_guessed_between() -> None:
    with pytest.raises(GroundupError, match=r"several parts: v1, v2\. Choose one, as in hf:owner/name:v1"):
        choose_files("hf:a/b", ["v1/train.parquet", "v2/train.parquet"], "")


def test_nothing_to_read() -> None:
    with pytest.raises(GroundupError, match="no text we can read"):
        choose_files("hf:a/b", ["README.md", "images.zip"], "")
