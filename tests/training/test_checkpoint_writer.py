"""The parts of checkpoints: files written from tensors that change soon, and tensors put together from pieces."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.model import Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.runtime import GroundupError
from groundup.training import checkpoint_writer
from groundup.training.checkpoint import Pieces, optimizer_tensors
from groundup.training.checkpoint_writer import Entry, LiveFile, LiveWriter
from tensors import assert_same

# ---- writing


@pytest.mark.parametrize("spare", [0, 900, 10_000, 10**9])
@pytest.mark.parametrize("pace", [0.0, 0.003])
def test_what_changes_after_settling_is_written_as_it_was(
    tmp_path: Path, spare: int, pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "SMALL", 8)
    generator = torch.Generator().manual_seed(7)
    live = [torch.randn(5, size, generator=generator) for size in (1, 7, 11, 13, 29, 31, 37, 41)]
    live.append(torch.arange(3))
    matrices = [torch.randn(3, 17, generator=generator), torch.randn(2, 17, generator=generator)]
    entries = [Entry(f"t{n}", [tensor]) for n, tensor in enumerate(live)]
    entries.append(Entry("both", matrices, lambda parts: torch.cat(list(parts)).T))
    expected = {f"t{n}": tensor.clone() for n, tensor in enumerate(live)} | {"both": torch.cat(matrices).T.clone()}
    writer = LiveWriter([LiveFile("a.safetensors", entries[:4]), LiveFile("b.safetensors", entries[4:])], spare)
    held: list[int] = []
    write = LiveWriter._write_entry

    def slowly(self: LiveWriter, entry: Entry, add: Any) -> None:
        time.sleep(pace)
        held.append(self._held)
        write(self, entry, add)

    monkeypatch.setattr(LiveWriter, "_write_entry", slowly)
    digests: dict[str, str] = {}
    thread = threading.Thread(target=lambda: digests.update(writer.write(tmp_path)))
    thread.start()
    writer.settle()
    for tensor in [*live, *matrices]:
        tensor.zero_()
    writer.settle()  # as often as you like
    thread.join()
    found = load_file(tmp_path / "a.safetensors") | load_file(tmp_path / "b.safetensors")
    assert_same(expected, found)
    assert max(held) <= max(spare, 24)  # small ones are copied whatever the bound
    assert writer._held == 0
    for name, digest in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert set(digests) == {"a.safetensors", "b.safetensors"}


def test_without_memory_for_copies_training_waits(tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: Entry) -> None:
        raise RuntimeError("not enough memory")

    live = [torch.randn(5, size) for size in (3, 7, 11, 13)]
    expected = {f"t{n}": tensor.clone() for n, tensor in enumerate(live)}
    writer = LiveWriter([LiveFile("a", [Entry(f"t{n}", [t]) for n, t in enumerate(live)])], 10**9)
    monkeypatch.setattr(Entry, "copy", none_left)
    thread = threading.Thread(target=writer.write, args=(tmp_path,))
    thread.start()
    writer.settle()
    for tensor in live:
        tensor.zero_()
    thread.join()
    assert_same(expected, load_file(tmp_path / "a"))


def test_settling_ends_when_the_writer_fails(tmp_path: Path) -> None:
    entries = [Entry(str(n), [torch.randn(200, 200)]) for n in range(9)]
    writer = LiveWriter([LiveFile("absent/folder/a", entries)], 0)
    failed: list[GroundupError] = []

    def write() -> None:
        time.sleep(0.05)
        try:
            writer.write(tmp_path / "none")
        except GroundupError as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    writer.settle()
    thread.join()
    assert "no such file" in str(failed[0])


def test_a_kind_of_number_that_files_cannot_hold_is_named() -> None:
    with pytest.raises(TypeError, match=r"phase: safetensors files have no name for torch\.complex64"):
        Entry("phase", [torch.zeros(3, dtype=torch.complex64)])


# ---- reading


def test_state_in_one_file_is_read_too(tmp_path: Path, model: Transformer) -> None:
    """As runs before this layout have it."""
    optimizers = build_optimizers(model, OptimConfig())
    model(torch.arange(13)[None]).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    expected = optimizer_tensors(model, optimizers)
    save_file(expected, tmp_path / "optimizer.safetensors")
    assert_same(expected, Pieces.open(tmp_path))


def test_regions_are_put_together_from_pieces(tmp_path: Path) -> None:
    whole = torch.arange(7 * 5).view(7, 5).clone()
    cuts = {"a": (0, 0, 3, 5), "b": (3, 0, 7, 2), "c": (3, 2, 7, 5)}
    for name, (top, left, bottom, right) in cuts.items():
        noted = json.dumps({"x": {"saved_offsets": [top, left]}})
        part = whole[top:bottom, left:right].contiguous()
        save_file({"x": part}, tmp_path / f"{name}.safetensors", metadata={"DCP_SHARDING_INFO": noted})
    pieces = Pieces.open(tmp_path)
    assert pieces.shape("x") == (7, 5)
    assert torch.equal(pieces["x"], whole)
    for top, left, rows, columns in [(2, 1, 3, 3), (0, 0, 1, 1), (4, 2, 3, 3), (6, 0, 1, 5), (7, 0, 0, 5)]:
        found = pieces.region("x", (top, left), (rows, columns))
        assert torch.equal(found, whole[top : top + rows, left : left + columns])
        assert found.dtype == torch.int64
    (tmp_path / "b.safetensors").unlink()
    fewer = Pieces.open(tmp_path)
    assert torch.equal(fewer.region("x", (2, 2), (4, 3)), whole[2:6, 2:])
    with pytest.raises(GroundupError, match="a part of the tensor x is missing"):
        fewer["x"]


@pytest.mark.parametrize(
    "noted", ["{", "[]", '{"x": 3}', '{"x": {}}', '{"x": {"saved_offsets": [0]}}', '{"x": {"saved_offsets": 0}}']
)
def test_a_header_without_sense_is_one_line(tmp_path: Path, noted: str) -> None:
    save_file({"x": torch.ones(2, 3)}, tmp_path / "a.safetensors", metadata={"DCP_SHARDING_INFO": noted})
    if noted == "[]":
        assert torch.equal(Pieces.open(tmp_path)["x"], torch.ones(2, 3))
        return
    with pytest.raises(GroundupError, match=r"a\.safetensors: damaged"):
        Pieces.open(tmp_path)


# ---- several ranks


@pytest.mark.slow
def test_shards_are_loaded_at_any_world_size(tmp_path: Path) -> None:
    """Saved by 4 ranks with FSDP, loaded by 4, 2 and 1; saved by 1, loaded by 2; and one rank that cannot write."""
    worker = Path(__file__).with_name("checkpoint_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sorted(re.findall(r"^equal: (.+)$", done.stdout, re.MULTILINE))
    assert found == ["1 -> 1", "1 -> 2", "4 -> 1", "4 -> 2", "4 -> 4", "all ranks hear", "one rank failed"]
    names = {path.name for path in (tmp_path / "four" / "step-000002" / "training_state").iterdir()}
    assert {f"adamw-exp_avg-0000{rank}-of-00004.safetensors" for rank in range(1, 5)} <= names
    assert not [name for name in names if name.startswith("rank")]
