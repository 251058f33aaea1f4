"""The compressors' sizes are those of the programs that anyone can run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from groundup.evaluation.compressors import compressor_rows, gzip_size, xz_size
from groundup.runtime import GroundupError


def size_of(command: list[str], data: bytes) -> int:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs the program {command[0]}")
    return len(subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("name", ["the-verdict.txt", "tinyshakespeare.txt", "wikitext2.valid.txt"])
def test_gzip_is_the_programs(shared_data: Path, name: str) -> None:
    data = (shared_data / "pretrain" / name).read_bytes()
    assert gzip_size(data) == pytest.approx(size_of(["gzip", "-9", "-n", "-c"], data), abs=20, rel=0.0005)


@pytest.mark.parametrize("name", ["the-verdict.txt", "tinyshakespeare.txt"])
def test_xz_is_the_programs(shared_data: Path, name: str) -> None:
    data = (shared_data / "pretrain" / name).read_bytes()
    assert xz_size(data) == pytest.approx(size_of(["xz", "-9e", "-T1", "-c"], data), abs=64)


def test_rows(shared_data: Path) -> None:
    data = (shared_data / "pretrain" / "the-verdict.txt").read_bytes()
    gzip_row, xz_row = compressor_rows(data)
    assert (gzip_row["name"], xz_row["name"]) == ("gzip -9", "xz -9e")
    assert gzip_row["bits_per_byte"] == pytest.approx(8 * 8889 / 20479, rel=0.01)
    assert xz_row["bits_per_byte"] < gzip_row["bits_per_byte"]
    assert all(row["kind"] == "compressor" and row["seconds"] > 0 and row["note"] for row in (gzip_row, xz_row))


def test_a_tiny_text_counts_its_header() -> None:
    gzip_row, xz_row = compressor_rows(b"x")
    assert gzip_row["bits_per_byte"] == 8 * gzip_size(b"x") > 8 * 18
    assert xz_row["bits_per_byte"] > 8 * 32


def test_no_text() -> None:
    with pytest.raises(GroundupError, match="empty"):
        compressor_rows(b"")
