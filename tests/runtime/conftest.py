"""Other processes and other disks, for what can only be seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import groundup

Child = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    """Start a Python program with this groundup; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        source = str(Path(groundup.__file__).resolve().parent.parent)
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": source}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
