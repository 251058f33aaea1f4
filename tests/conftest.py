"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run side by side: a process that computes on every core makes the others wait. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, vocabularies and weights kept beside the project, where they are to be had."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets, which are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT
