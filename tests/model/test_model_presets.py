"""Presets have the sizes that their makers publish."""

from __future__ import annotations

import inspect

import pytest
import torch

from groundup.model import PRESETS, ModelConfig, Transformer, presets
from groundup.model.weights import config_from_json, config_to_json, family_of

# Parameters, as the hub counts them in the published checkpoints (a tied head once).
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "gpt-117m": 116_534_784,
    "pythia-160m": 162_322_944,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "smollm-135m": 134_515_008,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "phi3-mini": 3_821_079_552,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
KINDS = {
    "gpt2": "gpt2", "pythia": "gpt_neox", "llama": "llama", "smollm": "llama", "mistral": "mistral",
    "mixtral": "mixtral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text",
    "phi3": "mistral",
    "olmo2": "olmo2", "deepseek-v2": "deepseek_v2", "deepseek-v3": "deepseek_v3", "gpt-oss": "gpt_oss",
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_as_many_as_published(name: str, count: int) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(name))
    assert model.parameter_count() == count


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_the_folder_of_its_family(name: str, tmp_path) -> None:
    config = ModelConfig.preset(name)
    values = config_to_json(config)
    kind = next((KINDS[start] for start in KINDS if name.startswith(start)), None)
    if kind is not None:
        kind = "qwen3_moe" if config.experts.count and kind == "qwen3" else kind
        family = family_of(config)
        assert family is not None
        assert values["model_type"] == family.model_type == kind
    assert config_from_json(values, tmp_path) == config


def test_a_preset_is_at_most_twelve_lines() -> None:
    source = inspect.getsource(presets).splitlines()
    begins = [number for number, line in enumerate(source) if line.startswith('    "')]
    lengths = [after - before for before, after in zip(begins, [*begins[1:], begins[-1] + 1], strict=True)]
    headings = [number for number, line in enumerate(source) if line.startswith("# ----")]
    assert len(begins) >= 30
    for begin, length in zip(begins, lengths, strict=True):
        between = [number for number in headings if begin < number < begin + length]
        assert min([length, *(number - begin for number in between)]) <= 12
