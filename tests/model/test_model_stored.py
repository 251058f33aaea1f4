"""Checkpoints of a few bits are read as what their scales make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.model import Experts, ModelConfig, Transformer, load_model, save_model
from groundup.model.presets import PRESETS
from groundup.model.weights.stored import FP4
from groundup.runtime import GroundupError


def quantize_mxfp4(weight_NIO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales, and what they stand for: the nearest of the sixteen values at the block's power of two."""
    rows = weight_NIO.transpose(1, 2).unflatten(-1, (-1, 32)).float()
    exponent = torch.floor(torch.log2(rows.abs().amax(-1).clamp_min(1e-30))) - 2
    values = torch.tensor(FP4)
    scaled = rows / 2.0 ** exponent[..., None]
    codes = (scaled[..., None] - values).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    meant = values[codes] * 2.0 ** exponent[..., None]
    return blocks, (exponent + 127).to(torch.uint8), meant.flatten(-2).transpose(1, 2)


@pytest.fixture
def gpt_oss(tmp_path: Path) -> tuple[Path, Transformer]:
    """A folder in gpt-oss's own form, and the model that it stands for."""
    torch.manual_seed(3)
    shape: dict[str, Any] = dict(vocab_size=67, context_length=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ff=96)
    experts = Experts(count=3, active=2, width=96, router_bias=True)
    scaling = {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16, "truncate": False}}
    config = PRESETS["gpt-oss-20b"] | shape | {"head_dim": 16, "sliding_window": 4, "experts": experts, "init_std": 0.3}
    model = Transformer(ModelConfig.from_dict(config | scaling)).eval()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, plain[name] = quantize_mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, tmp_path / "model.safetensors")
    meant = load_model(tmp_path).eval()
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    return tmp_path, meant


def test_mxfp4_is_what_blocks_and_scales_say(gpt_oss: tuple[Path, Transformer]) -> None:
    folder, meant = gpt_oss
    model = load_model(folder).eval()
    for (name, a), b in zip(model.state_dict().items(), meant.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(
        torch.equal(a, b.bfloat16())
        for a, b in zip(load_model(folder, dtype=torch.bfloat16).parameters(), meant.parameters(), strict=True)
    )


def test_mxfp4_is_what_transformers_makes_of_it(gpt_oss: tuple[Path, Transformer]) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    folder, _ = gpt_oss
    tensors, model = load_file(folder / "model.safetensors"), load_model(folder)
    name = "model.layers.1.mlp.experts.down_proj"
    theirs = mxfp4.convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    ours = model.state_dict()["blocks.1.feed_forward.down.weight"]
    assert torch.equal(ours.transpose(1, 2), theirs)


def test_missing_scales_are_named(gpt_oss: tuple[Path, Transformer]) -> None:
    folder, _ = gpt_oss
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(GroundupError, match=r"the tensor model\.layers\.1\.mlp\.experts\.down_proj_scales is missing"):
        load_model(folder)


def test_fp8_squares_with_edges(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Transformer(ModelConfig(vocab_size=67, n_layer=1, n_head=2, n_embd=40, n_ff=72, qk_norm=False)).eval()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = {}
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors[name].shape
        scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
        full = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        numbers = (50 * tensors[name] / full).to(torch.float8_e4m3fn)
        meant[name] = numbers.float() * full
        tensors |= {name: numbers, f"{name}_scale_inv": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    loaded = load_model(tmp_path).state_dict()
    assert torch.equal(loaded["blocks.0.attention.k.weight"], meant["model.layers.0.self_attn.k_proj.weight"])
    assert torch.equal(loaded["blocks.0.feed_forward.down.weight"], meant["model.layers.0.mlp.down_proj.weight"])
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"quantization_config": quantization | {"weight_block_size": [32, 16]}})
    )
    with pytest.raises(GroundupError, match=r"_scale_inv has shape \[\d+, \d+\], should be"):
        load_model(tmp_path)
