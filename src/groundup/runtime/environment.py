"""What a run notes about where it ran: ``environment.json``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "groundup",
    "torch",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "regex",
    "jsonargparse",
    "rich",
    "matplotlib",
    "jinja2",
)


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on (a container's share, not the host's count)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def git_commit() -> str | None:
    """The commit of the source tree this package runs from, with ``+changes`` where it was edited; None when installed
    from a wheel.
    """
    folder = Path(__file__).resolve().parent
    try:

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(folder), *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

        if not git("ls-files", "--", __file__):
            return None  # some other project's repository around an installed wheel
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment() -> dict[str, Any]:
    """Versions, machine and commit, as JSON-ready values. Nothing that names the person or the host."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "commit": git_commit(),
    }
