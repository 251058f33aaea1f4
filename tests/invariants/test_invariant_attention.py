"""The attention backends are one function: values and gradients, with every kind of view and score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundup.model import BACKENDS, KVCache, ModelConfig, Transformer
from groundup.model.attention import attend
from groundup.model.backends import Scores
from groundup.model.masks import View, positions_in_documents

CPU = torch.device("cpu")
PAD = torch.tensor([0, 4, 11])
DOCUMENTS = torch.tensor([[0] * 13, [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2], [5, 6, 7] + [7] * 5 + [2] * 5])


def view(queries: int, past: int = 0, *, first: int = 0, window: int | None = None, **more: Tensor) -> View:
    return View(queries, past, first, window, more.get("pad_B"), more.get("documents_BS"), CPU)


VIEWS: dict[str, Callable[[], View]] = {  # of 3 sequences
    "causal": lambda: view(13),
    "after a cache": lambda: view(5, 8),
    "one after a cache": lambda: view(1, 12),
    "padded": lambda: view(13, pad_B=PAD),
    "padded, after a cache": lambda: view(5, 8, pad_B=PAD),
    "padded, one after a cache": lambda: view(1, 12, pad_B=PAD),
    "a window": lambda: view(13, window=4),
    "a window of one": lambda: view(13, window=1),
    "a window that hides nothing": lambda: view(13, window=13),
    "a window, padded": lambda: view(13, window=3, pad_B=PAD),
    "a window, after a cache": lambda: view(5, 8, window=4),
    "a window, after a cache that forgets": lambda: view(5, 8, first=5, window=4),
    "a window, one after a cache that forgets": lambda: view(1, 12, first=9, window=4),
    "documents": lambda: view(13, documents_BS=DOCUMENTS),
    "documents through a window": lambda: view(13, window=5, documents_BS=DOCUMENTS),
}
SCORES: dict[str, Callable[[], Scores]] = {
    "plain": lambda: Scores(1 / math.sqrt(7)),
    "another scale": lambda: Scores(0.7),
    "soft cap": lambda: Scores(0.9, softcap=1.3),
    "alibi": lambda: Scores(1 / math.sqrt(7), slopes_H=torch.rand(6)),
    "sinks": lambda: Scores(1 / math.sqrt(7), sinks_H=torch.randn(6, dtype=torch.float64, requires_grad=True)),
}


def by_loops(q: Tensor, k: Tensor, v: Tensor, seen_by: View, scores: Scores) -> Tensor:
    """Vaswani et al. 2017, eq. 1, a query at a time; query head h reads key/value head h // (H / G)."""
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            query = seen_by.past + t
            keys = [place for place in range(seen_by.first, query + 1) if allowed(seen_by, b, query, place)]
            at = [place - seen_by.first for place in keys]
            assert at
            assert max(at) < S
            for h in range(H):
                g = h // (H // G)
                row = torch.stack([q[b, t, h] @ k[b, s, g] * scores.scale for s in at])
                if scores.softcap is not None:
                    row = scores.softcap * torch.tanh(row / scores.softcap)
                if scores.slopes_H is not None:
                    row = row - scores.slopes_H[h] * torch.tensor([query - place for place in keys])
                if scores.sinks_H is not None:
                    weights = torch.cat([row, scores.sinks_H[h : h + 1].detach()]).softmax(0)[:-1]
                else:
                    weights = row.softmax(0)
                result[b, t, h] = weights @ v[b, at, g]
    return result


def allowed(seen_by: View, b: int, query: int, key: int) -> bool:
    if query == key:
        return True
    if seen_by.window is not None and query - key >= seen_by.window:
        return False
    if seen_by.pad_B is not None and key < seen_by.pad_B[b]:
        return False
    return seen_by.documents_BS is None or bool(seen_by.documents_BS[b, query] == seen_by.documents_BS[b, key])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("case", VIEWS.values(), ids=VIEWS)
