"""``groundup doctor``: does this machine have what it takes, found by trying."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from groundup.runtime.console import flop_rate
from groundup.runtime.device import choose_device, choose_precision, matmul_flops
from groundup.runtime.environment import cpu_name, memory_bytes, package_version, usable_cores

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        name: what was looked at.
        status: ``ok``, ``note`` (works, could be better) or ``fail`` (something will not work).
        detail: what was found, and the mend where one is needed.
    """

    name: str
    status: Literal["ok", "note", "fail"]
    detail: str


def examine(folder: Path) -> list[Finding]:
    """Look at Python, packages, processor, memory, disk, device, precision and compiler.

    Args:
        folder: where runs would be written.
    """
    return [*_installation(), *_machine(folder), *_compute(), _compiler(), *_extras()]


def _installation() -> list[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [
        Finding("Python", "ok" if sys.version_info >= (3, 11) else "fail", f"{python} (3.11 or newer is needed)")
    ]
    for name in (
        "groundup",
        "torch",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "jsonargparse",
        "matplotlib",
    ):
        found = package_version(name)
        findings.append(Finding(name, "ok" if found else "fail", found or "missing: run `make setup`"))
    return findings


def _machine(folder: Path) -> list[Finding]:
    memory = memory_bytes()
    findings = [
        Finding("processor", "ok", f"{cpu_name()}, {usable_cores()} cores for this process"),
        Finding(
            "memory",
            "ok" if memory >= 3 * GIB else "note",
            f"{memory / GIB:.1f} GiB (the demo needs about 2)",
        ),
    ]
    try:
        existing = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"groundup")
        free = shutil.disk_usage(existing).free
        status: Literal["ok", "note"] = "ok" if free >= GIB else "note"
        findings.append(Finding("disk", status, f"{free / GIB:.1f} GiB free at {existing} (the demo needs about 0.3)"))
    except OSError as error:
        findings.append(
            Finding(
                "disk",
                "fail",
                f"cannot write at {folder}: {error.strerror}. Choose another folder with --out.",
            )
        )
    return findings


def _compute() -> list[Finding]:
    device = choose_device("auto")
    speeds = {precision: matmul_flops(device, precision) for precision in ("float32", "bfloat16")}
    measured = ", ".join(f"{name} {flop_rate(speed)}" for name, speed in speeds.items() if speed)
    return [
        Finding("device", "ok", f"{device}, the one `--device auto` takes"),
        Finding("matrix products", "ok", measured),
        Finding("precision", "ok", f"{choose_precision('auto', device)}, the one `--precision auto` takes here"),
    ]


def _compiler() -> Finding:
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found:
        return Finding("C++ compiler", "ok", f"{found}: torch.compile can be used on the CPU")
    return Finding("C++ compiler", "note", "none: runs are not compiled (`apt-get install g++` would allow it)")


def _extras() -> list[Finding]:
    wanted = {"pyarrow": "reads .parquet files: pip install 'groundup[data]'"}
    return [
        Finding(name, "ok" if (found := package_version(name)) else "note", found or f"not installed; {why}")
        for name, why in wanted.items()
    ]
