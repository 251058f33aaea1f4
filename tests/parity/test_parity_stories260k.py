"""Real weights: the 260K-parameter TinyStories model of llama2.c, against reference values computed apart from us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import groundup
from groundup.inference import Engine, LanguageModel, SamplingParams
from groundup.inference.requests import Request
from groundup.model import KVCache, Transformer, load_model, save_model
from groundup.model.weights.llama2c import load_llama2c

BOS = 1


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected_greedy.json").read_text())


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_llama2c(folder / "stories260K.bin")


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    request = Request(prompt, SamplingParams(max_tokens=count, temperature=0.0))
    for _ in Engine(model).run([request]):
        pass
    return request.tokens


def test_the_header_and_the_programs_constants_make_the_config(model: Transformer, expected: dict[str, Any]) -> None:
    told, config = expected["config"], model.config
    assert (config.n_embd, config.n_ff, config.n_layer) == (told["dim"], told["hidden_dim"], told["n_layers"])
    assert (config.n_head, config.kv_heads) == (told["n_heads"], told["n_kv_heads"])
    assert (config.vocab_size, config.context_length) == (told["vocab_size"], told["max_seq_len"])
    assert config.tie_embeddings == told["tied_embeddings"]
    assert (config.norm_eps, config.rope_theta) == (told["rms_eps"], told["rope_theta"])


@torch.inference_mode()
def test_the_first_logits(model: Transformer, expected: dict[str, Any]) -> None:
    logits = model(torch.tensor([[BOS]]))[0, 0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits_at_pos0_after_bos"]), rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_two_hundred_greedy_tokens_through_engine_and_cache(
    model: Transformer, expected: dict[str, Any], backend: Any
) -> None:
    ids = expected["greedy_token_ids"]
    assert ids[0] == BOS
    model.backend = backend
    assert greedy(model, [BOS], 200) == ids[1:]
    assert greedy(model, ids[:50], 151) == ids[50:]


@torch.inference_mode()
def test_one_pass_over_all_tokens_predicts_each(model: Transformer, expected: dict[str, Any]) -> None:
    ids = torch.tensor([expected["greedy_token_ids"]])
    assert torch.equal(model(ids)[0, :-1].argmax(-1), ids[0, 1:])
    cache = KVCache(model.config, 1, 201)
    torch.testing.assert_close(model(ids, cache), model(ids), rtol=0, atol=1e-4)


def tells(lm: LanguageModel) -> str:
    return lm.generate("", max_tokens=200, temperature=0.0)


@pytest.mark.parametrize("name", ["", "stories260K.bin"])
def test_the_folder_and_the_file_tell_the_story_byte_for_byte(
    folder: Path, name: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    lm = groundup.load(folder / name, device="cpu")
    assert tells(lm) == expected["greedy_text"]
    assert lm.tokenizer.decode(expected["greedy_token_ids"][1:]) == expected["greedy_text"]
    lm.save(tmp_path / "saved")
    again = groundup.load(tmp_path / "saved", device="cpu")
    assert tells(again) == expected["greedy_text"]
    assert again.tokenizer.fingerprint == lm.tokenizer.fingerprint
    assert (tmp_path / "saved" / "tokenizer.model").is_file()


def test_saved_it_tells_the_same_story_in_transformers(folder: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    groundup.load(folder, device="cpu").save(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert tokenizer("Once upon")["input_ids"] == expected["greedy_token_ids"][:3]
    ids = model.generate(torch.tensor([[BOS]]), max_new_tokens=200, do_sample=False)[0]
    assert ids.tolist() == expected["greedy_token_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected["greedy_text"]


def test_saved_it_tells_the_same_story_here_and_in_transformers(
    model: Transformer, expected: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    save_model(model, tmp_path, bos_id=BOS)
    assert greedy(load_model(tmp_path), [BOS], 200) == expected["greedy_token_ids"][1:]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        logits = other(torch.tensor([expected["greedy_token_ids"]])).logits[0]
    assert logits[:-1].argmax(-1).tolist() == expected["greedy_token_ids"][1:]
