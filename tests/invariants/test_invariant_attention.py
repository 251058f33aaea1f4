"""The attention backends are one function: values and gradients, with every kind of mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from groundup.model import KVCache, ModelConfig, Transformer
from groundup.model.attention import attend, visible_keys

CPU = torch.device("cpu")
MASKS: dict[
    str, Callable[[], tuple[int, int, Tensor | None]]
] = {  # query positions, key positions, mask for 3 sequences
    "causal": lambda: (13, 13, None),
    "causal, written out": lambda: (13, 13, visible_keys(13, 13, None, CPU)),
    "after a cache": lambda: (5, 13, visible_keys(5, 13, None, CPU)),
    "one after a cache": lambda: (1, 13, visible_keys(1, 13, None, CPU)),
    "padded": lambda: (13, 13, visible_keys(13, 13, torch.tensor([0, 4, 11]), CPU)),
    "padded, after a cache": lambda: (5, 13, visible_keys(5, 13, torch.tensor([0, 4, 11]), CPU)),
}


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Vaswani et al. 2017, eq. 1, a query at a time; query head h reads key/value head h // (H / G)."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    result = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                if mask is None:
                    seen = list(range(t + 1))
                else:
                    allowed = mask.expand(B, 1, T, S)[b, 0, t]
                    seen = [s for s in range(S) if allowed[s]]
                scores = torch.stack([q[b, t, h] @ k[b, s, g] / math.sqrt(D) for s in seen])
                result[b, t, h] = scores.softmax(0) @ v[b, seen, g]
    return result


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_backends_are_equal_and_right(case: Callable[[], tuple[int, int, Tensor | None]], groups: int) -> None:
    torch.manual_seed(groups)
    T, S, mask = case()
    inputs = [
        torch.randn(3, length, heads, 7, dtype=torch.float64) for length, heads in ((T, 6), (S, groups), (S, groups))
    ]
    weight = torch.randn(3, T, 6, 7, dtype=torch.float64)
    results = []
    for backend in ("explicit", "sdpa"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        mixed = attend(*leaves, mask, backend=backend)
        (mixed * weight).sum().backward()
        results.append([mixed.detach(), *(leaf.grad for leaf in leaves)])
    for name, explicit, sdpa in zip(("values", "dq", "dk", "dv"), *results, strict=True):
        assert explicit is not None
        assert torch.isfinite(explicit).all()
        torch.testing.assert_close(explicit, sdpa, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(results[0][0], by_loops(*inputs, mask), rtol=0, atol=1e-12)


def test_what_a_query_may_see_by_hand() -> None:
    seen = visible_keys(2, 4, torch.tensor([0, 3]), CPU)[:, 0].int().tolist()
    assert seen == [
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[0, 0, 1, 0], [0, 0, 0, 1]],  # three of padding: the query at 2 is one of them and sees itself alone
    ]


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
