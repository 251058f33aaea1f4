"""Compiled decoding against the model itself, written in PyTorch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from groundup.inference.small_batch import MOST, SmallBatch
from groundup.model import ModelConfig, Transformer
from groundup.model.quantized import quantize_model

TINY = {
    "vocab_size": 61, "context_length": 37, "n_layer": 3, "n_head": 6, "n_kv_head": 2, "n_embd": 29, "head_dim": 10,
    "n_ff": 43, "tie_embeddings": False,
}  # fmt: skip
BLOCK = 3


def make(seed: int = 0, **overrides: Any) -> Transformer:
    """A tiny model whose norms and biases are not what they start as."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_dict(TINY | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model.requires_grad_(False)


class Pages:
    """Pages of a model in which the blocks of sequences lie in no order, and everything else is not a number."""

    def __init__(
        self, model: Transformer, sequences: int, dtype: torch.dtype = torch.float32, block: int = BLOCK
    ) -> None:
        config = model.config
        each = -(-config.context_length // block)
        shape = ((sequences * each + 1) * block, config.kv_heads, config.head_width)
        self.pages = [tuple(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv") for _ in range(config.n_layer)]
        generator = np.random.default_rng(5)
        windows = {config.window(layer) for layer in range(config.n_layer)}
        self.tables = [
            (1 + generator.permutation(sequences * each)).astype(np.int32).reshape(sequences, each) for _ in windows
        ]
        self.batch = SmallBatch(model, self.pages, block)


def step(pages: Pages, texts: list[list[int]], tokens: list[tuple[int, int]], **options: Any) -> np.ndarray:
    """One step: features of tokens, each a text and a place in it."""
    rows, places = (np.array(values) for values in zip(*tokens, strict=True))
    ids = np.array([texts[row][place] for row, place in tokens])
    return pages.batch.features(ids, places, rows, pages.tables, **options)


def random_texts(count: int, length: int, vocab: int = 61) -> list[list[int]]:
    return np.random.default_rng(7).integers(0, vocab, (count, length)).tolist()


def decoded(model: Transformer, pages: Pages, texts: list[list[int]]) -> list[np.ndarray]:
    """Features of all tokens of texts: five tokens of the first at a time, two of the second, one of the others."""
    found: list[list[np.ndarray]] = [[] for _ in texts]
    sizes = [5, 2] + [1] * len(texts)
    while any(len(done) < len(text) for done, text in zip(found, texts, strict=True)):
        tokens = [
            (row, place)
            for row, text in enumerate(texts)
            for place in range(len(found[row]), min(len(text), len(found[row]) + sizes[row]))
        ]
        for (row, _), values in zip(tokens, step(pages, texts, tokens), strict=True):
            found[row].append(values)
    return [np.stack(values) for values in found]


def apart(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the root mean square."""
    expected = expected.float()
    return float((torch.from_numpy(found) - expected).abs().max() / expected.square().mean().sqrt())


def check(
    model: Transformer, tolerance: float, dtype: torch.dtype = torch.float32, reference: Any = None,
    logits_tolerance: float | None = None,
) -> None:  # fmt: skip
    texts = random_texts(3, 23, model.config.vocab_size)
    pages = Pages(model, 3, dtype)
    reference = reference or model
    with torch.no_grad():
        for text, found in zip(texts, decoded(model, pages, texts), strict=True):
            expected = reference.features(torch.tensor([text]))
            assert apart(found, expected[0]) < tolerance
            logits = pages.batch.logits(found[:MOST])
            assert apart(logits, reference.logits(expected)[0, :MOST]) < (logits_tolerance or tolerance)


SCALINGS: list[dict[str, Any]] = [
    {"kind": "linear", "factor": 3.0},
    {"kind": "yarn", "factor": 4.0, "original_length": 11},
    {"kind": "llama3", "factor": 4.0, "original_length": 11},
]
PARTS: list[dict[str, Any]] = [
    {},
    {"norm_plus_one": True, "qk_norm": False},
    {"norm": "layernorm", "bias": True, "feed_forward": "gelu", "positions": "learned", "tie_embeddings": True},
    {"norm": "layernorm", "bias": False, "norm_placement": "post", "positions": "sinusoidal"},
    {"norm_placement": "output", "qk_norm_whole": True, "feed_forward": "relu2"},
    {"norm_placement": "sandwich", "norm_plus_one": True, "feed_forward": "geglu", "attention_softcap": 5.0,
     "logit_softcap": 3.0, "embedding_scale": 5.3},
    {"parallel_blocks": True, "rope_fraction": 0.4, "feed_forward": "gelu_exact", "ff_bias": True},
    {"positions": "none", "n_kv_head": 1, "feed_forward": "relu", "out_bias": True},
    {"n_kv_head": 6, "qkv_bias": True, "feed_forward": "clamped_swiglu", "attention_scale": 0.3},
    {"layer_pattern": "SSF", "sliding_window": 5, "rope_local_theta": 100.0},
    {"layer_pattern": "NSF", "sliding_window": 7},
    {"norm": "layernorm", "bias": True, "qk_norm_whole": True, "norm_placement": "post", "n_head": 10, "head_dim": 32},
    *({"rope_scaling": scaling} for scaling in SCALINGS),
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts) or "plain")
def test_equals_the_model(parts: dict[str, Any]) -> None:
    check(make(**parts), 1e-4)


@pytest.mark.parametrize("parts", PARTS[:6], ids=lambda parts: "-".join(parts) or "plain")
def test_bf16(parts: dict[str, Any]) -> None:
    model = make(**parts)
    model.to(torch.bfloat16)
    reference = make(**parts).to(torch.bfloat16).float()  # the same weights, computed in float32
    with torch.no_grad():
        ids = torch.tensor(random_texts(3, 23))
        features, exact = model.features(ids), reference.features(ids)
        off = apart(features.float().numpy(), exact)
        logits_off = apart(model.logits(features).float().numpy(), reference.logits(exact))
    check(model, off, torch.bfloat16, reference, logits_off)  # no further off than PyTorch


def test_bf16_pages() -> None:
    check(make(), 0.03, torch.bfloat16)


QUANTIZED: list[tuple[Any, ...]] = [
    ("int8", 64, False), ("int4", 32, False), ("int4", 64, True), ("int4", 128, False), ("int4", 32, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "group", "zero_point"), QUANTIZED)
@pytest.mark.parametrize("width", [29, 320])
def test_quantized(kind: Any, group: int, zero_point: bool, width: int) -> None:
    model = make(n_embd=width, n_ff=3 * width, bias=True)
    quantize_model(model, kind, group=group, zero_point=zero_point, skip=["embedding"])
    check(model, 2e-3)


def test_kinds_mixed() -> None:
    """Each kind in one model, so that the same inputs are packed in several ways."""
    model = make(n_embd=67)
    quantize_model(model, "int4", group=32, skip=["head", "k", "down", "blocks.2.*"])
    quantize_model(model, "int8", skip=["head", "k", "blocks.2.*"])
    model.blocks[0].attention.k.to(torch.bfloat16)
    reference = make(n_embd=67)
    quantize_model(reference, "int4", group=32, skip=["head", "k", "down", "blocks.2.*"])
    quantize_model(reference, "int8", skip=["head", "k", "blocks.2.*"])
    reference.blocks[0].attention.k.to(torch.bfloat16).float()
    check(model, 0.03, reference=reference)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_alone_and_among_others(kind: str) -> None:
    """Each token's numbers are the same, bit for bit, whatever else is in the step."""
    model = make(n_embd=197, n_ff=331)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind != "float32":
        quantize_model(model, kind)  # type: ignore[arg-type]
    texts = random_texts(MOST, 6)
    alone = Pages(model, MOST)
    expected = [[step(alone, texts, [(row, place)])[0] for place in range(6)] for row in range(MOST)]
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, MOST - 1, MOST):
        pages = Pages(model, MOST)
        for place in range(6):
            found = step(pages, texts, [(row, place) for row in range(count)])
            for row in range(count):
                assert np.array_equal(found[row], expected[row][place])
        logits = pages.batch.logits(found)
        for row in range(count):
            assert np.array_equal(pages.batch.logits(found[row : row + 1])[0], logits[row])
    together = Pages(model, MOST)
    found = step(together, texts, [(3, place) for place in range(6)])
    assert np.array_equal(found, np.stack(expected[3]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_texts_and_threads(threads: int) -> None:
    """Texts of several pieces of attention, with and without a window; the same for any number of threads."""
    model = make(context_length=601, layer_pattern="SF", sliding_window=271, n_layer=2)
    texts = random_texts(2, 600)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pages = Pages(model, 2, block=16)
        for begin in range(0, 592, 8):
            step(pages, texts, [(row, begin + i) for row in range(2) for i in range(8)])
        found = step(pages, texts, [(row, 592 + i) for row in range(2) for i in range(8)])
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        expected = model.features(torch.tensor(texts))[:, 592:]
    assert apart(found, expected.flatten(0, 1)) < 1e-4


def test_several_python_threads() -> None:
    """Models decode side by side, and one decoder takes one step at a time."""
    model, before = make(n_embd=131), torch.get_num_threads()
    texts = random_texts(4, 30)
    torch.set_num_threads(3)
    try:
        alone = Pages(model, 4)
        expected = [step(alone, texts, [(row, place) for row in range(4)]) for place in range(30)]
        both = [Pages(model, 4), Pages(model, 4)]

        def decode(number: int) -> list[np.ndarray]:
            rows = range(4) if number < 2 else ()
            found = [step(both[number % 2], texts, [(row, place) for row in rows]) for place in range(30) if rows]
            return found or [both[number % 2].batch.logits(expected[place]) for place in range(30)]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(decode, range(4)))
        logits = [alone.batch.logits(features) for features in expected]
    finally:
        torch.set_num_threads(before)
    for of_step, wanted in zip([*found[0], *found[1]], expected * 2, strict=True):
        assert np.array_equal(of_step, wanted)
    for of_step, wanted in zip([*found[2], *found[3]], logits * 2, strict=True):
        assert np.array_equal(of_step, wanted)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_grow(kind: str) -> None:
    scaling: dict[str, Any] = {"kind": kind, "factor": 3.0, "original_length": 7}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 5, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0]}
    model = make(rope_scaling=scaling)
    texts = random_texts(2, 13)
    texts[1] = texts[1][:5]
    pages = Pages(model, 2)
    tokens = [(0, place) for place in range(11)] + [(1, place) for place in range(5)]
    lengths = np.array([11] * 11 + [5] * 5)
    found = step(pages, texts, tokens, lengths_N=lengths)
    with torch.no_grad():
        for text, begin, length in ((texts[0], 0, 11), (texts[1], 11, 5)):
            expected = model.features(torch.tensor([text[:length]]))[0]
            assert apart(found[begin : begin + length], expected) < 1e-4


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_no_numbers_stay_none(kind: str) -> None:
    """A broken model says so: its logits are not numbers."""
    model = make()
    if kind == "int8":
        quantize_model(model, "int8")
        model.blocks[1].feed_forward_norm.weight[3] = torch.nan
    else:
        model.blocks[1].feed_forward.up.weight[7, 11] = torch.nan
    pages = Pages(model, 1)
    found = step(pages, random_texts(1, 1), [(0, 0)])
    assert np.isnan(pages.batch.logits(found)).all()


def test_weights_that_change() -> None:
    """Training goes on between steps: the weights are read where they lie."""
    model = make(bias=True, norm="layernorm")
    pages, texts = Pages(model, 1), random_texts(1, 1)
    step(pages, texts, [(0, 0)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        expected = model.features(torch.tensor(texts))[0]
    assert apart(step(pages, texts, [(0, 0)]), expected) < 1e-4


def test_refusals() -> None:
    refused = {
        "latent": {"latent": {"kv_rank": 7, "rope_dim": 4, "nope_dim": 6, "v_dim": 5}, "qk_norm": False,
                   "n_kv_head": None, "head_dim": None},
        "experts": {"experts": {"count": 3}},
        "ALiBi": {"positions": "alibi"},
        "sinks": {"attention_sinks": True},
    }  # fmt: skip
    for word, parts in refused.items():
        assert word in str(SmallBatch.refusal(Transformer(ModelConfig.from_dict(TINY | parts))))
    assert "float16" in str(SmallBatch.refusal(make().to(torch.float16)))
    assert "nf4" in str(SmallBatch.refusal(quantize_model(make(), "nf4")))  # type: ignore[arg-type]
    assert SmallBatch.refusal(make()) is None
    with pytest.raises(ValueError, match="ALiBi"):
        SmallBatch(Transformer(ModelConfig.from_dict(TINY | refused["ALiBi"])), [], BLOCK)


def test_too_many_tokens() -> None:
    model = make()
    pages = Pages(model, 1)
    with pytest.raises(ValueError, match=f"1 to {MOST}"):
        step(pages, random_texts(1, MOST + 1), [(0, 3)] * (MOST + 1))
