"""Seeds, devices, precision, and what is noted about the machine."""

from __future__ import annotations

import getpass
import json
import os
import platform
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from groundup.runtime import UsageError, doctor
from groundup.runtime.device import autocast, choose_device, choose_precision, matmul_flops
from groundup.runtime.doctor import examine
from groundup.runtime.environment import describe_environment, memory_bytes, package_version, usable_cores
from groundup.runtime.seeds import rng_state, seed_everything, set_rng_state


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), *torch.rand(3).tolist(), float(torch.randn(1))]


@pytest.mark.parametrize("seed", [0, 1337, 2**32 + 1, 2**70, -5])
def test_the_same_seed_gives_the_same_numbers(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert draw() != first


def test_a_generator_goes_on_from_a_saved_state() -> None:
    seed_everything(3)
    torch.rand(17)
    state = json.loads(json.dumps(rng_state()))
    expected = torch.rand(100)
    torch.rand(1000)
    set_rng_state(state)
    assert torch.equal(torch.rand(100), expected)


# ---- device and precision


def test_the_device_chosen_can_compute() -> None:
    device = choose_device("auto")
    assert float((torch.eye(3, device=device) @ torch.ones(3, 3, device=device)).sum()) == 9.0
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("request_", ["banana", "", "0", "cuda:x", "cuda:99", "meta", "xla", "hpu", "privateuseone"])
def test_a_device_that_does_not_work_is_one_line(request_: str) -> None:
    with pytest.raises(UsageError, match=r"^device = ") as raised:
        choose_device(request_)
    line = str(raised.value)
    assert f"device = {request_}" in line
    assert "auto" in line
    assert len(line) < 300
    assert "\n" not in line


def test_the_precision_chosen_computes() -> None:
    cpu = torch.device("cpu")
    chosen = choose_precision("auto", cpu, rows=64, width=32)
    assert chosen in ("float32", "bfloat16")
    assert choose_precision("float32", cpu) == "float32"
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if choose_precision(precision, cpu, rows=8, width=8) == precision:
            with autocast(cpu, precision):  # type: ignore[arg-type]
                assert torch.nn.Linear(8, 8)(torch.ones(2, 8)).dtype == dtype
    with pytest.raises(
        UsageError, match=r"precision = float8 is unknown\. Known: auto, float32, tf32, bfloat16, float16"
    ):
        choose_precision("float8", cpu)


@pytest.mark.parametrize("bfloat16", [0.5, 0.99, 2.0, float("inf")])
def test_bfloat16_is_taken_only_where_it_is_clearly_faster(bfloat16: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from groundup.runtime import device

    seconds = {"float32": 1.0, "bfloat16": bfloat16}
    monkeypatch.setattr(device, "_linear_seconds", lambda _device, precision, _rows, _width: seconds[precision])
    assert choose_precision("auto", torch.device("cpu")) == ("bfloat16" if bfloat16 < 0.8 else "float32")
    if bfloat16 == float("inf"):
        with pytest.raises(UsageError, match="bfloat16 does not run on cpu"):
            choose_precision("bfloat16", torch.device("cpu"))


def test_the_speed_of_matrix_products_is_measured() -> None:
    speed = matmul_flops(torch.device("cpu"), "float32", rows=64, width=64, seconds=0.02)
    assert 1e7 < speed < 1e15
    slow = matmul_flops(torch.device("cpu"), "float32", rows=64, width=64, seconds=0.0)
    assert slow > 0, "however slow the machine, one product is measured"
    assert matmul_flops(torch.device("meta"), "float32", rows=64, width=64, seconds=0.001) >= 0.0


# ---- doctor and environment


def test_the_doctor_finds_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "matmul_flops", lambda _device, _precision: 1e9)
    folder = tmp_path / "not" / "yet"
    findings = {finding.name: finding for finding in examine(folder)}
    assert {finding.status for finding in findings.values()} <= {"ok", "note", "fail"}
    assert all(finding.detail and "\n" not in finding.detail for finding in findings.values())
    assert findings["torch"].detail == torch.__version__
    assert findings["Python"].status == "ok"
    assert findings["device"].status == findings["precision"].status == "ok"
    assert "1 GFLOP/s" in findings["matrix products"].detail
    assert findings["disk"].status in ("ok", "note")
    assert str(tmp_path) in findings["disk"].detail
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_the_doctor_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "matmul_flops", lambda _device, _precision: 1e9)
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == "safetensors" else "1.0")
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    found = {finding.name: (finding.status, finding.detail) for finding in examine(tmp_path / "runs")}
    assert found["safetensors"] == ("fail", "missing: run `make setup`")
    assert found["memory"][0] == "note"
    assert found["disk"] == (
        "fail",
        f"cannot write at {tmp_path / 'runs'}: Permission denied. Choose another folder with --out.",
    )
    assert found["C++ compiler"][0] == "note"


def test_the_environment_is_json_and_names_neither_person_nor_host() -> None:
    found = describe_environment()
    text = json.dumps(found)
    assert json.loads(text) == found
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"] == package_version("torch")
    assert found["memory_bytes"] == memory_bytes() > 2**28
    assert 1 <= found["cores"] == usable_cores() <= (os.cpu_count() or 1)
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["commit"])
    for private in (platform.node(), os.path.expanduser("~"), str(Path.cwd()), getpass.getuser()):
        assert len(private) < 2 or not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", text), private


def test_what_is_not_installed_has_no_version() -> None:
    assert package_version("groundup-of-nobody") is None
