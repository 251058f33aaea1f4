"""The kinds of attention that benchmarks/attention.py measures, who computes them, and how much memory that takes."""

from __future__ import annotations

from typing import Any

# One layer whose feed-forward is narrow, so that attention is nearly all of the work. Weights are larger than those of
# a new model: scores that are nearly all alike would hide what tells the kinds apart.
COMMON: dict[str, Any] = dict(
    vocab_size=256, n_layer=1, n_head=16, n_embd=1024, n_ff=64, qk_norm=False, norm_eps=1e-5, init_std=0.05,
)  # fmt: skip


def _latent(rank: int) -> dict[str, Any]:
    """Latent attention with DeepSeek's proportions: half as many rotary dimensions as others."""
    return dict(latent=dict(kv_rank=rank, rope_dim=32, nope_dim=64, v_dim=64), tie_embeddings=False)


def _window(width: int) -> dict[str, Any]:
    return dict(layer_pattern="S", sliding_window=width)


KINDS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA 8": dict(n_kv_head=8),
    "GQA 4": dict(n_kv_head=4),
    "GQA 2": dict(n_kv_head=2),
    "MQA": dict(n_kv_head=1),
    "MLA 128": _latent(128),
    "MLA 256": _latent(256),
    "MLA 512": _latent(512),
    "window 256": _window(256),
    "window 1024": _window(1024),
    "sinks": dict(  # as gpt-oss, whose layers are experts: here one of them
        attention_sinks=True, qkv_bias=True, out_bias=True, ff_bias=True, feed_forward="clamped_swiglu",
        tie_embeddings=False, experts=dict(count=1, active=1, width=64, router_bias=True),
    ),
    "soft cap": dict(  # as Gemma 2
        attention_softcap=50.0, attention_scale=0.125, norm_plus_one=True, norm_placement="sandwich",
        feed_forward="geglu", embedding_scale=32.0,
    ),
    "ALiBi": dict(positions="alibi"),
}  # fmt: skip
"""Fields over ``COMMON``. Of the transformers families, the first that can say a kind is its peer."""

PEERS = {"sinks": "gpt-oss", "soft cap": "Gemma 2", "ALiBi": None} | {
    kind: "DeepSeek-V3" if kind.startswith("MLA") else "Mistral" if kind.startswith("window") else "Llama"
    for kind in KINDS
    if kind not in ("sinks", "soft cap", "ALiBi")
}
PLAIN_FLEX = 1024  # on a CPU FlexAttention is not compiled; it is measured up to here, to compare
COPIES = {"forward": 3, "training": 6, "decoding": 3}  # of the scores, where they are written out
PIECE = 512  # positions at once when attention_jobs.py fills a cache


def contenders_of(kind: str, device: str) -> list[str]:
    """Who computes a kind of attention: our backends and theirs, the ones that are likely to be used side by side."""
    ways = ["sdpa", "explicit", "flex"]
    if kind.startswith("MLA"):
        ours = [f"groundup, {way}, {form}" for way in ways for form in ("expanded", "absorbed")]
    else:
        ours = [f"groundup, {way}" for way in ways]
    if PEERS[kind] is None:
        return ours
    theirs = ["transformers, eager"]
    if kind not in ("sinks", "soft cap"):  # which PyTorch's fused kernels lack, and transformers refuses there
        theirs.append("transformers, sdpa")
    if device.startswith("cuda"):
        theirs.append("transformers, flex")
    return (
        [name for pair in zip(ours, theirs, strict=False) for name in pair] + ours[len(theirs) :] + theirs[len(ours) :]
    )


def phases_of(contender: str, device: str) -> list[str]:
    """What a contender is measured at.

    The absorbed form of latent attention works with a cache alone; FlexAttention has no backward pass on a CPU.
    """
    trains = not contender.endswith("absorbed") and not (", flex" in contender and device == "cpu")
    return ["forward", "training", "decoding"] if trains else ["forward", "decoding"]


def needed_bytes(kind: str, contender: str, length: int, phase: str, device: str) -> float:
    """About how much a contender holds at once: the scores, where it writes them out, as often as it copies them.

    An estimate that only decides what to leave out; infinite for what is too slow to be worth the wait.
    """
    package, way = contender.split(", ")[:2]
    on_cpu = not device.startswith("cuda")
    if way == "flex" and on_cpu and length > PLAIN_FLEX:
        return float("inf")
    # The fused kernels take no soft cap; ALiBi is a mask of scores. On a CPU PyTorch's wants values as wide as keys,
    # which transformers does not see to.
    written_out = way in ("explicit", "eager") or (way == "flex" and on_cpu) or kind in ("soft cap", "ALiBi")
    written_out = written_out or (package == "transformers" and kind.startswith("MLA") and on_cpu)
    if not written_out:
        return 0.0
    keys = length
    if kind.startswith("window") and package == "groundup" and way != "flex":
        keys = min(length, 2 * KINDS[kind]["sliding_window"])
    queries = min(length, PIECE) if phase == "decoding" else length
    return 4.0 * COPIES[phase] * COMMON["n_head"] * queries * keys
