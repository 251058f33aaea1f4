"""What a run takes of the machine while it goes on: processor, memory, power, and the energy that adds up to.

Only what can be read is told: the processor's energy where the kernel shows its counters (RAPL, which most systems show
to root alone), a GPU's through NVML (package nvidia-ml-py). What nobody can read is null, never an estimate.

Reading a GPU was written against NVML's documentation and is tested against a stand-in, not on hardware.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

from groundup.runtime.console import warn
from groundup.runtime.environment import usable_cores
from groundup.runtime.errors import UsageError

# What a kWh of electricity emits: world mean of 2024, in grams of CO2 (IEA, Electricity 2025, chapter Emissions). Grids
# differ twentyfold: whoever knows theirs should say so.
WORLD_GRAMS_PER_KWH = 445.0
JOULES_PER_KWH = 3.6e6
POWERCAP = Path("/sys/class/powercap")

Row = dict[str, Any]


def co2_grams(joules: float, grams_per_kwh: float = WORLD_GRAMS_PER_KWH) -> float:
    """Grams of CO2 that so much electricity stands for.

    Args:
        joules: energy drawn.
        grams_per_kwh: of the grid it came from.
    """
    return joules / JOULES_PER_KWH * grams_per_kwh


class HardwareMonitor:
    """Takes a reading every so often, in a thread of its own, while the block runs; and one more at its end.

    A reading is a row of metrics.jsonl:

    ====================  ============================================================================================
    kind                  ``hardware``
    …                     what ``where`` says; else ``seconds`` since the block began
    cpu_percent           of the cores this process may use, its whole tree of processes, mean since the last row
    memory_bytes          resident memory of that tree; pages that processes share are counted for each
    gpu_percent           share of time in which the GPUs computed something, as NVML samples it; mean of the GPUs
    gpu_memory_bytes      used on those GPUs, by anybody
    watts                 mean since the last row, of what ``watts_from`` names
    energy_joules         since the run began, of the same; with what ``energy_joules`` brought along
    co2_grams             what that energy stands for on a grid of ``grams_per_kwh``
    watts_from            ``cpu``, ``gpu``, ``cpu+gpu`` or ``given``
    ====================  ============================================================================================

    What cannot be read is null. Processor and GPU are measured whole, whoever else uses them.

    Args:
        every_seconds: between two readings; 0 watches nothing.
        on_row: called with each row, in the monitor's thread. If it raises, the monitor warns once and ends.
        where: what stands at the front of each row, such as the run's step, tokens and seconds.
        watts: what the machine draws, read off a meter; then nothing is measured.
        grams_per_kwh: CO2 of the grid.
        energy_joules: what earlier sittings of the run took.
        root_process: whose tree of processes counts; this process when None. Of several ranks on a machine one should
            watch, over their common parent.
        gpus: UUIDs of the GPUs to watch; those torch sees when None.
        powercap: where the kernel shows the processor's counters.

    Raises:
        UsageError: a number that cannot be.
    """

    def __init__(
        self,
        every_seconds: float,
        on_row: Callable[[Row], None],
        *,
        where: Callable[[], Mapping[str, Any]] | None = None,
        watts: float | None = None,
        grams_per_kwh: float = WORLD_GRAMS_PER_KWH,
        energy_joules: float = 0.0,
        root_process: int | None = None,
        gpus: Sequence[str] | None = None,
        powercap: Path = POWERCAP,
    ) -> None:
        for name, value, most in (("watts", watts, 1e9), ("grams_per_kwh", grams_per_kwh, 1e4)):
            if value is not None and not 0 <= value <= most:
                raise UsageError(f"{name} = {value} should be a number from 0 to {most:g}.")
        if not 0 <= every_seconds < 1e7:
            raise UsageError(f"monitor_every = {every_seconds} should be a number of seconds, or 0 for none.")
        self._every, self._on_row, self._where = every_seconds, on_row, where
        self._watts, self._grams = watts, grams_per_kwh
        self._energy_before = self._energy_noted = energy_joules
        self._root, self._gpu_names, self._powercap = root_process or os.getpid(), gpus, powercap
        self._stop = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> HardwareMonitor:
        if not self._every:
            return self
        names = visible_gpus() if self._gpu_names is None else self._gpu_names
        self._gpus = Gpus.open(names) if names else None
        self._cpu = CpuEnergy(self._powercap)
        self._processes = ProcessTree(self._root)
        self._started = self._last = time.monotonic()
        self._thread = Thread(target=self._watch, name="hardware monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            if self._gpus is not None:
                self._gpus.close()

    def _watch(self) -> None:
        try:
            while not self._stop.wait(self._every):
                self._on_row(self.read())
            self._on_row(self.read())
        except Exception as error:
            warn(f"the hardware is no longer watched ({type(error).__name__}: {error}); the run goes on.")

    def read(self) -> Row:
        """One reading now. Called by the monitor's thread; by others only when it does not run."""
        now = time.monotonic()
        interval, self._last = now - self._last, now
        where = self._where() if self._where is not None else {"seconds": round(now - self._started, 3)}
        cpu_percent, memory = self._processes.read(interval)
        gpu_percent, gpu_memory = self._gpus.read() if self._gpus is not None else (None, None)
        energy, source = self._energy(now - self._started)
        watts = None
        if energy is not None:
            watts = round((energy - self._energy_noted) / interval, 2) if interval > 0 else None
            self._energy_noted = energy
        return {
            "kind": "hardware",
            **where,
            "cpu_percent": cpu_percent,
            "memory_bytes": memory,
            "gpu_percent": gpu_percent,
            "gpu_memory_bytes": gpu_memory,
            "watts": watts,
            "energy_joules": None if energy is None else round(energy, 3),
            "co2_grams": None if energy is None else round(co2_grams(energy, self._grams), 4),
            "watts_from": source,
        }

    def _energy(self, seconds: float) -> tuple[float | None, str | None]:
        """Joules since the run began, and who says so."""
        if self._watts is not None:
            return self._energy_before + self._watts * seconds, "given"
        parts = {"cpu": self._cpu.joules(), "gpu": self._gpus.joules() if self._gpus is not None else None}
        known = {name: joules for name, joules in parts.items() if joules is not None}
        return (self._energy_before + sum(known.values()), "+".join(known)) if known else (None, None)


