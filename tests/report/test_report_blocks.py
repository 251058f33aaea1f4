"""Facts of any shape become tables, and numbers become text that people read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.report.blocks import Block, blocks, cell, duration
from groundup.runtime.console import byte_size

facts = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def test_blocks() -> None:
    data = {
        "source": "stdlib",
        "seconds": {"collect": 2.1, "clean": 125.0},
        "stages": {"collect": {"documents": 1893, "bytes": 14_310_000}, "clean": {"documents": 1850}},
        "dropped": [{"reason": "too_short", "count": 31}],
        "gpus": [],
    }
    assert blocks(data) == [
        Block("overview", [], [["source", "stdlib"], ["gpus", "–"]]),
        Block("seconds", [], [["collect", "2.1 s"], ["clean", "2:05 min"]]),
        Block("stages", ["", "documents", "bytes"], [["collect", "1,893", "14.3 MB"], ["clean", "1,850", ""]]),
        Block("dropped", ["", "reason", "count"], [["1", "too_short", "31"]]),
    ]
    nested = blocks({"split": {"train": {"languages": {"en": 3}}}})
    assert nested == [Block("split: train", ["", "en"], [["languages", "3"]])]


@given(st.dictionaries(st.text(max_size=5), facts, max_size=4))
def test_any_shape_becomes_text(data: dict) -> None:
    for block in blocks(data):
        assert all(isinstance(text, str) for row in block.rows for text in row)
        assert {len(row) for row in block.rows} == {len(block.columns) or 2}


@pytest.mark.parametrize(
    ("value", "about", "text"),
    [
        (None, "", "–"),
        (True, "", "yes"),
        (4096, "vocab_size", "4,096"),
        (0.0003, "learning_rate", "0.0003"),
        (24_696_061_952, "memory_bytes", "24.7 GB"),
        (999, "bytes", "999 bytes"),
        (31.25, "expected_seconds", "31 s"),
        (["a", 2], "", "a, 2"),
        ({"a": {"b": 1}}, "", "a b 1"),
    ],
)
def test_cell(value: object, about: str, text: str) -> None:
    assert cell(value, about) == text


def test_sizes_and_durations() -> None:
    sizes = [byte_size(count) for count in (0, 1000, 999_400, 999_600, 13e9, 2e12)]
    assert sizes == ["0 bytes", "1.00 kB", "999 kB", "1.00 MB", "13.0 GB", "2.00 TB"]
    assert [duration(s) for s in (0.042, 9.1, 42.4, 99.7, 3599.9)] == [
        "0.042 s",
        "9.1 s",
        "42 s",
        "1:40 min",
        "1:00:00 h",
    ]
