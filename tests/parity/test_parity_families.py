"""Every family of checkpoints that we read is, here and in transformers, the same function; and so is what we save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.model import KVCache, Transformer, language_model_loss, load_model, save_model
from groundup.model.weights import family_of
from groundup.runtime import GroundupError

# Sizes are pairwise different, so that swapped axes fail.
SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=84, intermediate_size=61, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=29, initializer_range=0.15, rms_norm_eps=1e-4,
    bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 500.0}
DEEPSEEK = SIZES | dict(
    num_key_value_heads=6, rms_norm_eps=1e-6, kv_lora_rank=22, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=13,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=17, n_shared_experts=2, first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)  # fmt: skip
PLAIN = dict(attn_implementation="eager", experts_implementation="eager")  # the others want sizes of whole 16 bytes
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 700.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", dict(vocab_size=101, n_positions=29, n_embd=84, n_layer=3, n_head=6, initializer_range=0.15)),
    "gpt2, untied, exact gelu": (
        "GPT2",
        dict(
            vocab_size=101, n_positions=29, n_embd=84, n_layer=2, n_head=6, n_inner=61, initializer_range=0.15,
            tie_word_embeddings=False, activation_function="gelu", layer_norm_epsilon=1e-3,
        ),
    ),
    "gpt-neox": ("GPTNeoX", SIZES | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.3}}),
    "gpt-neox, one after the other": (
        "GPTNeoX",
        SIZES | {"use_parallel_residual": False, "attention_bias": False,
                 "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    ),
    "llama 2": ("Llama", SIZES | {"rope_parameters": ROPE}),
    "llama, multi-head, biases, wide heads": (
        "Llama",
        SIZES | {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True, "head_dim": 22},
    ),
    "llama 3": (
        "Llama",
        SIZES
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 3.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 10,
            },
        },
    ),
    "llama, linear": ("Llama", SIZES | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.5}}),
    "llama, dynamic": (
        "Llama",
        SIZES | {"max_position_embeddings": 12, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.5}},
    ),
    "llama, yarn": ("Llama", SIZES | {"rope_parameters": YARN}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5, "head_dim": 22}),
    "mistral, no window": ("Mistral", SIZES | {"sliding_window": None}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", SIZES | {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2, windows above": (
        "Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 22, "rope_parameters": ROPE}),
    "qwen3-moe": (
        "Qwen3Moe",
        SIZES | {"head_dim": 22, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 19,
                 "norm_topk_prob": True},
    ),
    "qwen3-moe, sparse, not normed": (
        "Qwen3Moe",
        SIZES | {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 19, "decoder_sparse_step": 2,
                 "norm_topk_prob": False},
    ),
    "olmo2": ("Olmo2", SIZES),
    "phi3": ("Phi3", SIZES | {"sliding_window": 6}),
    "phi3, longrope": (
        "Phi3",
        SIZES
        | {
            "original_max_position_embeddings": 12,
            "partial_rotary_factor": 6 / 14,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 700.0, "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [1.3, 2.0, 4.0], "partial_rotary_factor": 6 / 14,
                "original_max_position_embeddings": 12,
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        SIZES | {"head_dim": 22, "sliding_window": 5, "query_pre_attn_scalar": 31, "attn_logit_softcapping": 3.0,
                 "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3",
        SIZES
        | {
            "head_dim": 22, "sliding_window": 5, "query_pre_attn_scalar": 31,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "deepseek-v2": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": 18, "norm_topk_prob": False, "topk_method": "greedy"}),
    "deepseek-v2, lite": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2, groups": (
        "DeepseekV2",
        DEEPSEEK | {"q_lora_rank": 18, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v3": (
        "DeepseekV3", DEEPSEEK | {"q_lora_rank": 18, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0},
    ),
    "deepseek-v3, yarn": (
        "DeepseekV3",
        DEEPSEEK | {"q_lora_rank": 18, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0, "attention_bias": True,
                    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    ),
    "gpt-oss": (
        "GptOss",
        SIZES | {"head_dim": 22, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5,
                 "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def by_transformers(kind: str, values: dict[str, Any]) -> nn.Module:
    """Weights far from their initial size and norms far from 1, so that every part matters."""
    torch.manual_seed(13)
    config_class = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model_class = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    model = model_class._from_config(config_class(**values), **PLAIN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
            elif "experts" in name or "router" in name or "gate.weight" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.rand_like(buffer) - 0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def _forget(request: pytest.FixtureRequest) -> None:
    """transformers' dynamic frequencies stay as the longest text made them, until a short one comes."""
    if "pair" in request.fixturenames:
        with torch.inference_mode():
            request.getfixturevalue("pair")[0](torch.zeros(1, 2, dtype=torch.int64))