class ProcessTree:
    """A process and all below it."""

    def __init__(self, root: int) -> None:
        import psutil

        self._psutil = psutil
        self._root = root
        self._cores = usable_cores()
        self._used = self._look()[0]

    def read(self, interval: float) -> tuple[float | None, int | None]:
        """Percent of the usable cores' time that was used since the last call, and resident bytes; None: unreadable.

        Args:
            interval: seconds since the last call.
        """
        used, memory = self._look()
        # A process that has ended took its count along; one that is new did all of its work since.
        seconds = sum(max(0.0, value - self._used.get(process, 0.0)) for process, value in used.items())
        self._used = used
        percent = round(100 * seconds / interval / self._cores, 1) if used and interval > 0 else None
        return percent, memory if used else None

    def _look(self) -> tuple[dict[tuple[int, float], float], int]:
        """Processor seconds of each process, by number and birth (numbers are used again), and the bytes of all."""
        used, memory = {}, 0
        try:
            root = self._psutil.Process(self._root)
            tree = [root, *root.children(recursive=True)]
        except self._psutil.Error:
            return {}, 0
        for process in tree:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    memory += process.memory_info().rss
                    used[process.pid, process.create_time()] = times.user + times.system
            except self._psutil.Error:  # it has ended since, or is somebody else's
                continue
        return used, memory


class CpuEnergy:
    """The processor's own counters of energy, through Linux's powercap (RAPL; Intel and AMD): packages and memory.

    Args:
        powercap: the folder of zones.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._zones: list[_Counter] = []
        for zone in sorted(powercap.glob("*:*")):
            try:
                name = (zone / "name").read_text().strip()
                # A package's other parts (core, uncore) are contained in it, and psys contains the packages.
                if name.startswith("package") or name == "dram":
                    self._zones.append(_Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):  # since 2020 only root may read it: it tells secrets (CVE-2020-8694)
                continue

    def joules(self) -> float | None:
        """Energy since this object was made; None where nothing can be read."""
        return sum(zone.joules() for zone in self._zones) if self._zones else None


class _Counter:
    """A counter of microjoules that starts again from 0 when it is full."""

    def __init__(self, path: Path, full: int) -> None:
        self._path, self._full = path, full
        self._last, self._total = int(path.read_text()), 0

    def joules(self) -> float:
        try:
            now = int(self._path.read_text())
        except (OSError, ValueError):
            now = self._last
        self._total += (now - self._last) % self._full if self._full else max(0, now - self._last)
        self._last = now
        return self._total / 1e6


def visible_gpus() -> list[str]:
    """UUIDs of the NVIDIA GPUs that torch sees, if it has been imported; in NVML's spelling."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or torch.version.cuda is None:
        return []
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]


class Gpus:
    """NVIDIA GPUs through NVML.

    Args:
        nvml: the module ``pynvml``, initialised.
        handles: NVML's, one for each GPU.
    """

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._last = time.monotonic()
        self._counts = [self._counter(handle) for handle in handles]
        self._watts = [self._power(handle) for handle in handles]
        self._joules = [0.0] * len(handles)

    @classmethod
    def open(cls, names: Sequence[str]) -> Gpus | None:
        """The GPUs of these UUIDs; None where NVML, its package or the right to use it is missing."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names])
        except pynvml.NVMLError:
            return None

    def read(self) -> tuple[float | None, int | None]:
        """Percent of the time in which they computed, mean over the GPUs, and bytes in use on all of them."""
        busy = [self._ask(lambda h: self._nvml.nvmlDeviceGetUtilizationRates(h).gpu, h) for h in self._handles]
        used = [self._ask(lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).used, h) for h in self._handles]
        percent = None if None in busy else round(sum(busy) / len(busy), 1)
        return percent, None if None in used else int(sum(used))

    def joules(self) -> float | None:
        """Energy since this object was made; None where a GPU tells neither its energy nor its power.

        GPUs since Volta count it themselves; of others, power is integrated by the trapezoidal rule.
        """
        now = time.monotonic()
        interval, self._last = now - self._last, now
        for index, handle in enumerate(self._handles):
            count, before = self._counter(handle), self._counts[index]
            watts, watts_before = self._power(handle), self._watts[index]
            if count is not None and before is not None:
                self._joules[index] += max(0.0, count - before) / 1000
            elif watts is not None and watts_before is not None:
                self._joules[index] += (watts + watts_before) / 2 * interval
            else:
                return None
            self._counts[index], self._watts[index] = count, watts
        return sum(self._joules)

    def close(self) -> None:
        """Let NVML go."""
        self._ask(lambda _: self._nvml.nvmlShutdown(), None)

    def _counter(self, handle: Any) -> float | None:
        """Millijoules since the driver was loaded."""
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, handle)

    def _power(self, handle: Any) -> float | None:
        """Watts now."""
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage, handle)
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, question: Callable[[Any], Any], handle: Any) -> Any:
        """The answer; None where this GPU, or this driver, has none."""
        try:
            return question(handle)
        except self._nvml.NVMLError:
            return None
