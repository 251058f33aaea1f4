"""The model as a function: what it starts from, what it may look at, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from groundup.model import KVCache, ModelConfig, Transformer, fastest_backend
from groundup.model.feed_forward import make_feed_forward
from groundup.model.positions import rotate

CHOICES = [
    {},
    {"qk_norm": False, "n_kv_head": 1, "tie_embeddings": False},
    {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
    {"norm": "layernorm", "positions": "none", "feed_forward": "relu2"},
]
NAMES = ["qwen3", "llama", "gpt2", "neither"]


def small(**fields: Any) -> ModelConfig:
    sizes = dict(vocab_size=101, context_length=19, n_layer=3, n_head=3, n_embd=42, n_ff=53)
    return ModelConfig(**sizes | fields)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_a_fresh_model_knows_nothing(choice: dict[str, Any]) -> None:
    config = small(vocab_size=1009, **choice)
    ids = torch.randint(config.vocab_size, (8, 20))
    logits = Transformer(config)(ids[:, :-1])
    assert logits.shape == (8, 19, 1009)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(1009)) < 0.1


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_a_later_token_never_changes_an_earlier_logit(choice: dict[str, Any], backend: Any) -> None:
    model = Transformer(small(**choice)).eval()
    model.backend = backend
    ids = torch.randint(101, (2, 19))
    logits = model(ids)
    for changed in (1, 7, 18):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % 101
        difference = (model(other) - logits).abs().amax(dim=(0, 2))
        assert torch.all(difference[:changed] == 0)
        assert torch.all(difference[changed:] > 0)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_positions_matter_and_without_them_order_does_not(positions: Any) -> None:
    a, b, last = torch.tensor([[5]]), torch.tensor([[11]]), torch.tensor([[3]])
    one_way, other_way = torch.cat([a, b, last], 1), torch.cat([b, a, last], 1)

    def difference(config: ModelConfig) -> float:
        torch.manual_seed(3)
        # One layer: with more, the causal mask itself tells a position how many came before.
        model = Transformer(config).double()
        return float((model(one_way) - model(other_way))[:, -1].detach().abs().max())

    assert difference(small(n_layer=1, init_std=0.3, positions=positions)) > 1e-3
    assert difference(small(n_layer=1, init_std=0.3, positions="none")) < 1e-12


def test_rotary_attention_depends_on_distance_alone() -> None:
    model = Transformer(small()).eval()
    assert model.rotary is not None
    q, k = torch.randn(1, 1, 1, 14), torch.randn(1, 1, 1, 14)

    def score(query: int, key: int) -> float:
        assert model.rotary is not None
        turned = rotate(q, *model.rotary(torch.tensor([[query]]), 19)) * rotate(
            k, *model.rotary(torch.tensor([[key]]), 19)
        )
        return float(turned.sum())

    assert score(18, 13) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(18, 13) != pytest.approx(score(18, 12), abs=1e-3)


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_dropout_acts_in_training_only(backend: Any) -> None:
    model = Transformer(small(dropout=0.5))
    model.backend = backend
    ids = torch.randint(101, (2, 19))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    plain = Transformer(small())
    plain.load_state_dict(model.state_dict())
    plain.backend = backend
    assert torch.equal(plain(ids), model(ids))


def test_dropout_reaches_attention_weights_embeddings_and_sublayers() -> None:
    """Each place is dropped on its own, so the share of zeros is that of one dropout, and what is left is scaled up."""
    from groundup.model.backends import Scores, attend
    from groundup.model.masks import View

    q = k = torch.zeros(1, 400, 1, 4)
    v = torch.ones(1, 400, 1, 4)
    for backend in ("explicit", "sdpa"):
        view = View(400, 0, 0, None, None, None, torch.device("cpu"))
        mixed = attend(q, k, v, view, Scores(0.5, dropout=0.25), backend=backend)[:, 300:]
        assert float(mixed.mean()) == pytest.approx(1.0, abs=0.02)
        assert 0.01 < float(mixed.std()) < 0.05  # sqrt(0.25 / 0.75 / 350) = 0.031


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = Transformer(small()), Transformer(small(tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.parameter_count() - tied.parameter_count() == 101 * 42


def test_residual_writers_start_smaller() -> None:
    config = small(n_layer=8, n_embd=192, n_ff=512)
    block = Transformer(config).blocks[0]
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_feed_forward_layers_by_their_formulas() -> None:
    x = torch.randn(2, 5, 42)
    swiglu = make_feed_forward(small(feed_forward="swiglu"), 0)
    gate, up, down = swiglu.gate.weight, swiglu.up.weight, swiglu.down.weight
    torch.testing.assert_close(swiglu(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)
    relu2 = make_feed_forward(small(feed_forward="relu2"), 0)
    up, down = relu2.up.weight, relu2.down.weight
    torch.testing.assert_close(relu2(x), (x @ up.T).clamp_min(0) ** 2 @ down.T)
    gelu = make_feed_forward(small(feed_forward="gelu"), 0)
    hidden = x @ gelu.up.weight.T
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))  # Hendrycks & Gimpel 2016, section 2
    torch.testing.assert_close(gelu(x), 0.5 * hidden * (1 + tanh) @ gelu.down.weight.T)


def test_more_positions_than_the_context_are_refused() -> None:
    model = Transformer(small())
    with pytest.raises(ValueError, match=r"20 positions, the model's context_length is 19"):
        model(torch.zeros(1, 20, dtype=torch.int64))
    cache = KVCache(model.config, 1, 19)
    model(torch.zeros(1, 18, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"20 positions"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache)


def test_a_full_cache_is_refused() -> None:
    model = Transformer(small())
    cache = KVCache(model.config, 1, 4)
    with pytest.raises(ValueError, match=r"the cache holds 4 positions, 5 were asked for"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_the_last_logits_alone_are_the_last_of_all() -> None:
    model = Transformer(small()).eval()
    ids = torch.randint(101, (3, 11))
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=0, atol=1e-6)


def test_the_fastest_backend_is_one_that_runs() -> None:
    assert fastest_backend(small(), 2, torch.device("cpu"), torch.float32, repeats=1) in ("explicit", "sdpa")


def test_scores_too_large_to_hold_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundup.model import backends

    def too_large(*args: object, **kwargs: object) -> None:
        pytest.fail("the explicit backend was tried")

    monkeypatch.setattr(backends, "explicit_attention", too_large)
    monkeypatch.setattr(backends, "LARGEST_SCORES", 4 * 2 * 3 * 19 * 19 - 1)
    assert fastest_backend(small(), 2, torch.device("cpu"), torch.float32, repeats=1) == "sdpa"


def test_a_backend_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundup.model import backends

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel for this device")

    with monkeypatch.context() as patch:
        patch.setattr(backends.F, "scaled_dot_product_attention", broken)
        assert fastest_backend(small(), 2, torch.device("cpu"), torch.float32, repeats=1) == "explicit"
        patch.setattr(backends, "explicit_attention", broken)
        with pytest.raises(RuntimeError, match="no attention backend runs on cpu"):
            fastest_backend(small(), 2, torch.device("cpu"), torch.float32, repeats=1)
