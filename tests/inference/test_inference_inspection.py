"""What an inspection says of a model: against the softmax of each beginning, and against transformers' own outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.inference import LanguageModel
from groundup.inference.inspection import inspect_text
from groundup.model import Experts, LatentAttention, Transformer, quantize_model, save_model
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

Build = Callable[..., Transformer]
TEXT = "the dog sat on the naïve cat 中文 👋🏽 \n\tzzz"
PARTS: dict[str, dict[str, Any]] = {
    "llama": {"qk_norm": False, "n_kv_head": 1, "n_layer": 3},
    "qwen3": {"n_layer": 3, "head_dim": 6},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
}


@torch.inference_mode()
def beginnings(lm: LanguageModel, ids: list[int]) -> list[torch.Tensor]:
    """The distribution after each beginning of a text, read by itself, float64."""
    return [lm.model(torch.tensor([ids[: end + 1]]))[0, -1].double().softmax(-1) for end in range(len(ids))]


def test_each_token_by_definition(lm: LanguageModel) -> None:
    found = inspect_text(lm, TEXT, top=3)
    ids = lm.prompt_ids(TEXT)
    assert found.ids_T.tolist() == ids
    assert (found.start, found.tokens[0]) == (1, lm.tokenizer.decode([ids[0]]))
    for position, p in enumerate(beginnings(lm, ids)):
        assert found.entropy_T[position] == pytest.approx(-sum(float(x) * math.log2(x) for x in p), rel=1e-4)
        order = sorted(range(len(p)), key=lambda n, p=p: -float(p[n]))
        assert found.next_ids_TK[position].tolist() == order[:3]
        np.testing.assert_allclose(found.next_probabilities_TK[position], p[order[:3]], rtol=1e-4)
        if position + 1 < len(ids):
            following = ids[position + 1]
            assert found.logprob_T[position + 1] == pytest.approx(math.log(p[following]), rel=1e-4)
            assert found.rank_T[position + 1] == 1 + order.index(following)
    assert math.isnan(found.logprob_T[0])
    assert found.rank_T[0] == 0
    assert found.total_bits == pytest.approx(-lm.score([TEXT])[0] / math.log(2), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.total_bits / len(TEXT.encode()))
    assert found.perplexity == pytest.approx(2 ** (found.total_bits / (len(ids) - 1)))


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@torch.inference_mode()
def test_attention_and_lens_are_those_of_transformers(
    parts: dict[str, Any], tiny_model: Build, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import transformers

    lm = LanguageModel(tiny_model(tokenizer.vocab_size, **parts), tokenizer)
    save_model(lm.model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = lm.prompt_ids(TEXT)
    theirs = other(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    found = inspect_text(lm, TEXT, top=7)
    assert found.layers == tuple(range(lm.model.config.n_layer))
    np.testing.assert_allclose(found.attention_LHNN, torch.cat(theirs.attentions).numpy(), atol=1e-5)
    base: Any = other.base_model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    for layer in found.layers:
        stream = theirs.hidden_states[layer + 1][0]  # the last one is normed already
        logits = other.lm_head(stream if layer == found.layers[-1] else norm(stream)).double()
        p = logits.softmax(-1)
        np.testing.assert_allclose(found.lens_probabilities_LNK[layer], p.topk(7).values, rtol=2e-3)
        assert (found.lens_ids_LNK[layer, :, 0] == p.argmax(-1).numpy()).all()
        for position in range(len(ids) - 1):
            expected = float(p[position, ids[position + 1]])
            assert found.lens_probability_LN[layer, position] == pytest.approx(expected, rel=2e-3)
            assert found.lens_rank_LN[layer, position] == 1 + int((p[position] > expected).sum())
    assert math.isnan(found.lens_probability_LN[0, -1])
    assert found.lens_rank_LN[0, -1] == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"attention_sinks": True, "layer_pattern": "SF", "sliding_window": 5},
        {"latent": LatentAttention(kv_rank=7, rope_dim=4, nope_dim=3, v_dim=5), "qk_norm": False},
        {"norm_placement": "post", "positions": "alibi"},
        {"parallel_blocks": True, "logit_softcap": 3.0, "experts": Experts(count=3)},
    ],
    ids=["sinks and windows", "latents", "post norm", "experts"],
)
def test_whatever_the_parts_the_last_layers_lens_is_the_model(
    parts: dict[str, Any], tiny_model: Build, tokenizer: Tokenizer
) -> None:
    model = tiny_model(tokenizer.vocab_size, **{"n_layer": 3, **parts})
    found = inspect_text(LanguageModel(model, tokenizer), TEXT)
    np.testing.assert_allclose(found.lens_probabilities_LNK[-1], found.next_probabilities_TK, rtol=1e-4)
    assert (np.triu(found.attention_LHNN, 1) == 0).all()
    sums = found.attention_LHNN.sum(-1)
    sinks = model.config.attention_sinks
    assert (sums < 0.999).all() if sinks else sums == pytest.approx(np.ones_like(sums), abs=1e-5)
    if model.config.sliding_window:
        assert (np.tril(found.attention_LHNN[0], -5) == 0).all()
        assert (np.tril(found.attention_LHNN[1], -5) > 0).any()


def test_chosen_layers_and_positions_are_parts_of_all(tiny_model: Build, tokenizer: Tokenizer) -> None:
    lm = LanguageModel(tiny_model(tokenizer.vocab_size, n_layer=5), tokenizer)
    whole, part = inspect_text(lm, TEXT), inspect_text(lm, TEXT, layers=[3, 1, 3], positions=7)
    assert part.layers == (1, 3)
    assert part.looked_into == 7
    assert part.left_out == (f"attention and lens look into the first 7 of {len(whole.tokens)} tokens",)
    assert whole.left_out == ()
    np.testing.assert_allclose(part.attention_LHNN, whole.attention_LHNN[[1, 3], :, :7, :7], atol=1e-6)
    np.testing.assert_allclose(part.lens_probabilities_LNK, whole.lens_probabilities_LNK[[1, 3], :7], rtol=1e-4)
    assert (part.lens_rank_LN == whole.lens_rank_LN[[1, 3], :7]).all()
    assert (part.lens_rank_LN[:, -1] > 0).all()  # what follows the seventh is known, though it is not looked into
    np.testing.assert_array_equal(part.logprob_T, whole.logprob_T)
    assert not any(block._forward_hooks for block in lm.model.blocks)


def test_every_token_can_be_read_and_json_has_all_of_it(lm: LanguageModel) -> None:
    found = inspect_text(lm, TEXT, top=4, name="tiny")
    assert all(token.isprintable() and token.strip() for token in [*found.tokens, *found.names.values()])
    joined = "".join(found.tokens[1:])
    for sign in ("·", "↵", "→", r"\xe6"):
        assert sign in joined
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["model"] == "tiny"
    assert values["bits"] == pytest.approx(found.total_bits, rel=1e-5)
    first, second, *_ = values["tokens"]
    assert (first["bits"], first["rank"], first["entropy"], first["expected"]) == (None, None, None, [])
    assert second["logprob"] == pytest.approx(found.logprob_T[1], rel=1e-5)
    assert second["entropy"] == pytest.approx(found.entropy_T[0], rel=1e-5)
    assert [token for token, _ in second["expected"]] == [found.names[int(n)] for n in found.next_ids_TK[0]]
    assert [token for token, _ in values["then"]] == [found.names[int(n)] for n in found.next_ids_TK[-1]]
    assert values["attention"][1][0][5] == pytest.approx(found.attention_LHNN[1, 0, 5, :6].tolist(), rel=1e-5)
    assert len(values["attention"][1][0][5]) == 6
    assert values["lens"][0][3]["rank"] == found.lens_rank_LN[0, 3]
    assert values["lens"][0][-1]["probability"] is None


def test_long_texts_are_read_in_parts_of_logits(
    tiny_model: Build, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    whole = inspect_text(lm, TEXT)
    monkeypatch.setattr("groundup.inference.inspection.ROWS", 5)
    cut = inspect_text(lm, TEXT)
    np.testing.assert_allclose(cut.logprob_T, whole.logprob_T, rtol=1e-5)
    np.testing.assert_array_equal(cut.lens_ids_LNK, whole.lens_ids_LNK)


def test_a_quantized_model_in_bfloat16_and_ids_without_a_token(tiny_model: Build, tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer.vocab_size + 13, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight[-1] = 50 * model.head.weight[-1]  # an id beyond the tokenizer's that is likely somewhere
    quantize_model(model, "int8")
    found = inspect_text(LanguageModel(model.to(torch.bfloat16), tokenizer), TEXT, top=tokenizer.vocab_size + 13)
    assert np.isfinite(found.logprob_T[1:]).all()
    assert found.names[tokenizer.vocab_size + 12] == f"⟨{tokenizer.vocab_size + 12}⟩"
    np.testing.assert_allclose(found.next_probabilities_TK.sum(-1), 1, atol=1e-3)


def test_without_a_token_to_start_from_the_first_one_is_not_counted(tiny_model: Build) -> None:
    bare = Tokenizer.train(["the cat sat on the mat"], 270, special_tokens=[], show_progress=False)
    lm = LanguageModel(tiny_model(bare.vocab_size), bare)
    found = inspect_text(lm, "the cat sat")
    first = len(bare.token_bytes(int(found.ids_T[0])))
    assert (found.start, found.n_bytes) == (0, len("the cat sat") - first)
    assert found.scored == len(found.tokens) - 1
    alone = inspect_text(lm, "t")
    assert math.isnan(alone.bits_per_byte)
    assert json.loads(json.dumps(alone.to_dict(), allow_nan=False))["perplexity"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, "the text is empty"),
        ({"text": "cat " * 60}, r"the text has \d+ tokens, the model reads 48 at once"),
        ({"layers": [0, 2]}, "there is no layer 2: this model has 2, from 0 to 1"),
        ({"layers": [-1]}, "there is no layer -1"),
        ({"layers": []}, "no layer is chosen"),
        ({"top": 0}, "top = 0 must be from 1"),
        ({"top": 10_000}, "top = 10000 must be from 1"),
        ({"positions": 0}, "positions = 0 must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(lm: LanguageModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        inspect_text(lm, **{"text": "the cat", **settings})
    assert "\n" not in str(error.value)


def test_logits_that_are_no_numbers_are_said(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(GroundupError, match="logits are not numbers"):
        inspect_text(lm, "the cat")
