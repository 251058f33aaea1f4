"""The drawing shows every part once, folds what is repeated, and is well-formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.model import PRESETS, ModelConfig, explain
from groundup.model.drawing import Block, Row, draw_svg, draw_text, fold, stack
from random_model_configs import configs

SVG = "{http://www.w3.org/2000/svg}"


def drawn(config: ModelConfig) -> int:
    """Parameters of all rows, as often as they are repeated."""
    return sum(
        group.repeat * block.count * sum(row.parameters for row in block.rows)
        for group in stack(config)
        for block in group.blocks
    )


@given(configs())
@settings(max_examples=150, deadline=None)
def test_the_rows_have_all_parameters_of_the_model(config: ModelConfig) -> None:
    assert drawn(config) == explain(config).total_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_a_terminal_and_are_well_formed_as_svg(name: str) -> None:
    config = ModelConfig.preset(name)
    assert drawn(config) == explain(config).total_parameters
    assert {len(line) for line in draw_text(config).splitlines()} == {80}
    assert {len(line) for line in draw_text(config, 100).splitlines()} == {100}
    root = ET.fromstring(draw_svg(config, name))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x + float(rect.attrib["width"]) <= width
        assert y + float(rect.attrib["height"]) <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["y"]) <= height


@given(configs())
@settings(max_examples=60, deadline=None)
def test_text_and_svg_show_the_same_rows(config: ModelConfig) -> None:
    text, root = draw_text(config), ET.fromstring(draw_svg(config, "any"))
    assert {len(line) for line in text.splitlines()} == {80}
    words = [element.text for element in root.iter(f"{SVG}text")]
    for group in stack(config):
        assert not group.title or (group.title in text and group.title in words)
        for row in [row for block in group.blocks for row in block.rows]:
            assert f"│ {row.name} " in text
            assert row.name in words


def test_svg_refers_to_nothing_outside_itself_and_is_escaped() -> None:
    drawing = draw_svg(ModelConfig.preset("tiny"), "<script>a & b</script>")
    assert "<script" not in drawing
    assert "&lt;script&gt;a &amp; b" in drawing
    assert not re.search(r"href|url\((?!#)|@import|<image", drawing)
    addresses = set(re.findall(r"https?://[^\"'\s]+", drawing))
    assert addresses == {"http://www.w3.org/2000/svg"}


# ---- folding


def row(letter: str) -> tuple[Row, ...]:
    return (Row("norm", letter, "", 1),)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("AAAA", "1(4A)"),
        ("A", "1(1A)"),
        ("ABC", "1(1A) 1(1B) 1(1C)"),
        ("ABABAB", "3(1A1B)"),
        ("DDDEEEEE", "1(3D) 1(5E)"),
        ("DSFSFSF", "1(1D) 3(1S1F)"),
        ("SSSSSFSSSSSFSS", "2(5S1F) 1(2S)"),
        ("AABAABA", "2(2A1B) 1(1A)"),
    ],
)
def test_what_is_repeated_is_folded(layers: str, expected: str) -> None:
    found = fold([row(letter) for letter in layers])
    shown = (f"{repeat}({''.join(f'{b.count}{b.rows[0].name}' for b in blocks)})" for repeat, blocks in found)
    assert " ".join(shown) == expected


@given(st.text("ABC", min_size=1, max_size=40))
def test_unfolded_again_it_is_what_it_was(layers: str) -> None:
    def written(blocks: tuple[Block, ...]) -> str:
        return "".join(block.count * block.rows[0].name for block in blocks)

    found = fold([row(letter) for letter in layers])
    assert "".join(repeat * written(blocks) for repeat, blocks in found) == layers


# ---- what is said

SAID = {
    "gpt2-124m": ["12 × (layers 1 to 12)", "multi-head attention", "1,024 × 768, learnt", "the token embedding again"],
    "llama3.1-8b": [
        "grouped-query attention",
        "32 heads of 128, 8 kv, RoPE θ 500k llama3 × 8",
        "4,096 → 2 × 14,336 → 4,096",
    ],
    "gemma3-1b": ["multi-query attention", "4 × (layers 1 to 24)", "5 of 6 layers", "window 512", "RoPE θ 1M"],
    "deepseek-v3": ["3 × (layers 1 to 3)", "58 × (layers 4 to 61)", "latent 512", "8 of 256 experts", "1 shared"],
    "gpt-oss-20b": ["12 × (layers 1 to 24)", "window 128", "sinks", "4 of 32 experts", "clamped SwiGLU"],
    "pythia-160m": ["attention and feed-forward side by side", "on 16 dimensions"],
    "olmo2-1b": ["RMS norm of the result", "q and k normed whole"],
    "gpt-117m": ["layer norm of the sum"],
    "gemma2-2b": ["scores capped at ±50", "logits capped at ±30", "times 48"],
}


@pytest.mark.parametrize("name", SAID)
def test_choices_are_told(name: str) -> None:
    text = draw_text(ModelConfig.preset(name), 120)
    for words in SAID[name]:
        assert words in text


def test_further_tokens_stand_behind_the_logits() -> None:
    lines = draw_text(ModelConfig.preset("tiny", n_predict=2)).splitlines()
    ends = [number for number, line in enumerate(lines) if "logits" in line]
    title = next(number for number, line in enumerate(lines) if "2 × for further tokens" in line)
    assert ends[0] < title < ends[1] == len(lines) - 1
    assert len([line for line in lines if "output head" in line]) == 1