def scaled(expected: Tensor) -> dict[str, Any]:
    return dict(rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Transformer]:
    kind, values = request.param
    folder = tmp_path_factory.mktemp("theirs")
    other = by_transformers(kind, values)
    other.save_pretrained(folder)
    return other, load_model(folder).eval()


@torch.inference_mode()
def test_logits(pair: tuple[nn.Module, Transformer]) -> None:
    other, model = pair
    assert model.parameter_count() == sum(p.numel() for p in other.parameters())
    ids = torch.randint(101, (2, 29))
    expected = other(ids).logits
    assert expected.std() > 0.1  # that the logits are not all alike
    torch.testing.assert_close(model(ids), expected, **scaled(expected))


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_cached_decoding(pair: tuple[nn.Module, Transformer], backend: Any) -> None:
    other, model = pair
    if model.config.rope_scaling.kind in ("dynamic", "longrope"):
        pytest.skip("frequencies that change while the text grows leave old keys as they were")
    model.backend = backend
    ids = torch.randint(101, (2, 29))
    expected = other(ids).logits
    cache = KVCache(model.config, 2, 29)
    pieces = [model(ids[:, :13], cache), *(model(ids[:, t : t + 1], cache) for t in range(13, 29))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **scaled(expected))
    model.backend = "sdpa"


@torch.inference_mode()
def test_left_padding(pair: tuple[nn.Module, Transformer]) -> None:
    other, model = pair
    ids, pad = torch.randint(101, (3, 17)), torch.tensor([0, 5, 11])
    seen = (torch.arange(17) >= pad[:, None]).long()
    positions = (seen.cumsum(-1) - 1).clamp_min(0)
    expected = other(ids, attention_mask=seen, position_ids=positions).logits
    cache = KVCache(model.config, 3, 17)
    cache.pad_B = pad
    found = model(ids, cache)
    for row in range(3):
        torch.testing.assert_close(found[row, pad[row] :], expected[row, pad[row] :], **scaled(expected))


@torch.inference_mode()
def test_packed_documents(pair: tuple[nn.Module, Transformer]) -> None:
    other, model = pair
    if model.config.rope_scaling.kind in ("dynamic", "longrope"):
        pytest.skip("frequencies depend on the length of the text, and packed documents have one together")
    ids = torch.randint(101, (1, 17))
    documents = torch.tensor([[0] * 6 + [1] + [2] * 10])
    expected = torch.cat([other(part).logits for part in ids.split([6, 1, 10], dim=1)], dim=1)
    torch.testing.assert_close(model(ids, documents_BT=documents), expected, **scaled(expected))


@torch.inference_mode()
def test_what_we_save_is_the_same_function_there(pair: tuple[nn.Module, Transformer], tmp_path: Path) -> None:
    other, model = pair
    family = family_of(model.config)
    assert family is not None
    save_model(model, tmp_path, bos_id=1, eos_id=2)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **PLAIN).eval()
    ids = torch.randint(101, (2, 23))
    expected = other(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, **scaled(expected))
    mine = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), model.state_dict().values(), strict=True))


def test_loss_and_gradients(pair: tuple[nn.Module, Transformer], tmp_path: Path) -> None:
    other, model = pair
    ids = torch.randint(101, (2, 23))
    loss = language_model_loss(
        model.features(ids[:, :-1]), model.head.weight, ids[:, 1:], chunk=7, softcap=model.config.logit_softcap
    )
    logits = other(ids[:, :-1]).logits
    theirs = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one in (model, other):
        one.zero_grad()
    loss.backward()
    theirs.backward()
    expected = their_gradients(other, tmp_path)
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(1e-3, expected[name].abs().max().item())
        torch.testing.assert_close(
            gradient, expected.pop(name), rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not expected


def their_gradients(other: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Their gradients by our names, carried over the way weights are: saved as a model, and read by us."""
    weights = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    other.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    return {name: parameter.detach() for name, parameter in load_model(folder).named_parameters()}


def test_layers_that_predict_further_tokens_are_passed_over_where_a_family_has_them(tmp_path: Path) -> None:
    for name, has in (("deepseek-v3", True), ("deepseek-v2", False)):
        by_transformers(*CASES[name]).save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"model.layers.3.enorm.weight": torch.ones(84)}, file)
        if has:
            load_model(tmp_path / name)
        else:
            with pytest.raises(GroundupError, match=r"model\.layers\.3\.enorm\.weight has no place"):
                load_model(tmp_path / name)
