"""What the monitor reads: real processes, counters of energy as the kernel shows them, and NVML played."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from groundup.runtime import UsageError
from groundup.runtime.environment import usable_cores
from groundup.runtime.monitor import CpuEnergy, Gpus, HardwareMonitor, ProcessTree, co2_grams, visible_gpus

KEYS = [
    "cpu_percent", "memory_bytes", "gpu_percent", "gpu_memory_bytes",
    "watts", "energy_joules", "co2_grams", "watts_from",
]  # fmt: skip


def watch(seconds: float, every: float, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with HardwareMonitor(every, rows.append, **{"powercap": tmp_path, "gpus": [], **options}):
        time.sleep(seconds)
    return rows


def test_rows_come_while_the_block_runs_and_one_at_its_end(tmp_path: Path) -> None:
    rows = watch(0.35, 0.1, tmp_path)
    assert 2 <= len(rows) <= 4
    for row in rows:
        assert list(row) == ["kind", "seconds", *KEYS]
        assert row["kind"] == "hardware"
        assert row["memory_bytes"] > 10_000_000
        assert row["cpu_percent"] >= 0
        for key in ("gpu_percent", "gpu_memory_bytes", "watts", "energy_joules", "co2_grams", "watts_from"):
            assert row[key] is None, "what cannot be read is not made up"
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert 0.3 < rows[-1]["seconds"] < 5
    assert len(watch(0.01, 1000, tmp_path)) == 1
    assert watch(0.01, 0, tmp_path) == []


def test_where_stands_at_the_front(tmp_path: Path) -> None:
    (row,) = watch(0.01, 1000, tmp_path, where=lambda: {"step": 7, "seconds": 91.5})
    assert list(row)[:3] == ["kind", "step", "seconds"]
    assert (row["step"], row["seconds"]) == (7, 91.5)


def test_given_watts_are_integrated_over_time(tmp_path: Path) -> None:
    rows = watch(0.25, 0.1, tmp_path, watts=80.0, grams_per_kwh=360.0, energy_joules=1000.0)
    for before, row in zip([None, *rows], rows, strict=False):
        assert row["watts_from"] == "given"
        assert row["watts"] == pytest.approx(80, abs=0.01)
        assert row["energy_joules"] == pytest.approx(1000 + 80 * row["seconds"], abs=0.1)
        assert row["co2_grams"] == pytest.approx(row["energy_joules"] * 360 / 3.6e6, abs=1e-3)
        assert before is None or row["energy_joules"] > before["energy_joules"]


def test_co2_of_a_kilowatt_hour() -> None:
    assert co2_grams(3.6e6) == 445.0
    assert co2_grams(7.2e6, 30.0) == 60.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watts": -1.0}, "watts = -1.0 should be a number from 0"),
        ({"watts": float("nan")}, "watts = nan"),
        ({"grams_per_kwh": -3.0}, "grams_per_kwh = -3.0"),
        ({"every_seconds": -1.0}, "monitor_every = -1.0 should be a number of seconds, or 0 for none."),
        ({"every_seconds": float("nan")}, "monitor_every = nan"),
    ],
)
def test_numbers_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        HardwareMonitor(**{"every_seconds": 1.0, "on_row": print, **options})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_row_that_nobody_can_take_ends_the_monitor_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def refuse(row: dict[str, Any]) -> None:
        calls.append(row)
        raise OSError("no space")

    with HardwareMonitor(0.02, refuse, gpus=[], powercap=tmp_path):
        time.sleep(0.3)
    assert len(calls) == 1
    assert "the hardware is no longer watched (OSError: no space); the run goes on." in capsys.readouterr().err


# ---- processes

BUSY = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
FAT = "import sys, time\nkept = bytearray(200_000_000)\nprint('ready', flush=True)\ntime.sleep(60)"


def test_a_busy_child_counts_as_one_core() -> None:
    tree = ProcessTree(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        started = time.monotonic()
        time.sleep(1.0)
        percent, _ = tree.read(time.monotonic() - started)
    finally:
        child.kill()
        child.wait()
    assert percent is not None
    assert 20 / usable_cores() < percent <= 105 / usable_cores() + 5  # a shared machine may give it less than a core
    tree.read(0.1)
    time.sleep(0.3)
    quiet, _ = tree.read(0.3)
    assert quiet is not None
    assert quiet < percent  # and what has ended costs nothing any more


def test_memory_is_that_of_all_processes() -> None:
    tree = ProcessTree(os.getpid())
    _, before = tree.read(0.1)
    child = subprocess.Popen([sys.executable, "-c", FAT], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        _, after = tree.read(0.1)
    finally:
        child.kill()
        child.communicate()
    assert before is not None
    assert after is not None
    assert 200_000_000 < after - before < 300_000_000


def test_a_process_that_is_gone_is_not_read() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert ProcessTree(child.pid).read(1.0) == (None, None)


# ---- the processor's counters


def zone(folder: Path, name: str, energy: int, full: int = 10_000_000) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{full}\n")
    return folder / "energy_uj"


def test_packages_and_memory_count_and_what_they_contain_does_not(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 4_000_000)
    core = zone(tmp_path / "intel-rapl:0:0", "core", 1_000_000)
    memory = zone(tmp_path / "intel-rapl:0:1", "dram", 500_000)
    whole = zone(tmp_path / "intel-rapl:1", "psys", 9_000_000)
    energy = CpuEnergy(tmp_path)
    assert energy.joules() == 0.0
    package.write_text("7000000")
    memory.write_text("750000")
    core.write_text("3000000")
    whole.write_text("9900000")
    assert energy.joules() == pytest.approx(3.25)
    package.write_text("1000000")  # full at 10 J, it began again
    assert energy.joules() == pytest.approx(3.25 + 4.0)
    package.unlink()
    assert energy.joules() == pytest.approx(3.25 + 4.0)


def test_counters_that_only_root_may_read_are_no_counters(tmp_path: Path) -> None:
    assert CpuEnergy(tmp_path / "absent").joules() is None
    energy = zone(tmp_path / "intel-rapl:0", "package-0", 4_000_000)
    energy.unlink()
    energy.mkdir()  # reading fails, whoever asks
    assert CpuEnergy(tmp_path).joules() is None


def test_measured_energy_in_a_row(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    rows: list[dict[str, Any]] = []
    with HardwareMonitor(1000, rows.append, gpus=[], powercap=tmp_path, energy_joules=10.0):
        time.sleep(0.2)
        package.write_text("3500000")
    assert (rows[0]["energy_joules"], rows[0]["watts_from"]) == (12.5, "cpu")
    assert 2.5 / 5 < rows[0]["watts"] <= 2.5 / 0.2
    assert rows[0]["co2_grams"] == pytest.approx(12.5 * 445 / 3.6e6, abs=1e-4)


# ---- GPUs, played: no test of this has seen one


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    module.NVMLError = NVMLError
    module.milliwatts = {"GPU-a": 100_000, "GPU-b": 300_000}
    module.millijoules = {"GPU-a": 7_000.0, "GPU-b": 2_000.0}
    module.closed = 0

    def by_name(name: str) -> str:
        if name not in module.milliwatts:
            raise NVMLError("not found")
        return name

    def energy(handle: str) -> float:
        if module.millijoules is None:
            raise NVMLError("not supported")
        return module.millijoules[handle]

    def power(handle: str) -> int:
        if module.milliwatts[handle] is None:
            raise NVMLError("not supported")
        return module.milliwatts[handle]

    def shutdown() -> None:
        module.closed += 1

    module.nvmlInit = lambda: None
    module.nvmlShutdown = shutdown
    module.nvmlDeviceGetHandleByUUID = by_name
    module.nvmlDeviceGetTotalEnergyConsumption = energy
    module.nvmlDeviceGetPowerUsage = power
    module.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu={"GPU-a": 90, "GPU-b": 41}[handle])
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used={"GPU-a": 5_000, "GPU-b": 300}[handle])
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_gpus_own_count_of_energy_is_taken(nvml: Any, tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    rows: list[dict[str, Any]] = []
    with HardwareMonitor(1000, rows.append, gpus=["GPU-a", "GPU-b"], powercap=tmp_path):
        nvml.millijoules = {"GPU-a": 8_500.0, "GPU-b": 2_250.0}
    assert (rows[0]["gpu_percent"], rows[0]["gpu_memory_bytes"]) == (65.5, 5_300)
    assert (rows[0]["energy_joules"], rows[0]["watts_from"]) == (1.75, "cpu+gpu")
    assert nvml.closed == 1


def test_power_is_integrated_where_a_gpu_does_not_count(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.millijoules = None
    now = [100.0]
    monkeypatch.setattr("groundup.runtime.monitor.time.monotonic", lambda: now[0])
    gpus = Gpus.open(["GPU-a", "GPU-b"])
    assert gpus is not None
    now[0] = 102.0
    assert gpus.joules() == pytest.approx(2 * 400)
    now[0], nvml.milliwatts = 105.0, {"GPU-a": 200_000, "GPU-b": 0}
    assert gpus.joules() == pytest.approx(2 * 400 + 3 * (150 + 150))
    nvml.milliwatts["GPU-b"] = None
    assert gpus.joules() is None


def test_gpus_that_cannot_be_asked(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Gpus.open(["GPU-c"]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus.open(["GPU-a"]) is None


def test_the_gpus_are_those_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: types.SimpleNamespace(uuid=f"uuid-{index}"),
    )
    monkeypatch.setitem(
        sys.modules, "torch", types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(cuda="13"))
    )
    assert visible_gpus() == ["GPU-uuid-0", "GPU-uuid-1"]
    cuda.is_available = lambda: False
    assert visible_gpus() == []
    monkeypatch.delitem(sys.modules, "torch")
    assert visible_gpus() == []
