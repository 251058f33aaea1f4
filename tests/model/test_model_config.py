"""The config: what is derived, what is refused, and that asking for it costs no torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest

from groundup.model import PRESETS, ModelConfig
from groundup.runtime import UsageError


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"n_embd": 384, "n_head": 7},
            r"7 does not divide model\.n_embd = 384\. Heads that would: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48\.$",
        ),
        ({"n_embd": 90, "n_head": 7}, r"Heads that would: 1, 3, 5, 9\.$"),  # the others' head size is odd
        ({"n_embd": 90, "n_head": 7, "positions": "none"}, r"Heads that would: 1, 2, 3, 5, 6, 9, 10\.$"),
        (
            {"n_head": 12, "n_kv_head": 5},
            r"model\.n_kv_head = 5 does not divide model\.n_head = 12.*: 1, 2, 3, 4, 6, 12",
        ),
        ({"n_head": 12, "n_kv_head": 0}, r"model\.n_kv_head = 0"),
        ({"n_head": 12, "n_kv_head": 24}, r"model\.n_kv_head = 24"),
        ({"n_embd": 33, "n_head": 3}, r"model\.n_embd / model\.n_head = 11 is odd.*learned"),
        ({"n_layer": 0}, r"model\.n_layer = 0 must be at least 1"),
        ({"vocab_size": -1}, r"model\.vocab_size = -1"),
        ({"n_ff": 0}, r"model\.n_ff = 0 must be at least 1"),
        ({"dropout": 1.0}, r"model\.dropout = 1\.0"),
        ({"dropout": math.nan}, r"model\.dropout = nan"),
        (
            {"norm": "layer_norm"},
            r"model\.norm = layer_norm is not one of rmsnorm, layernorm\. Did you mean layernorm\?",
        ),
        ({"positions": "alibis"}, r"model\.positions = alibis is not one of rope, .*Did you mean alibi\?"),
        ({"feed_forward": "swigelu"}, r"model\.feed_forward = swigelu .*Did you mean swiglu\?"),
        ({"layer_pattern": "S"}, r"model\.layer_pattern = S has windows: set model\.sliding_window"),
        ({"sliding_window": 64}, r"model\.sliding_window = 64, but no layer of model\.layer_pattern = F has a window"),
        ({"layer_pattern": "SX", "sliding_window": 4}, r"model\.layer_pattern = 'SX' is made of the letters F "),
        ({"layer_pattern": ""}, r"model\.layer_pattern = ''"),
        (
            {"latent": {"kv_rank": 64, "nope_dim": 16, "v_dim": 16}, "qk_norm": False},
            r"model\.latent\.rope_dim = 0: latent attention carries rotary positions",
        ),
        ({"latent": {"rope_dim": 8}}, r"model\.latent\.rope_dim is set, but model\.latent\.kv_rank is 0"),
        (
            {"latent.kv_rank": 8, "latent.rope_dim": 4, "latent.nope_dim": 4, "latent.v_dim": 4},
            r"model\.qk_norm = true",
        ),
        (
            {"latent": {"kv_rank": 8, "rope_dim": 3, "nope_dim": 4, "v_dim": 4}, "qk_norm": False},
            r"model\.latent\.rope_dim = 3 is odd",
        ),
        ({"experts": {"shared": 1}}, r"model\.experts\.shared is set, but model\.experts\.count is 0"),
        ({"experts": {"count": 4, "active": 5}}, r"model\.experts\.active = 5 is more than model\.experts\.count = 4"),
        ({"experts": {"count": 9, "groups": 2}}, r"model\.experts\.groups = 2"),
        ({"experts": {"count": 8, "active": 3, "groups": 4}}, r"more than the active groups hold \(1 x 2\)"),
        ({"experts": {"count": 8, "pattern": "D"}}, r"model\.experts\.pattern = D gives no layer experts"),
        ({"experts": {"counts": 8}}, r"model\.experts\.counts is not a field.*Did you mean count\?"),
        ({"experts": {"count": 8, "router": "soft"}}, r"model\.experts\.router = soft is not one of softmax, sigmoid"),
        ({"rope_scaling": {"kind": "yarm"}}, r"model\.rope_scaling\.kind = yarm .*Did you mean yarn\?"),
        ({"rope_scaling": {"kind": "yarn", "factor": 0.5}}, r"model\.rope_scaling\.factor = 0\.5 must be at least 1"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}, "positions": "none"}, r"needs model\.positions = rope"),
        ({"rope_scaling": {"kind": "longrope", "factor": 2.0}}, r"short_factor has 0 numbers, 32 pairs are rotated"),
        ({"rope_fraction": 0.0}, r"model\.rope_fraction = 0\.0 must be above 0"),
        ({"parallel_blocks": True, "norm_placement": "sandwich"}, r"needs model\.norm_placement = pre"),
        ({"n_predict": 1, "positions": "learned"}, r"model\.n_predict = 1 needs positions inside attention"),
        ({"attention_softcap": 0.0}, r"model\.attention_softcap = 0\.0 must be above 0"),
        ({"n_layers": 3}, r"model\.n_layers is not a field of the model config\. Did you mean n_layer\?"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        ModelConfig.from_dict(fields)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_an_odd_head_is_fine_without_rotary_positions() -> None:
    assert ModelConfig(n_embd=33, n_head=3, positions="learned").head_dim == 11


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match=r"no model preset is called gpt2-124\. Did you mean gpt2-124m\?.*tiny"):
        ModelConfig.preset("gpt2-124")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_config_and_survives_its_dictionary(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_preset_with_a_field_overridden() -> None:
    config = ModelConfig.preset("gpt2-124m", n_layer=6)
    assert (config.n_layer, config.n_embd, config.norm, config.positions) == (6, 768, "layernorm", "learned")


def test_derived_widths() -> None:
    assert ModelConfig(n_embd=768, feed_forward="gelu").ff_dim == 3072
    assert ModelConfig(n_embd=768).ff_dim == 2048  # 8/3 x 768, a multiple of 32 already
    assert ModelConfig(n_embd=100, n_head=2).ff_dim == 288  # 266.7 rounded up to 32
    assert ModelConfig(n_head=12).kv_heads == 12
    assert ModelConfig(n_embd=768, n_ff=7).ff_dim == 7


def test_configs_and_rooms_are_imported_without_torch() -> None:
    code = (
        "import sys, groundup, groundup.model, groundup.optim, groundup.inference\n"
        "groundup.model.explain(groundup.ModelConfig.preset('tiny'))\n"
        "groundup.optim.learning_rate_factor(0, groundup.optim.OptimConfig(), None)\n"
        "print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.stdout.strip(), run.stderr) == ("False", "")


def test_the_cache_of_grouped_queries_is_a_quarter_and_of_latents_their_width() -> None:
    from groundup.model.cache import KVCache

    sizes: dict[str, Any] = dict(n_layer=3, n_head=16, n_embd=256, vocab_size=31)

    def per_token(**fields: Any) -> float:
        return KVCache(ModelConfig.from_dict(sizes | fields), 2, 50).nbytes / (2 * 50)

    assert per_token(n_kv_head=4) == 0.25 * per_token(n_kv_head=16)
    latent = {"kv_rank": 40, "rope_dim": 8, "nope_dim": 16, "v_dim": 16}
    assert per_token(latent=latent, qk_norm=False) == 3 * (40 + 8) * 4
