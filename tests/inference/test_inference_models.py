"""Models by name: llama2.c's files, and the hub's, fetched from one that is played on this machine."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import groundup
from fake_hub import COMMITS, FakeHub, nobody
from groundup.inference import LanguageModel, find_model, read_model_config
from groundup.inference.models import fetch_model, kept_model, kept_models, remove_model, verify_model
from groundup.model import Transformer, save_model
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
NAME = "hf:ann/tiny"


@pytest.fixture
def files(lm: LanguageModel, tmp_path: Path) -> dict[str, bytes]:
    """A repository as they are: the model in three shards, and beside it what must never be fetched."""
    place = tmp_path / "made"
    lm.save(place)
    (place / "model.safetensors").unlink()
    rest = sum(parameter.nbytes for parameter in lm.model.blocks.parameters())
    save_model(lm.model, place, bos_id=3, eos_id=3, shard_bytes=rest * 2 // 3)
    assert sorted(path.name for path in place.glob("*.safetensors")) == SHARDS
    others = {
        "pytorch_model.bin": b"PK\x03\x04pickled", "modeling_tiny.py": b"import os", "training_args.bin": b"PK",
        "original/model.safetensors": b"another", "README.md": b"# tiny", "flax_model.msgpack": b"x",
    }  # fmt: skip
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != "vocabulary.txt"} | others


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("HF_ENDPOINT", nobody())


def fails(name: str = NAME, kind: type[GroundupError] = GroundupError) -> str:
    with pytest.raises(kind) as caught:
        groundup.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- from the hub


def test_what_a_model_is_made_of_is_fetched_once_and_nothing_else(hub: type[FakeHub], lm: LanguageModel) -> None:
    loaded = groundup.load(NAME)
    assert loaded.score(["the cat"]) == lm.score(["the cat"])
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.downloads()) == sorted([*wanted, "model.safetensors.index.json", *SHARDS])
    assert hub.downloads()[-3:] == SHARDS, "what is large comes last"
    folder = find_model(NAME)
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.downloads())


def test_what_is_there_is_used_without_asking_the_hub(hub: type[FakeHub], no_network: Callable[[], None]) -> None:
    groundup.load(NAME)
    hub.asked.clear()
    groundup.load(NAME)
    assert read_model_config(NAME).n_embd == 16
    assert hub.asked == []
    no_network()
    groundup.load(NAME)


def test_a_single_file_of_weights(hub: type[FakeHub], lm: LanguageModel, tmp_path: Path) -> None:
    lm.save(tmp_path / "whole")
    hub.reset({path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()})
    assert groundup.load(NAME).score(["the cat"]) == lm.score(["the cat"])
    assert "model.safetensors" in hub.downloads()


def test_a_cut_download_goes_on_by_itself(hub: type[FakeHub], files: dict[str, bytes]) -> None:
    shard, size = SHARDS[1], len(files[SHARDS[1]])
    hub.breaks = {shard: [1000, 200], "config.json": [50]}
    groundup.load(NAME)
    ranges = [asked for method, name, asked in hub.asked if (method, name) == ("GET", shard)]
    assert size > 1200
    assert ranges == [None, "bytes=1000-", "bytes=1200-"]


def test_a_download_that_stays_cut_goes_on_with_the_next_command(hub: type[FakeHub], lm: LanguageModel) -> None:
    shard = SHARDS[2]
    hub.breaks = {shard: [1000, 0]}
    assert "the connection broke off. Run the same command again: it goes on after 1,000 bytes" in fails()
    assert kept_models() == []
    hub.asked.clear()
    assert groundup.load(NAME).score(["the cat"]) == lm.score(["the cat"])
    assert hub.downloads() == [shard]
    assert ("GET", shard, "bytes=1000-") in hub.asked
    assert len(kept_models()) == 1


@pytest.mark.parametrize("name", [SHARDS[0], "config.json", "tokenizer.json"])
def test_a_file_that_comes_wrong_is_refused_and_not_kept(hub: type[FakeHub], name: str) -> None:
    hub.damaged = {name}
    message = fails()
    assert name in message
    assert "not the file it should be (SHA-256" in message or "is damaged (its digest is" in message
    assert kept_models() == []
    hub.damaged = set()
    groundup.load(NAME)


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_a_file_changed_by_another_hand_is_noticed(
    hub: type[FakeHub], lm: LanguageModel, no_network: Callable[[], None], how: str, name: str
) -> None:
    path = find_model(NAME) / name
    content = path.read_bytes()
    if how == "gone":
        path.resolve().unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if how == "shorter" else bytes([content[-1] ^ 1])))
    address = os.environ["HF_ENDPOINT"]
    no_network()
    words = {"changed": "its digest is", "shorter": f"it has {len(content) - 1:,} bytes", "gone": "it is missing"}
    message = fails()
    assert name in message
    assert words[how] in message
    assert message.endswith("and the hub cannot be reached. Run the same command with a network.")
    os.environ["HF_ENDPOINT"] = address  # put back by monkeypatch
    hub.asked.clear()
    assert groundup.load(NAME).score(["the cat"]) == lm.score(["the cat"])
    assert hub.downloads() == [name]


def test_a_file_changed_without_a_trace_is_found_by_verify(hub: type[FakeHub]) -> None:
    path = (find_model(NAME) / SHARDS[0]).resolve()
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    kept = kept_model(NAME)
    assert kept.problem() is None
    assert "its digest is" in str(verify_model(kept))
    path.write_bytes(content)  # whole again, at another time
    assert verify_model(kept) is None
    assert kept_model(NAME).files[SHARDS[0]].changed_ns == path.stat().st_mtime_ns != before.st_mtime_ns


def test_no_network_and_nothing_kept(hub: type[FakeHub], no_network: Callable[[], None]) -> None:
    no_network()
    assert "the hub cannot be reached (" in (message := fails())
    assert message.endswith("Check the network, or pass a local folder.")


def test_no_network_and_fetched_by_another_tool(
    hub: type[FakeHub], no_network: Callable[[], None], lm: LanguageModel, tmp_path: Path
) -> None:
    find_model(NAME)
    shutil.rmtree(tmp_path / "data")  # our note
    no_network()
    assert groundup.load(NAME).score(["the cat"]) == lm.score(["the cat"])
    assert kept_model(NAME).commit == COMMITS["main"]
    shutil.rmtree(tmp_path / "data")
    path = find_model(NAME) / SHARDS[0]
    shutil.rmtree(tmp_path / "data")
    path.write_bytes(b"?" * path.stat().st_size)
    assert "its digest is" in fails()
    path.unlink()
    assert f"names {SHARDS[0]}, which is not in this repository" in fails()


def test_a_missing_shard(hub: type[FakeHub]) -> None:
    for files in hub.commits.values():
        del files[SHARDS[1]]
    assert f"model.safetensors.index.json names {SHARDS[1]}, which is not in this repository" in fails()
    assert not set(SHARDS) & set(hub.downloads()), "what cannot be whole is not begun"


@pytest.mark.parametrize("shard", ["../../etc/passwd", "pytorch_model.bin"])
def test_an_index_that_names_other_files(hub: type[FakeHub], shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    for files in hub.commits.values():
        files["model.safetensors.index.json"] = index
    assert f"names {shard}, which is no safetensors file beside it" in fails()


def test_repositories_without_a_model(hub: type[FakeHub]) -> None:
    hub.reset({"config.json": b"{}", "pytorch_model.bin": b"PK\x03\x04", "tokenizer.json": b"{}"})
    message = fails()
    assert "only pickled weights are in this repository (pytorch_model.bin), which can run code" in message
    assert hub.downloads() == []
    hub.reset({"config.json": b"{}"})
    assert "no model.safetensors in this repository" in fails()
    hub.reset({"model.safetensors": b"x"})
    assert "no config.json in this repository" in fails()
    assert "the hub knows no such repository" in fails("hf:ann/other")
    assert hub.downloads() == []


def test_revisions(
    hub: type[FakeHub], tiny_model: Callable[..., Transformer], lm: LanguageModel, tmp_path: Path
) -> None:
    other = LanguageModel(tiny_model(lm.tokenizer.vocab_size, n_ff=40), lm.tokenizer)
    other.save(tmp_path / "other")
    hub.commits[COMMITS["v1"]] = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert groundup.load(f"{NAME}@v1").model.config.n_ff == 40
    assert groundup.load(NAME).model.config.n_ff == 24
    assert groundup.load(f"{NAME}@{COMMITS['v1']}").model.config.n_ff == 40
    names = [kept.name for kept in kept_models()]
    assert sorted(names) == sorted([NAME, f"{NAME}@v1", f"{NAME}@{COMMITS['v1']}"])
    assert "this repository has no such revision" in fails(f"{NAME}@v9")
    assert "written hf:owner/name[@revision]" in fails(f"{NAME}:weights", UsageError)


def test_a_newer_commit_is_fetched_when_asked_for(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_model(NAME)
    monkeypatch.setitem(COMMITS, "main", COMMITS["v1"])
    assert fetch_model(NAME) == first
    hub.asked.clear()
    second = fetch_model(NAME, refresh=True)
    assert (first.name, second.name) == ("a" * 40, "b" * 40)
    assert hub.downloads() == [], "the same content lies in the cache already"
    assert fetch_model(NAME) == second


def test_removing_frees_the_cache(hub: type[FakeHub], tmp_path: Path) -> None:
    folder = find_model(NAME)
    find_model(f"{NAME}@{COMMITS['main']}")
    size = kept_model(NAME).nbytes
    assert remove_model(NAME) == 0, "the same commit is still kept by its own name"
    assert folder.is_dir()
    assert remove_model(f"{NAME}@{COMMITS['main']}") == size
    assert not folder.exists()
    assert kept_models() == []
    with pytest.raises(UsageError, match=r"hf:ann/tiny: this model is not kept here\. See groundup models list"):
        remove_model(NAME)


def test_a_damaged_note_is_no_harm(hub: type[FakeHub], tmp_path: Path) -> None:
    find_model(NAME)
    (note,) = (tmp_path / "data" / "models").iterdir()
    for content in ("", "[]", '{"files": {"a": 1}}', '{"files": {"config.json": {"size": 1}}}'):
        note.write_text(content)
        assert kept_models() == []
        hub.asked.clear()
        find_model(NAME)
        assert hub.downloads() == []
        assert len(kept_models()) == 1


def test_a_token_is_sent_to_the_hub_and_to_nobody_else(
    hub: type[FakeHub], loopback: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.breaks = {SHARDS[0]: [500]}
    with loopback(FakeHub) as other:
        hub.elsewhere = other
        groundup.load(NAME)
    assert hub.tokens == {"Bearer hf_mine"}
    assert hub.tokens_elsewhere == {None}
    assert ("GET", SHARDS[0], "bytes=500-") in hub.asked


# ---- what the weights become


def test_dtype(lm: LanguageModel, tmp_path: Path) -> None:
    def dtypes(name: Path, **options: Any) -> set[torch.dtype]:
        return {parameter.dtype for parameter in groundup.load(name, **options).model.parameters()}

    lm.save(tmp_path / "float32")
    assert dtypes(tmp_path / "float32") == {torch.float32}
    half = groundup.load(tmp_path / "float32", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    half.save(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert dtypes(tmp_path / "bfloat16") == {torch.bfloat16}, "no more memory than the file"
    assert dtypes(tmp_path / "bfloat16", dtype="float32") == {torch.float32}
    assert isinstance(groundup.load(tmp_path / "bfloat16").generate("the cat", max_tokens=5), str)
    with pytest.raises(
        UsageError, match=r"dtype 'bfloat' is not one of auto, float32, bfloat16\. Did you mean bfloat16"
    ):
        groundup.load(tmp_path / "float32", dtype="bfloat")  # type: ignore[arg-type]


# ---- llama2.c's files


@pytest.fixture
def stories(shared_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    folder.mkdir()
    for file in (shared_data / "weights" / "stories260K").glob("*.bin"):
        shutil.copy(file, folder)
    return folder


def test_the_folder_and_the_file_are_the_same_model(stories: Path) -> None:
    file = stories / "stories260K.bin"
    assert find_model(stories) == find_model(file) == file
    assert read_model_config(stories) == groundup.load(file).model.config
    shutil.copy(file, stories / "stories15M.bin")
    assert "there are 2 models here. Name the file, such as" in fails(str(stories), UsageError)
    assert isinstance(groundup.load(file).generate("", max_tokens=3), str)


def test_of_several_tokenizers_the_one_that_fits_is_taken(stories: Path) -> None:
    whole = (stories / "tok512.bin").read_bytes()
    cut = whole[: len(whole) - 8 - struct.unpack_from("<i", whole, len(whole) - 7)[0]]
    (stories / "tok_a.bin").write_bytes(cut)
    assert groundup.load(stories).tokenizer.vocab_size == 512
    (stories / "tok512.bin").unlink()
    message = fails(str(stories))
    assert "tok_a.bin: 511 tokens, the model beside it, stories260K.bin, has 512" in message
    (stories / "tok_a.bin").unlink()
    assert "tokenizer.json" in fails(str(stories / "stories260K.bin"))
    assert "put its tokenizer (tokenizer.bin) beside it" in fails(str(stories), UsageError)


def test_what_it_says_begins_without_the_tokenizers_own_space(stories: Path) -> None:
    lm = groundup.load(stories)
    assert lm.prompt_ids("Once") == [1, *lm.tokenizer.encode("Once")]
    settings: dict[str, Any] = dict(max_tokens=12, temperature=0.0)
    whole = lm.generate("", **settings)
    assert whole.startswith("Once upon a time")
    assert lm.generate("Once upon", **settings).startswith(" a time, there was")
    assert "".join(lm.stream("", **settings)) == whole
    assert lm.generate(["", "Once upon"], **settings) == [whole, lm.generate("Once upon", **settings)]


def test_saving_keeps_the_names_of_both_ends(stories: Path, tmp_path: Path) -> None:
    lm = groundup.load(stories)
    for _ in range(2):  # its own files may be replaced
        lm.save(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 1}
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == lm.tokenizer.fingerprint
