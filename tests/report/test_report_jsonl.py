"""Growing files survive what stops their writer, and a resumed run finds no rows of its lost future."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.report import MetricsWriter, read_metrics, truncate_metrics
from groundup.report.jsonl import encode_row
from groundup.report.metrics import series
from groundup.runtime import GroundupError

json_values = st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none())


def write(path: Path, rows: list[dict]) -> None:
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)


@given(st.dictionaries(st.text().filter(lambda key: key != "nonfinite"), json_values))
def test_any_row_is_one_line_and_comes_back(row: dict) -> None:
    line = encode_row(row)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    back = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    lost = back.pop("nonfinite", [])
    assert lost == [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    assert back == {key: None if key in lost else value for key, value in row.items()}


def test_nonfinite_and_numpy_values(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, [{"step": np.int64(3), "loss": float("nan"), "grad_norm": np.float32("inf"), "x": np.float32(0.5)}])
    assert read_metrics(path) == [
        {"step": 3, "loss": None, "grad_norm": None, "x": 0.5, "nonfinite": ["loss", "grad_norm"]}
    ]


def test_rows_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    writer.close()
    writer.close()


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [{"text": "a\udc80b"}])
    assert read_metrics(tmp_path / "m.jsonl") == [{"text": "a\udc80b"}]


@given(cut=st.integers(0, 40))
def test_a_last_line_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    whole = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}, {"step": 3, "loss": 2.0}]
    write(path, whole)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - min(cut, len(content))])
    survivors = read_metrics(path)
    assert survivors == whole[: len(survivors)]
    assert len(survivors) >= 3 - (cut + 23) // 24  # lines of 24 bytes; a lost line break loses nothing
    write(path, [{"step": 9}])
    assert read_metrics(path) == [*survivors, {"step": 9}]


def test_damage_in_the_middle_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff{"st\n[1, 2]\n\n{"step": 4}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 4}]
    assert "2 damaged lines left out of this metrics file (2, 3)" in " ".join(capsys.readouterr().err.split())


def test_truncate_drops_the_rows_after_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1}, {"note": "no step"}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 5}])
    truncate_metrics(path, 3)
    assert read_metrics(path) == [
        {"step": 1},
        {"note": "no step"},
        {"step": 2},
        {"step": 3, "loss": None, "nonfinite": ["loss"]},
    ]
    before = path.stat().st_mtime_ns
    truncate_metrics(path, 3)
    assert path.stat().st_mtime_ns == before  # nothing to drop, nothing written
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_missing_file_and_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match=r"cannot read metrics file .*metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(GroundupError, match="this is a folder"):
        MetricsWriter(tmp_path)


def test_series_leaves_out_what_is_not_finite() -> None:
    rows = [
        {"kind": "train", "tokens": 1, "loss": 3},
        {"kind": "eval", "tokens": 1, "loss": 9.0},
        {"kind": "train", "tokens": 2, "loss": None},
        {"kind": "train", "tokens": 3},
        {"kind": "train", "tokens": 4, "loss": float("inf")},
        {"kind": "train", "tokens": 5, "loss": 2.0},
    ]
    assert series(rows, "train", "tokens", "loss") == ([1.0, 5.0], [3.0, 2.0])


WRITE_FOREVER = """
import itertools, sys
from groundup.report import MetricsWriter
with MetricsWriter(sys.argv[1]) as writer:
    for step in itertools.count(1):
        writer.write({"step": step, "filler": "x" * (step % 97)})
"""


def test_kill_loses_no_row_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size > 20_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_metrics(path)
    assert len(rows) > 100
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


FILL_UP = """
import resource, signal, sys
from groundup.report import MetricsWriter
from groundup.runtime import GroundupError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
writer = MetricsWriter(sys.argv[1])
try:
    for step in range(100):
        writer.write({"step": step, "loss": 2.5})
except GroundupError as error:
    print(step, error)
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FILL_UP, str(path)], capture_output=True, text=True, check=True)
    step, message = done.stdout.split(" ", 1)
    assert message.startswith("cannot write")
    assert path.read_bytes().endswith(b"\n")
    assert [row["step"] for row in read_metrics(path)] == list(range(int(step)))
