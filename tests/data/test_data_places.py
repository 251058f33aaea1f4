"""A prepared corpus on a web server and on the hub."""

from __future__ import annotations

import http.server
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from remote_corpus import LINE, middle, settle

from fake_hub import FakeHub, nobody
from groundup.data import PreparedData, open_remote, prepare
from groundup.data.places import hub_folder
from groundup.data.remote import NotPreparedError
from groundup.runtime.hub import UnreachableError

pytestmark = pytest.mark.usefixtures("own_places")


# ---- the web


def test_a_folder_of_a_web_server(local: PreparedData, loopback: Callable) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with loopback(partial(Quiet, directory=str(local.folder))) as address:
        there = open_remote(f"{address}/")
        start = middle(local.train, 2)
        assert there.train.read(start, 99).tolist() == local.train.read(start, 99).tolist()
        assert list(there.texts("val")) == list(local.texts("val"))
        settle()
        with pytest.raises(NotPreparedError, match=rf"{address}/val/: no prepared corpus"):
            open_remote(f"{address}/val/")


# ---- the hub


class DataHub(FakeHub):
    """The same repository as a data set."""

    def answer(self, method: str) -> None:
        assert "/datasets/" in self.path or self.path.startswith("/elsewhere")
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/ann/", "/ann/")
        super().answer(method)


@pytest.fixture
def hub(local: PreparedData, loopback: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    files = {f"tiny/{path.relative_to(local.folder)}": path for path in local.folder.rglob("*") if path.is_file()}
    DataHub.reset({name: path.read_bytes() for name, path in files.items()})
    with loopback(DataHub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield DataHub


@pytest.mark.parametrize("url", ["hf:ann/tiny/tiny", "hf:ann/tiny:tiny", "hf:ann/tiny@v1/tiny/"])
def test_a_data_set_of_the_hub(local: PreparedData, hub: type[FakeHub], url: str) -> None:
    there = open_remote(url)
    assert not any(name.endswith(".bin") for name in hub.downloads())
    start = middle(local.train, 3)
    assert there.train.read(start, 99).tolist() == local.train.read(start, 99).tolist()
    assert list(there.texts("val")) == list(local.texts("val"))
    settle()
    assert {name for name in hub.downloads() if name.endswith(".bin")} >= {"tiny/train/tokens-00003.bin"}


def test_a_broken_transfer_goes_on_where_it_broke_off(local: PreparedData, hub: type[FakeHub]) -> None:
    there = open_remote("hf:ann/tiny/tiny")
    name = "tiny/train/tokens-00002.bin"
    hub.breaks[name] = [101, 307]
    start = middle(local.train, 2)
    assert there.train.read(start, 99).tolist() == local.train.read(start, 99).tolist()
    assert [wanted for _, asked, wanted in hub.asked if asked == name] == [None, "bytes=101-", "bytes=408-"]
    settle()


def test_a_beginning_of_an_older_file_is_not_gone_on_from(
    local: PreparedData, hub: type[FakeHub], tmp_path: Path
) -> None:
    open_remote("hf:ann/tiny/tiny")
    found = next((tmp_path / "data").rglob("stats.json"))
    found.with_name("stats.json.part").write_bytes(b"{ of another corpus")
    assert open_remote("hf:ann/tiny/tiny").stats == local.stats
    name = "tiny/train/tokens-00000.bin"  # of a shard the SHA-256 tells
    found.with_name("train").joinpath("tokens-00000.bin.part").write_bytes(b"another shard")
    assert open_remote("hf:ann/tiny/tiny").train.read(0, 9).tolist() == local.train.read(0, 9).tolist()
    assert [wanted for _, asked, wanted in hub.asked if asked == name] == ["bytes=13-", None]
    settle()


def test_the_token_goes_to_the_hub_alone(local: PreparedData, hub: type[FakeHub], loopback: Callable) -> None:
    class Elsewhere(DataHub):
        pass

    with loopback(hub) as other:
        hub.elsewhere = other.replace("127.0.0.1", "localhost")
        open_remote("hf:ann/tiny/tiny").train.read(0, 9)
        settle()
    assert hub.tokens == {"Bearer secret"}
    assert hub.tokens_elsewhere == {None}


def test_a_data_set_of_text_is_prepared_as_before(hub: type[FakeHub], tmp_path: Path) -> None:
    records = [{"text": " ".join(random.Random(number).choices(LINE.split(), k=50))} for number in range(40)]
    hub.reset({"train.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode()})
    made = prepare("hf:ann/tiny", tmp_path / "out", vocab_size=270)
    assert made.stats["documents"]["collected"] == 40
    asked = len(hub.asked)
    prepare("hf:ann/tiny", tmp_path / "out", vocab_size=270)  # it is there: nobody is asked
    assert len(hub.asked) == asked


def test_a_hub_that_does_not_answer(
    local: PreparedData, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_remote("hf:ann/tiny/tiny").train.read(0, 9)
    settle()
    monkeypatch.setenv("HF_ENDPOINT", nobody())
    assert open_remote("hf:ann/tiny/tiny").train.read(0, 9).tolist() == local.train.read(0, 9).tolist()
    with pytest.raises(UnreachableError, match="the hub cannot be reached"):
        open_remote("hf:ann/tiny/other")


def test_how_a_folder_of_the_hub_is_written() -> None:
    for spec in ("hf:a/b/c/d", "hf:a/b:c/d", "hf:a/b/c/d/"):
        assert (hub_folder(spec).repo, hub_folder(spec).inside, hub_folder(spec).revision) == ("a/b", "c/d", None)
    assert hub_folder("hf:a/b@v2/c").revision == "v2"
    assert hub_folder("hf:a/b@v2/c").inside == "c"
    assert hub_folder("hf:a/b").inside == ""
