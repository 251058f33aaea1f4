"""Time, energy and money on named machines follow from their figures by the arithmetic that is printed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.model import ModelConfig, explain
from groundup.model.hardware import (
    HARDWARE,
    Hardware,
    decode_estimate,
    decode_flops,
    experts_met,
    hardware,
    step_bytes,
    training_estimate,
)
from groundup.model.memory import serving_memory, weight_bytes
from groundup.runtime import UsageError
from random_model_configs import configs

MACHINE = Hardware("a machine", flops=3e12, bandwidth=7e9, memory=11e9, watts=13, price=1.7, utilisation=0.5)


def test_training_by_hand() -> None:
    config = ModelConfig.preset("gpt2-1558m")
    costs = explain(config, 2)
    found = training_estimate(costs, MACHINE, 5e9)
    seconds = 5e9 * costs.training_flops_per_token / 1.5e12
    assert found.seconds == pytest.approx(seconds)
    assert found.joules == pytest.approx(13 * seconds)
    assert found.price == pytest.approx(1.7 * seconds / 3600)
    again = training_estimate(costs, MACHINE, 5e9, checkpointing="block")
    assert again.seconds == pytest.approx(
        5e9 * (costs.training_flops_per_token + costs.forward_flops_per_token) / 1.5e12
    )
    assert (found.machines - 1) * 11e9 < costs.training_bytes <= found.machines * 11e9


def test_decoding_is_bound_by_memory_until_the_batch_is_large() -> None:
    config = ModelConfig.preset("gpt2-124m")
    costs = explain(config)
    one = decode_estimate(config, costs, MACHINE, 1, 100)
    assert one.bound == "memory"
    read = weight_bytes(config, "bfloat16") - 2 * 1024 * 768 + 100 * costs.kv_bytes_per_token
    assert one.step_bytes == read
    assert one.tokens_per_second == pytest.approx(7e9 / read)
    assert one.price == pytest.approx(1.7 / 3600 * 1e6 * read / 7e9)
    many = decode_estimate(config, costs, MACHINE, 4000, 1)
    assert many.bound == "compute"
    assert many.tokens_per_second == pytest.approx(
        many.machines * 3e12 / decode_flops(config, costs.matmul_parameters, 1)
    )


def test_decoding_latent_attention_multiplies_with_latents() -> None:
    latent = {"kv_rank": 13, "rope_dim": 6, "nope_dim": 5, "v_dim": 7}
    config = ModelConfig.from_dict({"n_layer": 3, "n_head": 2, "n_embd": 42, "qk_norm": False, "latent": latent})
    expected = 2 * 1009 + 3 * 2 * 2 * 17 * (13 + 6 + 13)
    assert decode_flops(config, 1009, 17) == expected
    plain = ModelConfig(n_layer=3, n_head=2, n_embd=42, positions="none")
    assert decode_flops(plain, 1009, 17) == 2 * 1009 + 3 * 2 * 2 * 17 * (21 + 21)


def test_more_tokens_reach_more_experts() -> None:
    config = ModelConfig.preset("mixtral-8x7b")
    assert experts_met(config, 1) == pytest.approx(2)
    assert experts_met(config, 2) == pytest.approx(2 + 2 * 0.75)  # a second token's two are new three times in four
    assert 7.99 < experts_met(config, 100) < 8


@given(configs(), st.integers(1, 9), st.integers(1, 40), st.sampled_from(["float32", "bfloat16", "int8", "int4"]))
@settings(max_examples=60, deadline=None)
def test_a_step_reads_no_more_than_is_held_and_no_less_than_the_active_weights(
    config: ModelConfig, batch: int, context: int, weight_type: str
) -> None:
    read = step_bytes(config, batch, context, weight_type)  # type: ignore[arg-type]
    held = serving_memory(config, batch, context, weight_type)  # type: ignore[arg-type]
    assert read <= held.weights + held.cache
    if weight_type == "float32":
        costs = explain(config)
        tables = costs.parameters["position embedding"]
        tables += 0 if config.tie_embeddings else costs.parameters["token embedding"]
        assert read >= 4 * (costs.active_parameters - tables) - 4


@pytest.mark.parametrize("name", HARDWARE)
def test_the_machines_of_the_table_are_plausible(name: str) -> None:
    machine = hardware(name)
    assert 1 < machine.flops / machine.bandwidth < 500  # FLOPs per byte: a processor that starves is a typing error
    assert 1e9 < machine.flops / machine.watts < 3e12
    assert 0 < machine.utilisation < 1
    assert 0 < machine.price < 10
    assert machine.memory >= 16e9


def test_an_unknown_machine_is_one_line_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"hardware = h10: no machine .* Did you mean h100\?"):
        hardware("h10")