def test_backends_are_equal_and_right(case: Callable[[], View], scores: Callable[[], Scores], groups: int) -> None:
    torch.manual_seed(groups)
    made = scores()
    T, S = case().queries, case().keys
    shapes = ((T, 6, 7), (S, groups, 7), (S, groups, 5))
    inputs = [torch.randn(3, *shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(3, T, 6, 5, dtype=torch.float64)
    results = []
    for backend in BACKENDS:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        sinks = None if made.sinks_H is None else made.sinks_H.detach().clone().requires_grad_()
        if backend == "flex":  # which PyTorch has no backward pass for on a CPU
            plain = replace(made, sinks_H=None if made.sinks_H is None else made.sinks_H.detach())
            results.append([attend(*inputs, case(), plain, backend=backend)])
            continue
        mixed = attend(*leaves, case(), replace(made, sinks_H=sinks), backend=backend)
        (mixed * weight).sum().backward()
        gradients = [leaf.grad for leaf in leaves] + ([] if sinks is None else [sinks.grad])
        results.append([mixed.detach(), *gradients])
    for backend, result in zip(BACKENDS[1:], results[1:], strict=True):
        for name, explicit, other in zip(("values", "dq", "dk", "dv", "dsinks"), results[0], result, strict=False):
            assert explicit is not None
            assert torch.isfinite(explicit).all()
            # ALiBi's biases are float32, and so is the denominator that flex gives back for the sinks.
            atol = 1e-6 if made.slopes_H is not None or (backend == "flex" and made.sinks_H is not None) else 1e-12
            torch.testing.assert_close(
                explicit, other, rtol=0, atol=atol, msg=lambda m, n=name, b=backend: f"{b} {n}: {m}"
            )
    torch.testing.assert_close(results[0][0], by_loops(*inputs, case(), made), rtol=0, atol=1e-6)


def test_what_a_query_may_see_by_hand() -> None:
    seen = view(2, 2, pad_B=torch.tensor([0, 3])).mask()[:, 0].int().tolist()
    assert seen == [
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[0, 0, 1, 0], [0, 0, 0, 1]],  # three of padding: the query at 2 is one of them and sees itself alone
    ]
    assert view(3, 2, first=1, window=2).mask()[0, 0].int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_positions_in_documents_by_hand() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 4, 4]])
    assert positions_in_documents(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]


def test_a_window_makes_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    T, W = 600, 7
    q, k, v = (torch.randn(1, T, heads, 4) for heads in (2, 1, 1))
    whole = view(T, window=W)
    expected = attend(q, k, v, whole, Scores(0.5), backend="explicit", weights=[])
    made: list[int] = []
    visible = View.visible
    monkeypatch.setattr(
        View,
        "visible",
        lambda self, a, b: made.append((a.shape[-2] if a.ndim > 1 else 1) * b.shape[-1]) or visible(self, a, b),
    )
    for backend in ("explicit", "sdpa"):
        found = attend(q, k, v, view(T, window=W), Scores(0.5), backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert made
    assert max(made) <= W * 2 * W


def test_weights_are_what_values_are_mixed_with() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 9, heads, 4, dtype=torch.float64) for heads in (6, 2, 2))
    weights: list[Tensor] = []
    mixed = attend(q, k, v, view(9), Scores(0.5), backend="sdpa", weights=weights)
    assert weights[0].shape == (2, 6, 9, 9)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 6, 9, dtype=torch.float64))
    again = torch.einsum("bhts,bshd->bthd", weights[0], v.repeat_interleave(3, dim=2))
    torch.testing.assert_close(mixed, again, rtol=0, atol=1e-12)
    plain = attend(q, k, v, view(9), Scores(0.5), backend="sdpa")
    torch.testing.assert_close(mixed, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_both_backends_are_equal_in_value_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=53, context_length=17, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, init_std=0.2)
    model = Transformer(config)
    ids = torch.randint(53, (3, 17))
    found = []
    for backend in ("explicit", "sdpa"):
        model.backend = backend
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ids)
        logits.float().logsumexp(-1).mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach().float(), torch.cat(gradients)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    (a, gradient_a), (b, gradient_b) = found
    assert (a - b).abs().max() < tolerance * a.abs().max()
    assert (gradient_a - gradient_b).norm() < tolerance * gradient_a.norm()


def test_grouped_query_attention_is_multi_head_attention_with_repeated_heads() -> None:
    torch.manual_seed(2)
    sizes = dict(vocab_size=53, context_length=17, n_layer=2, n_head=6, n_embd=36, n_ff=31, init_std=0.2)
    grouped = Transformer(ModelConfig(**sizes, n_kv_head=2)).eval()
    full = Transformer(ModelConfig(**sizes)).eval()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith(("attention.k.weight", "attention.v.weight"))]:
        state[name] = state[name].view(2, 1, 6, 36).expand(2, 3, 6, 36).reshape(36, 36)
    full.load_state_dict(state)
    ids = torch.randint(53, (2, 17))
    torch.testing.assert_close(grouped(ids), full(ids), rtol=0, atol=1e-5)
    assert KVCache(grouped.config, 1, 17).nbytes * 3 == KVCache(full.config, 1, 17).nbytes


@torch.inference_mode()
def test_packed_documents_are_each_alone() -> None:
    torch.manual_seed(4)
    for choice in ({}, {"positions": "learned"}, {"positions": "alibi"}, {"layer_pattern": "SF", "sliding_window": 3}):
        model = Transformer(ModelConfig(vocab_size=53, context_length=17, n_layer=2, n_head=2, n_embd=20, **choice))
        model = model.double().eval()
        ids = torch.randint(53, (1, 17))
        documents = torch.tensor([[0] * 6 + [1] + [2] * 10])
        alone = torch.cat([model(part) for part in ids.split([6, 1, 10], dim=1)], dim=1)
        torch.testing.assert_close(model(ids, documents_BT=documents), alone, rtol=0, atol=1e-6)
