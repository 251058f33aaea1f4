"""Model, tokenizer and engine behind one name: from a folder to text and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.inference import Engine, LanguageModel, SamplingParams, find_model
from groundup.inference.requests import Request
from groundup.model import Transformer, save_model
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.files import write_checksums
from groundup.tokenizer import Tokenizer

Build = Callable[..., Transformer]
PROMPTS = ["the cat", "", "naïve 中文 👋", "the dog sat on the mat, and the cat sat on the dog"]


@pytest.fixture
def folder(lm: LanguageModel, tmp_path: Path) -> Path:
    lm.save(tmp_path / "model")
    return tmp_path / "model"


def test_saved_and_loaded_it_says_the_same(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    loaded = groundup.load(folder, device="cpu")
    settings: dict[str, Any] = dict(max_tokens=20, temperature=0.9, seed=7)
    texts = lm.generate(PROMPTS, **settings)
    assert loaded.generate(PROMPTS, **settings) == texts
    assert loaded.score(PROMPTS) == lm.score(PROMPTS)
    assert len(set(texts)) == len(PROMPTS)
    loaded.save(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


def test_a_list_gives_a_list_and_the_nth_prompt_has_the_nth_seed(lm: LanguageModel) -> None:
    settings: dict[str, Any] = dict(max_tokens=60, temperature=1.0, top_p=0.95)
    together = lm.generate(PROMPTS, seed=3, **settings)
    assert together == [lm.generate(prompt, seed=3 + n, **settings) for n, prompt in enumerate(PROMPTS)]
    assert lm.generate((PROMPTS[0],), seed=3, **settings) == together[:1]
    assert lm.generate([], seed=3) == []
    assert lm.generate(PROMPTS[0], seed=4, **settings) != together[0]


@pytest.mark.parametrize("stop", [(), ("e",), ("th", "a", "👋")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_joined_are_what_generate_returns(lm: LanguageModel, stop: Any, temperature: float) -> None:
    for seed, prompt in enumerate(PROMPTS):
        settings: dict[str, Any] = dict(max_tokens=70, temperature=temperature, stop=stop, seed=seed)
        pieces = list(lm.stream(prompt, **settings))
        assert "".join(pieces) == lm.generate(prompt, **settings)
        assert all(pieces)
        assert not any(one in "".join(pieces) for one in stop)


def test_generate_ends_where_the_end_of_text_or_the_limit_says(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text_id is not None
    text = lm.generate("the", max_tokens=10, temperature=0.0)
    request = Request(lm.prompt_ids("the"), SamplingParams(max_tokens=10, temperature=0.0))
    for _ in lm.engine.run([request]):
        pass
    assert text == tokenizer.decode(request.tokens)
    with torch.no_grad():  # the blocks write nothing, and the end's embedding has the largest product with any other
        for parameter in lm.model.blocks.parameters():
            parameter.zero_()
        lm.model.embedding.weight.fill_(1.0)
        lm.model.embedding.weight[tokenizer.end_of_text_id] = 2.0
    assert lm.generate(["the", "cat"], max_tokens=10, temperature=0.0) == ["", ""]


def score_by_hand(lm: LanguageModel, text: str) -> float:
    """Every token after the first, each given all that its window holds of what came before."""
    ids, context = lm.prompt_ids(text), lm.model.config.context_length
    total, start = 0.0, 0
    for place in range(1, len(ids)):
        if place - start > context:  # the window is full: go on with its later half
            start = place - 1 - context // 2
        logits = lm.model(torch.tensor([ids[start:place]]))[0, -1].double()
        total += (logits - logits.logsumexp(0))[ids[place]].item()
    return total


@torch.inference_mode()
def test_score_is_the_sum_of_log_probabilities(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    longer = "the cat sat on the mat " * 30
    lengths = [len(tokenizer.encode(text)) for text in (*PROMPTS, longer)]
    assert max(lengths[:-1]) < 48  # within the context
    assert lengths[-1] > 3 * 48  # well past it
    expected = [score_by_hand(lm, text) for text in (*PROMPTS, longer)]
    assert lm.score([*PROMPTS, longer]) == pytest.approx(expected, rel=1e-5)
    assert lm.score([""]) == [0.0]
    for count in range(44, 54):  # around the edge of the window, by single tokens
        text = tokenizer.decode([97 + n % 20 for n in range(count)])
        assert lm.score([text]) == pytest.approx([score_by_hand(lm, text)], rel=1e-5)


@torch.inference_mode()
def test_score_without_an_end_of_text_token(tiny_model: Build) -> None:
    plain = Tokenizer.train(["the cat sat on the mat " * 9], 280, special_tokens=(), show_progress=False)
    lm = LanguageModel(tiny_model(plain.vocab_size), plain)
    ids = plain.encode("the cat")
    log_p = lm.model(torch.tensor([[ids[0], *ids[:-1]]]))[0].double().log_softmax(-1)
    assert lm.score(["the cat"]) == pytest.approx([sum(log_p[n, id_].item() for n, id_ in enumerate(ids))], rel=1e-5)


def test_an_empty_prompt_needs_an_end_of_text_token(lm: LanguageModel, tiny_model: Build) -> None:
    plain = Tokenizer.train(["the cat sat on the mat " * 9], 280, special_tokens=(), show_progress=False)
    with pytest.raises(UsageError, match="the prompt is empty, and this tokenizer has no end-of-text token"):
        LanguageModel(tiny_model(plain.vocab_size), plain).generate("")
    assert isinstance(lm.generate("", max_tokens=3), str)


def test_tokens_the_model_does_not_know_are_refused(tiny_model: Build) -> None:
    engine = Engine(tiny_model(11))
    params = SamplingParams()
    with pytest.raises(UsageError, match="the token id 11 is outside the model's vocabulary of 11"):
        list(engine.run([Request([1, 2], params), Request([3, 11], params)]))
    with pytest.raises(UsageError, match="the token id -1 is outside"):
        list(engine.run([Request([-1], params)]))
    with pytest.raises(UsageError, match="the prompt is empty"):
        list(engine.run([Request([], params)]))


def test_a_vocabulary_padded_past_the_tokenizers_is_never_chosen_from(tokenizer: Tokenizer, tiny_model: Build) -> None:
    model = tiny_model(tokenizer.vocab_size + 500)
    with torch.no_grad():
        model.embedding.weight[tokenizer.vocab_size :] *= 30  # the likeliest by far
    texts = LanguageModel(model, tokenizer).generate(PROMPTS, max_tokens=30, temperature=1.0, seed=1)
    assert any(texts)


def test_weights_that_are_not_finite_end_in_one_line(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(GroundupError, match="not finite"):
        lm.generate("the cat")


# ---- finding and loading


def test_a_run_is_its_best_checkpoint_then_its_latest(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in ("step-000001", "step-000002"):
        shutil.copytree(folder, run / "checkpoints" / step)
    (run / "checkpoints" / "latest").symlink_to("step-000002")
    assert find_model(run) == (run / "checkpoints" / "step-000002").resolve()
    (run / "checkpoints" / "best").symlink_to("step-000001")
    assert find_model(str(run)) == (run / "checkpoints" / "step-000001").resolve()
    assert isinstance(groundup.load(run).generate("the", max_tokens=2), str)


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"modle: no such folder\. Did you mean .*model\? MODEL is a run"):
        groundup.load(folder.with_name("modle"))
    with pytest.raises(UsageError, match=r"no such folder\. MODEL is a run"):
        groundup.load(folder / "a" / "b")


def test_a_run_without_a_checkpoint_and_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model here"):
        groundup.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UsageError, match="this run has no checkpoint yet"):
        groundup.load(tmp_path)


def test_a_file_in_place_of_its_folder(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.safetensors: this is a file\. MODEL is the folder that it lies in"):
        groundup.load(folder / "model.safetensors")


def test_a_damaged_file_is_found_by_its_checksum(folder: Path) -> None:
    write_checksums(folder)
    groundup.load(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # the last bit of a weight: nothing else would notice
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(GroundupError, match=r"model\.safetensors: damaged"):
        groundup.load(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path, tiny_model: Build) -> None:
    save_model(tiny_model(300), folder)
    with pytest.raises(GroundupError, match=r"the tokenizer has \d+ tokens, the model only 300"):
        groundup.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(GroundupError, match=r"tokenizer\.json"):
        groundup.load(folder)


# ---- saving


def test_saving_replaces_a_saved_model_but_nothing_else(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        lm.model.norm.weight.mul_(2)
    lm.save(folder)
    assert groundup.load(folder).score(["the cat"]) == lm.score(["the cat"])
    (folder / "thesis.tex").write_text("years of work")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"thesis\.tex is here already and would be lost"):
        lm.save(folder)
    with pytest.raises(UsageError, match="would be lost"):
        lm.save(tmp_path)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    lm.save(tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["eos_token_id"] == lm.tokenizer.end_of_text_id


def test_saving_where_a_file_stands(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for place in ("file", "file/below"):
        with pytest.raises(GroundupError, match="file"):
            lm.save(tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"
